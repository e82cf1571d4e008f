"""`tramontane status`: replicas, ranks, nodes, KV use and throughput as a table, live on a terminal.

Reads one endpoint, `GET /admin/cluster`, which answers with a ClusterView. Rates are differences between two answers. Knows no Ray: it
runs wherever the endpoint can be reached.
"""

import http.client
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.protocol.view import ClusterView, NodeNotice, RankRecord, ReplicaRecord, ReplicaState
from cluster.system.tls import client_context, distrust
from cluster.terminal.tables import answer_console, plain_table
from workers.errors import ConfigError, ReplicaUnavailableError

ADMIN_PATH = "/admin/cluster"
REQUEST_TIMEOUT_S = 5.0
WINDOW_S = 5.0  # rates are means over about this long
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
    """Means over the window, None where nothing happened or the time is not measured."""

    step_s: float | None = None
    all_reduce_s: float | None = None  # per step


@dataclass(frozen=True, kw_only=True)
class ReplicaRate:
    """`tokens_per_s`: generated tokens; None before a second look. `ranks` as in the replica's record."""

    tokens_per_s: float | None = None
    ranks: tuple[RankRate, ...] = ()


@dataclass(frozen=True)
class Sample:
    view: ClusterView
    at_s: float  # time.monotonic()


def status(args: Namespace) -> None:
    """args: url, api_key, ca_cert, watch (seconds between two looks), once, json. Raises ConfigError, ReplicaUnavailableError."""
    is_terminal = sys.stdout.isatty()
    console = answer_console()
    if args.json or args.once or not is_terminal:
        samples = [_look(args)]
        time.sleep(args.watch)
        samples.append(_look(args))
        if args.json:
            sys.stdout.write(to_json(samples) + "\n")
        else:
            console.print(render(samples, now=time.time()))
        return
    _watch(args, console)


def _watch(args: Namespace, console: Console) -> None:
    samples = deque([_look(args)])
    trouble = ""
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            table = render(list(samples), now=time.time())
            live.update(Group(table, Text(trouble, style="red")) if trouble else table, refresh=True)
            time.sleep(args.watch)
            try:
                samples.append(_look(args))
                trouble = ""
            except ReplicaUnavailableError as e:  # it may be restarted just now
                trouble = str(e)
            while len(samples) > 2 and samples[-1].at_s - samples[1].at_s >= WINDOW_S:
                samples.popleft()


def _look(args: Namespace) -> Sample:
    view = fetch(args.url, args.api_key, ca_cert=args.ca_cert)
    return Sample(view, time.monotonic())


def fetch(url: str, api_key: str | None, *, ca_cert: Path | None = None) -> ClusterView:
    """Raises ReplicaUnavailableError when nothing useful answers now, ConfigError when it never will."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url} is not the address of a server; write it like http://127.0.0.1:8000.")
    request = urllib.request.Request(url.rstrip("/") + ADMIN_PATH)
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        context = client_context(ca_cert)
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=context) as response:
            body = response.read()
    except urllib.error.HTTPError as e:
        raise _refusal(url, e) from e
    except (OSError, http.client.HTTPException) as e:
        if distrusted := distrust(url, e):
            raise distrusted from e
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        reason = getattr(reason, "strerror", None) or reason
        raise ReplicaUnavailableError(
            f"Nothing answers at {url} ({reason}); start `tramontane serve` there, or name another address with --url."
        ) from e
    try:
        return msgspec.json.decode(body, type=ClusterView)
    except msgspec.DecodeError as e:
        raise ConfigError(
            f"What answers at {url} is not a Tramontane of this version ({e}); use the `tramontane` it was started with."
        ) from e


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    if error.code in (401, 403):
        return ConfigError(f"The server at {url} wants an admin's API key; pass --api-key or set TRAMONTANE_API_KEY.")
    if error.code == 404:
        return ConfigError(
            f"The server at {url} has no {ADMIN_PATH}; --url must be a Tramontane gateway without a path behind it."
        )
    return ReplicaUnavailableError(f"The server at {url} answered {error.code} {error.reason}; its log says why.")


def rates(samples: Sequence[Sample]) -> list[ReplicaRate]:
    """Of the newest sample's replicas, in their order, since the oldest sample that knew the same start of the replica."""
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
    """What a person sees, in 80 columns. Step and all-reduce are per step; Hits: prompt tokens found cached. now: time.time()."""
    view = samples[-1].view
    table = plain_table()
    for name in ("Replica", "State", "Rank", "Node"):
        table.add_column(name, no_wrap=True)
    for name in ("Step ms", "Reduce", "Run", "Wait", "KV", "Tok/s", "Hits", "Up"):
        table.add_column(name, justify="right", no_wrap=True)
    nodes = _node_names(view)
    notes = [r.reason for r in view.replicas if r.reason]
    for replica, rate in zip(view.replicas, rates(samples), strict=True):
        _add_rows(table, replica, rate, nodes, now)
    if view.failure is not None:
        notes.append(f"Starting replicas is given up: {view.failure[1]}")
    notes += [_departure(notice, now) for notice in view.notices]
    gateways = ", ".join(f"{g.url} ({g.num_running} running, {g.num_queued} queued)" for g in view.gateways)
    notes.append(f"Gateways: {gateways or 'none'}")
    return Group(Text(_headline(view), style="bold"), table, *(Text(note) for note in notes))


def _departure(notice: NodeNotice, now: float) -> str:
    left_s = max(notice.deadline - now, 0)
    so_far = (
        ""
        if notice.drained_at is None
        else f" It was drained {notice.drained_at - notice.seen_at:.1f} s after the notice."
    )
    what = f"The head node {notice.node_ip}, and everything with it," if notice.is_head else f"Node {notice.node_ip}"
    return f"{what} goes away in {_duration(left_s)}: {notice.cause}{so_far}"


def _node_names(view: ClusterView) -> dict[str, str]:
    """By id: the address, and the id's beginning where several nodes share an address."""
    ips = {rank.node_id: rank.node_ip for replica in view.replicas for rank in replica.ranks}
    count = Counter(ips.values())
    return {node_id: ip if count[ip] == 1 else f"{ip} {node_id[:6]}" for node_id, ip in ips.items()}


def _headline(view: ClusterView) -> str:
    num_ready = sum(r.state is ReplicaState.READY for r in view.replicas)
    name = view.spec.model_name if view.spec is not None else "no model yet"
    why = f" ({view.scaling_reason})" if view.scaling_reason else ""
    return f"{name}: {num_ready} of {view.num_desired} replica{'s' * (view.num_desired != 1)} ready{why}"


def _add_rows(table: Table, replica: ReplicaRecord, rate: ReplicaRate, nodes: Mapping[str, str], now: float) -> None:
    """One row per rank; what is the replica's stands in the first."""
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
