"""What a preemption notice leads to: which replicas to drain, by when, and how close the deadline must be. Pure; no Ray, no clock.

When a worker node is preempted, its replicas end and their streams move. When the head node is preempted, all of Ray ends with it: there
is nowhere to move to, so nothing is drained and nothing is started, and gateways shut down in order (cluster/gateway/preemption.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.protocol.view import NodeNotice, ReplicaRecord, ReplicaState

# Clouds announce maintenance up to an hour ahead; the node keeps serving until the deadline is this close.
DUE_WITHIN_S = 150.0
# Streams that found no room elsewhere move this long before the deadline in any case.
MOVE_AHEAD_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ReplicaToDrain:
    replica_id: str
    until: float  # time.time() by which its streams move
    reason: str


def is_due(notice: NodeNotice, now: float) -> bool:
    """Whether the deadline is so close that it is time to act."""
    return notice.deadline - now <= DUE_WITHIN_S


def notices_from_ray(
    draining: Mapping[str, int], records: Sequence[ReplicaRecord], *, unknown_s: float, now: float
) -> tuple[NodeNotice, ...]:
    """A notice for each node that Ray drains. draining: node id -> Unix milliseconds or 0. unknown_s: seconds for a node without a
    deadline.
    """
    ips = {rank.node_id: rank.node_ip for record in records for rank in record.ranks}
    return tuple(
        NodeNotice(
            node_id=node_id,
            node_ip=ips.get(node_id, node_id[:6]),
            is_head=False,
            source="ray",
            cause="Ray is draining it.",
            deadline=deadline_ms / 1000 if deadline_ms else now + unknown_s,
            seen_at=now,
        )
        for node_id, deadline_ms in draining.items()
    )


def replicas_to_drain(
    notices: Sequence[NodeNotice], records: Sequence[ReplicaRecord], now: float
) -> list[ReplicaToDrain]:
    """The replicas with a rank on a worker node whose notice is due."""
    found = []
    for notice in notices:
        if notice.is_head or not is_due(notice, now):
            continue
        for record in records:
            if record.state is not ReplicaState.LOST and is_on(record, notice.node_id):
                reason = (
                    f"Replica {record.replica_id} is being drained: its node {notice.node_ip} will be removed. "
                    f"{notice.cause}"
                )
                until = max(now, notice.deadline - MOVE_AHEAD_S)
                found.append(ReplicaToDrain(replica_id=record.replica_id, until=until, reason=reason))
    return found


def is_on(record: ReplicaRecord, node_id: str) -> bool:
    return any(rank.node_id == node_id for rank in record.ranks)


def head_notice(notices: Sequence[NodeNotice], now: float) -> NodeNotice | None:
    """The head node's notice, once it is due: everything on this Ray cluster will end."""
    return next((n for n in notices if n.is_head and is_due(n, now)), None)
