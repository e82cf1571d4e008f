"""Streams over HTTP from any OpenAI-compatible server: when each event came. Knows bare sockets and SSE, no server of any kind.

Bare sockets, because the client shares the server's cores: it should cost as little as possible, and the same for every server.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

MODEL = "m"


@dataclass
class Stream:
    """What the client of one stream saw. Times are those of time.perf_counter."""

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.asked_s

    def gaps_s(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
        """Gaps that end within this time."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return [after - before for before, after in pairs if since_s <= after <= until_s]


def prompt(num_tokens: int, *, vocab_size: int, seed: int) -> list[int]:
    """Random token ids from the upper part of the vocabulary, where control tokens are not; different for each seed."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size // 8, vocab_size) for _ in range(num_tokens)]


async def read_stream(port: int, token_ids: Sequence[int], *, max_tokens: int, seen: Stream | None = None) -> Stream:
    """One greedy completion to its end. `seen` is filled as events come."""
    body = {"model": MODEL, "prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    seen = seen or Stream(0.0)
    seen.asked_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"The server answered {status!r} {(await reader.read(2000))!r}")
        last = b""
        while not (line := await reader.readline()).startswith(b"data: [DONE]"):
            if not line:
                raise RuntimeError("The server closed a stream before its end.")
            if line.startswith(b"data: {"):
                seen.times_s.append(time.perf_counter())
                last = line
        # The last event has the usage and no token.
        seen.times_s.pop()
        seen.num_tokens = json.loads(last[6:])["usage"]["completion_tokens"]
        return seen
    finally:
        writer.close()


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def load(
    port: int, *, num_streams: int, num_prompt: int, num_output: int, vocab_size: int, seed: int
) -> dict[str, float]:
    """All streams at once. Tokens/s end to end, tokens/s after the first token, gaps between events and time to first token in ms."""
    tokens = [prompt(num_prompt, vocab_size=vocab_size, seed=seed + i) for i in range(num_streams)]
    began = time.perf_counter()
    streams = await asyncio.gather(*(read_stream(port, ids, max_tokens=num_output) for ids in tokens))
    ended = time.perf_counter()
    num_tokens = sum(s.num_tokens for s in streams)
    gaps = [gap for s in streams for gap in s.gaps_s()]
    # With several streams there is no time at which all of them decode and none is prefilled.
    decode = {"decode@1": (num_output - 1) / (ended - streams[0].times_s[0])} if num_streams == 1 else {}
    return decode | {
        f"end_to_end@{num_streams}": num_tokens / (ended - began),
        f"gap_p50_ms@{num_streams}": statistics.median(gaps) * 1e3,
        f"gap_p99_ms@{num_streams}": percentile(gaps, 0.99) * 1e3,
        f"ttft_ms@{num_streams}": statistics.median([s.ttft_s for s in streams]) * 1e3,
    }


async def long_prompt(
    port: int, *, num_streams: int, num_long: int, num_prompt: int, vocab_size: int, seed: int
) -> dict[str, float]:
    """A long prompt alone, and then next to streams: their gaps before it and while it is computed, and its time to first token."""
    alone = []
    for i in range(2):
        ids = prompt(num_long, vocab_size=vocab_size, seed=seed + i)
        alone.append((await read_stream(port, ids, max_tokens=2)).ttft_s)
    streams = [Stream(0.0) for _ in range(num_streams)]
    tasks = [
        asyncio.create_task(
            read_stream(port, prompt(num_prompt, vocab_size=vocab_size, seed=seed + 10 + i), max_tokens=1500, seen=seen)
        )
        for i, seen in enumerate(streams)
    ]
    try:
        await until_tokens(streams, tasks, 8)
        undisturbed_s = time.perf_counter()
        await until_tokens(streams, tasks, 48)
        asked_s = time.perf_counter()
        ids = prompt(num_long, vocab_size=vocab_size, seed=seed + 3)
        ttft_s = (await read_stream(port, ids, max_tokens=2)).ttft_s
        first_s = asked_s + ttft_s
        # A gap that is open at the end counts as well.
        await until_tokens(streams, tasks, 2, more=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    before = [gap for s in streams for gap in s.gaps_s(undisturbed_s, asked_s)]
    during = [s.gaps_s(asked_s)[: len(s.gaps_s(asked_s, first_s)) + 1] for s in streams]
    gaps = [gap for each in during for gap in each]
    return {
        "undisturbed_p50_ms": statistics.median(before) * 1e3,
        "disturbed_p50_ms": statistics.median(gaps) * 1e3,
        "disturbed_p99_ms": percentile(gaps, 0.99) * 1e3,
        "ttft_alone_ms": statistics.median(alone) * 1e3,
        "ttft_ms": ttft_s * 1e3,
    }


async def until_tokens(
    streams: Sequence[Stream], tasks: Sequence["asyncio.Task[Stream]"], num: int, *, more: bool = False
) -> None:
    """Waits until every stream has `num` events, or that many more than now. Raises what a stream raised."""
    wanted = [num + (len(s.times_s) if more else 0) for s in streams]
    while any(len(s.times_s) < least for s, least in zip(streams, wanted, strict=True)):
        for task in tasks:
            if task.done():
                await task
                raise RuntimeError("A stream ended too early. Its tokens do not last for the measurement.")
        await asyncio.sleep(0.01)
