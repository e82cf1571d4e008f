"""How long steps take where one starts before the one before it has ended; the time is a fake."""

import pytest

from workers.engine.scheduling import step_clock
from workers.engine.scheduling.step_clock import StepClock


class FakeTime:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(step_clock, "time", fake)
    return fake


def test_one_step_after_the_other(time):
    clock = StepClock()
    assert (clock.step_age_s(), clock.forward_age_s()) == (None, None)
    clock.start()
    time.now = 102.0
    assert (clock.step_age_s(), clock.forward_age_s()) == (2.0, None)
    clock.end()
    clock.add_speed(10)
    time.now = 107.0
    assert (clock.step_age_s(), clock.forward_age_s()) == (None, 5.0)
    clock.start()
    time.now = 108.0
    clock.end()
    assert (clock.num_steps_total, clock.last_step_s, clock.step_s_total, clock.tokens_per_s) == (2, 1.0, 3.0, 5.0)


def test_a_step_that_starts_early_takes_the_time_from_the_end_of_the_one_before(time):
    """Steps start at 100 and 101 and end at 104 and 106: the device worked 6 seconds, not 9."""
    clock = StepClock()
    clock.start()
    time.now = 101.0
    clock.start()
    time.now = 104.0
    assert clock.step_age_s() == 4.0, "the oldest step counts"
    clock.end()
    assert (clock.last_step_s, clock.step_age_s(), clock.forward_age_s()) == (4.0, 3.0, 0.0)
    time.now = 106.0
    clock.end()
    assert (clock.last_step_s, clock.step_s_total, clock.step_age_s()) == (2.0, 6.0, None)
