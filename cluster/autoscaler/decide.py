"""How many replicas there should be: a pure function of what is seen now, of what was seen before, and of the clock.

Knows rates, backlogs and bounds; nothing of Ray, of replicas as objects, or of how one is started or drained. Replacing a
dead replica is the supervisor's business: it changes nothing in the number wished for.

Four needs, in replicas, and the largest counts. Load: the arrival rate of prompt tokens, forecast over the time a replica
takes to start, over what one replica computes, plus a reserve for the measured variance and for what such forecasts lately
missed. Backlog: what would clear a backlog above its objective by the time a replica ordered now could help. Decode:
sequences and KV blocks. Latency: one more when TTFT is missed while work waits. Up at once to the largest need; down only
to the largest need of a whole window.

Batches have a number of their own beside that (cluster/autoscaler/batches.py), and the larger wins: replicas that only batches
wanted go when these end, without a window.
"""

import math
from dataclasses import dataclass, field, replace

from cluster.autoscaler.batches import BatchState, size_for_batches
from cluster.protocol.report import BatchDemand

BUCKET_S = 5.0  # arrivals are counted over this long: shorter is noise, longer sees a rise late
LEVEL_S = 120.0  # how long the average arrival rate remembers
TREND_S = 300.0  # and its slope
VARIANCE_S = 900.0  # and the variance of arrivals around it
MISSED_S = 3600.0  # and how far arrivals went beyond the forecast: one judgement each start-up time
MISSED_DEVIATIONS = 2.5  # a miss of this many times the usual finds replicas ready
SPEED_S = 600.0  # a best speed fades over this long: steps with few tokens are slow, but not for lack of replicas
FAST_S = 15.0  # the rate that counts once there is a backlog
DECODE_S = 30.0
MAX_NEEDS = 60  # points kept of the window that a scale-down looks back on
BAND = 1.0  # standard deviations of the rate's average: a need must differ by more before load alone changes the number
TREND_BAND = 2.0  # and a trend must promise more, or it is taken for noise
HYSTERESIS = 0.3  # replicas that must be to spare beyond the one given up
EXCEEDED_SHARE = 0.02  # the reserve lets the backlog exceed its objective this share of the time
UNKNOWN_STARTUP_S = 60.0  # before the first replica was seen to start


