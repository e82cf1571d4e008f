"""Measures arrivals and forecasts them: level, trend and variance of the rate, and how far earlier forecasts fell short.

Knows observations and the clock as an argument. Knows no bounds and makes no decision (decide.py).
"""

import math
from dataclasses import replace

from cluster.autoscaler.state import BUCKET_S, AutoscalerState, Observation

LEVEL_S = 120.0  # memory of the mean arrival rate
TREND_S = 300.0  # of its slope
VARIANCE_S = 900.0  # of the variance of arrivals around it
MISSED_S = 3600.0  # of the amount by which arrivals exceeded forecasts; judged once per start-up time
SPEED_S = 600.0  # a best speed fades over this long: steps with few tokens are slow, but not for lack of replicas
FAST_S = 15.0  # memory of the rate that counts once there is a backlog
DECODE_S = 30.0
TREND_BAND = 2.0  # standard deviations of the level that a trend must exceed, or it counts as noise


def observe(seen: Observation, state: AutoscalerState, now: float) -> AutoscalerState:
    """The state with this observation added."""
    first = state.seen_at is None
    elapsed = 0.0 if state.seen_at is None else max(0.0, now - state.seen_at)
    # A total falls when a gateway is dropped.
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
    """Ends a bucket: Holt's linear trend of the arrival rate, and the variance around its prediction."""
    rate = state.bucket_tokens / width
    state = replace(state, bucket_at=now, bucket_tokens=0.0)
    if state.level is None:
        return replace(state, level=rate, fast=rate)
    predicted = state.level + state.trend * width
    surprise = rate - predicted
    assert state.started_at is not None
    memory_s = min(VARIANCE_S, max(LEVEL_S, now - state.started_at))  # at first there are few observations
    level = max(0.0, predicted + _weight(width, LEVEL_S) * surprise)
    return replace(
        state,
        level=level,
        trend=state.trend + _weight(width, TREND_S) * ((level - state.level) / width - state.trend),
        variance=state.variance + _weight(width, memory_s) * (surprise**2 * width - state.variance),
        fast=state.fast + _weight(width, FAST_S) * (rate - state.fast),
    )


def _judge_forecast(state: AutoscalerState, horizon_s: float, now: float) -> AutoscalerState:
    """Compares the arrivals of one start-up time with the forecast made at its beginning.

    Only arrivals above the forecast hurt, so their squares count twice. Noise is subtracted, because another reserve covers it.
    """
    width = 0.0 if state.forecast_at is None else now - state.forecast_at
    if 0.0 < width < horizon_s:
        return state
    missed = state.missed
    if width:
        excess = max(0.0, state.forecast_tokens / width - state.forecast)
        noise = state.variance / width + deviation(state) ** 2
        missed += _weight(width, MISSED_S) * (2 * excess**2 - noise - missed)
    return replace(state, forecast=forecast_rate(state, horizon_s), forecast_at=now, forecast_tokens=0.0, missed=missed)


def forecast_rate(state: AutoscalerState, horizon_s: float) -> float:
    """Expected tokens/s, `horizon_s` seconds from now."""
    rise = state.trend * horizon_s
    rise = math.copysign(max(0.0, abs(rise) - TREND_BAND * deviation(state)), rise)
    return max(0.0, (state.level or 0.0) + rise)


def deviation(state: AutoscalerState) -> float:
    """Standard deviation of `level`, tokens/s."""
    return math.sqrt(state.variance / (2 * LEVEL_S))


def _decode_load(seen: Observation) -> float:
    # Waiting sequences count as well: they are the reason for another replica.
    sequences = max(seen.num_running, seen.num_requests) / seen.max_num_seqs if seen.max_num_seqs else 0.0
    return max(sequences, seen.kv_cache_usage * seen.num_ready)


def _weight(elapsed: float, memory_s: float) -> float:
    return 1 - math.exp(-elapsed / memory_s)
