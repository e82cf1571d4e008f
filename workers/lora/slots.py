"""Which adapters are on the device: as many as there are slots, the least recently used ones leave. Pure Python, no torch.

An adapter that running requests use stays. A request whose adapter finds no slot waits, and others pass it. So that it does not wait for
ever, one adapter takes no requests that come after it (`draining`): its slot becomes free when its running requests have ended.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# The slot of a request without an adapter.
NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class Assignment:
    """This adapter is in this slot from the next step on, in place of the one that was there."""

    slot: int
    adapter: str


class AdapterSlots:
    """Adapters by their revision ids."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slot_of: dict[str, int] = {}
        self._num_users: Counter[str] = Counter()
        self._started: dict[str, int] = {}
        self._ticks = itertools.count()
        self._new: list[Assignment] = []

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that have a slot."""
        return tuple(self._slot_of)

    def has_room(self, adapter: str) -> bool:
        """Whether a request with it can start: it has a slot, or can get one."""
        return adapter in self._slot_of or len(self._slot_of) < self.num_slots or self._idle() is not None

    def start(self, adapter: str) -> int:
        """A request with this adapter runs from now on. Returns the slot. There must be room."""
        slot = self._slot_of.get(adapter)
        if slot is None:
            slot = self._slot_of[adapter] = self._free_slot()
            self._new.append(Assignment(slot, adapter))
        self._num_users[adapter] += 1
        self._started[adapter] = next(self._ticks)
        return slot

    def end(self, adapter: str) -> None:
        """One request with it runs no longer."""
        self._num_users[adapter] -= 1
        if not self._num_users[adapter]:
            del self._num_users[adapter]

    def take_new(self) -> list[Assignment]:
        """What changed since the last call. All ranks must know it before the next step."""
        new, self._new = self._new, []
        return new

    def remove(self, adapter: str) -> None:
        """No request uses it any more: its slot is free."""
        assert adapter not in self._num_users, f"{adapter} is in use"
        self._new = [assignment for assignment in self._new if assignment.adapter != adapter]
        self._slot_of.pop(adapter, None)
        self._started.pop(adapter, None)

    def draining(self, among: Iterable[str] | None = None) -> str | None:
        """The one of these, by default of all that have a slot, in which a request started longest ago."""
        adapters = self._slot_of if among is None else among
        return min(adapters, key=self._started.__getitem__, default=None)

    def _idle(self) -> str | None:
        """Of the adapters that no running request uses, the one that was used longest ago."""
        return self.draining([adapter for adapter in self._slot_of if adapter not in self._num_users])

    def _free_slot(self) -> int:
        if len(self._slot_of) < self.num_slots:
            taken = set(self._slot_of.values())
            return next(slot for slot in range(self.num_slots) if slot not in taken)
        leaving = self._idle()
        assert leaving is not None, "every slot is in use"
        slot = self._slot_of[leaving]
        self.remove(leaving)
        return slot
