"""What a gateway reports to the controller: its load, and the batches it runs. Frozen values, picklable, without behaviour."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BatchDemand:
    """One batch that runs at a gateway. Tokens are estimates, of prompts and outputs together."""

    batch_id: str
    remaining_tokens: int  # of lines that have no answer yet
    deadline_s: float | None = None  # seconds left; None: as soon as `max_replicas` of them can
    max_replicas: int | None = None  # None: as many as the cluster may have


@dataclass(frozen=True, kw_only=True)
class GatewayReport:
    """What one gateway holds, said every half second. A gateway that says nothing for a while is forgotten.

    Lines of batches are told of in `batches` and counted in `num_running` and `streams_per_replica`, and nowhere else.
    """

    gateway_id: str
    url: str
    num_running: int = 0  # sequences on replicas
    num_queued: int = 0  # sequences waiting at the router
    num_queued_tokens: int = 0
    oldest_wait_s: float = 0.0
    arrived_tokens_total: int = 0  # prompt tokens of all requests so far: the arrival rate is its slope
    ttft_p95_s: float | None = None  # of the last seconds; None without requests
    streams_per_replica: dict[str, int] = field(default_factory=dict)
    batches: tuple[BatchDemand, ...] = ()
    batch_tokens_total: int = 0  # of lines answered so far, by the same estimate as `remaining_tokens`
