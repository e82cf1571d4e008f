"""Chooses the attention backend for a device and says why. Knows the backends' limits, not their arithmetic."""

import logging

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.flash import MAX_HEAD_DIM, REQUIRED_BLOCK_MULTIPLE, FlashBackend
from workers.attention.sdpa import SdpaBackend

log = logging.getLogger(__name__)


def select_backend(
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int | None,
) -> AttentionBackend:
    """FlashAttention where it can run, else the specification; a fallback on CUDA is logged with its reason."""

    def make(backend: type[FlashBackend] | type[SdpaBackend]) -> AttentionBackend:
        return backend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=sliding_window)

    if device.type != "cuda":
        return make(SdpaBackend)
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"it needs float16 or bfloat16, not {dtype}"
    elif block_size % REQUIRED_BLOCK_MULTIPLE:
        reason = f"it needs a block size that is a multiple of {REQUIRED_BLOCK_MULTIPLE}, not {block_size}"
    elif head_dim > MAX_HEAD_DIM:
        reason = f"it needs a head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
    else:
        return make(FlashBackend)
    log.warning("Attention falls back to the slow reference backend because FlashAttention cannot run: %s.", reason)
    return make(SdpaBackend)
