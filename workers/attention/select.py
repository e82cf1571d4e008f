"""Chooses the attention backend for a device, and says why. Knows the backends' limits, not their arithmetic."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.native import NativeBackend
from workers.attention.sdpa import SdpaBackend
from workers.config import AttentionChoice, KVCacheDtype
from workers.errors import ConfigError
from workers.kernels.usable import why_triton_cannot_run
from workers.native.library import NativeLibrary, NoNativeLibrary, load_library
from workers.native.matrices import DTYPE_NAMES

log = logging.getLogger(__name__)

TRITON_MAX_HEAD_DIM = 256
TRITON_MAX_GROUP = 64  # query heads of one KV head: they share a tile
CUDA = torch.device("cuda")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """`reason` ends a sentence that begins with the backend's name. `new` makes another one of the same kind, for a window."""

    backend: AttentionBackend
    reason: str
    new: Callable[[int | None], AttentionBackend]


def select_backend(
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int | None,
    choice: AttentionChoice = "auto",
    kv_cache_dtype: KVCacheDtype = "auto",
    deterministic: bool = False,
) -> Selection:
    """Triton on CUDA, FlashAttention where Triton cannot run; on the CPU the compiled kernel; else the specification. Logs the choice with
    its reason.

    Raises ConfigError if `choice` names a backend that cannot run, or if on CUDA none can that is `deterministic`.
    """

    def obstacle_to(name: str) -> str | None:
        if name == "native":
            return native_obstacle(dtype, device=device)
        if name == "triton":
            return triton_obstacle(group=num_heads // num_kv_heads, head_dim=head_dim, device=device)
        return flash_obstacle(
            dtype, kv_cache_dtype=kv_cache_dtype, block_size=block_size, head_dim=head_dim, device=device
        )

    if choice == "sdpa":
        name, reason = "sdpa", "--attention-backend names it"
    elif choice != "auto":
        if obstacle := obstacle_to(choice):
            raise ConfigError(
                f"The attention backend {choice} cannot run: {obstacle}.",
                remedy="Use --attention-backend auto.",
                param="--attention-backend",
            )
        name, reason = choice, "--attention-backend names it"
    elif device.type != "cuda":
        native = obstacle_to("native")
        name, reason = (
            ("native", "it is the first choice on the CPU")
            if native is None
            else ("sdpa", f"native cannot run: {native}")
        )
    elif (triton := obstacle_to("triton")) is None:
        name, reason = "triton", "it is the first choice on CUDA"
    elif deterministic:
        raise ConfigError(
            f"--deterministic cannot work: its attention runs on the backend triton, and {triton}.",
            remedy="Leave it out.",
            param="--deterministic",
        )
    elif (flash := obstacle_to("flash")) is None:
        name, reason = "flash", f"triton cannot run: {triton}"
    else:
        name, reason = "sdpa", f"triton cannot run: {triton}; flash cannot run: {flash}"
    is_fallback = device.type == "cuda" and choice == "auto" and name != "triton"
    log.log(
        logging.WARNING if is_fallback else logging.INFO,
        "Attention runs on the backend %s%s, because %s.",
        name,
        ", the slow reference" if device.type == "cuda" and name == "sdpa" else "",
        reason,
    )

    def new(window: int | None) -> AttentionBackend:
        return _new(name, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)

    return Selection(backend=new(sliding_window), reason=reason, new=new)


def native_obstacle(dtype: torch.dtype, *, device: torch.device) -> str | None:
    """Why the compiled kernel for the CPU cannot run; None where it can."""
    if device.type != "cpu":
        return f"it needs a CPU, and the device is {device.type}"
    if dtype not in DTYPE_NAMES:
        return f"it needs float32 or bfloat16, not {dtype}"
    library = load_library()
    if isinstance(library, NoNativeLibrary):
        return f"there are no compiled kernels ({library.reason.rstrip('.')})"
    return None


def triton_obstacle(*, group: int, head_dim: int, device: torch.device = CUDA) -> str | None:
    """Why the Triton backend cannot run; None where it can."""
    if head_dim > TRITON_MAX_HEAD_DIM:
        return f"it needs a head_dim of at most {TRITON_MAX_HEAD_DIM}, not {head_dim}"
    if group > TRITON_MAX_GROUP:
        return f"it needs at most {TRITON_MAX_GROUP} query heads per KV head, not {group}"
    return why_triton_cannot_run(device)


def flash_obstacle(
    dtype: torch.dtype,
    *,
    block_size: int,
    head_dim: int,
    kv_cache_dtype: KVCacheDtype = "auto",
    device: torch.device = CUDA,
) -> str | None:
    """Why FlashAttention cannot run; None where it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if kv_cache_dtype != "auto":
        return f"it does not read keys and values in {kv_cache_dtype}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    # Imported here because it takes a second, which a start on the CPU does not need to spend.
    from workers.attention import flash

    if block_size % flash.BLOCK_MULTIPLE:
        return f"it needs a --block-size that is a multiple of {flash.BLOCK_MULTIPLE}, not {block_size}"
    if head_dim > flash.MAX_HEAD_DIM or head_dim % 8:
        return f"it needs a head_dim that is a multiple of 8 and at most {flash.MAX_HEAD_DIM}, not {head_dim}"
    if missing := flash.missing_arguments():
        return f"varlen_attn of torch {torch.__version__} lacks {', '.join(missing)}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.cuda.get_device_capability(device) < flash.MIN_CAPABILITY:
        return "it needs an Ampere GPU (compute capability 8.0) or newer"
    return None


def _new(
    name: str, *, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> AttentionBackend:
    """Imports the backend late, because Triton is not everywhere and FlashAttention takes a second."""
    if name == "native":
        library = load_library()
        assert isinstance(library, NativeLibrary)
        return NativeBackend(
            library,
            dtype=dtype,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sliding_window=window,
        )
    if name == "triton":
        from workers.attention.triton_paged import TritonBackend

        return TritonBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)
    if name == "flash":
        from workers.attention.flash import FlashBackend

        return FlashBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)
    return SdpaBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)
