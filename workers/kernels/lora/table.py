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
    """What an adapter adds to this rank's part of one module's weight: scale * b @ a. On the host, as its file has them: floats of any
    type, and rows at any distance.
    """

    a: torch.Tensor  # [rank, in_features]
    b: torch.Tensor  # [out_features, rank]
    scale: float


class NumbersError(Exception):
    """What is wrong with an adapter's numbers. shard, half: whose, "A" or "B". too_large_for: the layer's dtype; None: they are infinite,
    or no numbers.
    """

    def __init__(self, shard: int, half: str, *, too_large_for: torch.dtype | None) -> None:
        what = "infinite numbers or NaN"
        if too_large_for is not None:
            what = f"numbers too large for {str(too_large_for).removeprefix('torch.')}"
        super().__init__(what)
        self.shard = shard
        self.half = half


# One adapter in one layer: for each of its shards the matrices, None where the adapter leaves that one alone.
Parts = Sequence[LoraMatrices | None]


class LoraTable(Protocol):
    """Slots of one layer, whose output is that of its shards side by side.

    `prepare` may be called on any thread. The others belong to the thread that computes. What it returned is kept as long as it is in a
    slot. A row's result is bit for bit independent of the other rows, of their number, of its slot and of the number of threads.
    """

    def prepare(self, parts: Parts, memory: HostMemory) -> Any:
        """The form on the host from which `put` is quick, in the layer's dtype. memory: of this adapter. Raises NumbersError."""
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

    def __init__(
        self, in_features: int, out_sizes: Sequence[int], *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.out_sizes = list(out_sizes)
        self._dtype = dtype
        self._device = device
        self._slots: list[Parts | None] = [None] * num_slots

    def prepare(self, parts: Parts, memory: HostMemory) -> Parts:
        return [
            None
            if (found := convert(part, shard, self._dtype)) is None
            else LoraMatrices(found.a.to(self._device), found.b.to(self._device), found.scale)
            for shard, part in enumerate(parts)
        ]

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


def convert(part: LoraMatrices | None, shard: int, dtype: torch.dtype) -> LoraMatrices | None:
    """The same in another type, contiguous. Raises NumbersError."""
    if part is None:
        return None
    a, b = (_converted(values, dtype, shard, half) for values, half in ((part.a, "A"), (part.b, "B")))
    return LoraMatrices(a, b, part.scale)


def _converted(values: torch.Tensor, dtype: torch.dtype, shard: int, half: str) -> torch.Tensor:
    converted = values.to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        raise NumbersError(shard, half, too_large_for=dtype if torch.isfinite(values).all() else None)
    return converted
