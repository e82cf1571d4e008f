"""A few slots for work that tenants take in turns: one slot a tenant at a time, and the tenant that waited longest is next.

The tenant None, which is all callers where there are no keys, may have all slots.

Knows asyncio and names; not what the work is.
"""

import asyncio
from collections import deque


class TenantSlots:
    """Belongs to one event loop. `release` may be called late, by work that outlived its waiter."""

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._busy: set[str | None] = set()
        # In the order of their turns. A tenant that was served goes to the end.
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}

    async def acquire(self, tenant: str | None) -> None:
        """Returns when a slot is this tenant's. Requests of one tenant are served in the order of their arrival."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(tenant)
            else:
                turn.cancel()
                self._hand_out()
            raise

    def release(self, tenant: str | None) -> None:
        self._busy.discard(tenant)
        self._num_free += 1
        if tenant in self._waiting:
            self._waiting[tenant] = self._waiting.pop(tenant)
        self._hand_out()

    def _hand_out(self) -> None:
        for tenant in list(self._waiting):
            turns = self._waiting[tenant]
            while turns and turns[0].done():
                turns.popleft()
            if not turns:
                del self._waiting[tenant]
            elif self._num_free and (tenant is None or tenant not in self._busy):
                turns.popleft().set_result(None)
                self._num_free -= 1
                self._busy.add(tenant)
                del self._waiting[tenant]
                if turns:
                    self._waiting[tenant] = turns
