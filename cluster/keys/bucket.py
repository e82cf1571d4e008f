"""A limit per minute as a token bucket that refills evenly: pure arithmetic; the clock is an argument.

Worked example, 60 per minute: the bucket is full at 60 and gets one back each second. Taking 30 leaves 30. A request for 40 then waits
10 s. Taking 50 although only 30 are left (generated tokens, for example) leaves a debt of 20: nothing is available for 20 s.
"""


class Bucket:
    """`limit`: per minute, and the capacity of the bucket. now: time.monotonic()."""

    def __init__(self, limit: float, now: float) -> None:
        self.limit = limit
        self._level = limit
        self._at = now

    def level(self, now: float) -> float:
        """What is left; negative for a debt."""
        self._level = min(self.limit, self._level + max(now - self._at, 0.0) * self.limit / 60)
        self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until this amount is available; 0 for now. An amount above the capacity needs a full bucket."""
        missing = min(amount, self.limit) - self.level(now)
        return max(missing, 0.0) * 60 / self.limit

    def take(self, amount: float, now: float) -> None:
        """Takes the amount, even if it is not available. A negative amount is given back."""
        self._level = min(self.limit, self.level(now) - amount)

    def full_in_s(self, now: float) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.level(now)) * 60 / self.limit
