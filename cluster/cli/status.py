"""`tramontane status`: replicas, ranks, nodes, KV use and throughput as a table, live on a terminal.

Reads one endpoint, `GET /admin/cluster`, which answers with a ClusterView. Rates are differences between two answers. Does not use Ray:
it runs on any machine that can reach the endpoint.
"""

import sys
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.client import Client
from cluster.protocol.adapters import RevisionState
from cluster.protocol.view import ClusterView, DeploymentRecord, NodeNotice, RankRecord, ReplicaRecord, ReplicaState
from cluster.terminal.tables import answer_console, plain_table
from workers.config import describe_dtype
from workers.errors import ReplicaUnavailableError

ADMIN_PATH = "/admin/cluster"
REQUEST_TIMEOUT_S = 5.0
WINDOW_S = 5.0  # rates are averages over about this time
NOTHING = "–"
_STYLES = {
    ReplicaState.PLACING: "yellow",
    ReplicaState.STARTING: "yellow",
    ReplicaState.READY: "green",
    ReplicaState.DRAINING: "cyan",
    ReplicaState.LOST: "red",
}


@dataclass(frozen=True, kw_only=True)
class RankRate:
    """Averages over the window; None where nothing happened or the time is not measured."""

    step_s: float | None = None
    all_reduce_s: float | None = None  # per step


@dataclass(frozen=True, kw_only=True)
class ReplicaRate:
    """`tokens_per_s`: generated tokens; None before a second poll. `ranks` in the order of the replica's record."""

    tokens_per_s: float | None = None
    ranks: tuple[RankRate, ...] = ()


@dataclass(frozen=True)
class Sample:
    view: ClusterView
    at_s: float  # time.monotonic()


def status(args: Namespace) -> None:
    """args: url, api_key, ca_cert, watch (seconds between two polls), once, json. Raises ConfigError, ReplicaUnavailableError."""
    console = answer_console()
    with Client(args.url, api_key=args.api_key, ca_cert=args.ca_cert, timeout_s=REQUEST_TIMEOUT_S) as client:
        if not (args.json or args.once) and sys.stdout.isatty():
            _watch(client, console, every_s=args.watch)
        samples = [poll(client)]
        time.sleep(args.watch)
        samples.append(poll(client))
    if args.json:
        sys.stdout.write(to_json(samples) + "\n")
    else:
        console.print(render(samples, now=time.time()))


def _watch(client: Client, console: Console, *, every_s: float) -> NoReturn:
    """Until Ctrl-C."""
    samples = deque([poll(client)])
    trouble = ""
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            table = render(list(samples), now=time.time())
            live.update(Group(table, Text(trouble, style="red")) if trouble else table, refresh=True)
            time.sleep(every_s)
            try:
                samples.append(poll(client))
                trouble = ""
            except ReplicaUnavailableError as e:  # it may be restarting
                trouble = str(e)
            while len(samples) > 2 and samples[-1].at_s - samples[1].at_s >= WINDOW_S:
                samples.popleft()


def poll(client: Client) -> Sample:
    """The state of the cluster now. Raises ReplicaUnavailableError when a later poll may succeed, ConfigError when none will."""
    view = client.get(ADMIN_PATH, ClusterView)
    return Sample(view, time.monotonic())


def rates(samples: Sequence[Sample]) -> list[ReplicaRate]:
    """One per replica of the newest sample, in its order, since the oldest sample with the same incarnation of the replica."""
    last = samples[-1]
    found = []
    for replica in last.view.replicas:
        known = ((s, r) for s in samples[:-1] for r in s.view.replicas if r.incarnation == replica.incarnation)
        first = next(known, None)
        found.append(ReplicaRate() if first is None else _rate(first[1], replica, last.at_s - first[0].at_s))
    return found


def _rate(before: ReplicaRecord, after: ReplicaRecord, elapsed_s: float) -> ReplicaRate:
    num_tokens = after.load.generated_tokens_total - before.load.generated_tokens_total
    # No strict zip: ranks appear while a replica starts.
    ranks = tuple(_rank_rate(a, b) for a, b in zip(before.ranks, after.ranks, strict=False))
    return ReplicaRate(tokens_per_s=max(num_tokens, 0) / elapsed_s if elapsed_s > 0 else None, ranks=ranks)


def _rank_rate(before: RankRecord, after: RankRecord) -> RankRate:
    a, b = before.stats, after.stats
    num_steps = b.num_steps_total - a.num_steps_total
    if num_steps <= 0:
        return RankRate()
    known = a.all_reduce_s_total is not None and b.all_reduce_s_total is not None
    return RankRate(
        step_s=(b.step_s_total - a.step_s_total) / num_steps,
        all_reduce_s=(b.all_reduce_s_total - a.all_reduce_s_total) / num_steps if known else None,  # type: ignore[operator]
    )


def to_json(samples: Sequence[Sample]) -> str:
    """The ClusterView and `rates` by replica id."""
    view = samples[-1].view
    by_id = {r.replica_id: asdict(rate) for r, rate in zip(view.replicas, rates(samples), strict=True)}
    body = {**msgspec.to_builtins(view), "rates": by_id}
    return msgspec.json.format(msgspec.json.encode(body), indent=2).decode()


