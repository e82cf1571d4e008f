"""The gateway's side of the simulation, with the real policies and the real prefix index, and the event loop around it.

The gateway knows a replica's newest frame and what it has sent since. Decisions are measured in this
machine's CPU time; everything else happens on the simulated clock.
"""

import heapq
import time
from collections import deque
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

import numpy as np
from simulation.replica import Frame, Hardware, Replica, Sequence
from simulation.traces import TraceRequest

from cluster.protocol.routing import RoutingPolicy
from cluster.router.load_balancing.policy import RequestView, Snapshot, choose
from cluster.router.load_balancing.prefix_index import PrefixIndex
from workers.protocol import CacheEvents

MIN_DELAY_S, MAX_DELAY_S = 0.05, 0.5  # age of a frame when the gateway gets it


@dataclass
class Outcome:
    """The result of one run. Sequences are in the order of arrival."""

    sequences: list[Sequence] = field(default_factory=list)
    predicted_tokens: list[int] = field(default_factory=list)  # cached, as the decision expected
    decisions_s: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)  # per replica
    busy: list[float] = field(default_factory=list)  # per replica, fraction of the time


class SimulatedGateway:
    def __init__(self, policy: RoutingPolicy, num_replicas: int, hardware: Hardware) -> None:
        n = num_replicas
        self.policy = policy
        self.block_size = hardware.block_size
        self.index = PrefixIndex()
        for slot in range(n):
            self.index.add(slot)
        self.snapshot = Snapshot(
            available=np.ones(n, np.bool_),
            num_requests=np.zeros(n, np.int64),
            pending_tokens=np.zeros(n),
            tokens_per_s=np.zeros(n),
            kv_usage=np.zeros(n),
            max_num_seqs=np.full(n, hardware.max_num_seqs),
        )
        self.turn = 0
        self.decisions_s: list[float] = []
        self._num_own = [0] * n
        self._reported_tokens = [0] * n
        self._reported_requests = [0] * n
        self._unreported: list[deque[tuple[float, int]]] = [deque() for _ in range(n)]  # (sent, tokens)
        self._unreported_tokens = [0] * n

    def route(self, request: TraceRequest, now: float) -> tuple[int, int]:
        """(slot, prompt tokens expected in its cache)."""
        began = time.thread_time()
        num_blocks = (request.num_prompt_tokens - 1) // self.block_size
        matched = self.index.match(request.hashes[:num_blocks], window_blocks=None)
        view = RequestView(request.num_prompt_tokens, matched * self.block_size)
        decision = choose(self.policy, self.snapshot, view, turn=self.turn)
        self.decisions_s.append(time.thread_time() - began)
        assert decision is not None, "every simulated replica is available"
        self.turn += 1
        slot, cached = decision.slot, decision.num_cached_tokens
        self._num_own[slot] += 1
        self._unreported[slot].append((now, request.num_prompt_tokens - cached))
        self._unreported_tokens[slot] += request.num_prompt_tokens - cached
        self._refresh(slot)
        return slot, cached

    def receive(self, frame: Frame) -> None:
        slot, snapshot = frame.slot, self.snapshot
        if frame.stored or frame.evicted:
            self.index.apply(slot, CacheEvents(stored=frame.stored, evicted=frame.evicted))
        self._num_own[slot] -= len(frame.finished)
        self._reported_requests[slot] = frame.num_requests
        self._reported_tokens[slot] = frame.num_pending_tokens
        unreported = self._unreported[slot]
        while unreported and unreported[0][0] <= frame.made_s:
            self._unreported_tokens[slot] -= unreported.popleft()[1]
        snapshot.tokens_per_s[slot] = frame.tokens_per_s
        snapshot.kv_usage[slot] = frame.kv_usage
        self._refresh(slot)

    def _refresh(self, slot: int) -> None:
        self.snapshot.num_requests[slot] = max(self._num_own[slot], self._reported_requests[slot])
        self.snapshot.pending_tokens[slot] = self._reported_tokens[slot] + self._unreported_tokens[slot]


def simulate(
    requests: Series[TraceRequest],
    *,
    policy: RoutingPolicy,
    num_replicas: int,
    hardware: Hardware,
    num_gateways: int = 1,
) -> Outcome:
    """Runs the requests in order of arrival, until the last one ends. Gateways take turns and know nothing about each other."""
    replicas = [Replica(slot, hardware) for slot in range(num_replicas)]
    gateways = [SimulatedGateway(policy, num_replicas, hardware) for _ in range(num_gateways)]
    # Golden-ratio steps spread the delays evenly; one replica's frames always take the same time and stay in order.
    delays = [MIN_DELAY_S + (MAX_DELAY_S - MIN_DELAY_S) * (slot * 0.618 % 1.0) for slot in range(num_replicas)]
    outcome = Outcome()
    events: list[tuple[float, int, Replica | Frame]] = []
    ends: list[float | None] = [None] * num_replicas
    order = 0

    def schedule(replica: Replica, at: float | None) -> None:
        nonlocal order
        ends[replica.slot] = at
        if at is not None:
            order += 1
            heapq.heappush(events, (at, order, replica))

    def play(until: float) -> None:
        nonlocal order
        while events and events[0][0] <= until:
            at, _, what = heapq.heappop(events)
            if isinstance(what, Frame):
                for gateway in gateways:
                    gateway.receive(what)
            elif ends[what.slot] == at:
                frame, end = what.end_step(at)
                order += 1
                heapq.heappush(events, (at + delays[what.slot], order, frame))
                schedule(what, end)

    for number, request in enumerate(requests):
        now = request.arrival_s
        play(now)
        slot, predicted = gateways[number % num_gateways].route(request, now)
        sequence = Sequence(request, now)
        outcome.sequences.append(sequence)
        outcome.predicted_tokens.append(predicted)
        end = replicas[slot].submit(sequence, now)
        if end is not None:
            schedule(replicas[slot], end)
    outcome.decisions_s = [s for gateway in gateways for s in gateway.decisions_s]
    last_arrival = requests[-1].arrival_s
    play(last_arrival)
    outcome.busy = [r.busy_s / last_arrival for r in replicas]
    play(float("inf"))
    outcome.computed_tokens = [r.num_computed_tokens for r in replicas]
    return outcome
