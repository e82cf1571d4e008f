"""What is true about the replicas now, in words for load balancers and people. Knows the table; decides nothing."""

from dataclasses import dataclass
from typing import Literal

from cluster.router.replica import Outlook
from cluster.router.table import ReplicaTable
from workers.protocol import LoadReport

ASLEEP = "No replica runs; the next request starts one."


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    replica_id: str
    ready: bool
    reason: str | None
    load: LoadReport
    state: Literal["ready", "not_ready", "draining"] = "ready"


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: a request sent now would be taken, if need be by starting a replica. `reason` is one sentence when none runs."""

    ready: bool
    reason: str | None
    replicas: list[ReplicaStatus]


def look(table: ReplicaTable, outlook: Outlook, *, closing: str | None, now: float) -> Health:
    """closing: why this gateway wants nothing new, in a sentence."""
    statuses = []
    for seat in table:
        replica = seat.replica
        reason = replica.not_ready_reason(now)
        if reason is None and replica.drain_until is not None:
            reason = f"Replica {replica.replica_id} is being drained."
            statuses.append(ReplicaStatus(replica.replica_id, False, reason, replica.load, "draining"))
        else:
            state: Literal["ready", "not_ready"] = "ready" if reason is None else "not_ready"
            statuses.append(ReplicaStatus(replica.replica_id, reason is None, reason, replica.load, state))
    if closing is not None:
        return Health(False, closing, statuses)
    if any(s.ready for s in statuses) or table.look_for_ready():
        return Health(True, None, statuses)
    if outlook.expected and outlook.asleep:
        return Health(True, outlook.reason or ASLEEP, statuses)
    reasons = [s.reason for s in statuses if s.reason]
    return Health(False, outlook.reason or " ".join(reasons) or "The server has no replica.", statuses)
