"""64 streams at a time for twenty minutes: whether memory and step time stay flat, and the gateway's CPU time for a token.

    python benchmarks/steady.py [--minutes 20] [--streams 64] [--output benchmarks/results/steady.md]

Starts `tramontane serve` on the demo model and streams completions over HTTP all the time, from a process of its own. Every minute it reads
the gateway's CPU time, the memory of gateway and rank, and the engine's counters from /metrics.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import machine  # noqa: E402
from support.servers.system_server import API_KEY, Server  # noqa: E402

MAX_TOKENS = 128
COUNTERS = ("engine_steps", "engine_step_seconds", "engine_generation_tokens")
TARGET_US = 60


@dataclass(frozen=True)
class Reading:
    """Totals since the start, and memory now."""

    at_s: float
    gateway_cpu_s: float
    steps: float
    step_s: float
    tokens: float
    gateway_rss_bytes: int
    rank_rss_bytes: int


def load(url: str, num_streams: int) -> None:
    """Streams until it is ended."""

    async def stream(session: aiohttp.ClientSession, number: int) -> None:
        seed = number
        while True:
            body = {
                "model": "demo_model",
                "prompt": f"def f{seed}(",
                "seed": seed,
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                async for _ in response.content.iter_any():
                    pass
            seed += num_streams

    async def run() -> None:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await asyncio.gather(*(stream(session, n) for n in range(num_streams)))

    asyncio.run(run())


def read(server: Server, gateway: psutil.Process, rank: psutil.Process, began: float) -> Reading:
    """The gateway and its threads; Ray's processes are not counted."""
    _, text = server.get("/metrics")
    totals = dict.fromkeys(COUNTERS, 0.0)
    for family in text_string_to_metric_families(text):
        for name in COUNTERS:
            if family.name.endswith(name):
                totals[name] += sum(sample.value for sample in family.samples if not sample.name.endswith("_created"))
    cpu = gateway.cpu_times()
    return Reading(
        at_s=time.monotonic() - began,
        gateway_cpu_s=cpu.user + cpu.system,
        steps=totals["engine_steps"],
        step_s=totals["engine_step_seconds"],
        tokens=totals["engine_generation_tokens"],
        gateway_rss_bytes=gateway.memory_info().rss,
        rank_rss_bytes=rank.memory_info().rss,
    )


def measure(*, minutes: float, num_streams: int) -> list[Reading]:
    server = Server("--no-batches")
    clients = multiprocessing.get_context("spawn").Process(target=load, args=(server.url, num_streams), daemon=True)
    try:
        server.wait_ready(1)
        (replica,) = server.replicas("ready")
        gateway, rank = psutil.Process(server.process.pid), server.rank(replica, 0)
        clients.start()
        time.sleep(10)  # code is loaded at its first use, and the KV cache's pages when they are first written
        began = time.monotonic()
        readings = [read(server, gateway, rank, began)]
        while readings[-1].at_s < minutes * 60:
            time.sleep(min(60.0, minutes * 60))
            readings.append(read(server, gateway, rank, began))
            print(describe(readings[-2], readings[-1]), flush=True)
        assert clients.is_alive(), "the clients ended: a request failed"
        return readings
    finally:
        if clients.pid is not None:
            clients.terminate()
            clients.join()
        server.kill()


def describe(before: Reading, after: Reading) -> str:
    """A row of the table, of the time between two readings."""
    tokens, steps = after.tokens - before.tokens, after.steps - before.steps
    cells = [
        f"{after.at_s / 60:.0f}",
        f"{tokens / (after.at_s - before.at_s):,.0f}",
        f"{(after.step_s - before.step_s) / steps * 1e3:.2f}",
        f"{(after.gateway_cpu_s - before.gateway_cpu_s) / tokens * 1e6:.0f}",
        str(after.gateway_rss_bytes >> 20),
        str(after.rank_rss_bytes >> 20),
    ]
    return f"| {' | '.join(cells)} |"


def page(readings: Sequence[Reading], *, num_streams: int, minutes: float) -> str:
    rows = [describe(a, b) for a, b in itertools.pairwise(readings)]
    lines = [
        f"# {minutes:g} minutes of {num_streams} streams",
        "",
        f"{machine.describe(torch.device('cpu'))}; server, Ray, gateway and clients share them.",
        f"`python benchmarks/steady.py --minutes {minutes:g} --streams {num_streams}`, {time.strftime('%F')}: `tramontane serve` on the",
        f"demo model, completions of {MAX_TOKENS} tokens. Each row is the minute before it. Target: at most {TARGET_US} us of the",
        "gateway's CPU time for a token.",
        "",
        "| minute | tokens/s | mean step, ms | gateway CPU for a token, us | gateway RSS, MiB | rank RSS, MiB |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=64, help="at a time")
    parser.add_argument("--output", type=Path, default=None, help="write the page to this file")
    args = parser.parse_args()
    text = page(measure(minutes=args.minutes, num_streams=args.streams), num_streams=args.streams, minutes=args.minutes)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
