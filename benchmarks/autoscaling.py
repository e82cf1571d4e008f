"""The autoscaler's pure function on a simulated clock, with the request traces of real services, compared with an oracle.

    python benchmarks/autoscaling.py [--traces ../shared/traces] [--output benchmarks/results/autoscaling.md]

Knows what the autoscaler sees of a cluster and what a replica costs. simulation/fluid.py knows how fast a replica is, and
simulation/oracle.py the best schedule. Counts and bounds, no tokens.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from simulation.fluid import A10G, A100, Arrays, Load, Model
from simulation.oracle import PRICES, SLOT_S, cheapest

from cluster.autoscaler.decide import decide
from cluster.autoscaler.state import AutoscalerConfig, AutoscalerState, Observation

KEPT = 0.99  # share of requests that must meet the backlog objective
DAY_S = 86_400
SEED = 11  # the function's constants were chosen on days of seeds 1 to 3
Scale = Callable[[Arrays, int], tuple[Arrays, int]]


@dataclass(frozen=True)
class Outcome:
    hours: float
    kept: float
    p99_s: float
    low: int
    high: int
    turns: int  # changes in the opposite direction of the previous one
    undone: int


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


def busier(trace: Arrays, copies: int, seed: int = SEED) -> tuple[Arrays, int]:
    """The trace with `copies` requests for each of its own, up to 30 s apart. It keeps its rises and bursts."""
    times, prompts, outputs = trace
    length = int(times[-1]) + 1
    rng = np.random.default_rng(seed)
    moved = np.concatenate([(times + rng.uniform(0, 30, len(times))) % length for _ in range(copies)])
    return (moved, np.tile(prompts, copies), np.tile(outputs, copies)), length


def day(trace: Arrays, copies: int, seed: int = SEED) -> tuple[Arrays, int]:
    """A day of `copies` tenants. Each repeats the trace from a different place, thinned to 15 % at 4:00 and complete at 16:00."""
    times, prompts, outputs = trace
    period = int(times[-1]) + 1
    rng = np.random.default_rng(seed)
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
    """Asks the autoscaler every second. Replicas are paid for from order to removal."""
    ready, starting = first_need(load), []  # type: ignore[var-annotated]
    state = AutoscalerState(num_replicas=ready)
    backlog, running, arrived = 0.0, load.first_running, 0.0
    waits, paid, changes = np.zeros(load.length), np.zeros(load.length, int), []
    for t in range(load.length):
        while starting and starting[0] <= t:
            starting.pop(0)
            ready += 1
        arrived += load.tokens[t]
        waits[t], backlog, running, speed = load.step(load.tokens[t], ready, backlog, running)
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
    kept, p99_s = float(load.kept(waits, config.backlog_limit_s)), load.p99_s(waits)
    turned = sum((before > 0) != (after > 0) for (_, before), (_, after) in itertools.pairwise(changes))
    undone = undone_downs(changes, config.scale_down_after_s)
    return Outcome(paid.sum() / 3600, kept, p99_s, paid.min(), paid.max(), turned, undone)


def undone_downs(changes: list[tuple[int, int]], within_s: float) -> int:
    """Scale-downs followed by a scale-up within that time."""
    return sum(before < 0 < after and then - t < within_s for (t, before), (then, after) in itertools.pairwise(changes))


DAYS: tuple[tuple[str, str, Model, Scale, int], ...] = (
    ("Azure conversation, a day of 12 tenants", "azure_conv.csv", A10G, day, 12),
    ("Azure code, a day of 20 tenants", "azure_code.csv", A10G, day, 20),
    ("Mooncake, a day of 6 tenants", "mooncake_synthetic.jsonl", A100, day, 6),
)
HOURS: tuple[tuple[str, str, Model, Scale, int], ...] = (
    ("Azure conversation as recorded, 6 times", "azure_conv.csv", A10G, busier, 6),
    ("Azure code as recorded, 4 times", "azure_code.csv", A10G, busier, 4),
    ("Mooncake as recorded, 3 times", "mooncake_synthetic.jsonl", A100, busier, 3),
)


def rows(traces: Path) -> Iterator[str]:
    for workloads, objectives, startups in ((DAYS, (2.0, 5.0, 10.0), (60, 120)), (HOURS, (2.0,), (60,))):
        loads = [
            (f"{name}, {model.name}", Load(model, *scale(read(traces / file), copies)))
            for name, file, model, scale, copies in workloads
        ]
        for ttft_s, (name, load), startup_s in itertools.product(objectives, loads, startups):
            config = AutoscalerConfig(min_replicas=1, max_replicas=500, ttft_objective_s=ttft_s)
            yield row(name, load, startup_s, config)


def row(name: str, load: Load, startup_s: int, config: AutoscalerConfig) -> str:
    ours = simulate(load, startup_s, config)
    goals = ((config.scale_down_after_s, KEPT), (config.scale_down_after_s, ours.kept), (0.0, KEPT))
    calm, equal, free = cheapest(load, config.backlog_limit_s, startup_s=startup_s, goals=goals)
    cells = [f"{config.ttft_objective_s:.0f}", name, startup_s, f"{ours.low} to {ours.high}", f"{ours.kept:.2%}"]
    cells += [f"{ours.p99_s:.2f}", f"{ours.turns * 3600 / load.length:.1f}", ours.undone, f"{ours.hours:,.1f}"]
    cells += [f"{calm:,.1f}", *(f"{ours.hours / best:.2f}" for best in (calm, equal, free))]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def describe(config: AutoscalerConfig) -> str:
    columns = (
        "TTFT objective, s|load|start-up, s|replicas|objective kept|backlog p99, s|turns per hour|undone|replica-hours"
        "|oracle|ratio|to equal|to free"
    )
    speeds = f"A10G {A10G.tokens_per_s:,.0f}, A100 {A100.tokens_per_s:,.0f} prompt tokens/s"
    return f"""# Autoscaling: request traces on a simulated clock

`python benchmarks/autoscaling.py`, {time.strftime("%F")}. Default settings except the TTFT objective: the backlog objective is half of it,
scale-down after {config.scale_down_after_s:.0f} s. Replicas are a fluid with assumed speeds ({speeds}, less up to
40 % while sequences decode), prefix hits are not counted, and a replica is paid for from its order to its removal.
The days are synthetic: tenants that each repeat a trace, each time from a different place, thinned to 15 % at 4:00 and complete at
16:00. They are drawn with seed {SEED}; the function's constants were chosen on other seeds. The last rows are the recorded traces
(17 to 58 minutes) with every request several times: they rise faster than a replica starts, and end before the autoscaler can
recover much.

"Objective kept": requests that met a backlog within the objective. "Undone": scale-downs followed by a scale-up within
{config.scale_down_after_s:.0f} s. The oracle knows the whole load: it orders replicas ahead, keeps the objective for
{KEPT:.0%} of the requests, also pays from order to removal, and is the cheapest of {2 * len(PRICES)} schedules in slots of {SLOT_S} s.
Like the autoscaler, it keeps a replica for at least {config.scale_down_after_s:.0f} s and adds none back sooner; otherwise
its schedule would flap. "To equal" is the ratio to an oracle that keeps the objective for the share that the autoscaler kept it for;
"to free" to one that may flap, held back only by what a start costs.

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
    text = describe(AutoscalerConfig(min_replicas=1, max_replicas=500))
    print(text, end="")
    for line in rows(args.traces):
        print(line, flush=True)
        text += line + "\n"
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
