"""The autoscaler's pure function on a simulated clock, fed with the request traces of real services, beside an oracle.

    python benchmarks/autoscaling.py [--traces ../shared/traces] [--output benchmarks/autoscaling.md]

Replicas are a fluid: prompt tokens are worked off at a speed that falls as sequences decode. Counts and bounds, no tokens.
"""

import argparse
import csv
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from cluster.autoscaler import AutoscalerConfig, AutoscalerState, Observation, decide

SLOT_S = 30  # the oracle changes its mind this often
KEPT = 0.99  # share of requests that must meet the backlog objective
DAY_S = 86_400
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Model:
    """A 7B model on one accelerator: prompt tokens/s while nothing decodes, sequences, KV tokens, seconds per output token."""

    name: str
    tokens_per_s: float
    max_num_seqs: int
    kv_tokens: int
    tpot_s: float
    slowdown: float = 0.4  # of prompts, when every sequence decodes


A10G = Model("A10G", 3_500, 48, 48_000, 0.040)
A100 = Model("A100", 11_000, 128, 400_000, 0.025)


class Load:
    """Prompt tokens and requests of every second."""

    def __init__(self, model: Model, arrays: Arrays, length: int) -> None:
        times, prompts, outputs = arrays
        seconds = times.astype(int)
        self.model, self.length = model, length
        self.tokens = np.bincount(seconds, weights=prompts, minlength=length)
        self.requests = np.bincount(seconds, minlength=length).astype(float)
        self.prompt = prompts.mean()
        self.life_s = max(1.0, outputs.mean() * model.tpot_s)
        self.kv_per_request = self.prompt + outputs.mean()
        self.max_running = min(model.max_num_seqs, model.kv_tokens / self.kv_per_request)
        self.schedules: dict[float, np.ndarray] = {}  # the oracle's, by price
        self.first_running = self.requests[:60].mean() * self.life_s

    def step(self, t, replicas, backlog, running):
        """One second. Returns (mean wait, backlog, running, speed); `replicas` may be an array of alternatives."""
        full = replicas * self.max_running
        speed = self.model.tokens_per_s * (1 - self.model.slowdown * np.minimum(1.0, running / full))
        free = np.maximum(0.0, full - running + running / self.life_s) * self.prompt
        after = backlog + self.tokens[t]
        after = after - np.minimum(np.minimum(after, replicas * speed), free)
        started = (backlog + self.tokens[t] - after) / self.prompt
        wait = (backlog + after) / 2 / (replicas * speed)
        return wait, after, running + started - running / self.life_s, speed


@dataclass
class Outcome:
    hours: float
    kept: float
    p99_s: float = 0.0
    low: int = 0
    high: int = 0
    changes_per_hour: float = 0.0
    undone: int = 0


