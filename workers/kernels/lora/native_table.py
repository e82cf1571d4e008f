"""LoRA compiled for the CPU (native/cpp/lora.cpp). Adapters are multiplied where they lie in host memory: a slot is a few addresses.

The addresses stand in a table that never moves, so a graph of kernel calls goes on while adapters come and go.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.table import LoraMatrices, NumbersError, Parts
from workers.native.library import NativeLibrary
from workers.native.matrices import DTYPE_NAMES

# As lora.cpp reads them: ranks and output columns that are packed together, the last ones filled up with zeros.
RANK_PANEL = 16
COLUMN_PANEL = 64
# What lora_pack.cpp reads, by the numbers that it has for them.
STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TOO_LARGE = 2  # what it returns
_FIELDS = 4  # of a descriptor: the addresses of a and b, the rank, the bits of the scale
_KERNEL = [*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 5]
_PACK = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """descriptors: [num_shards, 4] int64. matrices: what the addresses in them belong to."""

    descriptors: np.ndarray
    matrices: tuple[torch.Tensor, ...]


class NativeLoraTable:
    """See `LoraTable`. dtype: float32 or bfloat16, of the matrices, the inputs and the outputs."""

    def __init__(
        self,
        in_features: int,
        out_sizes: Sequence[int],
        *,
        num_slots: int,
        dtype: torch.dtype,
        library: NativeLibrary,
    ) -> None:
        name = DTYPE_NAMES[dtype]
        self._kernel = library.function(f"lora_{name}", _KERNEL)
        self._packs = {h: library.function(f"lora_pack_{h}_{name}", _PACK, restype=ctypes.c_int64) for h in "ab"}
        self._dtype = dtype
        self._in_features = in_features
        self._num_slots = num_slots
        # Where the columns of each shard begin, and where the last ones end.
        self._columns = np.concatenate([[0], np.cumsum(out_sizes)]).astype(np.int64)
        self._table = np.zeros((num_slots, len(out_sizes), _FIELDS), dtype=np.int64)
        self._kept: list[_Prepared | None] = [None] * num_slots

    def prepare(self, parts: Parts, memory: HostMemory) -> _Prepared:
        descriptors = np.zeros((len(parts), _FIELDS), dtype=np.int64)
        here = {shard: part for shard, part in enumerate(parts) if part is not None}
        # In the order in which the kernel reads them, so that reading ahead goes on from one to the next.
        a = {shard: self._packed("a", part.a, shard, memory) for shard, part in here.items()}
        b = {shard: self._packed("b", part.b, shard, memory) for shard, part in here.items()}
        for shard, part in here.items():
            descriptors[shard] = (a[shard].data_ptr(), b[shard].data_ptr(), part.a.shape[0], _bits(part))
        return _Prepared(descriptors, (*a.values(), *b.values()))

    def _packed(self, half: str, values: torch.Tensor, shard: int, memory: HostMemory) -> torch.Tensor:
        """Python's lock is free meanwhile."""
        if values.stride(1) != 1:
            values = values.contiguous()
        packed = memory.new(packed_shape(half, values.shape, self._dtype), self._dtype)
        found = self._packs[half](
            packed.data_ptr(),
            values.data_ptr(),
            STORED_DTYPES.index(values.dtype),
            *values.shape,
            values.stride(0) * values.element_size(),
        )
        if found:
            raise NumbersError(shard, half.upper(), too_large_for=self._dtype if found == _TOO_LARGE else None)
        return packed

    def put(self, slot: int, prepared: Any | None) -> None:
        self._table[slot] = 0 if prepared is None else prepared.descriptors
        self._kept[slot] = prepared

    def add(self, out: torch.Tensor, x: torch.Tensor, rows: AdapterRows) -> None:
        assert x.stride(1) == 1 and out.stride(1) == 1 and x.shape[1] == self._in_features
        assert out.shape[1] == self._columns[-1] and len(rows.starts) == self._num_slots + 1
        self._kernel(
            out.data_ptr(),
            x.data_ptr(),
            rows.order.data_ptr(),
            rows.starts.data_ptr(),
            self._table.ctypes.data,
            self._columns.ctypes.data,
            self._num_slots,
            len(self._columns) - 1,
            self._in_features,
            x.stride(0),
            out.stride(0),
        )


def packed_shape(half: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Of A [rank, k]: [ceil(rank / 16), k, 16], in bfloat16 [ceil(rank / 16), ceil(k / 2), 16, 2].

    Of B [n, rank]: [ceil(n / 64), rank, 64].
    """
    if half == "b":
        return (-(-shape[0] // COLUMN_PANEL), shape[1], COLUMN_PANEL)
    values = 4 // dtype.itemsize
    return (-(-shape[0] // RANK_PANEL), -(-shape[1] // values), RANK_PANEL, values)


def _bits(part: LoraMatrices) -> int:
    return struct.unpack("<I", struct.pack("<f", part.scale))[0]
