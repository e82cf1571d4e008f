"""The replicas a router has: their reported load, the sequences this gateway has on them, and the index of cached blocks.

Knows replicas and what their frames report. Knows no queue and no HTTP. The numbers are kept in rows.py; the choice itself is made in
policy.py.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.protocol.routing import RoutingPolicy
from cluster.router.load_balancing.policy import Decision, RequestView, Row, choose, explain
from cluster.router.load_balancing.prefix_index import PrefixIndex, window_blocks
from cluster.router.load_balancing.rows import ReplicaRows, with_available
from cluster.router.replica import Replica
from cluster.router.stream import Stream
from workers.errors import ReplicaUnavailableError
from workers.protocol import EngineFacts, StepFrame

REPORT_MARGIN_S = 0.02  # on the way, or in rank 0's inbox
REFRESH_INTERVAL_S = 0.25
MANY_REPLICAS = 16  # up to this many, the readiness of all replicas is refreshed for each choice


class ReplicaEntry:
    """One replica in the table. Streams keep it after the replica was removed; `slot` is None from then on."""

    def __init__(self, replica: Replica, slot: int) -> None:
        self.replica = replica
        self.slot: int | None = slot
        self.streams: set[Stream] = set()
        self.num_background = 0  # of the streams
        self.unreported: dict[Stream, tuple[float, int]] = {}  # (when it was sent, tokens to compute)
        self.move_timer: asyncio.TimerHandle | None = None  # while draining
        self.was_alone: bool | None = None  # whether it worked on one request when it was lost; None before
        self.in_rows: tuple[float, ...] | None = None  # what its rows were made from; None to make them again

    @property
    def numerics(self) -> str | None:
        """See EngineFacts; None before the first connection."""
        with contextlib.suppress(ReplicaUnavailableError):
            return self.replica.facts.numerics
        return None


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a sequence goes, and what the decision expected."""

    entry: ReplicaEntry
    decision: Decision


