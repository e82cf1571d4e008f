"""How long steps take, and how fast they compute prompts. The only part of the engine that reads the time.

Knows no requests. The engine thread writes; any thread may read.
"""

import time

# How much of the speed known before a step with prompts survives it.
SPEED_DECAY = 0.9


class StepClock:
    """Call `start` and `end` around every forward pass, then `add_speed` where its speed is representative.

    A pass may start before the one before it has ended, and they end in the order of their starts. The device computes one at a time, so
    a pass takes the time from its start, or from the end of the one before it, whichever is later.
    """

    def __init__(self) -> None:
        self.num_steps_total = 0
        self.step_s_total = 0.0
        self.last_step_s = 0.0
        # Decaying sums, so that a short prompt, whose step is mostly fixed cost, does not count like a long one.
        self._recent_tokens = self._recent_s = 0.0
        self._last_end: float | None = None
        # Of the steps that have not ended. Replaced, never changed: other threads read it.
        self._starts: tuple[float, ...] = ()

    def start(self) -> None:
        self._starts = (*self._starts, time.monotonic())

    def end(self) -> None:
        """The first of the steps that have started ends now: the device has computed it."""
        assert self._starts, "a step ends that has not started"
        now = time.monotonic()
        began = self._starts[0] if self._last_end is None else max(self._starts[0], self._last_end)
        self.last_step_s = now - began
        self._last_end, self._starts = now, self._starts[1:]
        self.num_steps_total += 1
        self.step_s_total += self.last_step_s

    def add_speed(self, num_tokens: int) -> None:
        """The last step computed `num_tokens`, prompts among them."""
        self._recent_s = SPEED_DECAY * self._recent_s + self.last_step_s
        self._recent_tokens = SPEED_DECAY * self._recent_tokens + num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Recent speed of steps with prompts; 0 before the first."""
        return self._recent_tokens / self._recent_s if self._recent_s else 0.0

    def step_age_s(self) -> float | None:
        """Seconds since the first of the steps that have not ended started; None between steps."""
        starts = self._starts  # another thread may end the step
        return time.monotonic() - starts[0] if starts else None

    def forward_age_s(self) -> float | None:
        """Seconds since the last forward pass ended; None before the first."""
        return None if self._last_end is None else time.monotonic() - self._last_end
