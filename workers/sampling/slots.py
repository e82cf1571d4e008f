"""Which request has which row of a matrix on the device, the least recently used one replaced when there are too many. Knows ids only."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from workers.sampling.parameters import PreparedParams


@dataclass(slots=True)
class Slot:
    """num_counted: how many of the request's tokens the matrix counts; None when its row means nothing yet."""

    index: int
    prepared: PreparedParams
    num_counted: int | None = None


class Slots:
    """`num_slots` must be at least the number of requests in one step, so that a request of a step never replaces another of it."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._by_id: OrderedDict[str, Slot] = OrderedDict()

    def touch(self, request_ids: Iterable[str]) -> None:
        """Those of the requests that have a slot keep it until all others are replaced."""
        for request_id in request_ids:
            if request_id in self._by_id:
                self._by_id.move_to_end(request_id)

    def get(self, request_id: str) -> Slot | None:
        return self._by_id.get(request_id)

    def add(self, request_id: str, prepared: PreparedParams) -> Slot:
        """A slot for a request that has none, if need be the one of the request that was longest out of use."""
        if not self._free:
            _, replaced = self._by_id.popitem(last=False)
            self._free.append(replaced.index)
        slot = self._by_id[request_id] = Slot(self._free.pop(), prepared)
        return slot

    def forget(self, request_id: str) -> None:
        slot = self._by_id.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.index)
