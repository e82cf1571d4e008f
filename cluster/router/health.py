"""The health of the gateway and its replicas, for load balancers and people. Reads the table; decides nothing.

A replica that is late with a report counts as ready for a few seconds: a busy machine does not mean an outage, and requests wait for it
in the queue.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.router.load_balancing.table import ReplicaTable
from cluster.router.replica import Availability
from workers.protocol import LoadReport

SCALED_TO_ZERO = "No replica runs; the next request starts one."


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    replica_id: str
    ready: bool
    reason: str | None
    load: LoadReport
    state: Literal["ready", "not_ready", "draining"] = "ready"
    numerics: str | None = None  # see EngineFacts


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: a request sent now would be served, if need be by starting a replica. `reason`: one sentence if no replica is ready."""

    ready: bool
    reason: str | None
    replicas: list[ReplicaStatus]


def check_health(table: ReplicaTable, availability: Availability, *, closing: str | None, now: float) -> Health:
    """closing: why this gateway accepts no new requests, one sentence, or None."""
    statuses = []
    for entry in table:
        replica = entry.replica
        reason = replica.unhealthy_reason(now)
        if reason is None and replica.drain_until is not None:
            reason = f"Replica {replica.replica_id} is being drained."
            statuses.append(ReplicaStatus(replica.replica_id, False, reason, replica.load, "draining", entry.numerics))
        else:
            state: Literal["ready", "not_ready"] = "ready" if reason is None else "not_ready"
            statuses.append(
                ReplicaStatus(replica.replica_id, reason is None, reason, replica.load, state, entry.numerics)
            )
    if closing is not None:
        return Health(False, closing, statuses)
    if any(s.ready for s in statuses) or table.accepts_requests():
        return Health(True, None, statuses)
    if availability.expected and availability.scaled_to_zero:
        return Health(True, availability.reason or SCALED_TO_ZERO, statuses)
    reasons = [s.reason for s in statuses if s.reason]
    return Health(False, availability.reason or " ".join(reasons) or "The server has no replica.", statuses)
