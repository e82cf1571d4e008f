"""A GPU that was asked for: found and tried before anything is loaded, so that no rank computes on the CPU in its place.

Knows the words of the errors. Imports torch late, for the trial.
"""

from workers.device.probe import CudaDevice, NoGpu, probe
from workers.errors import ConfigError


def require_gpu(who: str) -> CudaDevice:
    """`find_gpu` and `try_gpu`."""
    device = find_gpu(who)
    try_gpu(who, device)
    return device


def find_gpu(who: str) -> CudaDevice:
    """The GPU of this process, the first that it sees. who: the process and its place, for the message. Raises ConfigError."""
    found = probe()
    if isinstance(found, NoGpu):
        raise ConfigError(_refusal(who, found.message), remedy=found.remedy, param="--device")
    return found[0]


def try_gpu(who: str, device: CudaDevice) -> None:
    """Computes one number there. Raises ConfigError with torch's reason, such as a GPU that this build of torch has no kernels for."""
    import torch

    try:
        torch.ones(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as e:  # torch raises both, and its own CUDA errors are RuntimeErrors
        reason = str(e).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            _refusal(who, f"torch {torch.__version__} cannot compute on {device.name}: {reason}."),
            remedy="Run `tramontane doctor` there, or use --device cpu.",
            param="--device",
        ) from e


def _refusal(who: str, message: str) -> str:
    return f"{who} cannot use a GPU: {message[0].lower()}{message[1:]}"
