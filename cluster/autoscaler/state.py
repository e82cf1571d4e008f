"""The values of the autoscaler: its settings, what it observes, and what it remembers between two decisions."""

from dataclasses import dataclass, field

from cluster.autoscaler.batches import BatchState
from cluster.protocol.report import BatchDemand
from cluster.protocol.spec import ClusterSpec

BUCKET_S = 5.0  # arrivals are counted over this long: shorter is noise, longer detects a rise late
UNKNOWN_STARTUP_S = 60.0  # until the first start of a replica was measured


@dataclass(frozen=True, kw_only=True)
class AutoscalerConfig:
    """`backlog_objective_s` None: half of the TTFT objective; the other half is left for computing the prompt itself."""

    min_replicas: int
    max_replicas: int
    ttft_objective_s: float = ClusterSpec.ttft_objective_s
    backlog_objective_s: float | None = None
    scale_down_after_s: float = ClusterSpec.scale_down_after_s
    # Mean share of the prompt speed to use. It is the smallest reserve, whatever the variance.
    target_utilization: float = 0.95
    target_decode_utilization: float = 0.85  # share of sequences and of KV blocks to use

    @property
    def backlog_limit_s(self) -> float:
        return self.ttft_objective_s / 2 if self.backlog_objective_s is None else self.backlog_objective_s


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The cluster now, without batch lines unless a field says so. Totals only grow."""

    num_ready: int
    num_starting: int = 0  # replicas being placed or started
    num_backlog_tokens: int = 0  # queued at routers and pending on replicas
    num_requests: int = 0  # queued and running
    num_running: int = 0  # sequences on replicas
    max_num_seqs: int = 0  # of one replica; 0 while unknown
    kv_cache_usage: float = 0.0  # mean of the ready replicas, 0 to 1
    arrived_tokens_total: int = 0
    prompt_hit_rate: float = 0.0  # share of recent prompt tokens found in prefix caches, which cost no work
    prefill_tokens_per_s: float | None = None  # recent speed of one replica; None before any measurement
    ttft_p95_s: float | None = None
    startup_s: float | None = None  # from order to ready, as measured
    batches: tuple[BatchDemand, ...] = ()
    batch_tokens_total: int = 0  # of answered batch lines

    @property
    def horizon_s(self) -> float:
        """How far to forecast: a replica ordered now is ready only then."""
        return max(BUCKET_S, self.startup_s or UNKNOWN_STARTUP_S)


@dataclass(frozen=True, kw_only=True)
class AutoscalerState:
    """What is remembered between two decisions; bounded. `num_replicas`: without replicas that only batches need."""

    num_replicas: int
    speed: float | None = None  # prompt tokens/s of one replica
    bucket_at: float | None = None  # when the current bucket began
    bucket_tokens: float = 0.0
    last_total: int = 0
    fast: float = 0.0  # tokens/s, of the last seconds
    level: float | None = None  # tokens/s
    trend: float = 0.0  # tokens/s per s
    variance: float = 0.0  # of arrivals: tokens squared per s
    forecast: float = 0.0  # tokens/s, for the start-up time that began at `forecast_at`
    forecast_at: float | None = None
    forecast_tokens: float = 0.0  # arrived since then
    missed: float = 0.0  # tokens/s squared, by which arrivals exceeded the forecasts beyond their noise
    decode: float = 0.0  # replicas
    needs: tuple[tuple[float, float], ...] = ()  # (when, the largest need since the entry before)
    asked_at: float | None = None  # when there was work last
    seen_at: float | None = None
    started_at: float | None = None  # time of the first observation
    batch: BatchState = field(default_factory=BatchState)
