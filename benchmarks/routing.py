"""Routing policies on a simulated clock: prefix hits, time to first token, imbalance and the time a decision takes.

    python benchmarks/routing.py [--traces ../shared/traces] [--replicas 4,64,1000] [--output benchmarks/results/routing.md]

Recorded requests of real services run on simulated replicas. The policies and the prefix index are the router's own. Only the
decisions are measured on this machine.
"""

import argparse
import math
import time
import timeit
from collections.abc import Sequence as Series
from pathlib import Path
from typing import cast

import machine
import numpy as np
import torch
from simulation import traces
from simulation.gateway import Outcome, simulate
from simulation.replica import Hardware
from simulation.traces import TraceRequest

from cluster.protocol.routing import ROUTING_POLICIES
from cluster.router.load_balancing.policy import RequestView, Snapshot, choose
from cluster.router.load_balancing.prefix_index import PrefixIndex
from workers.protocol import CacheEvents

ROOT = Path(__file__).resolve().parents[1]
WITH_PREFIXES = "mooncake_synthetic.jsonl"
WITHOUT_PREFIXES = ("azure_conv.csv", "azure_code.csv")
MAX_PROMPT_TOKENS = 32_000  # Mistral-7B v0.2 and v0.3 have a context of 32,768
REQUESTS_PER_REPLICA, MAX_REQUESTS = 440, 100_000
WARM_UP = 0.2  # of the requests: they run with empty caches and are not counted


def scale(trace: list[TraceRequest], num_replicas: int, load: float, hardware: Hardware) -> list[TraceRequest]:
    """Copies of the trace, fast enough to keep the share `load` of the replicas busy without any cache hit."""
    num_copies = max(1, round(min(REQUESTS_PER_REPLICA * num_replicas, MAX_REQUESTS) / len(trace)))
    demand_s = sum(hardware.demand_s(r) for r in trace)
    return traces.replicate(trace, num_copies, num_copies * demand_s / (num_replicas * load))


