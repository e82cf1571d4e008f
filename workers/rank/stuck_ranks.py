"""Which ranks a replica is really stuck on. Pure: the time is an argument, in seconds of a monotonic clock."""

from collections.abc import Iterable

STUCK_AFTER_S = 1.5  # an ordinary collective ends much sooner


class StuckRanks:
    """Rank 0 waits for other ranks in every collective; a rank is stuck only when it has been waited for STUCK_AFTER_S without a pause."""

    def __init__(self) -> None:
        self._waited_since: dict[int, float] = {}

    def update(self, waiting_for: Iterable[int], now: float) -> tuple[int, ...]:
        """waiting_for: the ranks waited for at this instant. Returns those that are stuck."""
        self._waited_since = {rank: self._waited_since.get(rank, now) for rank in waiting_for}
        return tuple(rank for rank, since in self._waited_since.items() if now - since >= STUCK_AFTER_S)