def render(samples: Sequence[Sample], *, now: float) -> RenderableType:
    """The table, which fits 80 columns. Step and Reduce are times per step; Hits is the share of prompt tokens found cached.

    now: time.time().
    """
    view = samples[-1].view
    table = plain_table()
    for name in ("Replica", "State", "Rank", "Node"):
        table.add_column(name, no_wrap=True)
    for name in ("Step ms", "Reduce", "Run", "Wait", "KV", "Tok/s", "Hits", "Up"):
        table.add_column(name, justify="right", no_wrap=True)
    nodes = _node_names(view)
    notes = [r.reason for r in view.replicas if r.reason] + _kinds(view)
    for replica, rate in zip(view.replicas, rates(samples), strict=True):
        _add_rows(table, replica, rate, nodes, now)
    notes += _adapters(view)
    if view.failure is not None:
        notes.append(f"No more replicas are started: {view.failure}")
    notes += [_departure(notice, now) for notice in view.notices]
    gateways = ", ".join(f"{g.url} ({g.num_running} running, {g.num_queued} queued)" for g in view.gateways)
    notes.append(f"Gateways: {gateways or 'none'}")
    return Group(*(Text(line, style="bold") for line in _headlines(view)), table, *(Text(note) for note in notes))


def _kinds(view: ClusterView) -> list[str]:
    """Which replicas compute the same bits, if not all of a deployment do."""
    notes = []
    for own in [d.replica_ids for d in view.deployments] or [tuple(r.replica_id for r in view.replicas)]:
        kinds: dict[str, list[str]] = {}
        for replica in view.replicas:
            if replica.facts is not None and replica.replica_id in own:
                kinds.setdefault(replica.facts.numerics, []).append(replica.replica_id)
        notes += [
            f"Replicas with the numerics {kind}: {', '.join(ids)}" for kind, ids in kinds.items() if len(kinds) > 1
        ]
    return notes


def _adapters(view: ClusterView) -> list[str]:
    """What each adapter serves, and what is on its way."""
    notes = []
    for adapter in view.adapters.adapters:
        parts = [adapter.current or "nothing yet"]
        if adapter.canary is not None:
            parts.append(f"canary {adapter.canary} for {100 * adapter.canary_share:g} %")
        own = [r for r in view.adapters.revisions if r.name == adapter.name]
        parts += [f"{r.digest} {r.state.value}" for r in own if r.state is not RevisionState.READY]
        notes.append(f"Adapter {adapter.name}: {', '.join(parts)}")
    return notes


def _departure(notice: NodeNotice, now: float) -> str:
    left_s = max(notice.deadline - now, 0)
    so_far = (
        ""
        if notice.drained_at is None
        else f" It was drained {notice.drained_at - notice.seen_at:.1f} s after the notice."
    )
    what = (
        f"The head node {notice.node_ip}, and with it the whole cluster,"
        if notice.is_head
        else f"Node {notice.node_ip}"
    )
    return f"{what} will be preempted in {_duration(left_s)}: {notice.cause}{so_far}"


def _node_names(view: ClusterView) -> dict[str, str]:
    """Node id -> address, with the start of the id where several nodes share an address."""
    ips = {rank.node_id: rank.node_ip for replica in view.replicas for rank in replica.ranks}
    count = Counter(ips.values())
    return {node_id: ip if count[ip] == 1 else f"{ip} {node_id[:6]}" for node_id, ip in ips.items()}


def _headlines(view: ClusterView) -> list[str]:
    """One for each deployment."""
    if not view.deployments:
        return [_headline(view, view.replicas)]
    return [_headline(d, [r for r in view.replicas if r.replica_id in d.replica_ids]) for d in view.deployments]


def _headline(of: ClusterView | DeploymentRecord, replicas: Sequence[ReplicaRecord]) -> str:
    num_ready = sum(r.state is ReplicaState.READY for r in replicas)
    name = of.spec.model_name if of.spec is not None else "no model yet"
    if of.facts is not None and of.facts.dtype:
        name += f" ({describe_dtype(of.facts.dtype, of.facts.quantization)})"
    why = f". {of.scaling_reason}" if of.scaling_reason else ""
    return f"{name}: {num_ready} of {of.num_desired} replica{'s' * (of.num_desired != 1)} ready{why}"


def _add_rows(table: Table, replica: ReplicaRecord, rate: ReplicaRate, nodes: Mapping[str, str], now: float) -> None:
    """One row per rank; the first one also shows the columns of the replica."""
    load = replica.load
    whole = (
        str(load.num_running),
        str(load.num_waiting),
        _share(load.num_used_blocks, load.num_blocks),
        NOTHING if rate.tokens_per_s is None else f"{rate.tokens_per_s:,.0f}",
        _share(load.prefix_hits_total, load.prefix_queries_total),
        NOTHING if replica.ready_at is None else _duration(now - replica.ready_at),
    )
    name, state = Text(replica.replica_id), Text(_state(replica, now), style=_STYLES[replica.state])
    if not replica.ranks:
        table.add_row(name, state, NOTHING, NOTHING, NOTHING, NOTHING, *whole)
    for i, rank in enumerate(replica.ranks):
        stuck = rank.rank in load.stuck_ranks
        number = Text(f"{rank.rank} stuck" if stuck else str(rank.rank), style="red" if stuck else "")
        node = Text(nodes[rank.node_id])
        times = map(_milliseconds, _times(rate, i))
        if i == 0:
            table.add_row(name, state, number, node, *times, *whole)
        else:
            table.add_row("", "", number, node, *times, *([""] * len(whole)))


def _times(rate: ReplicaRate, index: int) -> tuple[float | None, float | None]:
    rank = rate.ranks[index] if index < len(rate.ranks) else RankRate()
    return rank.step_s, rank.all_reduce_s


def _state(replica: ReplicaRecord, now: float) -> str:
    if replica.state is ReplicaState.STARTING:
        done, total = replica.progress
        return f"{replica.phase or 'starting'} {100 * done // total}%" if total else replica.phase or "starting"
    if replica.state is ReplicaState.DRAINING and replica.drain_until is not None:
        return f"draining {max(replica.drain_until - now, 0):.0f}s"
    return replica.state.value


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else NOTHING


def _milliseconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds * 1e3:.1f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{s:02}s" if minutes else f"{s}s"
