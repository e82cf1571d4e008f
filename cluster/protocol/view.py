"""The current state of the cluster: replicas, ranks, gateways and preemption notices. The controller writes it; gateways and commands
read it.

Frozen, picklable values without Ray and without behaviour. Times are time.time(), because they cross processes and hosts.
"""

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.protocol.adapters import NO_REGISTRY, Registry
from cluster.protocol.notice import Cloud
from cluster.protocol.spec import ClusterSpec
from workers.protocol import EngineFacts, LoadReport
from workers.rank.reports import RankStats

NoticeSource = Cloud | Literal["ray"]  # who announced that a node will be removed


class ReplicaState(enum.StrEnum):
    """The states of a replica, in order; LOST may follow any of the first four."""

    PLACING = "placing"  # its placement group waits for resources
    STARTING = "starting"  # ranks join, load, warm up
    READY = "ready"
    DRAINING = "draining"  # gets no new requests; running streams finish or move
    LOST = "lost"  # ended unexpectedly; its processes are being stopped


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
    """`address` and `token` open rank 0's socket; None until it listens. `reason`: why it is in this state, or None."""

    replica_id: str
    incarnation: str
    state: ReplicaState
    reason: str | None = None
    phase: str | None = None  # while STARTING: joining, loading, starting
    progress: tuple[int, int] = (0, 0)  # bytes of weights: read, in all
    address: tuple[str, int] | None = None
    token: str | None = field(default=None, repr=False)
    ranks: tuple[RankRecord, ...] = ()
    started_at: float = 0.0
    ready_at: float | None = None
    drain_until: float | None = None  # while DRAINING: when running streams must move
    # While DRAINING: its node is preempted, so streams move as soon as there is room elsewhere.
    is_leaving: bool = False
    facts: EngineFacts | None = None
    load: LoadReport = field(default_factory=LoadReport)
    adapters: tuple[str, ...] = ()  # the revisions that all of its ranks hold


@dataclass(frozen=True, kw_only=True)
class GatewayRecord:
    gateway_id: str
    url: str
    node_id: str | None
    num_running: int
    num_queued: int


@dataclass(frozen=True, kw_only=True)
class NodeNotice:
    """A node will be removed. `cause`: one sentence on who removes it and why. `deadline`: it may be gone from then on."""

    node_id: str
    node_ip: str
    is_head: bool  # everything on Ray ends with the head node
    source: NoticeSource
    cause: str
    deadline: float
    seen_at: float
    drained_at: float | None = None  # since when no replica has a rank there


@dataclass(frozen=True, kw_only=True)
class StartFailure:
    """Why no replica can start, and why the controller has stopped trying. The parts are those of a TramontaneError.

    kind: "config" for a setting that cannot work, "checkpoint" for files that cannot be loaded, "stopping" for a deployment that is
    being taken down.
    """

    kind: Literal["config", "checkpoint", "stopping"]
    message: str
    remedy: str | None = None

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message} {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class DeploymentRecord:
    """One of several deployments that share their gateways. Its replicas are those with `replica_ids`. `adapters`: names."""

    name: str
    replica_ids: tuple[str, ...]
    num_desired: int
    scaling_reason: str
    spec: ClusterSpec | None
    failure: StartFailure | None
    facts: EngineFacts | None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    """The state of the cluster. `version` grows with every change, except changes of loads and statistics.

    `deployments`: where a gateway joins the views of several; `spec`, `scaling_reason` and `facts` are the first one's then.
    """

    version: int
    controller_id: str  # changes when the controller restarts
    spec: ClusterSpec | None = None
    replicas: tuple[ReplicaRecord, ...] = ()
    gateways: tuple[GatewayRecord, ...] = ()
    notices: tuple[NodeNotice, ...] = ()  # of nodes that will be removed
    num_notices_total: int = 0  # seen by this controller
    num_desired: int = 0
    scaling_reason: str = ""
    failure: StartFailure | None = None
    facts: EngineFacts | None = None  # of the served model, known even while no replica runs
    adapters: Registry = NO_REGISTRY
    deployments: tuple[DeploymentRecord, ...] = ()


def without_secrets(view: ClusterView) -> ClusterView:
    """The view without the tokens of replicas and the keys of the collector, for display."""
    spec = view.spec
    if spec is not None and spec.tracing is not None:
        spec = replace(spec, tracing=spec.tracing.for_display())
    return replace(view, spec=spec, replicas=tuple(replace(r, token=None) for r in view.replicas))
