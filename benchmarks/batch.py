"""Batch lines next to online requests, and batch lines alone: what the lines cost online requests, and their throughput alone.

    python benchmarks/batch.py [--background-tokens 4,8] [--pairs 4] [--seconds 20] [--output benchmarks/results/batch.md]

A real engine with the demo model runs in its own process with its socket. A real router runs in this process, with an open loop of online
requests and the window of a batch's runner (`Router.batch_room`). The engine computes on one thread, which leaves the second core
to the gateway.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.replicas.client import ReplicaClient
from cluster.router.router import Router
from workers.protocol import BATCH_PRIORITY, GenerateRequest, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 4096
UTILISATION = 0.3  # of the online requests a replica can answer
ONLINE_PROMPT, ONLINE_OUTPUT = 64, 32
FILL_S = 0.005  # how often the simulated runner polls for room
SETTLE_S = 2.0  # of batch lines alone, before online requests come

Shape = tuple[int, int, int]  # (max_num_seqs, max_background_tokens, number of threads)


def line(number: int) -> GenerateRequest:
    """Prompts of 16 to 96 tokens, 16 to 96 of output, all different."""
    rng = random.Random(number)
    sampling = SamplingParams(max_tokens=rng.randint(16, 96), seed=number, ignore_eos=True)
    prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(16, 96))]
    return GenerateRequest(
        request_id=f"line-{number}", prompt_token_ids=prompt, sampling=sampling, priority=BATCH_PRIORITY
    )


def online(number: int) -> GenerateRequest:
    rng = random.Random(-number)
    sampling = SamplingParams(max_tokens=ONLINE_OUTPUT, seed=number, ignore_eos=True)
    prompt = [rng.randrange(3, VOCAB) for _ in range(ONLINE_PROMPT)]
    return GenerateRequest(request_id=f"online-{number}", prompt_token_ids=prompt, sampling=sampling)


def num_tokens(requests: list[GenerateRequest]) -> int:
    return sum(len(r.prompt_token_ids) + r.sampling.max_tokens for r in requests)


def run_engine(link: Connection, shape: Shape) -> None:
    """The engine's process: sends its address, then follows commands. A list of line numbers: computes them without a
    gateway and sends the seconds. None: ends.
    """
    from workers.checkpoint.model_config import load_model_config
    from workers.config import EngineConfig
    from workers.engine.llm_engine import LLMEngine
    from workers.engine.loop import EngineLoop
    from workers.rank.server import StreamServer

    max_num_seqs, background, num_threads = shape
    folder = ROOT / "examples" / "demo_model"
    config = EngineConfig(
        model_path=str(folder),
        model=load_model_config(folder),
        max_num_seqs=max_num_seqs,
        max_background_tokens=background,
        max_model_len=2048,
        num_threads=num_threads,
    )
    core, alone = LLMEngine(config).core, LLMEngine(config)
    loop = EngineLoop(core, lambda *step: server.publish(*step))
    server = StreamServer(core.facts("r0"), "secret", submit=loop.submit, abort=loop.abort, load=core.load)
    link.send(server.start())
    loop.start()
    while (numbers := link.recv()) is not None:
        requests = [line(number) for number in numbers]
        began = time.perf_counter()
        alone.generate(requests)
        link.send(time.perf_counter() - began)
    loop.stop()
    server.close()


@contextlib.asynccontextmanager
async def rig(shape: Shape) -> AsyncIterator[tuple[Router, Connection]]:
    spawn = multiprocessing.get_context("spawn")
    link, there = spawn.Pipe()
    process = spawn.Process(target=run_engine, args=(there, shape), daemon=True)
    process.start()
    address = await asyncio.to_thread(link.recv)
    try:
        async with ReplicaClient("r0", address, "secret") as client:
            while not client.is_ready(time.monotonic()):
                await asyncio.sleep(0.01)
            yield Router([client]), link
    finally:
        link.send(None)
        await asyncio.to_thread(process.join, 20)


class Runner:
    """Acts as a batch's runner: keeps as many lines in flight as the router has room for."""

    def __init__(self, router: Router, numbers: itertools.count) -> None:
        self._router, self._numbers = router, numbers
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_tokens = 0  # of all answered, and of the outputs of those that are not yet

    async def answer(self, count: int | None = None) -> None:
        """Answers `count` lines; None: until cancelled."""
        num_left = count
        try:
            while num_left is None or num_left or self._tasks:
                for _ in range(
                    self._router.batch_room() if num_left is None else min(num_left, self._router.batch_room())
                ):
                    task = asyncio.create_task(self._answer_one(line(next(self._numbers))))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                    num_left = None if num_left is None else num_left - 1
                await asyncio.sleep(FILL_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer_one(self, request: GenerateRequest) -> None:
        async for delta in self._router.generate(request, max_crashes=1):
            self.num_tokens += len(delta.token_ids)
            if delta.num_cached_tokens is not None:
                self.num_tokens += len(request.prompt_token_ids)


@dataclass
class Seen:
    """What online clients saw, in seconds."""

    ttfts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    elapsed_s: float = 0.0


async def ask(router: Router, request: GenerateRequest, seen: Seen) -> None:
    last = asked = time.perf_counter()
    async for _ in router.generate(request):
        now = time.perf_counter()
        (seen.ttfts if last is asked else seen.gaps).append(now - last)
        last = now


async def online_capacity(router: Router, numbers: itertools.count) -> float:
    """The online requests per second of one replica, with enough requests waiting at any time."""
    began, count = time.perf_counter(), 128
    await asyncio.gather(*(ask(router, online(next(numbers)), Seen()) for _ in range(count)))
    return count / (time.perf_counter() - began)


async def open_loop(
    router: Router, numbers: itertools.count, seen: Seen, *, rate: float, seconds: float, seed: int
) -> None:
    """Random arrivals, the same for the same seed, whether or not earlier requests are answered."""
    rng, tasks = random.Random(seed), []
    began = at = time.perf_counter()
    while (at := at + rng.expovariate(rate)) < began + seconds:
        await asyncio.sleep(at - time.perf_counter())
        tasks.append(asyncio.create_task(ask(router, online(next(numbers)), seen)))
    await asyncio.gather(*tasks)
    seen.elapsed_s += time.perf_counter() - began


async def measure_online(router: Router, args: argparse.Namespace) -> tuple[Seen, Seen, float]:
    """(without a batch, with a batch, the rate). The two take turns, so that other work on the machine affects both."""
    numbers = itertools.count(1)
    await online_capacity(router, numbers)
    rate = UTILISATION * await online_capacity(router, numbers)
    without, with_batch = Seen(), Seen()
    for pair in range(args.pairs):
        await open_loop(router, numbers, without, rate=rate, seconds=args.seconds, seed=pair)
        runner = Runner(router, itertools.count(10_000 * (pair + 1)))
        running = asyncio.create_task(runner.answer())
        await asyncio.sleep(SETTLE_S)
        before = runner.num_tokens
        await open_loop(router, numbers, with_batch, rate=rate, seconds=args.seconds, seed=pair)
        with_batch.batch_tokens += runner.num_tokens - before
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return without, with_batch, rate


async def throughput(router: Router, link: Connection, args: argparse.Namespace) -> tuple[float, float]:
    """Tokens/s of the same lines: the engine alone, and through socket and router; medians of several turns."""
    alone, through = [], []
    for repeat in range(args.repeats + 1):
        numbers = range(10**6 + repeat * args.lines, 10**6 + (repeat + 1) * args.lines)
        tokens = num_tokens([line(number) for number in numbers])
        link.send(numbers)
        alone.append(tokens / await asyncio.to_thread(link.recv))
        began = time.perf_counter()
        await Runner(router, itertools.count(numbers.start)).answer(args.lines)
        through.append(tokens / (time.perf_counter() - began))
    return statistics.median(alone[1:]), statistics.median(through[1:])  # the first turn warms


def p50_p99(values: list[float]) -> tuple[float, float]:
    values = sorted(values)
    return statistics.median(values) * 1e3, values[min(len(values) - 1, int(0.99 * len(values)))] * 1e3


async def online_row(background: int, args: argparse.Namespace) -> str:
    async with rig((args.max_num_seqs, background, args.threads)) as (router, _):
        without, with_batch, rate = await measure_online(router, args)
    cells = [str(background), f"{rate:.1f}", str(len(with_batch.ttfts))]
    for kind in ("ttfts", "gaps"):
        (p50, p99), (p50_with, p99_with) = p50_p99(getattr(without, kind)), p50_p99(getattr(with_batch, kind))
        cells += [f"{p50:.1f} / {p99:.1f}", f"{p50_with:.1f} / {p99_with:.1f}"]
        cells += [f"{p50_with / p50:.2f} / **{p99_with / p99:.2f}**"]
    cells += [f"{with_batch.batch_tokens / with_batch.elapsed_s:,.0f}"]
    return "| " + " | ".join(cells) + " |"


async def throughput_rows(args: argparse.Namespace) -> list[str]:
    rows, best = [], 0.0
    for num_seqs in (int(n) for n in args.batch_sizes.split(",")):
        async with rig((num_seqs, 8, args.threads)) as (router, link):
            alone, through = await throughput(router, link, args)
        best = max(best, alone)
        rows.append((num_seqs, alone, through))
    return [
        f"| {num_seqs} | {alone:,.0f} | {through:,.0f} | {through / alone:.2f} | {through / best:.2f} |"
        for num_seqs, alone, through in rows
    ]


async def bench(args: argparse.Namespace) -> str:
    import machine
    import torch

    rows = await throughput_rows(args)
    online_rows = [await online_row(int(b), args) for b in args.background_tokens.split(",")]
    return "\n".join(
        [
            "# Batches: next to online requests, and alone",
            "",
            f"{machine.describe(torch.device('cpu'))}; demo_model, float32. The engine computes on {args.threads} thread(s) in its own",
            f"process; router, online clients and runner share another. `python benchmarks/batch.py`, {time.strftime('%F')}.",
            "",
            "## Online requests without a batch, and with a batch that uses all it can",
            "",
            f"An open loop at {UTILISATION:.0%} of the online requests that one replica can answer: prompts of {ONLINE_PROMPT} tokens,",
            f"{ONLINE_OUTPUT} of output, max_num_seqs {args.max_num_seqs}; {args.pairs} turns of {args.seconds:.0f} s without and with,",
            "the same arrivals. Milliseconds, p50 / p99; ratios of p50 and p99. The first column is max_background_tokens of",
            "EngineConfig, the most that batch lines add to a step with online requests; 4 is the CPU's default.",
            "",
            "| background tokens | requests/s | requests | TTFT without | TTFT with | ratio "
            "| token gap without | token gap with | ratio | batch tokens/s |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *online_rows,
            "",
            "## A batch alone",
            "",
            f"{args.lines} lines, prompts of 16 to 96 tokens and 16 to 96 of output, tokens/s of both; medians of {args.repeats} turns.",
            "Best: the engine without socket and router at its best batch size.",
            "",
            "| max_num_seqs | engine alone | through the router | ratio | to the best |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--background-tokens", default="4,8")
    parser.add_argument("--batch-sizes", default="64,128")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="with online requests")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--lines", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this file")
    args = parser.parse_args()
    text = asyncio.run(bench(args))
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