@dataclass(frozen=True, kw_only=True)
class AutoscalerConfig:
    """`backlog_objective_s` None: half of the TTFT objective, the other half is left to the prompt's own computation."""

    min_replicas: int
    max_replicas: int
    ttft_objective_s: float = 2.0
    backlog_objective_s: float | None = None
    scale_down_after_s: float = 600.0
    target_utilization: float = 0.95  # of prompt speed, on average: the least reserve, whatever the variance
    target_decode_utilization: float = 0.85  # of sequences and of KV blocks

    @property
    def backlog_limit_s(self) -> float:
        return self.ttft_objective_s / 2 if self.backlog_objective_s is None else self.backlog_objective_s


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The cluster now, batch lines apart. Totals only grow; `num_starting` counts replicas being placed or started."""

    num_ready: int
    num_starting: int = 0
    num_backlog_tokens: int = 0  # queued at routers and pending on replicas
    num_requests: int = 0  # queued and running
    num_running: int = 0  # sequences on replicas
    max_num_seqs: int = 0  # of one replica; 0 while unknown
    kv_cache_usage: float = 0.0  # mean of the ready replicas
    arrived_tokens_total: int = 0
    prompt_hit_rate: float = 0.0  # share of prompt tokens lately found in prefix caches: these are no work
    prefill_tokens_per_s: float | None = None  # of one replica, lately; None before any measurement
    ttft_p95_s: float | None = None
    startup_s: float | None = None  # from order to ready, as measured
    batches: tuple[BatchDemand, ...] = ()
    batch_tokens_total: int = 0  # of batch lines answered

    @property
    def horizon_s(self) -> float:
        """How far ahead to look: what is ordered now helps only then."""
        return max(BUCKET_S, self.startup_s or UNKNOWN_STARTUP_S)


@dataclass(frozen=True, kw_only=True)
class AutoscalerState:
    """What is remembered between two decisions; bounded. `num_replicas`: without what only batches want."""

    num_replicas: int
    speed: float | None = None  # prompt tokens/s of one replica
    bucket_at: float | None = None  # when the bucket being filled began
    bucket_tokens: float = 0.0
    last_total: int = 0
    fast: float = 0.0  # tokens/s, of the last seconds
    level: float | None = None  # tokens/s
    trend: float = 0.0  # tokens/s per s
    variance: float = 0.0  # of arrivals: tokens squared per s
    forecast: float = 0.0  # tokens/s, for the start-up time that began then
    forecast_at: float | None = None
    forecast_tokens: float = 0.0  # arrived since
    missed: float = 0.0  # tokens/s squared, by which arrivals exceeded the forecasts beyond their noise
    decode: float = 0.0  # replicas
    needs: tuple[tuple[float, float], ...] = ()  # (when, the largest need since the one before)
    asked_at: float | None = None  # when there was last anything to do
    seen_at: float | None = None
    started_at: float | None = None  # when there was a first look
    batch: BatchState = field(default_factory=BatchState)


@dataclass(frozen=True)
class ScalingDecision:
    num_replicas: int
    reason: str


@dataclass(frozen=True)
class Need:
    replicas: float
    reason: str
    band: float = 0.0  # by how much it must exceed what is there, before it counts


def decide(
    config: AutoscalerConfig, observation: Observation, state: AutoscalerState, now: float
) -> tuple[AutoscalerState, ScalingDecision]:
    """Call it about once a second with the state of the call before; `now` is any clock that only grows."""
    state = _observe(observation, state, now)
    needs = _needs(config, observation, state)
    largest = max(need.replicas for need in needs)
    state = replace(state, needs=_remember(state.needs, largest, config.scale_down_after_s, now))
    # Averages fade but never end: without a request in the whole window they are no need.
    needs = [*needs, Need(1.0, "a request waits")] if _is_wanted(config, state, now) else needs[:1]
    need = max(needs, key=lambda n: n.replicas)
    decision = _choose(config, state, need, now)
    state = replace(state, num_replicas=decision.num_replicas)
    return _beside_batches(config, observation, state, decision, now)


def _beside_batches(
    config: AutoscalerConfig, seen: Observation, state: AutoscalerState, online: ScalingDecision, now: float
) -> tuple[AutoscalerState, ScalingDecision]:
    batch, need = size_for_batches(
        seen.batches,
        state.batch,
        now,
        tokens_total=seen.batch_tokens_total,
        num_ready=seen.num_ready,
        startup_s=seen.startup_s or UNKNOWN_STARTUP_S,
        max_replicas=config.max_replicas,
    )
    before = max(online.num_replicas, state.batch.num_replicas)
    state = replace(state, batch=batch)
    if need.num_replicas > online.num_replicas:
        change = f"{before} -> {need.num_replicas}" if before != need.num_replicas else f"{before} are enough"
        return state, ScalingDecision(need.num_replicas, f"{change}: {need.reason}.")
    if before > online.num_replicas:
        return state, ScalingDecision(online.num_replicas, f"{before} -> {online.num_replicas}: {need.reason}.")
    return state, online


def with_reserve(rate: float, variance: float, limit_s: float) -> float:
    """Replicas n at which work arriving at `rate` with `variance` seldom waits longer than `limit_s`.

    A queue with drift -(n - rate) and this variance exceeds b = n * limit_s with probability exp(-2 b (n - rate) / variance);
    that set to EXCEEDED_SHARE and solved for n. Example: rate 20, variance 24, limit 1.0: n = 22.46.
    """
    c = math.log(1 / EXCEEDED_SHARE) * variance / (2 * limit_s)
    return (rate + math.sqrt(rate**2 + 4 * c)) / 2


def _observe(seen: Observation, state: AutoscalerState, now: float) -> AutoscalerState:
    first = state.seen_at is None
    elapsed = 0.0 if state.seen_at is None else max(0.0, now - state.seen_at)
    # A total falls when a gateway is forgotten: that is no arrival.
    arrived = 0 if first else max(0, seen.arrived_tokens_total - state.last_total)
    asked = (first and state.num_replicas > 0) or arrived > 0 or seen.num_requests > 0 or seen.num_backlog_tokens > 0
    state = replace(
        state,
        speed=_speed(seen, state, elapsed),
        decode=state.decode + _weight(elapsed, DECODE_S) * (_decode_load(seen) - state.decode),
        last_total=seen.arrived_tokens_total,
        bucket_at=now if state.bucket_at is None else state.bucket_at,
        bucket_tokens=state.bucket_tokens + arrived * (1 - seen.prompt_hit_rate),
        asked_at=now if asked else state.asked_at,
        started_at=now if first else state.started_at,
        seen_at=now,
    )
    assert state.bucket_at is not None
    if now - state.bucket_at < BUCKET_S:
        return state
    closed = _close_bucket(state, now - state.bucket_at, now)
    closed = replace(closed, forecast_tokens=state.forecast_tokens + state.bucket_tokens)
    return _judge_forecast(closed, seen.horizon_s, now)


def _speed(seen: Observation, state: AutoscalerState, elapsed: float) -> float | None:
    if not seen.prefill_tokens_per_s or not seen.num_ready:
        return state.speed
    return max(seen.prefill_tokens_per_s, (state.speed or 0.0) * math.exp(-elapsed / SPEED_S))


def _close_bucket(state: AutoscalerState, width: float, now: float) -> AutoscalerState:
    """Holt's linear trend of the arrival rate, and the variance of what it did not foresee."""
    rate = state.bucket_tokens / width
    state = replace(state, bucket_at=now, bucket_tokens=0.0)
    if state.level is None:
        return replace(state, level=rate, fast=rate)
    foreseen = state.level + state.trend * width
    surprise = rate - foreseen
    assert state.started_at is not None
    memory_s = min(VARIANCE_S, max(LEVEL_S, now - state.started_at))  # at first there is little to go by
    level = max(0.0, foreseen + _weight(width, LEVEL_S) * surprise)
    return replace(
        state,
        level=level,
        trend=state.trend + _weight(width, TREND_S) * ((level - state.level) / width - state.trend),
        variance=state.variance + _weight(width, memory_s) * (surprise**2 * width - state.variance),
        fast=state.fast + _weight(width, FAST_S) * (rate - state.fast),
    )


