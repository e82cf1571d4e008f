"""Constant load while random ranks are killed or frozen and random replicas drained: every answer is checked byte for byte.

    python benchmarks/chaos.py [--seconds 300] [--clients 32] [--replicas 3] [-tp 2] [--output benchmarks/results/chaos.md]

Starts the server as a user would. An undisturbed run first records every request's answer: text, log-probabilities, finish
reason and token counts must be the same later, streamed or not. `tests/system/test_chaos.py` runs the same for 30 seconds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ("kill", "freeze", "drain")
NUM_JOBS = 24
START_TIMEOUT_S = 180.0
CALM_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """The part of an answer that must not change. One entry per choice: (text, finish_reason, logprobs as JSON)."""

    choices: tuple[tuple[str, str, str], ...]
    completion_tokens: int


@dataclass
class Outcome:
    """What the clients saw."""

    num_done: int = 0
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest pause of each stream
    actions: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)  # from the action until all replicas are ready again
    num_failovers: float = 0.0
    left_over: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0


def make_jobs() -> list[dict[str, Any]]:
    """Requests of every kind that failover must continue exactly."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.0, "logprobs": 3},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.2, "min_tokens": 20},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.8, "stop": ["\n\n", "return"], "include_stop_str_in_output": True},
    ]
    return [
        {
            "model": "demo_model",
            "prompt": f"# {i}\ndef function_{i}(self, value):\n    ",
            "max_tokens": 32 + 8 * (i % 9),
            "seed": i,
            **kinds[i % len(kinds)],
        }
        for i in range(NUM_JOBS)
    ]


async def ask(session: aiohttp.ClientSession, url: str, job: dict[str, Any], *, stream: bool) -> tuple[Answer, float]:
    """The answer, and the longest pause in it. Raises RuntimeError for anything but a whole answer."""
    body = {**job, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        if not stream:
            whole = await response.json()
            choices = sorted(whole["choices"], key=lambda c: c["index"])
            parts = tuple((c["text"], c["finish_reason"], json.dumps(c["logprobs"])) for c in choices)
            return Answer(parts, whole["usage"]["completion_tokens"]), 0.0
        return await _read_stream(response, num_choices=job.get("n", 1))


async def _read_stream(response: aiohttp.ClientResponse, *, num_choices: int) -> tuple[Answer, float]:
    texts = ["" for _ in range(num_choices)]
    reasons = ["" for _ in range(num_choices)]
    logprobs: list[dict[str, list[Any]] | None] = [None] * num_choices
    usage, longest, last = None, 0.0, time.monotonic()
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if line.strip() == b"data: [DONE]":
            if usage is None or not all(reasons):
                raise RuntimeError("the stream ended before it was complete")
            parts = zip(texts, reasons, map(json.dumps, logprobs), strict=True)
            return Answer(tuple(parts), usage["completion_tokens"]), longest
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"error event: {event['error']['message']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            i = choice["index"]
            texts[i] += choice["text"]
            reasons[i] = choice["finish_reason"] or reasons[i]
            if choice["logprobs"] is not None:
                held = logprobs[i] = logprobs[i] or {name: [] for name in choice["logprobs"]}
                for name, values in choice["logprobs"].items():
                    held[name] += values
    raise RuntimeError("the connection closed in mid-stream")


async def cluster_of(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """The replicas as operators see them."""
    async with session.get(f"{url}/admin/cluster") as response:
        return (await response.json())["replicas"]


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    """The sum over all series of a metric."""
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"tramontane:{name}[ {{]", line))


