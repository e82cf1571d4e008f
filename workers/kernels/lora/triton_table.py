"""LoRA's slots on CUDA: memory for the largest adapter in each, filled from pinned host memory after the steps launched before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.lora_matmul import add_lora
from workers.kernels.lora.rows import AdapterRows
from workers.kernels.lora.table import Parts, convert


@dataclass(frozen=True, slots=True)
class _Prepared:
    values: torch.Tensor  # A and B of each shard, one after the other
    table: torch.Tensor  # [num_shards, 3] int32: where they begin, and the rank
    scales: torch.Tensor  # [num_shards]


class TritonLoraTable:
    """See `LoraTable`. On the CPU for tests, in Triton's interpreter."""

    def __init__(
        self,
        in_features: int,
        out_sizes: Sequence[int],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_shards, self._pins = len(out_sizes), device.type == "cuda"
        self._dtype = dtype
        self._max_rank = max_rank
        self._max_outputs = max(out_sizes)
        slot_size = sum(max_rank * (in_features + n) for n in out_sizes)
        self._values = torch.zeros((num_slots, slot_size), dtype=dtype, device=device)
        self._table = torch.zeros((num_slots, num_shards, 3), dtype=torch.int32, device=device)
        self._scales = torch.zeros((num_slots, num_shards), dtype=torch.float32, device=device)
        ends = [sum(out_sizes[:i]) for i in range(num_shards + 1)]
        self._columns = torch.tensor(ends, dtype=torch.int32, device=device)
        self._kept: list[_Prepared | None] = [None] * num_slots

    def prepare(self, parts: Parts, memory: HostMemory) -> _Prepared:
        here = {
            shard: found for shard, part in enumerate(parts) if (found := convert(part, shard, self._dtype)) is not None
        }
        num_values = sum(part.a.numel() + part.b.numel() for part in here.values())
        # All in a few pinned pieces: to pin one makes the driver wait.
        values = memory.new((num_values,), self._dtype, pins=self._pins)
        table = memory.new((len(parts), 3), torch.int32, pins=self._pins).zero_()
        scales = memory.new((len(parts),), torch.float32, pins=self._pins).zero_()
        end = 0
        for shard, part in here.items():
            begin, middle = end, end + part.a.numel()
            end = middle + part.b.numel()
            values[begin:middle].copy_(part.a.flatten())
            values[middle:end].copy_(part.b.flatten())
            table[shard] = torch.tensor([begin, middle, part.a.shape[0]])
            scales[shard] = part.scale
        return _Prepared(values, table, scales)

    def put(self, slot: int, prepared: Any | None) -> None:
        self._kept[slot] = prepared
        if prepared is None:
            self._table[slot].zero_()
            return
        self._values[slot, : len(prepared.values)].copy_(prepared.values, non_blocking=True)
        self._table[slot].copy_(prepared.table, non_blocking=True)
        self._scales[slot].copy_(prepared.scales, non_blocking=True)

    def add(self, out: torch.Tensor, x: torch.Tensor, rows: AdapterRows) -> None:
        assert x.stride(1) == 1 and out.stride(1) == 1
        add_lora(
            out,
            x,
            rows.order,
            rows.starts,
            values=self._values,
            table=self._table,
            scales=self._scales,
            columns=self._columns,
            max_outputs=self._max_outputs,
            max_rank=self._max_rank,
        )
