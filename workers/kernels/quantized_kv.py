"""Keys and values in 8 bits: what holds them, and the specification of how a token is written. Needs torch only.

A token's key or value in one head is `head_dim` numbers of 8 bits and one scale, its largest number divided by the largest of the type.
So it depends on this token alone, it never changes once it is written, and no number is too large or too small for the type.

A number is read as its value times the scale. Readers may multiply a score or a weight by the scale instead, with the same meaning.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

# By the names of --kv-cache-dtype.
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# The largest number of each type.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """The keys or the values of one layer. A head's scales of one block lie next to each other."""

    values: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim], int8 or float8_e4m3fn
    scales: torch.Tensor  # [num_blocks, num_kv_heads, block_size], float32

    @classmethod
    def of(cls, cache: torch.Tensor, dtype: torch.dtype) -> "QuantizedKV":
        """A whole cache in 8 bits. cache: [num_blocks, block_size, num_kv_heads, head_dim]."""
        values, scales = quantize(cache, dtype)
        return cls(values, scales.transpose(1, 2).contiguous())

    def to(self, device: torch.device) -> "QuantizedKV":
        return QuantizedKV(self.values.to(device), self.scales.to(device))

    def dequantize(self) -> torch.Tensor:
        """In float32, [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self.values.float() * self.scales.transpose(1, 2)[..., None]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


# The keys or the values of one layer: in the dtype of the model, [num_blocks, block_size, num_kv_heads, head_dim], or in 8 bits.
Cache: TypeAlias = torch.Tensor | QuantizedKV


class Parts(NamedTuple):
    """A cache as kernels take it. scales: None for a cache that has none."""

    values: torch.Tensor
    scales: torch.Tensor | None


def parts_of(cache: Cache) -> Parts:
    if isinstance(cache, torch.Tensor):
        return Parts(cache, None)
    return Parts(cache.values, cache.scales)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of `dtype` and the scales [..., num_kv_heads] of x [..., num_kv_heads, head_dim].

    In int8, [0.5, -1.0, 0.25] has the scale 1 / 127 and the values [64, -127, 32]: 63.5 and 31.75 are rounded, halves to even. A NaN or an
    infinity makes the scale one, and so every number of that head.
    """
    limit = LIMITS[dtype]
    x = x.float()
    scales = x.abs().amax(dim=-1) / limit
    # Divided by 1 where the scale is 0: all numbers are 0 then, or vanish.
    values = (x / torch.where(scales == 0, 1.0, scales)[..., None]).clamp(-limit, limit)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def write(cache: Cache, x: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes x [num_tokens, num_kv_heads, head_dim] to the slots (block * block_size + offset) of a cache. slot_mapping: [num_tokens]."""
    _, block_size, num_kv_heads, head_dim = cache.shape
    if isinstance(cache, torch.Tensor):
        cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, x)
        return
    values, scales = quantize(x, cache.dtype)
    # As bytes: not every operation knows float8.
    cache.values.view(torch.int8).view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, values.view(torch.int8))
    cache.scales[slot_mapping // block_size, :, slot_mapping % block_size] = scales


def read(cache: Cache, rows: torch.Tensor) -> torch.Tensor:
    """Heads in float32, [num_rows, head_dim]. rows: slot * num_kv_heads + head."""
    _, block_size, num_kv_heads, head_dim = cache.shape
    if isinstance(cache, torch.Tensor):
        return cache.view(-1, head_dim).index_select(0, rows).float()
    values = cache.values.view(torch.int8).view(-1, head_dim).index_select(0, rows).view(cache.dtype)
    slots, heads = rows // num_kv_heads, rows % num_kv_heads
    return values.float() * cache.scales[slots // block_size, heads, slots % block_size][:, None]