class ReplicaTable:
    """`on_report(entry)` is called after each frame of a replica."""

    def __init__(
        self, policy: RoutingPolicy, clock: Callable[[], float], on_report: Callable[[ReplicaEntry], None]
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._on_report = on_report
        self._entries: dict[int, ReplicaEntry] = {}  # by slot
        self._slot_of: dict[int, int] = {}  # by id() of the replica: a replica may be replaced by one of the same name
        self._index = PrefixIndex()
        self._rows = ReplicaRows()
        self._no_match = np.zeros(0, np.int64)
        self._turn = 0
        self._refreshed_at = float("-inf")

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ReplicaEntry]:
        return iter(list(self._entries.values()))

    @property
    def facts(self) -> EngineFacts | None:
        """Of the reachable replica with the shortest context, so that what it accepts can continue on any other."""
        shortest: EngineFacts | None = None
        for entry in self._entries.values():
            with contextlib.suppress(ReplicaUnavailableError):
                facts = entry.replica.facts
                if shortest is None or facts.max_model_len < shortest.max_model_len:
                    shortest = facts
        return shortest

    @property
    def any_ready(self) -> bool:
        """Whether a replica that is not draining was ready at the last refresh."""
        return self._rows.any_ready

    def accepts_requests(self) -> bool:
        """Whether a replica would accept a request now, if need be one whose node is preempted. Refreshes readiness if it is due."""
        self._refresh_if_due(self._clock())
        return self._rows.any_accepts

    def update(self, replicas: list[Replica]) -> None:
        """Replaces the set of replicas."""
        wanted = {id(r) for r in replicas}
        for key, slot in list(self._slot_of.items()):
            if key not in wanted:
                self._remove(key, slot)
        for replica in replicas:
            if id(replica) not in self._slot_of:
                self._add(replica)
        self.refresh()

    def enter(self, entry: ReplicaEntry, stream: Stream, num_cached_tokens: int) -> None:
        """The sequence is on its way to the replica. It counts here until a report can include it."""
        entry.streams.add(stream)
        entry.was_alone = None
        entry.num_background += stream.is_background
        entry.unreported[stream] = (self._clock(), max(stream.num_tokens - num_cached_tokens, 1))
        self._refresh_load(entry)

    def leave(self, entry: ReplicaEntry, stream: Stream) -> None:
        """The sequence is no longer on the replica."""
        if stream in entry.streams:
            entry.streams.remove(stream)
            entry.num_background -= stream.is_background
        entry.unreported.pop(stream, None)
        self._refresh_load(entry)

    def was_alone(self, entry: ReplicaEntry) -> bool:
        """Whether a lost replica worked on a single request, whatever its number of sequences.

        The first stream that reports the loss decides, before the streams leave one by one. What other gateways had there is known from
        the last report, which may count a sequence that has just ended; in doubt the answer is no.
        """
        if entry.was_alone is None:
            load = entry.replica.load
            num_known = load.num_running + load.num_waiting + len(entry.unreported)
            entry.was_alone = len({s.order for s in entry.streams}) == 1 and num_known <= len(entry.streams)
        return entry.was_alone

    def report_includes(self, entry: ReplicaEntry, stream: Stream) -> None:
        """The replica has answered the sequence, so its reports count it."""
        if entry.unreported.pop(stream, None) is not None:
            self._refresh_load(entry)

    def is_ready(self, entry: ReplicaEntry) -> bool:
        """Whether a decision made a moment ago still holds."""
        return entry.slot is not None and self._may_accept(entry, self._clock())

    def choose(self, stream: Stream, *, numerics: str | None = None) -> Assignment | None:
        """A ready replica with room, chosen by the policy. None if there is none. numerics: what it must have; None for any."""
        now = self._clock()
        self._refresh_if_due(now)
        # Called often while requests queue: this check avoids matching a long prompt for nothing.
        if not self._rows.snapshot(background=stream.is_background).available.any():
            return None
        while True:
            decision = self._decide(stream, numerics)
            if decision is None:
                return None
            entry = self._entries[decision.slot]
            self._refresh_readiness(entry, now)
            if self.has_room(entry, stream):
                self._turn += 1
                return Assignment(entry, decision)

    def explain(self, stream: Stream, policy: RoutingPolicy) -> list[tuple[ReplicaEntry, Row]]:
        """What `choose` would see now, for display."""
        self.refresh()
        snapshot = self._rows.snapshot(background=stream.is_background)
        rows = explain(policy, snapshot, self._view(stream), turn=self._turn)
        return [(self._entries[row.slot], row) for row in rows if row.slot in self._entries]

    def refresh(self) -> None:
        """Refreshes the readiness of all replicas, which changes with time alone."""
        self._refreshed_at = now = self._clock()
        # Draining replicas come last: whether they are needed depends on the others.
        for entry in sorted(self._entries.values(), key=lambda entry: entry.replica.drain_until is not None):
            self._refresh_readiness(entry, now)

    def estimated_wait_s(self, num_tokens: int, *, background: bool = False) -> float | None:
        """Until the ready replicas have computed what waits there and these tokens; None while no speed is known."""
        return self._rows.estimated_wait_s(num_tokens, background=background)

    def has_room(self, entry: ReplicaEntry, stream: Stream) -> bool:
        if entry.slot is None:
            return False
        return bool(self._rows.snapshot(background=stream.is_background).available[entry.slot])

    def background_room(self) -> int:
        """How many more background sequences the ready replicas could take now, next to everything they have."""
        self._refresh_if_due(self._clock())
        return self._rows.num_free(background=True)

    def online_room(self, *, numerics: str | None = None) -> int:
        """How many more online sequences the replicas that are not draining could take. numerics: of these replicas; None for all."""
        return self._rows.num_free(background=False, among=None if numerics is None else self._slots_with(numerics))

    def _refresh_if_due(self, now: float) -> None:
        if len(self._entries) <= MANY_REPLICAS or now - self._refreshed_at >= REFRESH_INTERVAL_S:
            self.refresh()

    def _add(self, replica: Replica) -> None:
        slot = next(i for i in range(len(self._entries) + 1) if i not in self._entries)
        entry = self._entries[slot] = ReplicaEntry(replica, slot)
        self._slot_of[id(replica)] = slot
        self._index.add(slot)
        self._rows.grow(self._index.num_slots)
        self._no_match = np.zeros(self._index.num_slots, np.int64)
        self._rows.clear(slot)
        replica.on_frame = lambda frame: self._handle_frame(entry, frame)

    def _remove(self, key: int, slot: int) -> None:
        entry = self._entries.pop(slot)
        del self._slot_of[key]
        entry.slot = None
        entry.replica.on_frame = None
        self._index.remove(slot)
        self._rows.clear(slot)

    def _handle_frame(self, entry: ReplicaEntry, frame: StepFrame) -> None:
        if entry.slot is None:
            return
        now = self._clock()
        if frame.cache is not None:
            self._index.apply(entry.slot, frame.cache)
        if entry.unreported:
            began = now - (frame.load.step_age_s or 0.0) - REPORT_MARGIN_S
            entry.unreported = {s: sent for s, sent in entry.unreported.items() if sent[0] > began}
        self._refresh_load(entry)
        self._refresh_readiness(entry, now)
        self._on_report(entry)

    def _refresh_load(self, entry: ReplicaEntry) -> None:
        slot = entry.slot
        if slot is None:
            return
        load, unreported = entry.replica.load, entry.unreported
        # Most frames say what the one before said, and to write a row costs as much as all else about a frame.
        known = (
            load.num_running, load.num_waiting, load.num_background, load.num_pending_tokens, load.num_background_pending_tokens,
            load.tokens_per_s, load.num_used_blocks, load.num_background_blocks, load.num_blocks, len(entry.streams), entry.num_background,
        )  # fmt: skip
        if known == entry.in_rows:
            return
        entry.in_rows = None if unreported else known
        num_reported = load.num_running + load.num_waiting
        online = [tokens for stream, (_, tokens) in unreported.items() if not stream.is_background]
        num_online = num_reported - load.num_background + len(online)
        self._rows.set_load(
            slot,
            background=False,
            num_requests=max(len(entry.streams) - entry.num_background, num_online),
            pending_tokens=load.num_pending_tokens - load.num_background_pending_tokens + sum(online),
            tokens_per_s=load.tokens_per_s,
            kv_usage=(load.num_used_blocks - load.num_background_blocks) / load.num_blocks if load.num_blocks else 0.0,
        )
        self._rows.set_load(
            slot,
            background=True,
            num_requests=max(len(entry.streams), num_reported + len(unreported)),
            pending_tokens=load.num_pending_tokens + sum(tokens for _, tokens in unreported.values()),
            tokens_per_s=load.tokens_per_s,
            kv_usage=load.num_used_blocks / load.num_blocks if load.num_blocks else 0.0,
        )

    def _refresh_readiness(self, entry: ReplicaEntry, now: float) -> None:
        """Whether the replica accepts new requests, and for which of them it has room."""
        slot, replica = entry.slot, entry.replica
        assert slot is not None, "only replicas in the table are refreshed"
        self._rows.set_ready(slot, replica.drain_until is None and replica.is_ready(now))
        accepts = self._may_accept(entry, now)
        if accepts and not self._rows.has_limit(slot):
            self._rows.set_limit(slot, replica.facts.max_num_seqs)
            entry.in_rows = None
            self._refresh_load(entry)
        self._rows.set_accepts(slot, accepts)

    def _may_accept(self, entry: ReplicaEntry, now: float) -> bool:
        """A replica whose node is preempted is better than none."""
        replica = entry.replica
        if replica.drain_until is None:
            return replica.is_ready(now)
        return replica.is_leaving and now < replica.drain_until and not self.any_ready and replica.is_ready(now)

    def _slots_with(self, numerics: str) -> NDArray[np.bool_]:
        slots = np.zeros(len(self._no_match), np.bool_)
        slots[[slot for slot, entry in self._entries.items() if entry.numerics == numerics]] = True
        return slots

    def _decide(self, stream: Stream, numerics: str | None) -> Decision | None:
        view, rows = self._view(stream), self._rows.snapshot(background=stream.is_background)
        if numerics is not None:
            rows = with_available(rows, rows.available & self._slots_with(numerics))
        if stream.lost_on:
            others = rows.available.copy()
            for slot, entry in self._entries.items():
                if entry.replica in stream.lost_on:
                    others[slot] = False
            if others.any():
                rows = with_available(rows, others)
        return choose(self.policy, rows, view, turn=self._turn)

    def _view(self, stream: Stream) -> RequestView:
        facts = self.facts if stream.block_hashes else None
        if facts is None:
            return RequestView(stream.num_tokens, self._no_match)
        window = window_blocks(facts.sliding_window, facts.block_size)
        matched = self._index.match(stream.block_hashes, window_blocks=window)
        return RequestView(stream.num_tokens, matched * facts.block_size)
