"""What a notice leads to: which replicas are drained and until when, and how near its end a node must be. Pure; no Ray, no clock.

A node that is not the head node takes its replicas along, and their streams move. The head node takes all of Ray along: there is
nowhere to move to, so nothing is drained and nothing is started; gateways end in order (cluster/gateway/departure.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.protocol.view import NodeNotice, ReplicaRecord, ReplicaState

# Clouds tell of maintenance up to an hour before; until it is this near, the node serves on.
LEAVES_WITHIN_S = 150.0
# Streams that found no room elsewhere move so long before the end in any case.
MOVE_AHEAD_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LeavingReplica:
    replica_id: str
    until: float  # time.time() at which its streams move at the latest
    reason: str


def is_due(notice: NodeNotice, now: float) -> bool:
    """Whether the node's end is so near that it is time to act."""
    return notice.deadline - now <= LEAVES_WITHIN_S


def from_ray(
    draining: Mapping[str, int], records: Sequence[ReplicaRecord], *, unknown_s: float, now: float
) -> tuple[NodeNotice, ...]:
    """The nodes that Ray drains. unknown_s: how long one without a deadline is given."""
    ips = {rank.node_id: rank.node_ip for record in records for rank in record.ranks}
    return tuple(
        NodeNotice(
            node_id=node_id,
            node_ip=ips.get(node_id, node_id[:6]),
            is_head=False,
            source="ray",
            cause="Ray drains it.",
            deadline=deadline_ms / 1000 if deadline_ms else now + unknown_s,
            seen_at=now,
        )
        for node_id, deadline_ms in draining.items()
    )


def leaving_replicas(
    notices: Sequence[NodeNotice], records: Sequence[ReplicaRecord], now: float
) -> list[LeavingReplica]:
    """Those with a rank on a node that goes away soon, and is not the head node."""
    found = []
    for notice in notices:
        if notice.is_head or not is_due(notice, now):
            continue
        for record in records:
            if record.state is not ReplicaState.LOST and is_on(record, notice.node_id):
                reason = (
                    f"Replica {record.replica_id} is being drained: its node {notice.node_ip} goes away. {notice.cause}"
                )
                until = max(now, notice.deadline - MOVE_AHEAD_S)
                found.append(LeavingReplica(replica_id=record.replica_id, until=until, reason=reason))
    return found


def is_on(record: ReplicaRecord, node_id: str) -> bool:
    return any(rank.node_id == node_id for rank in record.ranks)


def ending(notices: Sequence[NodeNotice], now: float) -> NodeNotice | None:
    """The head node's notice, once it is due: everything on this Ray cluster ends."""
    return next((n for n in notices if n.is_head and is_due(n, now)), None)
