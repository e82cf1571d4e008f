"""The replicas a router has, as a policy needs them: rows of numbers by slot, and the index of who holds which KV blocks.

Knows replicas, what their frames report, and which sequences this gateway has on them, some of them too fresh for any report. Knows
no line of waiters and no HTTP. The choice itself is cluster/router/policy.py's.

There are two views of the same replicas. Background sequences give way to all others within a step, so for these they are not there:
neither as sequences nor as tokens or KV blocks. A background sequence sees everything, and thus takes only what is left.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from cluster.router.policy import Decision, PolicyName, RequestView, Row, Snapshot, choose, explain
from cluster.router.prefix_index import PrefixIndex, window_blocks
from cluster.router.replica import Replica
from cluster.router.stream import Stream
from workers.errors import ReplicaUnavailableError
from workers.protocol import EngineFacts, StepFrame

OVERSHOOT = 0.25  # sequences beyond max_num_seqs, so that a replica's scheduler always has a next one
REPORT_MARGIN_S = 0.02  # on the way, or in rank 0's inbox
SWEEP_EVERY_S = 0.25
MANY_REPLICAS = 16  # up to here everyone's readiness is looked at for each choice


class Seat:
    """A replica's place in the table, for as long as a stream remembers it; `slot` is None once the replica was taken out."""

    def __init__(self, replica: Replica, slot: int) -> None:
        self.replica = replica
        self.slot: int | None = slot
        self.streams: set[Stream] = set()
        self.num_background = 0  # of the streams
        self.unreported: dict[Stream, tuple[float, int]] = {}  # sent when, with how many tokens to compute
        self.move_timer: asyncio.TimerHandle | None = None  # while draining
        self.was_alone: bool | None = None  # one request, as the replica was lost; None before


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence goes, and what the decision expected."""

    seat: Seat
    decision: Decision


class ReplicaTable:
    """`on_news(seat)` is called when a replica's frame was taken in."""

    def __init__(self, policy: PolicyName, clock: Callable[[], float], on_news: Callable[[Seat], None]) -> None:
        self.policy = policy
        self._clock = clock
        self._on_news = on_news
        self._seats: dict[int, Seat] = {}  # by slot
        self._slot_of: dict[int, int] = {}  # by id() of the replica: two of one name may follow each other
        self._index = PrefixIndex()
        self._without_background = _rows(0)
        self._everything = _rows(0)
        self._ready = np.zeros(0, np.bool_)
        self._takes = np.zeros(0, np.bool_)  # the ready ones; without any, those that leave
        self._limit = np.zeros(0, np.int64)
        self._no_match = np.zeros(0, np.int64)
        self._turn = 0
        self._swept = float("-inf")

    def __len__(self) -> int:
        return len(self._seats)

    def __iter__(self) -> Iterator[Seat]:
        return iter(list(self._seats.values()))

    @property
    def facts(self) -> EngineFacts | None:
        """Of the reachable replica with the shortest context: what it takes may go on, or move, anywhere."""
        shortest: EngineFacts | None = None
        for seat in self._seats.values():
            with contextlib.suppress(ReplicaUnavailableError):
                facts = seat.replica.facts
                if shortest is None or facts.max_model_len < shortest.max_model_len:
                    shortest = facts
        return shortest

    @property
    def any_ready(self) -> bool:
        """Whether a replica that does not drain takes new work, by the newest look."""
        return bool(self._ready.any())

    def look_for_ready(self) -> bool:
        """Whether a request would be taken, if need be by a replica whose node goes away; with a look at those it may have changed for."""
        self._sweep_if_due(self._clock())
        return bool(self._takes.any())

    def update(self, replicas: list[Replica]) -> None:
        """From now on it is these."""
        wanted = {id(r) for r in replicas}
        for key, slot in list(self._slot_of.items()):
            if key not in wanted:
                self._remove(key, slot)
        for replica in replicas:
            if id(replica) not in self._slot_of:
                self._add(replica)
        self.sweep()

    def enter(self, seat: Seat, stream: Stream, num_cached_tokens: int) -> None:
        """The sequence is on its way to the replica; until a report can know of it, it counts here."""
        seat.streams.add(stream)
        seat.was_alone = None
        seat.num_background += stream.is_background
        seat.unreported[stream] = (self._clock(), max(stream.num_tokens - num_cached_tokens, 1))
        self._refresh_load(seat)

    def leave(self, seat: Seat, stream: Stream) -> None:
        if stream in seat.streams:
            seat.streams.remove(stream)
            seat.num_background -= stream.is_background
        seat.unreported.pop(stream, None)
        self._refresh_load(seat)

    def lost(self, seat: Seat) -> bool:
        """Whether the replica, which was lost, worked on one request alone, whatever number of sequences.

        The first stream that tells of the loss decides, before the streams leave one by one. What other gateways had there is known from
        the last report, which may count a sequence that has just ended: then it is rather not alone.
        """
        if seat.was_alone is None:
            load = seat.replica.load
            num_known = load.num_running + load.num_waiting + len(seat.unreported)
            seat.was_alone = len({s.order for s in seat.streams}) == 1 and num_known <= len(seat.streams)
        return seat.was_alone

    def report_knows(self, seat: Seat, stream: Stream) -> None:
        """The replica has said something about it."""
        if seat.unreported.pop(stream, None) is not None:
            self._refresh_load(seat)

    def is_ready(self, seat: Seat) -> bool:
        """Whether what was decided a moment ago still holds."""
        return seat.slot is not None and self._may_take(seat, self._clock())

    def choose(self, stream: Stream) -> Place | None:
        """A ready replica with room, by the policy. None when there is none."""
        now = self._clock()
        self._sweep_if_due(now)
        if not self._rows_for(
            stream
        ).available.any():  # asked often while a line waits: spares the matching of a long prompt
            return None
        while True:
            decision = self._decide(stream)
            if decision is None:
                return None
            seat = self._seats[decision.slot]
            self._look(seat, now)
            if self.has_room(seat, stream):
                self._turn += 1
                return Place(seat, decision)

    def explain(self, stream: Stream, policy: PolicyName) -> list[tuple[Seat, Row]]:
        """What `choose` would see now, for people."""
        self.sweep()
        rows = explain(policy, self._rows_for(stream), self._view(stream), turn=self._turn)
        return [(self._seats[row.slot], row) for row in rows if row.slot in self._seats]

    def sweep(self) -> None:
        """Looks at everyone's readiness, which time alone may change."""
        self._swept = now = self._clock()
        # Those that drain come last: whether they are needed depends on the others.
        for seat in sorted(self._seats.values(), key=lambda seat: seat.replica.drain_until is not None):
            self._look(seat, now)

    def _sweep_if_due(self, now: float) -> None:
        if len(self._seats) <= MANY_REPLICAS or now - self._swept >= SWEEP_EVERY_S:
            self.sweep()

    def estimated_wait_s(self, num_tokens: int, *, background: bool = False) -> float | None:
        """Until the ready replicas have computed what waits there and these tokens; None when nobody knows."""
        rows = self._everything if background else self._without_background
        speed = float(rows.tokens_per_s[self._ready].sum())
        if speed <= 0:
            return None
        return (float(rows.pending_tokens[self._ready].sum()) + num_tokens) / speed

    def has_room(self, seat: Seat, stream: Stream) -> bool:
        return seat.slot is not None and bool(self._rows_for(stream).available[seat.slot])

    def background_room(self) -> int:
        """How many more background sequences the ready replicas could take now, beside everything that is there."""
        self._sweep_if_due(self._clock())
        room = np.maximum(self._limit - self._everything.num_requests, 0)
        return int(room[self._ready].sum())

    def room_elsewhere(self) -> int:
        """How many more sequences the replicas could take that do not drain."""
        room = np.maximum(self._limit - self._without_background.num_requests, 0)
        return int(room[self._ready].sum())

    def _rows_for(self, stream: Stream) -> Snapshot:
        return self._everything if stream.is_background else self._without_background

    def _add(self, replica: Replica) -> None:
        slot = next(i for i in range(len(self._seats) + 1) if i not in self._seats)
        seat = self._seats[slot] = Seat(replica, slot)
        self._slot_of[id(replica)] = slot
        self._index.add(slot)
        self._grow(self._index.num_slots)
        self._clear(slot)
        replica.on_frame = lambda frame: self._hear(seat, frame)

    def _remove(self, key: int, slot: int) -> None:
        seat = self._seats.pop(slot)
        del self._slot_of[key]
        seat.slot = None
        seat.replica.on_frame = None
        self._index.remove(slot)
        self._clear(slot)

    def _grow(self, num_slots: int) -> None:
        more = num_slots - len(self._ready)
        if more <= 0:
            return
        self._without_background = _joined(self._without_background, _rows(more))
        self._everything = _joined(self._everything, _rows(more))
        self._ready = np.concatenate([self._ready, np.zeros(more, np.bool_)])
        self._takes = np.concatenate([self._takes, np.zeros(more, np.bool_)])
        self._limit = np.concatenate([self._limit, np.zeros(more, np.int64)])
        self._no_match = np.zeros(num_slots, np.int64)

    def _clear(self, slot: int) -> None:
        for rows in (self._without_background, self._everything):
            for field, empty in zip(fields(Snapshot), _EMPTY_ROW, strict=True):
                getattr(rows, field.name)[slot] = empty
        self._ready[slot] = self._takes[slot] = False
        self._limit[slot] = 0

    def _hear(self, seat: Seat, frame: StepFrame) -> None:
        if seat.slot is None:
            return
        now = self._clock()
        if frame.cache is not None:
            self._index.apply(seat.slot, frame.cache)
        if seat.unreported:
            began = now - (frame.load.step_age_s or 0.0) - REPORT_MARGIN_S
            seat.unreported = {s: sent for s, sent in seat.unreported.items() if sent[0] > began}
        self._refresh_load(seat)
        self._look(seat, now)
        self._on_news(seat)

    def _refresh_load(self, seat: Seat) -> None:
        if seat.slot is None:
            return
        load, fresh = seat.replica.load, seat.unreported
        num_reported = load.num_running + load.num_waiting
        others = [tokens for stream, (_, tokens) in fresh.items() if not stream.is_background]
        self._fill(
            self._without_background,
            seat,
            num_requests=max(len(seat.streams) - seat.num_background, num_reported - load.num_background + len(others)),
            pending_tokens=load.num_pending_tokens - load.num_background_pending_tokens + sum(others),
            num_used_blocks=load.num_used_blocks - load.num_background_blocks,
        )
        self._fill(
            self._everything,
            seat,
            num_requests=max(len(seat.streams), num_reported + len(fresh)),
            pending_tokens=load.num_pending_tokens + sum(tokens for _, tokens in fresh.values()),
            num_used_blocks=load.num_used_blocks,
        )

    def _fill(
        self, rows: Snapshot, seat: Seat, *, num_requests: int, pending_tokens: int, num_used_blocks: int
    ) -> None:
        slot, load = seat.slot, seat.replica.load
        assert slot is not None, "a replica that was taken out has no row"
        rows.num_requests[slot] = num_requests
        rows.pending_tokens[slot] = pending_tokens
        rows.tokens_per_s[slot] = load.tokens_per_s
        rows.kv_usage[slot] = num_used_blocks / load.num_blocks if load.num_blocks else 0.0
        rows.available[slot] = self._takes[slot] and num_requests < self._limit[slot]

    def _look(self, seat: Seat, now: float) -> None:
        """Whether the replica takes new work, and for whom it has room."""
        slot, replica = seat.slot, seat.replica
        assert slot is not None, "a replica that was taken out is not asked"
        self._ready[slot] = replica.drain_until is None and replica.is_ready(now)
        self._takes[slot] = self._may_take(seat, now)
        if not self._limit[slot] and self._takes[slot]:
            most = replica.facts.max_num_seqs
            self._without_background.max_num_seqs[slot] = self._everything.max_num_seqs[slot] = most
            self._limit[slot] = most + max(1, int(most * OVERSHOOT))
            self._refresh_load(seat)
        for rows in (self._without_background, self._everything):
            rows.available[slot] = self._takes[slot] and rows.num_requests[slot] < self._limit[slot]

    def _may_take(self, seat: Seat, now: float) -> bool:
        """A replica that leaves is better than none."""
        replica = seat.replica
        if replica.drain_until is None:
            return replica.is_ready(now)
        return replica.is_leaving and now < replica.drain_until and not self.any_ready and replica.is_ready(now)

    def _decide(self, stream: Stream) -> Decision | None:
        view, rows = self._view(stream), self._rows_for(stream)
        if stream.lost_on:
            others = rows.available.copy()
            for slot, seat in self._seats.items():
                if seat.replica in stream.lost_on:
                    others[slot] = False
            if others.any():
                kept = {f.name: getattr(rows, f.name) for f in fields(Snapshot)}
                rows = Snapshot(**(kept | {"available": others}))
        return choose(self.policy, rows, view, turn=self._turn)

    def _view(self, stream: Stream) -> RequestView:
        facts = self.facts if stream.block_hashes else None
        if facts is None:
            return RequestView(stream.num_tokens, self._no_match)
        window = window_blocks(facts.sliding_window, facts.block_size)
        matched = self._index.match(stream.block_hashes, window_blocks=window)
        return RequestView(stream.num_tokens, matched * facts.block_size)


def _joined(first: Snapshot, second: Snapshot) -> Snapshot:
    columns = {f.name: np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Snapshot)}
    return Snapshot(**columns)


_EMPTY_ROW = (False, 0, 0.0, 0.0, 0.0, 1)  # in the order of Snapshot's fields


def _rows(count: int) -> Snapshot:
    return Snapshot(
        available=np.zeros(count, np.bool_),
        num_requests=np.zeros(count, np.int64),
        pending_tokens=np.zeros(count),
        tokens_per_s=np.zeros(count),
        kv_usage=np.zeros(count),
        max_num_seqs=np.ones(count, np.int64),
    )
