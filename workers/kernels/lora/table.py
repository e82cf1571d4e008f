"""The seam between a linear layer and LoRA's kernels: the adapters in the slots of one layer on one rank, and what they add to its output.

`TorchLoraTable` is the specification. Knows no checkpoint, no adapter's name and no ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.kernels.lora.host_memory import HostMemory
from workers.kernels.lora.rows import AdapterRows


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """What an adapter adds to this rank's part of one module's weight: scale * b @ a. On the host, in the layer's dtype, contiguous."""

    a: torch.Tensor  # [rank, in_features]
    b: torch.Tensor  # [out_features, rank]
    scale: float


# One adapter in one layer: for each of its shards the matrices, None where the adapter leaves that one alone.
Parts = Sequence[LoraMatrices | None]


class LoraTable(Protocol):
    """Slots of one layer, whose output is that of its shards side by side.

    `prepare` may be called on any thread. The others belong to the thread that computes. What it returned is kept as long as it is in a
    slot. A row's result is bit for bit independent of the other rows, of their number, of its slot and of the number of threads.
    """

    def prepare(self, parts: Parts, memory: HostMemory) -> Any:
        """The form on the host from which `put` is quick. memory: of this adapter, for what is read where it lies."""
        ...

    def put(self, slot: int, prepared: Any | None) -> None:
        """None empties the slot: its rows get nothing added."""
        ...

    def add(self, out: torch.Tensor, x: torch.Tensor, rows: AdapterRows) -> None:
        """In place: out[row] += scale * b @ (a @ x[row]) of the row's adapter, for each shard in its columns. Sums in float32, and one
        rounding to out's type. x: [num_tokens, in_features]; out: [num_tokens, sum of the shards' out_features].
        """
        ...


# Makes the table of a layer with so many inputs, and so many outputs of each of its shards.
NewLoraTable = Callable[[int, Sequence[int]], LoraTable]


class TorchLoraTable:
    """See `LoraTable`. Row by row, because a library's product of several rows may round otherwise than that of one. Reads `rows` on the
    host.
    """

    def __init__(self, in_features: int, out_sizes: Sequence[int], *, num_slots: int, device: torch.device) -> None:
        self.out_sizes = list(out_sizes)
        self._device = device
        self._slots: list[Parts | None] = [None] * num_slots

    def prepare(self, parts: Parts, memory: HostMemory) -> Parts:
        return [None if p is None else LoraMatrices(p.a.to(self._device), p.b.to(self._device), p.scale) for p in parts]

    def put(self, slot: int, prepared: Any | None) -> None:
        self._slots[slot] = prepared

    def add(self, out: torch.Tensor, x: torch.Tensor, rows: AdapterRows) -> None:
        starts = rows.starts.tolist()
        order = rows.order[: starts[-1]].tolist()
        for slot, parts in enumerate(self._slots):
            for part, columns in zip(parts or (), _columns(self.out_sizes), strict=False):
                if part is None:
                    continue
                a, b = part.a.float(), part.b.float()
                for row in order[starts[slot] : starts[slot + 1]]:
                    delta = torch.mv(b, torch.mv(a, x[row].float())) * part.scale
                    out[row, columns] = (out[row, columns].float() + delta).to(out.dtype)


def _columns(out_sizes: Sequence[int]) -> list[slice]:
    ends = [sum(out_sizes[: i + 1]) for i in range(len(out_sizes))]
    return [slice(end - size, end) for end, size in zip(ends, out_sizes, strict=True)]