def _judge_forecast(state: AutoscalerState, horizon_s: float, now: float) -> AutoscalerState:
    """What came in the time a replica takes to start, beside what was forecast when it began.

    Only misses upwards hurt, so their squares count twice; noise is taken off, for the other reserve covers it.
    """
    width = 0.0 if state.forecast_at is None else now - state.forecast_at
    if 0.0 < width < horizon_s:
        return state
    missed = state.missed
    if width:
        excess = max(0.0, state.forecast_tokens / width - state.forecast)
        noise = state.variance / width + _deviation(state) ** 2
        missed += _weight(width, MISSED_S) * (2 * excess**2 - noise - missed)
    return replace(state, forecast=_forecast(state, horizon_s), forecast_at=now, forecast_tokens=0.0, missed=missed)


def _forecast(state: AutoscalerState, horizon_s: float) -> float:
    """Tokens/s, that long from now."""
    rise = state.trend * horizon_s
    rise = math.copysign(max(0.0, abs(rise) - TREND_BAND * _deviation(state)), rise)
    return max(0.0, (state.level or 0.0) + rise)


def _is_wanted(config: AutoscalerConfig, state: AutoscalerState, now: float) -> bool:
    return state.asked_at is not None and now - state.asked_at < config.scale_down_after_s


def _needs(config: AutoscalerConfig, seen: Observation, state: AutoscalerState) -> list[Need]:
    target = config.target_decode_utilization
    needs = [
        Need(config.min_replicas, f"at least {config.min_replicas} are configured"),
        Need(
            state.decode / target,
            f"sequences or KV blocks fill {state.decode:.1f} replicas, and the target is {target:.0%} of each",
        ),
    ]
    if state.speed:
        waits_s = seen.num_backlog_tokens / state.speed / max(1, seen.num_ready)
        needs.append(_load_need(config, state, state.speed, seen.horizon_s))
        if waits_s > config.backlog_limit_s:
            needs.append(_backlog_need(config, seen, state, state.speed))
        if _is_late(config, seen, waits_s):
            why = f"TTFT p95 of {seen.ttft_p95_s:.1f} s is above the objective of {config.ttft_objective_s:.1f} s"
            needs.append(Need(seen.num_ready + 1, why))
    return needs


