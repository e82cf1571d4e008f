"""What a deployment should be: the model and how many replicas of it. The controller makes it so."""

from dataclasses import dataclass

from cluster.protocol.notice import PreemptionNotices
from workers.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What shall be: the same model on `min_replicas` to `max_replicas` replicas, the autoscaler choosing between."""

    model_name: str
    engine: EngineConfig
    min_replicas: int = 1
    max_replicas: int = 1
    num_gateways: int = 1  # the process that asks is one of them
    drain_timeout_s: float = 30.0
    scale_down_after_s: float = 600.0  # how long a replica must have been needless
    ttft_objective_s: float = 2.0
    placement_timeout_s: float | None = None  # None: more nodes may come, so wait for ever
    single_host: bool = False  # sockets stay on loopback: nothing outside this machine takes part
    preemption_notices: PreemptionNotices = "auto"
    log_level: str = "WARNING"
