"""A limit per minute as a bucket that refills evenly: pure arithmetic, the clock is an argument.

Worked example, 60 a minute: full at 60, one comes back each second. Taking 30 leaves 30. Whoever then wants 40 waits 10 s. Taking 50
more although only 30 are there (tokens that were generated, say) leaves a debt of 20: nothing more for 20 s.
"""


class Bucket:
    """`limit`: of a minute, and the most the bucket holds. now: time.monotonic()."""

    def __init__(self, limit: float, now: float) -> None:
        self.limit = limit
        self._level = limit
        self._at = now

    def level(self, now: float) -> float:
        """What is there; negative for a debt."""
        self._level = min(self.limit, self._level + max(now - self._at, 0.0) * self.limit / 60)
        self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Until so much can be taken; 0 for at once. More than the bucket holds needs a full one."""
        missing = min(amount, self.limit) - self.level(now)
        return max(missing, 0.0) * 60 / self.limit

    def take(self, amount: float, now: float) -> None:
        """Without asking; negative gives back."""
        self._level = min(self.limit, self.level(now) - amount)

    def full_in_s(self, now: float) -> float:
        return (self.limit - self.level(now)) * 60 / self.limit