async def until_ready(session: aiohttp.ClientSession, url: str, count: int, timeout_s: float) -> None:
    """Returns when `count` replicas are ready. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(aiohttp.ClientError, KeyError):
                if sum(r["state"] == "ready" for r in await cluster_of(session, url)) >= count:
                    return
            await asyncio.sleep(0.05)


async def disturb(
    session: aiohttp.ClientSession, url: str, outcome: Outcome, rng: random.Random, *, count: int, pause_s: float
) -> None:
    """One action after the other, each on a random rank of a random ready replica, until cancelled."""
    watchers: set[asyncio.Task[None]] = set()

    async def recovery(since: float) -> None:
        await until_ready(session, url, count, CALM_TIMEOUT_S)
        outcome.recoveries_s.append(time.monotonic() - since)

    try:
        while True:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * pause_s)
            ready = [r for r in await cluster_of(session, url) if r["state"] == "ready"]
            if not ready:
                continue
            replica, action = rng.choice(ready), rng.choice(ACTIONS)
            rank = rng.choice(replica["ranks"])
            if action == "drain":
                drain = f"{url}/admin/replicas/{replica['replica_id']}/drain"
                async with session.post(drain, json={"grace_s": rng.choice([0.0, 0.5, 5.0])}) as response:
                    assert response.status in (202, 400), await response.text()  # 400: it has already ended
            else:
                with contextlib.suppress(ProcessLookupError):  # an earlier action has just ended it
                    os.kill(rank["pid"], signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            outcome.actions[action] += 1
            watcher = asyncio.create_task(recovery(time.monotonic()))
            watchers.add(watcher)
    finally:
        await asyncio.gather(*watchers, return_exceptions=True)


async def run_chaos(
    url: str, *, seconds: float, num_clients: int, num_replicas: int, seed: int, headers: dict[str, str], pause_s: float
) -> Outcome:
    """Records the answers without disturbance, checks them under disturbance, then checks what is left when nothing runs."""
    outcome, rng = Outcome(), random.Random(seed)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await until_ready(session, url, num_replicas, START_TIMEOUT_S)
        jobs = make_jobs()
        expected = [answer for answer, _ in await asyncio.gather(*(ask(session, url, j, stream=False) for j in jobs))]
        over = time.monotonic() + seconds
        began = time.monotonic()

        async def client(number: int) -> None:
            own = random.Random(1000 * seed + number)
            while time.monotonic() < over:
                i, stream = own.randrange(len(jobs)), own.random() < 0.7
                try:
                    answer, gap = await ask(session, url, jobs[i], stream=stream)
                except (RuntimeError, aiohttp.ClientError, TimeoutError, ValueError) as e:
                    outcome.failures.append(f"job {i}: {e!r}")
                    continue
                outcome.num_done += 1
                outcome.num_tokens += answer.completion_tokens
                outcome.gaps_s.append(gap)
                if answer != expected[i]:
                    outcome.wrong.append(f"job {i} {jobs[i]}: {answer} instead of {expected[i]}")

        disturber = asyncio.create_task(disturb(session, url, outcome, rng, count=num_replicas, pause_s=pause_s))
        await asyncio.gather(*(client(i) for i in range(num_clients)))
        outcome.elapsed_s = time.monotonic() - began
        disturber.cancel()
        await asyncio.gather(disturber, return_exceptions=True)
        await until_ready(session, url, num_replicas, CALM_TIMEOUT_S)
        outcome.num_failovers = await metric(session, url, "num_failovers_total")
        await _settle(session, url, outcome)
    return outcome


async def _settle(session: aiohttp.ClientSession, url: str, outcome: Outcome) -> None:
    names = ("num_requests_inflight", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while True:
                outcome.left_over = {name: await metric(session, url, name) for name in names}
                if not any(outcome.left_over.values()):
                    return
                await asyncio.sleep(0.1)


def report(outcome: Outcome) -> list[str]:
    """The figures, one Markdown table row each."""

    def spread(values: list[float]) -> str:
        ordered = sorted(values) or [0.0]
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        return f"{statistics.median(ordered):.2f} / {p99:.2f} / {ordered[-1]:.2f} s"

    rows = {
        "time under disturbance": f"{outcome.elapsed_s:.0f} s",
        "actions": ", ".join(f"{n} {name}" for name, n in sorted(outcome.actions.items())),
        "requests answered": f"{outcome.num_done:,} ({outcome.num_tokens / max(outcome.elapsed_s, 1e-9):,.0f} tokens/s)",
        "**failed requests**": f"**{len(outcome.failures)}**",
        "**answers with a wrong byte**": f"**{len(outcome.wrong)}**",
        "streams continued on another replica": f"{outcome.num_failovers:,.0f}",
        "longest pause of a stream, p50 / p99 / max": spread(outcome.gaps_s),
        "action to all replicas ready, p50 / p99 / max": spread(outcome.recoveries_s),
        "left at the end (in flight, running, waiting, KV use)": ", ".join(
            f"{v:g}" for v in outcome.left_over.values()
        ),
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


@asynccontextmanager
async def server(*options: str) -> AsyncIterator[str]:
    """Starts a server on a free port; yields its URL."""
    command = [sys.executable, "-m", "cluster.cli.main", "serve", "--port", "0", *options]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        url = None
        async with asyncio.timeout(START_TIMEOUT_S):
            while url is None:
                line = (await process.stderr.readline()).decode()
                if not line:
                    raise SystemExit("the server ended before it was ready")
                if match := re.search(r"Endpoint +(http://\S+)/v1", line):
                    url = match[1]
        drainer = asyncio.create_task(process.stderr.read())
        yield url
        drainer.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), timeout=90)


async def bench(args: argparse.Namespace) -> Outcome:
    options = ["--replicas", str(args.replicas), "--tensor-parallel-size", str(args.tensor_parallel_size)]
    async with server(*options) as url:
        return await run_chaos(
            url,
            seconds=args.seconds,
            num_clients=args.clients,
            num_replicas=args.replicas,
            seed=args.seed,
            headers={},
            pause_s=args.pause,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=2)
    parser.add_argument("--pause", type=float, default=6.0, help="mean seconds between two actions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    args = parser.parse_args()
    outcome = asyncio.run(bench(args))
    import machine
    import torch

    text = (
        f"# Chaos: {args.clients} clients, {args.replicas} replicas of {args.tensor_parallel_size} ranks\n\n"
        f"{machine.describe(torch.device('cpu'))}; server, Ray, ranks and clients share them. Seed {args.seed}; an action every "
        f"{args.pause:g} s on average. `make test-chaos`, {time.strftime('%F')}.\n\n"
        + "\n".join(report(outcome))
        + "\n"
    )
    print(text)
    for line in [*outcome.failures, *outcome.wrong][:20]:
        print(line, file=sys.stderr)
    if args.output:
        args.output.write_text(text)
    sys.exit(bool(outcome.failures or outcome.wrong or any(outcome.left_over.values())))


if __name__ == "__main__":
    main()