def hit_limit(requests: Series[TraceRequest], block_size: int) -> float:
    """The hit rate of one endless cache that all replicas share."""
    seen: set[bytes] = set()
    num_hit = num_tokens = 0
    for number, r in enumerate(requests):
        leading = r.hashes[: (r.num_prompt_tokens - 1) // block_size]
        num_found = next((i for i, h in enumerate(leading) if h not in seen), len(leading))
        seen.update(r.hashes)
        if number >= WARM_UP * len(requests):
            num_hit += num_found * block_size
            num_tokens += r.num_prompt_tokens
    return num_hit / num_tokens


def row(num_replicas: int, policy: str, outcome: Outcome) -> list[str]:
    counted = outcome.sequences[math.ceil(WARM_UP * len(outcome.sequences)) :]
    predicted = outcome.predicted_tokens[-len(counted) :]
    num_tokens = sum(s.request.num_prompt_tokens for s in counted)
    ttfts = np.array([cast(float, s.first_token_s) - s.submitted_s for s in counted])
    decisions_us = np.array(outcome.decisions_s) * 1e6
    computed, busy = np.array(outcome.computed_tokens), np.array(outcome.busy)
    return [
        f"{num_replicas:,}",
        policy,
        f"{sum(s.num_cached for s in counted) / num_tokens:.1%}",
        f"{sum(predicted) / num_tokens:.1%}",
        f"{np.median(ttfts):.2f} / {np.percentile(ttfts, 99):.2f}",
        f"{computed.max() / computed.mean():.2f}",
        f"{busy.mean():.0%} / {busy.max():.0%}",
        f"{np.median(decisions_us):.0f} / {decisions_us.mean():.0f} / {np.percentile(decisions_us, 99):.0f}",
    ]


def table(trace: list[TraceRequest], sizes: list[int], args: argparse.Namespace, hardware: Hardware) -> list[str]:
    lines = [
        "| replicas | policy | prefix hits | predicted | TTFT p50 / p99, s | computed tokens, max / mean "
        "| busy, mean / max | decision p50 / mean / p99, us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num_replicas in sizes:
        requests = scale(trace, num_replicas, args.load, hardware)
        for policy in args.policies.split(","):
            outcome = simulate(
                requests, policy=policy, num_replicas=num_replicas, hardware=hardware, num_gateways=args.gateways
            )
            lines.append("| " + " | ".join(row(num_replicas, policy, outcome)) + " |")
            print(lines[-1], flush=True)
    return lines


def undisturbed_decision_us(num_replicas: int = 1000, num_blocks: int = 32) -> float:
    """The match and the choice by the default policy, with nothing else in between: the best of several runs."""
    rng = np.random.default_rng(0)
    hashes = [i.to_bytes(8, "big") for i in range(num_blocks)]
    index = PrefixIndex()
    for slot in range(num_replicas):
        index.add(slot)
        # All replicas have the same beginning, a few have more of it.
        num_held = num_blocks // 4 if slot % 100 else num_blocks // 2 + slot // 100
        index.apply(slot, CacheEvents(stored=hashes[:num_held]))
    snapshot = Snapshot(
        available=np.ones(num_replicas, np.bool_),
        num_requests=rng.integers(0, 40, num_replicas),
        pending_tokens=rng.random(num_replicas) * 1e4,
        tokens_per_s=7000 + 2000 * rng.random(num_replicas),
        kv_usage=rng.random(num_replicas) * 0.8,
        max_num_seqs=np.full(num_replicas, 64),
    )

    def decide() -> None:
        matched = index.match(hashes, window_blocks=None)
        choose("prefix", snapshot, RequestView(512 * num_blocks + 1, matched * 512), turn=0)

    return min(timeit.repeat(decide, timer=time.thread_time, number=100, repeat=200)) / 100 * 1e6


def introduction(args: argparse.Namespace, hardware: Hardware) -> str:
    chunk_s = hardware.step_s([(hardware.max_num_batched_tokens, 8192)], 8, 8 * 8192)
    return (
        f"# Routing: policies on a simulated clock\n\n"
        f"Decisions (the match of the prefix and the choice) in CPU time of {machine.describe(torch.device('cpu'))}. "
        f"`python benchmarks/routing.py`, {time.strftime('%F')}. They include cold CPU caches; undisturbed, "
        f"one among 1,000 replicas takes {undisturbed_decision_us():.0f} us.\n\n"
        f"Replica: Mistral 7B in bf16 on an A100 80GB. A step reads {hardware.weights_bytes / 1e9:.1f} GB of weights and the running "
        f"sequences' KV at 80 % of 2,039 GB/s, computes 14.5 GFLOP per token and its attention at 55 % of 312 TFLOP/s, and takes "
        f"{hardware.fixed_s * 1e3:.0f} ms of overhead: {hardware.step_s([], 1, 1024) * 1e3:.1f} ms to decode one sequence, "
        f"{chunk_s * 1e3:.0f} ms for a chunk of {hardware.max_num_batched_tokens:,} tokens after 8,192 with 8 sequences decoding. "
        f"Prefix cache of {hardware.kv_tokens:,} tokens, blocks of {hardware.block_size}, {hardware.max_num_seqs} sequences at most.\n"
        f"Gateways: {args.gateways}. A report reaches them 50 to 500 ms after the step that it describes.\n"
        f"Copies of a trace share no prefix. At most {MAX_REQUESTS:,} requests: 1,000 replicas see fewer copies that come faster, each "
        f"with more cache, so they have more hits.\n"
        f"Load: without any cache hit the replicas would be busy {args.load:.0%} of the time. The first {WARM_UP:.0%} of the "
        f"requests are not counted. Busy: the share of time in which a replica runs at least one sequence.\n"
    )


def about(trace: list[TraceRequest], hardware: Hardware) -> str:
    alone = np.array([hardware.demand_s(TraceRequest(0.0, r.num_prompt_tokens, 0, ())) for r in trace])
    prompts = np.array([r.num_prompt_tokens for r in trace])
    return (
        f"{len(trace):,} requests, prompts of {prompts.mean():,.0f} tokens (p99 {np.percentile(prompts, 99):,.0f}; cut at "
        f"{MAX_PROMPT_TOKENS:,}), {np.mean([r.num_output_tokens for r in trace]):.0f} output tokens. "
        f"Computed alone on an idle replica: p50 {np.median(alone):.2f} s, p99 {np.percentile(alone, 99):.2f} s. "
        f"One endless cache shared by all replicas would hit {hit_limit(trace, hardware.block_size):.1%}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, default=ROOT.parent / "shared" / "traces", help="folder of the trace files"
    )
    parser.add_argument("--replicas", default="4,64,1000")
    parser.add_argument("--replicas-without-prefixes", default="64", help="for the traces that share none")
    parser.add_argument("--policies", default=",".join(ROUTING_POLICIES))
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.75)
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this file")
    args = parser.parse_args()
    unknown = set(args.policies.split(",")) - set(ROUTING_POLICIES)
    if unknown:
        raise SystemExit(f"Unknown policy {unknown.pop()!r}. Choose from {', '.join(ROUTING_POLICIES)}.")
    if not args.traces.is_dir():
        raise SystemExit(f"No traces found in {args.traces}. Name their folder with --traces.")
    hardware = Hardware()
    text = introduction(args, hardware)
    print(text)
    for name in (WITH_PREFIXES, *WITHOUT_PREFIXES):
        path = args.traces / name
        sizes = args.replicas if name == WITH_PREFIXES else args.replicas_without_prefixes
        text += f"\n## {name}\n\n"
        if not path.exists():
            text += f"Skipped: {name} does not exist.\n"
        elif sizes:
            trace = traces.load(path, MAX_PROMPT_TOKENS)
            text += about(trace, hardware) + "\n"
            text += "\n".join(table(trace, [int(n) for n in sizes.split(",")], args, hardware)) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
