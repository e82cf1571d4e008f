"""What a gateway reports to the controller: its load, and the batches it runs. Frozen, picklable values without behaviour."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BatchDemand:
    """One batch that a gateway runs. Token counts are estimates of prompts and outputs together."""

    batch_id: str
    remaining_tokens: int  # of lines without an answer
    deadline_s: float | None = None  # seconds left; None: as soon as `max_replicas` replicas can finish it
    max_replicas: int | None = None  # None: as many as the cluster may have


@dataclass(frozen=True, kw_only=True)
class GatewayReport:
    """The load of one gateway, sent twice a second. The controller drops a gateway that stops reporting.

    Batch lines count in `batches`, `num_running` and `streams_per_replica`, and in no other field.
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
    streams_per_adapter: dict[str, int] = field(
        default_factory=dict
    )  # by revision, from a request's admission to its end
    batches: tuple[BatchDemand, ...] = ()
    batch_tokens_total: int = 0  # of answered lines, by the same estimate as `remaining_tokens`