def read(path: Path) -> Arrays:
    """Arrival in seconds, prompt tokens, output tokens."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return (
            np.array([r["timestamp"] / 1e3 for r in rows]),
            np.array([r["input_length"] for r in rows]),
            np.array([r["output_length"] for r in rows]),
        )
    with path.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    times = np.array([datetime.fromisoformat(line[0][:26]).timestamp() for line in lines])
    return times - times[0], np.array([int(line[1]) for line in lines]), np.array([int(line[2]) for line in lines])


def busier(trace: Arrays, copies: int) -> tuple[Arrays, int]:
    """The trace as it is, with `copies` requests for each, up to 30 s apart: its rises and bursts stay."""
    times, prompts, outputs = trace
    length = int(times[-1]) + 1
    rng = np.random.default_rng(1)
    moved = np.concatenate([(times + rng.uniform(0, 30, len(times))) % length for _ in range(copies)])
    return (moved, np.tile(prompts, copies), np.tile(outputs, copies)), length


def day(trace: Arrays, copies: int) -> tuple[Arrays, int]:
    """A day of `copies` tenants: each repeats the trace from a new place every time, thinned to 15 % at 4:00, all at 16:00."""
    times, prompts, outputs = trace
    period = int(times[-1]) + 1
    rng = np.random.default_rng(1)
    parts = []
    for copy in range(copies):
        for turn in range(-1, DAY_S // period + 1):
            at = (times + rng.uniform(0, period)) % period + (turn + copy / copies) * period
            profile = 0.15 + 0.85 * (0.5 - 0.5 * np.cos(2 * np.pi * (at / 3600 - 4) / 24)) ** 1.5
            keep = (rng.random(len(at)) < profile) & (at >= 0) & (at < DAY_S)
            parts.append((at[keep], prompts[keep], outputs[keep]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True)), DAY_S  # type: ignore[return-value]


def first_need(load: Load) -> int:
    return max(1, int(np.ceil(load.tokens[:120].mean() / load.model.tokens_per_s / 0.7)))


def simulate(load: Load, startup_s: int, config: AutoscalerConfig) -> Outcome:
    """The autoscaler, asked every second. Replicas are paid from order to removal."""
    ready, starting = first_need(load), []  # type: ignore[var-annotated]
    state = AutoscalerState(num_replicas=ready)
    backlog, running, arrived = 0.0, load.first_running, 0.0
    waits, paid, changes = np.zeros(load.length), np.zeros(load.length, int), []
    for t in range(load.length):
        while starting and starting[0] <= t:
            starting.pop(0)
            ready += 1
        arrived += load.tokens[t]
        waits[t], backlog, running, speed = load.step(t, ready, backlog, running)
        seen = Observation(
            num_ready=ready,
            num_starting=len(starting),
            num_backlog_tokens=int(backlog),
            num_requests=int(running + backlog / load.prompt + 0.5),
            num_running=int(running),
            max_num_seqs=load.model.max_num_seqs,
            kv_cache_usage=min(1.0, running * load.kv_per_request / (ready * load.model.kv_tokens)),
            arrived_tokens_total=int(arrived),
            prefill_tokens_per_s=float(speed),
            startup_s=startup_s,
        )
        state, decision = decide(config, seen, state, float(t))
        change = decision.num_replicas - ready - len(starting)
        if change:
            changes.append((t, change))
        starting += [t + startup_s] * max(0, change)
        for _ in range(-change):
            if starting:
                starting.pop()
            else:
                ready -= 1
        paid[t] = ready + len(starting)
    kept, p99_s = judge(load, waits, config.backlog_limit_s)
    signs = [change > 0 for _, change in changes]
    turned = sum(a != b for a, b in itertools.pairwise(signs))
    undone = undone_downs(changes, config.scale_down_after_s)
    hours = load.length / 3600
    return Outcome(paid.sum() / 3600, kept, p99_s, paid.min(), paid.max(), turned / hours, undone)


def undone_downs(changes: list[tuple[int, int]], within_s: float) -> int:
    """Scale-downs followed by a scale-up within that time."""
    return sum(before < 0 < after and then - t < within_s for (t, before), (then, after) in itertools.pairwise(changes))


def judge(load: Load, waits: np.ndarray, limit_s: float) -> tuple[float, float]:
    """The share of requests that met the objective, and the 99th percentile of the backlog they met."""
    order = np.argsort(waits)
    count = np.cumsum(load.requests[order])
    p99_s = waits[order][np.searchsorted(count, 0.99 * count[-1])]
    return load.requests[waits <= limit_s].sum() / count[-1], float(p99_s)


def oracle(load: Load, startup_s: int, pause_s: float, limit_s: float, kept: float = KEPT) -> Outcome:
    """The cheapest schedule found that knows the whole trace, keeps the objective for `kept` of the requests and pays for starts.

    Every slot gets the count with the least paid time + price * late requests; pauses of a replica shorter than `pause_s` are
    filled; the price is found by bisection. A good schedule, not a proven optimum.
    """
    low, high, best = 1e-2, 1e4, None
    for _ in range(9):
        price = (low * high) ** 0.5
        if price not in load.schedules:
            load.schedules[price] = cheapest(load, limit_s, price)
        schedule = without_pauses(load.schedules[price], max(pause_s, startup_s))
        outcome = follow(load, schedule, startup_s, limit_s)
        if outcome.kept >= kept:
            high = price
            best = outcome if best is None or outcome.hours < best.hours else best
        else:
            low = price
    return best or outcome


def cheapest(load: Load, limit_s: float, price: float) -> np.ndarray:
    schedule = np.zeros(load.length, int)
    backlog, running = 0.0, load.first_running
    for begin in range(0, load.length, SLOT_S):
        end = min(load.length, begin + SLOT_S)
        mean, peak = (f(load.tokens[begin:end]) / load.model.tokens_per_s for f in (np.mean, np.max))
        low = max(1, int(mean * 0.8))
        high = max(low + 4, int(max(peak * 0.6, mean * 1.6) + backlog / load.model.tokens_per_s / SLOT_S) + 6)
        counts = np.unique(np.linspace(low, high, min(high - low + 1, 50)).astype(int)).astype(float)
        backlogs, runnings, late = np.full(len(counts), backlog), np.full(len(counts), running), np.zeros(len(counts))
        for t in range(begin, end):
            wait, backlogs, runnings, speed = load.step(t, counts, backlogs, runnings)
            late += load.requests[t] * (wait > limit_s)
        left = backlogs / (counts * speed)
        late += load.requests[begin:end].mean() * 3 * np.maximum(0.0, left - limit_s)
        best = int(np.argmin(counts * (end - begin) + price * late + np.where(left > 2 * limit_s, 1e6 * left, 0.0)))
        schedule[begin:end] = int(counts[best])
        backlog, running = backlogs[best], runnings[best]
    return schedule


def without_pauses(schedule: np.ndarray, pause_s: float) -> np.ndarray:
    """The nth replica is kept where it would come back within `pause_s`: cheaper than a start, or no flapping."""
    filled = schedule.copy()
    for level in range(schedule.min() + 1, schedule.max() + 1):
        used = np.flatnonzero(schedule >= level)
        for i in np.flatnonzero(np.diff(used) > 1):
            if used[i + 1] - used[i] <= pause_s:
                pause = slice(used[i] + 1, used[i + 1])
                filled[pause] = np.maximum(filled[pause], level)
    return filled


def follow(load: Load, schedule: np.ndarray, startup_s: int, limit_s: float) -> Outcome:
    waits, backlog, running = np.zeros(load.length), 0.0, load.first_running
    for t in range(load.length):
        waits[t], backlog, running, _ = load.step(t, schedule[t], backlog, running)
    starts = np.maximum(0, np.diff(schedule)).sum()
    kept, p99_s = judge(load, waits, limit_s)
    return Outcome((schedule.sum() + startup_s * starts) / 3600, kept, p99_s)


WORKLOADS = (
    ("Azure conversation, 6 times", "azure_conv.csv", A10G, busier, 6),
    ("Azure code, 4 times", "azure_code.csv", A10G, busier, 4),
    ("Mooncake, 3 times", "mooncake_synthetic.jsonl", A100, busier, 3),
    ("Azure conversation, a day of 12 tenants", "azure_conv.csv", A10G, day, 12),
    ("Azure code, a day of 20 tenants", "azure_code.csv", A10G, day, 20),
    ("Mooncake, a day of 6 tenants", "mooncake_synthetic.jsonl", A100, day, 6),
)


def bench(job: tuple[Path, int]) -> list[str]:
    traces, index = job
    name, file, model, scale, copies = WORKLOADS[index]
    load = Load(model, *scale(read(traces / file), copies))
    return [row(f"{name}, {model.name}", load, startup_s) for startup_s in (60, 120)]


def row(name: str, load: Load, startup_s: int) -> str:
    config = AutoscalerConfig(min_replicas=1, max_replicas=500)
    ours = simulate(load, startup_s, config)
    best = oracle(load, startup_s, startup_s, config.backlog_limit_s)
    equal = oracle(load, startup_s, startup_s, config.backlog_limit_s, ours.kept)
    calm = oracle(load, startup_s, config.scale_down_after_s, config.backlog_limit_s)
    cells = [name, startup_s, f"{ours.low} to {ours.high}", f"{ours.kept:.2%}", f"{ours.p99_s:.2f}"]
    cells += [f"{ours.changes_per_hour:.1f}", ours.undone, f"{ours.hours:,.1f}", f"{best.hours:,.1f}"]
    ratios = [f"{ours.hours / oracle.hours:.2f}" for oracle in (best, equal, calm)]
    return "| " + " | ".join(str(cell) for cell in [*cells, *ratios]) + " |"


def describe(config: AutoscalerConfig) -> str:
    columns = "load|start-up, s|replicas|objective kept|backlog p99, s|turns per hour|undone|replica-hours|oracle|ratio|to equal|to calm"
    return f"""# Autoscaling: request traces on a simulated clock

