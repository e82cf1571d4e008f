"""How many replicas there should be: a pure function of what is seen now, of what was seen before, and of the clock.

Knows rates, backlogs and bounds; nothing of Ray, of replicas as objects, or of how one is started or drained. Replacing a
dead replica is the supervisor's business: it changes nothing in the number wished for.

Four needs, in replicas, and the largest counts. Load: the arrival rate of prompt tokens, forecast over the time a replica
takes to start, over what one replica computes, plus a reserve that grows with the measured variance. Backlog: what would
clear a backlog above its objective by the time a replica ordered now could help. Decode: sequences and KV blocks.
Latency: one more when TTFT is missed while work waits. Up at once to the largest need; down only to the largest need of a
whole window.
"""

import math
from dataclasses import dataclass, replace

BUCKET_S = 5.0  # arrivals are counted over this long: shorter is noise, longer sees a rise late
LEVEL_S = 120.0  # how long the average arrival rate remembers
TREND_S = 300.0  # and its slope
VARIANCE_S = 900.0  # and the variance of arrivals around it
SPEED_S = 600.0  # a best speed fades over this long: steps with few tokens are slow, but not for lack of replicas
FAST_S = 15.0  # the rate that counts once there is a backlog
DECODE_S = 30.0
MAX_NEEDS = 60  # points kept of the window that a scale-down looks back on
TREND_NOISE = 2.0
UP_BAND = 1.0
DOWN_BAND = 1.0
JUMP = 99.0
Z = 0.0
HYSTERESIS = 0.3  # replicas that must be to spare beyond the one given up
EXCEEDED_SHARE = 0.01  # the reserve lets the backlog exceed its objective this share of the time
UNKNOWN_STARTUP_S = 60.0  # before the first replica was seen to start


@dataclass(frozen=True, kw_only=True)
class AutoscalerConfig:
    """`backlog_objective_s` None: half of the TTFT objective, the other half is left to the prompt's own computation."""

    min_replicas: int
    max_replicas: int
    ttft_objective_s: float = 2.0
    backlog_objective_s: float | None = None
    scale_down_after_s: float = 300.0
    target_utilization: float = 0.95  # of prompt speed, on average: the least reserve, whatever the variance
    target_decode_utilization: float = 0.85  # of sequences and of KV blocks

    @property
    def backlog_limit_s(self) -> float:
        return self.ttft_objective_s / 2 if self.backlog_objective_s is None else self.backlog_objective_s


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The cluster now. Totals only grow; `num_starting` counts replicas being placed or started."""

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


@dataclass(frozen=True, kw_only=True)
class AutoscalerState:
    """What is remembered between two decisions; bounded."""

    num_replicas: int
    speed: float | None = None  # prompt tokens/s of one replica
    bucket_at: float | None = None  # when the bucket being filled began
    bucket_tokens: float = 0.0
    last_total: int = 0
    fast: float = 0.0  # tokens/s, of the last seconds
    level: float | None = None  # tokens/s
    trend: float = 0.0  # tokens/s per s
    variance: float = 0.0  # of arrivals: tokens squared per s
    decode: float = 0.0  # replicas
    past: tuple = ()
    error: float = 0.0
    needs: tuple[tuple[float, float], ...] = ()  # (when, the largest need since the one before)
    asked_at: float | None = None  # when there was last anything to do
    seen_at: float | None = None
    started_at: float | None = None  # when there was a first look


@dataclass(frozen=True)
class ScalingDecision:
    num_replicas: int
    reason: str


@dataclass(frozen=True)
class Need:
    replicas: float
    reason: str


def decide(
    config: AutoscalerConfig, observation: Observation, state: AutoscalerState, now: float
) -> tuple[AutoscalerState, ScalingDecision]:
    """Call it about once a second with the state of the call before; `now` is any clock that only grows."""
    state = _observe(observation, state, now)
    need = max(_needs(config, observation, state, now), key=lambda n: n.replicas)
    state = replace(state, needs=_remember(state.needs, need.replicas, config.scale_down_after_s, now))
    decision = _choose(config, state, need, now)
    return replace(state, num_replicas=decision.num_replicas), decision


def _observe(seen: Observation, state: AutoscalerState, now: float) -> AutoscalerState:
    first = state.seen_at is None
    elapsed = 0.0 if state.seen_at is None else max(0.0, now - state.seen_at)
    arrived = 0 if first else max(0, seen.arrived_tokens_total - state.last_total)
    asked = first or arrived > 0 or seen.num_requests > 0 or seen.num_backlog_tokens > 0
    speed = state.speed and state.speed * math.exp(-elapsed / SPEED_S)
    if seen.prefill_tokens_per_s and seen.num_ready:
        speed = max(seen.prefill_tokens_per_s, speed or 0.0)
    elif state.speed:
        speed = state.speed  # nothing measured, nothing forgotten
    decode = state.decode + _weight(elapsed, DECODE_S) * (_decode_load(seen) - state.decode)
    state = replace(
        state,
        speed=speed,
        decode=decode,
        last_total=seen.arrived_tokens_total,
        bucket_at=now if state.bucket_at is None else state.bucket_at,
        bucket_tokens=state.bucket_tokens + arrived * (1 - seen.prompt_hit_rate),
        asked_at=now if asked else state.asked_at,
        seen_at=now,
        started_at=now if first else state.started_at,
    )
    assert state.bucket_at is not None
    return _close_bucket(state, now) if now - state.bucket_at >= BUCKET_S else state


def _close_bucket(state: AutoscalerState, now: float) -> AutoscalerState:
    """Holt's linear trend over the arrival rate, and the variance of what it did not foresee."""
    assert state.bucket_at is not None
    width = now - state.bucket_at
    rate = state.bucket_tokens / width
    state = replace(state, bucket_at=now, bucket_tokens=0.0)
    if state.level is None:
        return replace(state, level=rate, fast=rate)
    foreseen = state.level + state.trend * width
    surprise = rate - foreseen
    level = max(0.0, foreseen + _weight(width, LEVEL_S) * surprise)
    slope = (level - state.level) / width
    fast = state.fast + _weight(width, FAST_S) * (rate - state.fast)
    if fast - level > JUMP * math.sqrt(state.variance / (2 * FAST_S)):
        level = fast
    past = (*state.past, level + rise(state, 120.0))
    error = state.error
    if len(past) > 24:
        error += _weight(width, 1800.0) * (max(0, fast - past[0]) ** 2 - error)
        past = past[1:]
    return replace(
        state,
        level=level,
        trend=state.trend + _weight(width, TREND_S) * (slope - state.trend),
        variance=state.variance + _weight(width, VARIANCE_S) * (surprise**2 * width - state.variance),
        fast=fast, past=past, error=error,
    )


