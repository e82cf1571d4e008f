"""How many replicas there should be: a pure function of an observation, the state of the call before, and the clock.

Knows rates, backlogs and bounds. Knows no Ray, no replica objects, and not how a replica is started or drained. The supervisor replaces
dead replicas; that changes nothing here.

There are four needs, in replicas, and the largest counts. Load: the forecast arrival rate of prompt tokens, one start-up time ahead,
divided by the speed of one replica, plus a reserve for the measured variance and for what earlier forecasts missed. Backlog: what clears
a backlog above its objective by the time a new replica could help. Decode: sequences and KV blocks. Latency: one more replica when TTFT
is missed while work waits. The number rises at once to the largest need, and falls only to the largest need of a whole window.

Batches have a number of their own (batches.py), and the larger one wins. Replicas that only batches need are removed when the batches
end, without a window.
"""

import math
from dataclasses import dataclass, replace

from cluster.autoscaler.batches import size_for_batches
from cluster.autoscaler.forecast import deviation, forecast_rate, observe
from cluster.autoscaler.state import UNKNOWN_STARTUP_S, AutoscalerConfig, AutoscalerState, Observation

MISSED_DEVIATIONS = 2.5  # the reserve covers a miss of this many times the usual one
MAX_NEEDS = 60  # points kept of the window that a scale-down looks back on
BAND = 1.0  # standard deviations of the mean rate: load alone changes the number only if the need differs by more
HYSTERESIS = 0.3  # replicas that must be idle in addition to the one removed
EXCEEDED_SHARE = 0.02  # share of the time that the reserve lets the backlog exceed its objective


@dataclass(frozen=True)
class ScalingDecision:
    num_replicas: int
    reason: str


@dataclass(frozen=True)
class Need:
    replicas: float
    reason: str
    band: float = 0.0  # by how much it must exceed the current number before it counts


def decide(
    config: AutoscalerConfig, observation: Observation, state: AutoscalerState, now: float
) -> tuple[AutoscalerState, ScalingDecision]:
    """Call it about once a second with the state of the call before. now: seconds of any monotonic clock."""
    state = observe(observation, state, now)
    needs = _needs(config, observation, state)
    largest = max(need.replicas for need in needs)
    state = replace(state, needs=_remember(state.needs, largest, config.scale_down_after_s, now))
    # Averages fade but never reach zero: without a request in the whole window they do not count.
    needs = [*needs, Need(1.0, "a request is waiting")] if _is_wanted(config, state, now) else needs[:1]
    need = max(needs, key=lambda n: n.replicas)
    decision = _choose(config, state, need, now)
    state = replace(state, num_replicas=decision.num_replicas)
    return _add_batches(config, observation, state, decision, now)


def _add_batches(
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
        change = f"{before} -> {need.num_replicas}" if before != need.num_replicas else _wanted(before)
        return state, ScalingDecision(need.num_replicas, f"{change}: {need.reason}.")
    if before > online.num_replicas:
        return state, ScalingDecision(online.num_replicas, f"{before} -> {online.num_replicas}: {need.reason}.")
    return state, online


def with_reserve(rate: float, variance: float, limit_s: float) -> float:
    """The number n of replicas at which work arriving at `rate` with `variance` rarely waits longer than `limit_s`.

    A queue with drift -(n - rate) and this variance exceeds b = n * limit_s with probability exp(-2 b (n - rate) / variance). Setting
    this to EXCEEDED_SHARE and solving for n gives the result. Example: rate 20, variance 24, limit 1.0: n = 22.46.
    """
    c = math.log(1 / EXCEEDED_SHARE) * variance / (2 * limit_s)
    return (rate + math.sqrt(rate**2 + 4 * c)) / 2


def _is_wanted(config: AutoscalerConfig, state: AutoscalerState, now: float) -> bool:
    return state.asked_at is not None and now - state.asked_at < config.scale_down_after_s


def _needs(config: AutoscalerConfig, seen: Observation, state: AutoscalerState) -> list[Need]:
    target = config.target_decode_utilization
    needs = [
        Need(config.min_replicas, f"the configured minimum is {config.min_replicas}"),
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
    rate = forecast_rate(state, horizon_s) / speed
    for_noise = with_reserve(rate, state.variance / speed**2, config.backlog_limit_s) - rate
    for_misses = MISSED_DEVIATIONS * math.sqrt(max(0.0, state.missed)) / speed
    number = max(rate / config.target_utilization, rate + math.hypot(for_noise, for_misses))
    why = f"{rate * speed:,.0f} prompt tokens/s expected in {horizon_s:.0f} s, and one replica computes {speed:,.0f}"
    return Need(number, why, BAND * deviation(state) / speed)


def _backlog_need(config: AutoscalerConfig, seen: Observation, state: AutoscalerState, speed: float) -> Need:
    """Enough to keep up with recent arrivals and to clear the backlog in the time a replica takes to start."""
    work_s = seen.num_backlog_tokens / speed
    number = max(state.fast, state.level or 0.0) / speed + work_s / seen.horizon_s
    waits_s = work_s / max(1, seen.num_ready)
    return Need(number, f"backlog of {waits_s:.1f} s is above the objective of {config.backlog_limit_s:.1f} s")


def _is_late(config: AutoscalerConfig, seen: Observation, waits_s: float) -> bool:
    """Whether TTFT is missed while work waits. Otherwise one more replica would not help: a long prompt takes its time anywhere."""
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
        return ScalingDecision(bounded, f"{number} -> {bounded}: the configured bounds are {low} and {high}.")
    up = min(high, math.ceil(need.replicas - 1e-9))
    if up > number and (need.replicas > number + need.band or number == 0):
        return ScalingDecision(up, f"{number} -> {up}: {need.reason}.")
    largest = max(n for _, n in state.needs)
    spare = HYSTERESIS + (BAND * deviation(state) / state.speed if state.speed else 0.0)
    down = low
    if _is_wanted(config, state, now):
        down = max(low, 1, math.ceil(largest + spare if largest > max(1, low) else largest))
    if down < number and now - state.started_at >= config.scale_down_after_s:
        window = f"the last {config.scale_down_after_s:.0f} s"
        why = f"no request arrived in {window}" if down == 0 else f"at most {largest:.1f} were needed in {window}"
        return ScalingDecision(down, f"{number} -> {down}: {why}.")
    if up > number == high:
        return ScalingDecision(number, f"{_wanted(number)}, the configured maximum, although {need.reason}.")
    return ScalingDecision(number, f"{_wanted(number)}.")


def _wanted(number: int) -> str:
    return f"{number} {'replica' if number == 1 else 'replicas'} wanted"
