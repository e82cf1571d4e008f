"""The cheapest schedule of replicas, found with knowledge of the whole load.

Knows the fluid model and the price of a late request; does not know the autoscaler. Each replica is planned on its own: the nth
replica of a slot saves a number of late requests, and dynamic programming finds when it pays off, with a shortest life and a shortest
pause. A range of prices for a late request gives a range of schedules. All are simulated, and the cheapest that keeps the
objective wins. The schedules are good, but not proven optimal.
"""

from collections.abc import Sequence

import numpy as np
from simulation.fluid import Load

SLOT_S = 30  # the number may change this often
WARM_UP_S = 60  # before each slot, with the same number of replicas: the backlog of earlier arrivals
PRICES = np.geomspace(1.0, 150.0, 24)  # seconds of a replica that one late request is worth


def cheapest(load: Load, limit_s: float, *, startup_s: int, goals: Sequence[tuple[float, float]]) -> list[float]:
    """Replica-hours, paid from order to removal, for each goal: shortest life and pause, and the share of requests within the limit.

    Infinite where no schedule keeps that share.
    """
    tables = [saved_by_replica(load, inner_s) for inner_s in (limit_s, limit_s / 2)]
    pauses = sorted({pause_s for pause_s, _ in goals})
    plans = np.concatenate([plan(table, startup_s, pause_s) for pause_s in pauses for table in tables])
    pause_of = np.repeat(pauses, len(tables) * len(PRICES))
    schedules = np.repeat(plans, SLOT_S, axis=1)[:, : load.length]
    hours = (schedules.sum(1) + startup_s * np.maximum(0, np.diff(schedules, axis=1)).sum(1)) / 3600
    kept = load.kept(follow(load, schedules), limit_s)
    return [float(np.where((pause_of == pause_s) & (kept >= share), hours, np.inf).min()) for pause_s, share in goals]


def follow(load: Load, schedules: np.ndarray) -> np.ndarray:
    """Waits by second and schedule."""
    by_second = np.ascontiguousarray(schedules.T).astype(float)
    waits, backlog, running = np.empty(by_second.shape), np.zeros(len(schedules)), np.full(len(schedules), 0.0)
    running += load.first_running
    for t in range(load.length):
        waits[t], backlog, running, _ = load.step(load.tokens[t], by_second[t], backlog, running)
    return waits


def saved_by_replica(load: Load, limit_s: float) -> np.ndarray:
    """Late requests that the nth replica saves, n from 2, by slot. Made to decrease with n, so that the nth is added before the next."""
    num_slots = -(-load.length // SLOT_S)
    tokens, requests = np.zeros((2, WARM_UP_S + num_slots * SLOT_S))
    tokens[WARM_UP_S : WARM_UP_S + load.length] = load.tokens
    requests[WARM_UP_S : WARM_UP_S + load.length] = load.requests
    running = np.full(len(requests) + 1, load.first_running)
    for t in range(WARM_UP_S, len(requests)):
        running[t + 1] = running[t] + requests[t] - running[t] / load.life_s
    begins = np.arange(num_slots) * SLOT_S
    busiest = tokens[WARM_UP_S:].reshape(num_slots, SLOT_S).mean(1).max() / load.model.tokens_per_s
    counts = np.arange(1.0, int(busiest * 2.5) + 8)
    now = np.repeat(running[begins][:, None], len(counts), 1)
    late, backlog = np.zeros((2, *now.shape))
    for second in range(WARM_UP_S + SLOT_S):
        wait, backlog, now, speed = load.step(tokens[begins + second][:, None], counts, backlog, now)
        if second < WARM_UP_S:
            backlog = np.minimum(backlog, limit_s * counts * speed)
        else:
            late += requests[begins + second][:, None] * (wait > limit_s)
    left_s = backlog / (counts * speed)
    late += requests[WARM_UP_S:].reshape(num_slots, SLOT_S).mean(1)[:, None] * np.maximum(0.0, 2 * left_s - limit_s)
    return -np.diff([convex(row) for row in late])


def convex(row: np.ndarray) -> np.ndarray:
    """The greatest convex function below the points."""
    hull: list[int] = []
    for k in range(len(row)):
        while len(hull) > 1:
            i, j = hull[-2:]
            if (row[j] - row[i]) * (k - j) < (row[k] - row[j]) * (j - i):
                break
            hull.pop()
        hull.append(k)
    return np.interp(np.arange(len(row)), hull, row[hull])


def plan(saved: np.ndarray, startup_s: float, pause_s: float) -> np.ndarray:
    """Schedules, one for each price, by slot: every replica runs, and rests, for at least `pause_s`."""
    shortest = max(1, round(max(pause_s, startup_s) / SLOT_S))
    cost = SLOT_S - saved[:, None, :] * PRICES[:, None]
    total = np.concatenate([np.zeros((1, *cost.shape[1:])), np.cumsum(cost, 0)])
    on, off = np.zeros(
        (2, *total.shape)
    )  # the least cost so far of those that run, or rest, for the shortest time at least
    began, ended = np.zeros((2, *total.shape), bool)
    for t in range(1, len(total)):
        since = max(0, t - shortest)
        stays, starts = on[t - 1] + cost[t - 1], off[since] + startup_s + total[t] - total[since]
        began[t], on[t] = starts < stays, np.minimum(starts, stays)
        ended[t], off[t] = on[since] < off[t - 1], np.minimum(on[since], off[t - 1])
    return 1 + backtrack(on[-1] < off[-1], began, ended, shortest)


def backtrack(runs: np.ndarray, began: np.ndarray, ended: np.ndarray, shortest: int) -> np.ndarray:
    """The number that run in each slot, traced back from the state at the end. A change found at t happened `shortest` slots before."""
    numbers = np.zeros((runs.shape[0], len(began) - 1), int)
    left = np.zeros(runs.shape, int)  # slots until the change
    for t in range(len(began) - 1, 0, -1):
        numbers[:, t - 1] = runs.sum(1)
        left = np.where(left > 0, left, shortest * np.where(runs, began[t], ended[t]))
        turns = left == 1
        left = np.maximum(0, left - 1)
        runs = runs ^ turns
    return numbers
