"""Explains where the router would send a request and why, without sending it. Knows the table and a policy's rows."""

from dataclasses import dataclass

from cluster.protocol.routing import RoutingPolicy
from cluster.router.load_balancing.table import ReplicaTable
from cluster.router.stream import Stream


@dataclass(frozen=True, slots=True)
class RouteRow:
    """One replica as the decision saw it. The lowest score wins; None: not eligible."""

    replica_id: str
    available: bool
    num_cached_tokens: int
    pending_tokens: float
    num_requests: int
    estimated_wait_s: float
    score: float | None
    chosen: bool
    numerics: str | None = None  # see EngineFacts: a stream with tokens continues where they are the same


@dataclass(frozen=True, slots=True)
class Explanation:
    """`chosen` is None if the request would wait at the router."""

    policy: RoutingPolicy
    num_prompt_tokens: int
    chosen: str | None
    reason: str
    num_waiting: int
    replicas: list[RouteRow]


def explain_route(table: ReplicaTable, stream: Stream, policy: RoutingPolicy, *, num_waiting: int) -> Explanation:
    rows = [
        RouteRow(
            replica_id=entry.replica.replica_id,
            available=row.available,
            num_cached_tokens=row.num_cached_tokens,
            pending_tokens=row.pending_tokens,
            num_requests=row.num_requests,
            estimated_wait_s=row.estimated_wait_s,
            score=row.score,
            chosen=row.chosen,
            numerics=entry.numerics,
        )
        for entry, row in table.explain(stream, policy)
    ]
    chosen = next((r for r in rows if r.chosen), None)
    num_available = sum(r.available for r in rows)
    if chosen is None:
        reason = f"None of {len(rows)} replicas is ready and has room; the request would wait at the router."
    else:
        why = {
            "prefix": f"is expected to have the first token soonest ({chosen.estimated_wait_s:.3f} s)",
            "least_load": "holds the fewest requests",
            "round_robin": "is the next in turn",
        }[policy]
        reason = (
            f"Replica {chosen.replica_id} {why} of {num_available} available; {chosen.num_cached_tokens} of the "
            f"prompt's {stream.num_tokens} tokens are cached there."
        )
        if num_waiting:
            reason += f" {num_waiting} sequences wait at the router and may go first."
    return Explanation(policy, stream.num_tokens, chosen.replica_id if chosen else None, reason, num_waiting, rows)
