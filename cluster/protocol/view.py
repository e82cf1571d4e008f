"""The cluster as it is: replicas, ranks, gateways and preemption notices. The controller makes the view, gateways and commands read it.

Frozen values, picklable, without Ray and without behaviour. Times are time.time(): they cross processes and hosts.
"""

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.protocol.notice import Cloud
from cluster.protocol.spec import ClusterSpec
from workers.protocol import EngineFacts, LoadReport

NoticeSource = Cloud | Literal["ray"]  # who says that a node goes away


class ReplicaState(enum.StrEnum):
    """A replica's life, in this order; LOST may follow any of the first four."""

    PLACING = "placing"  # its placement group waits for resources
    STARTING = "starting"  # ranks join, load, warm up
    READY = "ready"
    DRAINING = "draining"  # nothing new; what runs ends or moves
    LOST = "lost"  # over without being asked; its processes are being ended


@dataclass(frozen=True, kw_only=True)
class RankStats:
    """One rank's own counters. Seconds are of the host's clock; `all_reduce_s_total` is None where it runs asynchronously (CUDA)."""

    num_steps_total: int = 0
    step_s_total: float = 0.0
    num_all_reduces_total: int = 0
    all_reduce_s_total: float | None = None


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    rank: int
    node_id: str
    node_ip: str
    actor_name: str
    pid: int | None = None
    stats: RankStats = field(default_factory=RankStats)


@dataclass(frozen=True, kw_only=True)
class ReplicaRecord:
    """`address` and `token` open rank 0's socket; None until it listens. `reason`: one sentence, where there is something to say."""

    replica_id: str
    incarnation: str
    state: ReplicaState
    reason: str | None = None
    phase: str | None = None  # while STARTING: joining, loading, starting
    progress: tuple[int, int] = (0, 0)  # bytes of weights read, of how many
    address: tuple[str, int] | None = None
    token: str | None = field(default=None, repr=False)
    ranks: tuple[RankRecord, ...] = ()
    started_at: float = 0.0
    ready_at: float | None = None
    drain_until: float | None = None  # while DRAINING: when streams that still run must move
    is_leaving: bool = False  # while DRAINING: its node goes away, so streams move as soon as there is room elsewhere
    facts: EngineFacts | None = None
    load: LoadReport = field(default_factory=LoadReport)


@dataclass(frozen=True, kw_only=True)
class GatewayRecord:
    gateway_id: str
    url: str
    node_id: str | None
    num_running: int
    num_queued: int


@dataclass(frozen=True, kw_only=True)
class NodeNotice:
    """A node will be taken away. `cause`: a sentence of who does it. `deadline`: from when on it may be gone."""

    node_id: str
    node_ip: str
    is_head: bool  # everything on Ray ends with it
    source: NoticeSource
    cause: str
    deadline: float
    seen_at: float
    drained_at: float | None = None  # no replica has a rank there any more


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    """What is. `version` grows with every change of another field but `loads` and statistics."""

    version: int
    controller_id: str  # changes when the controller was restarted
    spec: ClusterSpec | None = None
    replicas: tuple[ReplicaRecord, ...] = ()
    gateways: tuple[GatewayRecord, ...] = ()
    notices: tuple[NodeNotice, ...] = ()  # of nodes that will be taken away
    num_notices_total: int = 0  # that this controller has seen
    num_desired: int = 0
    scaling_reason: str = ""
    failure: tuple[str, str] | None = (
        None  # (exception class, sentence): starting replicas cannot succeed, and is not tried again
    )
    facts: EngineFacts | None = None  # of the model served, known even while no replica runs


def without_secrets(view: ClusterView) -> ClusterView:
    """The view as it may be shown to people."""
    return replace(view, replicas=tuple(replace(r, token=None) for r in view.replicas))
