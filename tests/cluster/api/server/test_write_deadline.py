"""When a client is too slow to read; times and bytes are passed in."""

import pytest

from cluster.api.server.write_deadline import WriteDeadline

PERIOD_S, MIN_BYTES = 60.0, 1000


def is_late_after(
    seconds: float,
    *,
    written_per_s: float = 0.0,
    taken_per_s: float = 0.0,
    closing: bool = False,
    at_once: int = 0,
) -> bool:
    """A connection with `at_once` bytes of an answer at first, and more bytes each second."""
    deadline = WriteDeadline(PERIOD_S, min_bytes=MIN_BYTES)
    for now in range(0, int(seconds) + 1, 5):
        written = int(at_once + now * written_per_s)
        waiting = max(0, written - int(now * taken_per_s))
        if deadline.is_late(num_written=written, num_waiting=waiting, closing=closing, now=float(now)):
            return True
    return False


@pytest.mark.parametrize(
    ("case", "late"),
    [
        ({"at_once": 10_000_000}, True),  # a whole answer, of which nothing is read
        ({"at_once": 100}, True),  # a small one
        ({"at_once": 10_000_000, "taken_per_s": 3}, True),  # read too slowly
        ({"at_once": 1_000_000, "taken_per_s": 20}, False),  # slowly, but not too slowly
        ({"written_per_s": 50}, True),  # a stream that nobody reads
        ({"written_per_s": 50, "taken_per_s": 20}, False),  # a stream that is read more slowly than it is written
        ({"written_per_s": 50, "taken_per_s": 50}, False),
        ({}, False),  # idle: the idle timeout ends it
        ({"closing": True}, True),  # it cannot close: the other end does not finish TLS
    ],
)
def test_a_client_must_read_something_in_each_period(case: dict, late: bool) -> None:
    assert not is_late_after(PERIOD_S - 5, **case)
    assert is_late_after(10 * PERIOD_S, **case) == late


def test_time_counts_from_the_first_unread_byte() -> None:
    deadline = WriteDeadline(PERIOD_S)
    assert not deadline.is_late(num_written=10, num_waiting=0, closing=False, now=0.0)
    assert not deadline.is_late(num_written=20, num_waiting=10, closing=False, now=1000.0)
    assert not deadline.is_late(num_written=20, num_waiting=10, closing=False, now=1000.0 + PERIOD_S - 1)
    assert deadline.is_late(num_written=20, num_waiting=10, closing=False, now=1000.0 + PERIOD_S)
