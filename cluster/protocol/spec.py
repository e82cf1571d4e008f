"""The spec of a deployment: which model to serve, on how many replicas. The controller makes the cluster match it.

The defaults here are the only ones: the options of commands, the supervisor and the autoscaler read them off this class.
"""

from dataclasses import dataclass

from cluster.protocol.notice import PreemptionNotices
from workers.config import EngineConfig
from workers.tracing.settings import TracingConfig


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """One model on `min_replicas` to `max_replicas` identical replicas; the autoscaler chooses the number."""

    model_name: str
    engine: EngineConfig
    min_replicas: int = 1
    max_replicas: int = 1
    num_gateways: int = 1  # including the process that runs `serve`
    drain_timeout_s: float = 30.0
    scale_down_after_s: float = 600.0  # seconds a replica must be idle before it is removed
    ttft_objective_s: float = 2.0
    # None: wait forever, because more nodes may join. With several hosts it is for the first replica only.
    placement_timeout_s: float | None = None
    single_host: bool = False  # sockets stay on loopback, and only this machine takes part
    preemption_notices: PreemptionNotices = "auto"
    log_level: str = "WARNING"
    data_dir: str | None = None  # None: the user's own folder
    tracing: TracingConfig | None = None  # of replicas that start from now on
