"""Chooses the attention backend for a device and logs why. Knows the backends' limits, not their arithmetic."""

import logging

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.sdpa import SdpaBackend

log = logging.getLogger(__name__)

FLASH_BLOCK_MULTIPLE = 256  # of FlashAttention 2's paged path
FLASH_MAX_HEAD_DIM = 256
FLASH_MIN_CAPABILITY = (8, 0)


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
    reason = None
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"it needs float16 or bfloat16, not {dtype}"
    elif block_size % FLASH_BLOCK_MULTIPLE:
        reason = f"it needs a block size that is a multiple of {FLASH_BLOCK_MULTIPLE}, not {block_size}"
    elif head_dim > FLASH_MAX_HEAD_DIM or head_dim % 8:
        reason = f"it needs a head_dim that is a multiple of 8 and at most {FLASH_MAX_HEAD_DIM}, not {head_dim}"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH_MIN_CAPABILITY:
        reason = "it needs an Ampere GPU (compute capability 8.0) or newer"
    if device.type == "cuda" and reason is None:
        # Imported here because it takes a second, which a start on the CPU does not need to spend.
        from workers.attention.flash import FlashBackend

        return FlashBackend(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=sliding_window
        )
    if device.type == "cuda":
        log.warning("Attention falls back to the slow reference backend because FlashAttention cannot run: %s.", reason)
    return SdpaBackend(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=sliding_window)
