"""Which request has which row of a matrix on the device, the least recently used one replaced when there are too many; and the columns of
a SamplingTable of all of them, so that a step takes them at once. Knows ids and prepared parameters.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workers.sampling.parameters import PreparedParams


@dataclass(slots=True)
class Slot:
    """num_counted: how many of the request's tokens the matrix counts; None when its row means nothing yet."""

    index: int
    prepared: PreparedParams
    num_counted: int | None = None


class Columns(NamedTuple):
    """Of some slots: see SamplingTable. `integers` lacks random numbers and masks. The rest: whether any of the slots needs it."""

    floats: np.ndarray
    integers: np.ndarray
    draws: bool
    truncates: bool
    penalizes: bool
    edits_logits: bool
    has_mask: bool


class Slots:
    """`num_slots` must be at least the number of requests in one step, so that a request of a step never replaces another of it."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._by_id: OrderedDict[str, Slot] = OrderedDict()
        self._floats = np.zeros((4, num_slots), dtype=np.float32)
        self._integers = np.zeros((6, num_slots), dtype=np.int64)
        self._needs = np.zeros((5, num_slots), dtype=bool)

    def touch(self, request_ids: Sequence[str]) -> list[Slot | None]:
        """The slots of the requests. Those that have one keep it until all others are replaced."""
        slots = [self._by_id.get(request_id) for request_id in request_ids]
        for request_id, slot in zip(request_ids, slots, strict=True):
            if slot is not None:
                self._by_id.move_to_end(request_id)
        return slots

    def columns(self, slots: Sequence[Slot]) -> Columns:
        """In the order of `slots`, in arrays of their own."""
        index = [slot.index for slot in slots]
        needs = map(bool, np.logical_or.reduce(self._needs[:, index], axis=1))
        return Columns(self._floats[:, index], self._integers[:, index], *needs)

    def add(self, request_id: str, prepared: PreparedParams) -> Slot:
        """A slot for a request that has none, if need be the one of the request that was longest out of use."""
        if not self._free:
            _, replaced = self._by_id.popitem(last=False)
            self._free.append(replaced.index)
        slot = self._by_id[request_id] = Slot(self._free.pop(), prepared)
        p = prepared
        self._floats[:, slot.index] = p.floats
        self._integers[:, slot.index] = (0, p.top_p, p.min_weight, p.top_k, slot.index if p.penalizes else -1, -1)
        self._needs[:, slot.index] = (p.draws, p.truncates, p.penalizes, p.edits_logits, p.mask is not None)
        return slot

    def forget(self, request_id: str) -> None:
        slot = self._by_id.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.index)
