"""A real `tramontane serve` process under load: start-up, time to first token, time per output token, throughput.

    python benchmarks/serving.py [--tensor-parallel-sizes 1,2] [--concurrency 1,16,64] [--output benchmarks/results/serving.md]

Starts the server as a user would, on loopback, streams completions over HTTP, and stops it with SIGTERM.
"""

import argparse
import asyncio
import json
import signal
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import machine
import torch

ROOT = Path(__file__).resolve().parents[1]
PROMPT = (
    "def read_lines(path, encoding=None):\n    " + '"""Return the lines of a file as a list of strings."""\n    ' * 3
)


@dataclass
class Stream:
    ttft_s: float
    tpot_s: float
    num_tokens: int


async def run_stream(session: aiohttp.ClientSession, url: str, *, seed: int, max_tokens: int) -> Stream:
    body = {
        "model": "demo_model",
        "prompt": f"# {seed}\n{PROMPT}",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = last = None
    num_tokens = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            last = time.perf_counter()
            event = json.loads(line[6:])
            if event["choices"] and first is None:
                first = last
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    assert first is not None and last is not None, "the stream held no event"
    return Stream(first - began, (last - first) / max(1, num_tokens - 1), num_tokens)


async def run_level(url: str, *, concurrency: int, num_requests: int, max_tokens: int) -> list[str]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await run_stream(session, url, seed=10_000, max_tokens=4)
        gate = asyncio.Semaphore(concurrency)

        async def one(seed: int) -> Stream:
            async with gate:
                return await run_stream(session, url, seed=seed, max_tokens=max_tokens)

        began = time.perf_counter()
        streams = await asyncio.gather(*(one(i) for i in range(num_requests)))
        elapsed = time.perf_counter() - began

    def milliseconds(values: list[float]) -> str:
        values = sorted(values)
        p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
        return f"{statistics.median(values) * 1e3:.1f} / {p99 * 1e3:.1f}"

    return [
        str(concurrency),
        milliseconds([s.ttft_s for s in streams]),
        milliseconds([s.tpot_s for s in streams]),
        f"{sum(s.num_tokens for s in streams) / elapsed:,.0f}",
    ]


async def wait_until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    async with aiohttp.ClientSession() as session:
        while process.returncode is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)
    raise SystemExit(f"the server ended with status {process.returncode} before it was ready")


async def bench(size: int, args: argparse.Namespace) -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "cluster.cli.main", "serve", "--port", str(port)]
    command += ["--tensor-parallel-size", str(size)]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
    try:
        await wait_until_ready(url, process)
        ready = time.perf_counter() - began
        async with aiohttp.ClientSession() as session:
            await run_stream(session, url, seed=0, max_tokens=1)
        first_token = time.perf_counter() - began
        rows = []
        for concurrency in (int(c) for c in args.concurrency.split(",")):
            num_requests = max(8, concurrency * 4)
            rows.append(
                await run_level(url, concurrency=concurrency, num_requests=num_requests, max_tokens=args.max_tokens)
            )
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), timeout=60)
    lines = [
        f"## Tensor-parallel size {size}",
        "",
        f"Start to ready {ready:.1f} s, start to first token {first_token:.1f} s.",
        "",
        "| concurrent streams | TTFT p50 / p99, ms | time per output token p50 / p99, ms | tokens/s |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel-sizes", default="1,2")
    parser.add_argument("--concurrency", default="1,16,64")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None, help="write the tables to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = (
        f"# Serving: demo_model over HTTP\n\n{machine.describe(device)}; server, Ray, gateway and clients share them.\n"
        f"Prompts of about 60 tokens, {args.max_tokens} output tokens. `make bench`, {time.strftime('%F')}.\n"
    )
    for size in (int(s) for s in args.tensor_parallel_sizes.split(",")):
        text += "\n" + asyncio.run(bench(size, args))
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