def _needs(config: AutoscalerConfig, seen: Observation, state: AutoscalerState, now: float) -> list[Need]:
    needs = [Need(config.min_replicas, f"min_replicas is {config.min_replicas}"), _presence(config, state, now)]
    needs.append(Need(state.decode / config.target_decode_utilization, "sequences and KV blocks are above the target"))
    if state.speed:
        needs.append(_load(config, seen, state))
        needs += _backlog(config, seen, state)
    return needs


def _presence(config, state, now):
    if state.asked_at is not None and now - state.asked_at < config.scale_down_after_s:
        return Need(1.0, "requests")
    return Need(0.0, "nothing")


def _load(config: AutoscalerConfig, seen: Observation, state: AutoscalerState) -> Need:
    assert state.speed
    startup_s = seen.startup_s or UNKNOWN_STARTUP_S
    rate = max(0.0, (state.level or 0.0) + rise(state, startup_s)) / state.speed
    return Need(
        max(rate / config.target_utilization, with_reserve(rate, state.variance / state.speed**2, config.backlog_limit_s, Z * math.sqrt(state.error) / state.speed)),
        "load",
    )


def rise(state, h):
    x = state.trend * h
    return math.copysign(max(0.0, abs(x) - TREND_NOISE * noise(state)), x)


def noise(state):
    return math.sqrt(state.variance / (2 * LEVEL_S))


def with_reserve(rate: float, variance: float, limit_s: float, error=0.0) -> float:
    """Replicas n at which work arriving at `rate` with `variance` seldom waits longer than `limit_s`.

    A queue with drift -(n - rate) and this variance exceeds b = n * limit_s with probability exp(-2 b (n - rate) / variance);
    set to EXCEEDED_SHARE and solved for n. Example: rate 20, variance 24, limit 1.0: n = 22.46.
    """
    rate += error
    c = math.log(1 / EXCEEDED_SHARE) * variance / (2 * limit_s)
    return (rate + math.sqrt(rate**2 + 4 * c)) / 2


def _backlog(config: AutoscalerConfig, seen: Observation, state: AutoscalerState) -> list[Need]:
    assert state.speed
    work_s = seen.num_backlog_tokens / state.speed
    waits_s = work_s / max(1, seen.num_ready)
    if waits_s <= config.backlog_limit_s:
        return []
    startup_s = max(seen.startup_s or UNKNOWN_STARTUP_S, BUCKET_S)
    rate = max(state.fast, state.level or 0.0) / state.speed
    needs = [Need(rate + work_s / startup_s, f"backlog of {waits_s:.1f} s is above the objective of {config.backlog_limit_s:.1f} s")]
    return needs


def _remember(needs, need, window_s, now):
    kept = tuple(n for n in needs if n[0] > now - window_s)
    if kept and now - kept[-1][0] < window_s / MAX_NEEDS:
        if need <= kept[-1][1]:
            return kept if len(kept) != len(needs) else needs
        return (*kept[:-1], (kept[-1][0], need))
    return (*kept, (now, need))


def _choose(config: AutoscalerConfig, state: AutoscalerState, need: Need, now: float) -> ScalingDecision:
    n = state.num_replicas
    sigma = noise(state) / state.speed if state.speed else 0.0
    band = UP_BAND * sigma if need.reason == "load" else 0.0
    up = min(config.max_replicas, math.ceil(need.replicas - 1e-9)) if need.replicas > n + band else n
    if up > n:
        return ScalingDecision(up, f"{n} -> {up}: {need.reason}.")
    largest = max(x for _, x in state.needs)
    down = max(config.min_replicas, math.ceil(largest + HYSTERESIS + DOWN_BAND * sigma) if largest > 1 else math.ceil(largest))
    if down < n and state.started_at is not None and now - state.started_at >= config.scale_down_after_s:
        return ScalingDecision(down, f"{n} -> {down}: {largest:.1f} replicas would have been enough for {config.scale_down_after_s:.0f} s.")
    return ScalingDecision(min(n, config.max_replicas), "")


def _decode_load(seen: Observation) -> float:
    sequences = seen.num_running / seen.max_num_seqs if seen.max_num_seqs else 0.0
    return max(sequences, seen.kv_cache_usage * seen.num_ready)


def _weight(elapsed: float, memory_s: float) -> float:
    return 1 - math.exp(-elapsed / memory_s)
