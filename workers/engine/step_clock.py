"""How long steps take, and how fast they compute prompts. The only part of the engine that reads the time.

Knows no requests. The engine thread writes; any thread may read.
"""

import time

# How much of the speed known before a step with prompts survives it.
SPEED_DECAY = 0.9


class StepClock:
    """Call `start` and `end` around every forward pass, then `add_speed` where its speed is representative."""

    def __init__(self) -> None:
        self.num_steps_total = 0
        self.step_s_total = 0.0
        self.last_step_s = 0.0
        # Decaying sums, so that a short prompt, whose step is mostly fixed cost, does not count like a long one.
        self._recent_tokens = self._recent_s = 0.0
        self._last_end: float | None = None
        self._start: float | None = None

    def start(self) -> None:
        self._start = time.monotonic()

    def end(self) -> None:
        assert self._start is not None, "a step ends that has not started"
        self._last_end = time.monotonic()
        self.last_step_s = self._last_end - self._start
        self._start = None
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
        """Seconds since the running step started; None between steps."""
        start = self._start  # another thread may end the step
        return None if start is None else time.monotonic() - start

    def forward_age_s(self) -> float | None:
        """Seconds since the last forward pass ended; None before the first."""
        return None if self._last_end is None else time.monotonic() - self._last_end