def _load_need(config: AutoscalerConfig, state: AutoscalerState, speed: float, horizon_s: float) -> Need:
    rate = _forecast(state, horizon_s) / speed
    for_noise = with_reserve(rate, state.variance / speed**2, config.backlog_limit_s) - rate
    for_misses = MISSED_DEVIATIONS * math.sqrt(max(0.0, state.missed)) / speed
    number = max(rate / config.target_utilization, rate + math.hypot(for_noise, for_misses))
    why = f"{rate * speed:,.0f} prompt tokens/s expected in {horizon_s:.0f} s, one replica computes {speed:,.0f}"
    return Need(number, why, BAND * _deviation(state) / speed)


def _backlog_need(config: AutoscalerConfig, seen: Observation, state: AutoscalerState, speed: float) -> Need:
    """What keeps up with the arrivals of the last seconds and works the backlog off in the time a replica takes to start."""
    work_s = seen.num_backlog_tokens / speed
    number = max(state.fast, state.level or 0.0) / speed + work_s / seen.horizon_s
    waits_s = work_s / max(1, seen.num_ready)
    return Need(number, f"backlog of {waits_s:.1f} s is above the objective of {config.backlog_limit_s:.1f} s")


def _is_late(config: AutoscalerConfig, seen: Observation, waits_s: float) -> bool:
    """Only work that waits is helped by one more replica: a long prompt alone takes its time anywhere."""
    late = seen.ttft_p95_s is not None and seen.ttft_p95_s > config.ttft_objective_s
    return late and seen.num_starting == 0 and seen.num_ready > 0 and waits_s > config.backlog_limit_s / 2


def _remember(
    needs: tuple[tuple[float, float], ...], need: float, window_s: float, now: float
) -> tuple[tuple[float, float], ...]:
    if needs and needs[0][0] <= now - window_s:
        needs = tuple(n for n in needs if n[0] > now - window_s)
    if needs and now - needs[-1][0] < window_s / MAX_NEEDS:
        return needs if need <= needs[-1][1] else (*needs[:-1], (needs[-1][0], need))
    return (*needs, (now, need))


def _choose(config: AutoscalerConfig, state: AutoscalerState, need: Need, now: float) -> ScalingDecision:
    assert state.started_at is not None
    number, low, high = state.num_replicas, config.min_replicas, config.max_replicas
    if not low <= number <= high:
        bounded = min(max(number, low), high)
        return ScalingDecision(bounded, f"{number} -> {bounded}: the bounds are {low} and {high}.")
    up = min(high, math.ceil(need.replicas - 1e-9))
    if up > number and (need.replicas > number + need.band or number == 0):
        return ScalingDecision(up, f"{number} -> {up}: {need.reason}.")
    largest = max(n for _, n in state.needs)
    spare = HYSTERESIS + (BAND * _deviation(state) / state.speed if state.speed else 0.0)
    down = low
    if _is_wanted(config, state, now):
        down = max(low, 1, math.ceil(largest + spare if largest > max(1, low) else largest))
    if down < number and now - state.started_at >= config.scale_down_after_s:
        window = f"the last {config.scale_down_after_s:.0f} s"
        why = f"nothing was asked in {window}" if down == 0 else f"{largest:.1f} would have been enough in {window}"
        return ScalingDecision(down, f"{number} -> {down}: {why}.")
    if up > number == high:
        return ScalingDecision(number, f"{number} is the most allowed, though {need.reason}.")
    return ScalingDecision(number, f"{number} are enough.")


def _deviation(state: AutoscalerState) -> float:
    """Standard deviation of `level`, tokens/s."""
    return math.sqrt(state.variance / (2 * LEVEL_S))


def _decode_load(seen: Observation) -> float:
    # Those that wait for a free place count as well: they are why another replica is wanted.
    sequences = max(seen.num_running, seen.num_requests) / seen.max_num_seqs if seen.max_num_seqs else 0.0
    return max(sequences, seen.kv_cache_usage * seen.num_ready)


def _weight(elapsed: float, memory_s: float) -> float:
    return 1 - math.exp(-elapsed / memory_s)