`python benchmarks/autoscaling.py`, {time.strftime("%F")}. Defaults: backlog objective {config.backlog_limit_s:.1f} s (half of the
TTFT objective), scale down after {config.scale_down_after_s:.0f} s. Replicas are a fluid with assumed speeds
(A10G {A10G.tokens_per_s:,.0f}, A100 {A100.tokens_per_s:,.0f} prompt tokens/s, less up to 40 % while sequences decode), prefix hits
are not counted, and a replica is paid from its order on. The first six rows are the traces as they are (17 to 58 minutes)
with every request several times; the days are made: tenants that each repeat the trace, every time from another place,
thinned to 15 % at 4:00 and all of it at 16:00.

The oracle knows the whole trace: the cheapest schedule found, in slots of {SLOT_S} s, that keeps the objective for
{KEPT:.0%} of the requests and pays for starts. "To equal": an oracle that keeps it for the share that the autoscaler kept.
"To calm": one that, too, brings no replica back within {config.scale_down_after_s:.0f} s.
"Undone": scale-downs followed by a scale-up within that time.

| {columns.replace("|", " | ")} |
{"|---" * (columns.count("|") + 1)}|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "traces")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    args = parser.parse_args()
    if not args.traces.is_dir():
        print(f"Skipped: {args.traces} has no request traces; name their folder with --traces.")
        return
    config = AutoscalerConfig(min_replicas=1, max_replicas=500)
    with ProcessPoolExecutor() as pool:
        jobs = [(args.traces, index) for index in range(len(WORKLOADS))]
        rows = [line for lines in pool.map(bench, jobs) for line in lines]
    text = describe(config) + "\n".join(rows) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
