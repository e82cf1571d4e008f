"""A whole benchmark: every level on every server, round by round, with warm-up requests before each run.

Alternates the servers, and which one comes first, so that a machine that changes its speed does not favor one. Knows no report.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.bench.exchange import Body, Outcome, exchange
from cluster.bench.load import Clock, Loaded, run_load
from cluster.bench.probe import Server
from cluster.bench.transport import Transport
from cluster.bench.workload import DEFAULT_WARMUP, Level, Shape, closed_level, plan_requests


@dataclass(frozen=True, kw_only=True)
class Plan:
    """limit_s: of a run, after which no request is sent. num_warmup: requests before each run; None: as many as streams, 8 at most."""

    levels: Sequence[Level]
    shape: Shape
    num_rounds: int
    seed: int
    num_warmup: int | None = None
    limit_s: float | None = None

    @property
    def num_runs_of_a_server(self) -> int:
        return self.num_rounds * len(self.levels)


@dataclass(slots=True)
class Run:
    """One level on one server in one round. Indexes count from 0."""

    server: int
    level: int
    round: int
    loaded: Loaded


@dataclass(slots=True)
class Progress:
    """Of the run that is going on. what: names it."""

    what: str
    num_requests: int
    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class Watch:
    """Called after each request."""

    show: Callable[[Progress], None] = field(default=lambda _: None)


async def run_rounds(
    plan: Plan,
    servers: Sequence[tuple[Server, Transport]],
    *,
    clock: Clock,
    stop: asyncio.Event,
    runs: list[Run],
    watch: Watch,
) -> None:
    """Adds to `runs` as they end. `stop` ends it early; the run that is going on is kept with what it has."""
    for round_ in range(plan.num_rounds):
        for i, level in enumerate(plan.levels):
            order = list(enumerate(servers))
            if (round_ + i) % 2:
                order.reverse()
            for server_index, (server, transport) in order:
                if stop.is_set():
                    return
                what = level.label
                if plan.num_rounds > 1:
                    what += f", round {round_ + 1} of {plan.num_rounds}"
                if len(servers) > 1:
                    what += f", {server.name}"
                seed = plan.seed + round_
                loaded = await _run(plan, level, server, transport, clock, stop, watch, what, (seed, server_index, i))
                if loaded is not None:
                    runs.append(Run(server_index, i, round_, loaded))


async def _run(
    plan: Plan,
    level: Level,
    server: Server,
    transport: Transport,
    clock: Clock,
    stop: asyncio.Event,
    watch: Watch,
    what: str,
    place: tuple[int, int, int],
) -> Loaded | None:
    """place: seed, and the indexes of server and level. None if it was stopped during the warm-up."""
    seed, server_index, level_index = place
    salt = 2 * (1_000 * level_index + server_index)
    num_warmup = plan.num_warmup
    if num_warmup is None:
        num_warmup = min(level.num_streams or DEFAULT_WARMUP, DEFAULT_WARMUP)
    if num_warmup:
        warm = closed_level(num_warmup, num_requests=num_warmup)
        progress = Progress(f"{what}, warm-up", num_warmup)
        await _load(plan, warm, server, transport, clock, stop, watch, progress, seed=seed, salt=salt + 1)
    if stop.is_set():
        return None
    progress = Progress(what, level.num_requests)
    return await _load(plan, level, server, transport, clock, stop, watch, progress, seed=seed, salt=salt)


async def _load(
    plan: Plan,
    level: Level,
    server: Server,
    transport: Transport,
    clock: Clock,
    stop: asyncio.Event,
    watch: Watch,
    progress: Progress,
    *,
    seed: int,
    salt: int,
) -> Loaded:
    planned = plan_requests(level, plan.shape, seed=seed, salt=salt)
    bodies: list[Body] = [server.body(server.prompts.make(p), num_output=p.num_output) for p in planned]

    async def send(index: int, outcome: Outcome) -> None:
        await exchange(transport, bodies[index], outcome)

    def seen(outcome: Outcome) -> None:
        progress.num_done += 1
        progress.num_failed += outcome.failure is not None
        progress.num_tokens += outcome.num_output
        watch.show(progress)

    watch.show(progress)
    return await run_load(
        planned, send, num_streams=level.num_streams, clock=clock, stop=stop, limit_s=plan.limit_s, seen=seen
    )
