"""Whether Triton can run kernels here, and if not, why. Imports Triton only where it is asked."""

import functools
import importlib.util
import os
import subprocess

import torch

MIN_CAPABILITY = (8, 0)


@functools.cache
def why_triton_cannot_run(device: torch.device) -> str | None:
    """The end of a sentence that begins with "Triton cannot run because"; None where it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, which runs kernels on the CPU"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it needs an Ampere GPU (compute capability 8.0) or newer"
    import triton

    try:
        # Compiles Triton's launcher on first use, which needs a C compiler.
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        return f"its launcher does not start: {str(error).splitlines()[0]:.200}"
    return None
