"""The clock of a connection, with times passed in: when a heartbeat is due, how long the peer is silent, and whose fault that is."""

import pytest

from workers.heartbeat import RECENTLY_S, STANDSTILL_S, TICK_S, PeerClock
from workers.protocol import HEARTBEAT_INTERVAL_S, SILENCE_IS_DEATH_S


def ticked(clock: PeerClock, start: float, end: float) -> float:
    """Ticks regularly from start to end; returns the time of the last tick."""
    now = start
    while now + TICK_S <= end:
        now += TICK_S
        clock.tick(now)
    return now


def test_a_heartbeat_is_due_when_nothing_was_sent_for_a_tick():
    clock = PeerClock(100.0)
    assert not clock.is_heartbeat_due(100.0)
    assert clock.is_heartbeat_due(100.0 + TICK_S)
    clock.sent(100.0 + TICK_S)
    assert not clock.is_heartbeat_due(100.0 + 1.5 * TICK_S)
    assert clock.is_heartbeat_due(100.0 + 2 * TICK_S)
    assert TICK_S <= HEARTBEAT_INTERVAL_S, "heartbeats come at least as often as the protocol says"


def test_silence_counts_from_the_last_word():
    clock = PeerClock(0.0)
    ticked(clock, 0.0, 2.0)
    assert clock.silence_s(2.0) == 2.0
    clock.received(2.0)
    assert clock.silence_s(2.5) == 0.5
    now = ticked(clock, 2.0, 10.0)
    assert clock.silence_s(now) == 8.0, "the peer is silent while this process listens"
    assert clock.silence_at_last_tick_s() == 8.0


def test_a_standstill_of_this_process_is_not_the_peers_silence():
    clock = PeerClock(0.0)
    now = ticked(clock, 0.0, 1.0)
    woke_at = now + STANDSTILL_S + 5.0
    assert clock.silence_at_last_tick_s() <= 1.0, "the pause does not count even before the next tick"
    clock.tick(woke_at)
    assert clock.silence_s(woke_at) == 0.0
    ticked(clock, woke_at, woke_at + SILENCE_IS_DEATH_S)
    assert clock.silence_s(woke_at + SILENCE_IS_DEATH_S) == SILENCE_IS_DEATH_S, "from then on it counts again"


def test_a_late_tick_is_not_a_standstill():
    clock = PeerClock(0.0)
    clock.tick(STANDSTILL_S)
    assert clock.silence_s(STANDSTILL_S) == STANDSTILL_S


@pytest.mark.parametrize(
    ("received_at", "ticked_at", "now", "well"),
    [
        (9.9, 9.9, 10.0, True),
        (10.0 - RECENTLY_S, 9.9, 10.0, False),  # the peer is silent
        (9.9, 9.9, 9.9 + STANDSTILL_S + 0.1, False),  # this process stands still
    ],
)
def test_whether_both_ends_were_running_a_moment_ago(received_at, ticked_at, now, well):
    clock = PeerClock(9.0)
    clock.tick(ticked_at)
    clock.received(received_at)
    assert clock.was_well(now) is well


def test_after_a_standstill_a_while_must_pass():
    clock = PeerClock(0.0)
    woke_at = 10.0
    clock.tick(woke_at)
    clock.received(woke_at)
    assert not clock.was_well(woke_at + 0.1)
    now = ticked(clock, woke_at, woke_at + RECENTLY_S + TICK_S)
    clock.received(now)
    assert clock.was_well(now)


def test_a_new_connection_starts_afresh():
    clock = PeerClock(0.0)
    clock.restart(50.0)
    assert clock.silence_s(50.0) == 0.0
    clock.tick(50.0 + TICK_S)
    assert clock.silence_s(50.0 + TICK_S) == TICK_S, "the time before the connection was not a standstill"
