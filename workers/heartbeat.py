"""When a heartbeat is due and when a peer has been silent for too long. Pure: the time is an argument, in seconds of one monotonic clock.

Knows no sockets. Used at both ends of a gateway's connection and between ranks, so that all of them judge silence alike.
"""

from workers.protocol import HEARTBEAT_INTERVAL_S, SILENCE_IS_DEATH_S

TICK_S = HEARTBEAT_INTERVAL_S / 2  # how often the owner of a clock calls `tick`
STANDSTILL_S = TICK_S + 1.0  # no tick for this long: this process itself stood still
RECENTLY_S = SILENCE_IS_DEATH_S / 2  # several heartbeats fit in


class PeerClock:
    """One connection's times. The owner reports what happens and calls `tick` every TICK_S.

    A process that stood still (stopped, starved of CPU, a suspended machine) has not heard its peer because it did not listen. `tick`
    notices that and counts the peer's silence from then on only.
    """

    def __init__(self, now: float) -> None:
        self._last_received = now
        self._last_sent = now
        self._last_tick = now
        self._stood_still_at = float("-inf")

    def restart(self, now: float) -> None:
        """A new connection to the peer: it was just heard."""
        self._last_received = self._last_sent = self._last_tick = now

    def received(self, now: float) -> None:
        self._last_received = now

    def sent(self, now: float) -> None:
        self._last_sent = now

    def tick(self, now: float) -> None:
        if now - self._last_tick > STANDSTILL_S:
            self._last_received = self._stood_still_at = now
        self._last_tick = now

    @property
    def last_tick(self) -> float:
        """Until when this process has listened: a pause of it since then does not count."""
        return self._last_tick

    def is_heartbeat_due(self, now: float) -> bool:
        """Whether nothing has been sent since the previous tick. Call it at each tick."""
        return now - self._last_sent >= TICK_S

    def silence_s(self, now: float) -> float:
        """How long ago the peer was last heard."""
        return now - self._last_received

    def silence_at_last_tick_s(self) -> float:
        """The same up to the last tick, so that a pause of this process since then does not count."""
        return self._last_tick - self._last_received

    def was_well(self, now: float) -> bool:
        """Whether both ends were running a moment ago: this process did not stand still, and the peer was heard recently."""
        stood_still = now - self._last_tick > STANDSTILL_S or now - self._stood_still_at < RECENTLY_S
        return not stood_still and self.silence_s(now) < RECENTLY_S
