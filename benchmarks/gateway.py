"""What the gateway adds: latency of a token from engine to client, of a request from client to engine, and events per second.

    python benchmarks/gateway.py [--streams 1,64,512] [--output benchmarks/results/gateway.md]

Three processes: a fake engine that steps at a fixed pace, with the real socket server; a real gateway (HTTP, router, detokenizer);
and a client that reads as fast as it can. The engine writes the time of each step into the token's log-probability, so that the client
knows how old a token is. Without a pace, the same streams show how many events the gateway handles per second of CPU time.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACES_S = {1: 0.01, 64: 0.05, 512: 0.2}  # about what a 7B model needs for a step of that many sequences
NUM_TOKENS = {1: 400, 64: 100, 512: 30}
NUM_TIMED = 8
MODEL = "demo"


def run_engine(link: Connection, max_num_seqs: int = 1024) -> None:
    """Process 1: sends its address, then follows commands: a pace in seconds, or None to end."""
    from workers.engine.loop import EngineLoop
    from workers.protocol import EngineFacts, FinishReason, GenerateRequest, LoadReport, TokenDelta, TokenLogprob
    from workers.rank.server import StreamServer

    class PacedCore:
        """One token for every request at each step; steps are `pace_s` apart."""

        pace_s = 0.0
        next_step = 0.0

        def __init__(self) -> None:
            self.requests: dict[str, tuple[GenerateRequest, int]] = {}
            self.arrivals_s: list[float] = []

        def add_request(self, request: GenerateRequest) -> None:
            self.arrivals_s.append(time.monotonic())
            self.requests[request.request_id] = (request, 0)

        def abort(self, request_id: str) -> None:
            self.requests.pop(request_id, None)

        def has_work(self) -> bool:
            return bool(self.requests)

        def step(self) -> list[TokenDelta]:
            self.next_step = max(self.next_step + self.pace_s, time.monotonic())
            time.sleep(max(0.0, self.next_step - time.monotonic()))
            now, deltas = time.monotonic(), []
            for request_id, (request, done) in list(self.requests.items()):
                over = done + 1 >= request.sampling.max_tokens
                self.requests[request_id] = (request, done + 1)
                if over:
                    del self.requests[request_id]
                logprob = [TokenLogprob(token_id=1000 + done % 500, logprob=now, rank=1)]
                deltas.append(
                    TokenDelta(
                        request_id=request_id,
                        token_ids=[1000 + done % 500],
                        logprobs=logprob if request.sampling.logprobs is not None else None,
                        finish_reason=FinishReason.LENGTH if over else None,
                        num_cached_tokens=0 if done == 0 else None,
                    )
                )
            return deltas

        def heartbeat(self) -> None:
            pass

        def take_cache_events(self) -> None:
            return None

        def shutdown(self) -> None:
            pass

    core = PacedCore()
    facts = EngineFacts(
        replica_id="fake", tensor_parallel_size=1, vocab_size=32768, max_model_len=4096, max_num_seqs=max_num_seqs, block_size=16,
        num_blocks=100_000, sliding_window=None, enable_prefix_caching=False, bos_token_id=1, eos_token_ids=(2,),
        attention_backend="fake",
    )  # fmt: skip
    loop = EngineLoop(core, lambda *step: server.publish(*step))
    server = StreamServer(
        facts,
        "secret",
        submit=loop.submit,
        abort=loop.abort,
        load=lambda: LoadReport(num_running=len(core.requests), num_blocks=100_000, forward_age_s=0.0),
    )
    link.send(server.start())
    loop.start()
    while (pace_s := link.recv()) is not None:
        core.pace_s = pace_s
        link.send(core.arrivals_s)
        core.arrivals_s = []
    loop.stop()
    server.close()


def run_gateway(link: Connection, address: tuple[str, int], **options: Any) -> None:
    """Process 2: sends its port, then its CPU seconds on each request. options: more for the application."""
    from cluster.api.app import make_app
    from cluster.api.server.listener import Listener
    from cluster.replicas.client import ReplicaClient
    from cluster.router.replica import Availability
    from cluster.router.router import Router
    from cluster.system.garbage import collect_garbage_rarely
    from cluster.text.tokenizer import load_tokenizer

    async def main() -> None:
        tokenizer = load_tokenizer(str(ROOT / "examples" / "demo_model"), version=None, model_vocab_size=None)
        async with ReplicaClient("fake", address, "secret") as client:
            router = Router()
            router.update([client], Availability())
            app = make_app(router=router, tokenizer=tokenizer, chat_template=None, model_name=MODEL, **options)
            listener = await Listener(app).open("127.0.0.1", 0)
            collect_garbage_rarely()  # as the command does
            link.send(listener.port)
            while await asyncio.to_thread(link.recv):
                usage = resource.getrusage(resource.RUSAGE_SELF)
                link.send(usage.ru_utime + usage.ru_stime)
            await listener.close()

    asyncio.run(main())


@dataclass
class Seen:
    """What one client saw of its stream: the ages of tokens when it read them, and the time of its request."""

    asked_s: float
    ages_s: list[float]


async def read_stream(port: int, *, max_tokens: int, timed: bool) -> Seen:
    """One streamed completion over a bare socket, so that the client costs as little as possible. Only timed streams record ages."""
    body = {"model": MODEL, "prompt": [1, 5, 6, 7], "max_tokens": max_tokens, "stream": True}
    data = json.dumps({**body, "logprobs": 0} if timed else body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    seen = Seen(time.monotonic(), [])
    writer.write(head.encode() + data)
    try:
        tail = b""
        while not timed:
            tail = tail[-8:] + await reader.read(1 << 16)
            if b"[DONE]" in tail:
                return seen
            if b"HTTP/1.1 4" in tail or b"HTTP/1.1 5" in tail or reader.at_eof():
                raise SystemExit(f"the gateway answered {tail!r}")
        while True:
            line = await reader.readuntil(b"\n")
            if line.startswith(b"data: [DONE]"):
                return seen
            if line.startswith(b"data: {"):
                now = time.monotonic()
                values = json.loads(line[6:])["choices"][0]["logprobs"]["token_logprobs"]
                seen.ages_s += [now - value for value in values]
            elif line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise SystemExit(f"the gateway answered {line!r}")
    finally:
        writer.close()


async def read_directly(address: tuple[str, int], num_streams: int, *, max_tokens: int) -> list[float]:
    """The ages of tokens of the same streams without a gateway, from the engine's own socket."""
    from cluster.replicas.client import ReplicaClient
    from workers.protocol import GenerateRequest, SamplingParams

    ages = []

    async def read(client: ReplicaClient, number: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, logprobs=0)
        request = GenerateRequest(request_id=f"d{number}", prompt_token_ids=[1, 5, 6, 7], sampling=sampling)
        async for delta in client.generate(request):
            now = time.monotonic()
            ages.extend(now - logprob.logprob for logprob in delta.logprobs or [])

    async with ReplicaClient("fake", address, "secret") as client:
        await asyncio.gather(*(read(client, i) for i in range(num_streams)))
    return ages


def p50_p99(values: list[float]) -> str:
    values = sorted(values)
    return f"{statistics.median(values) * 1e3:.2f} / {values[min(len(values) - 1, int(0.99 * len(values)))] * 1e3:.2f}"


class Rig:
    """The two processes, controlled over pipes."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.engine, there = spawn.Pipe()
        self._engine = spawn.Process(target=run_engine, args=(there,), daemon=True)
        self._engine.start()
        self.address = address = self.engine.recv()
        self.gateway, there = spawn.Pipe()
        self._gateway = spawn.Process(target=run_gateway, args=(there, address), daemon=True)
        self._gateway.start()
        self.port = self.gateway.recv()

    def pace(self, pace_s: float) -> list[float]:
        """Sets the engine's pace; returns the arrival times of requests since the last call."""
        self.engine.send(pace_s)
        return self.engine.recv()

    def gateway_cpu_s(self) -> float:
        self.gateway.send(True)
        return self.gateway.recv()

    def close(self) -> None:
        self.gateway.send(False)
        self._gateway.join(10)
        self.engine.send(None)
        self._engine.join(10)


async def bench(rig: Rig, num_streams: int) -> list[str]:
    rig.pace(PACES_S.get(num_streams, 0.05))
    count = NUM_TOKENS.get(num_streams, 100)
    # A few streams, spread over the frame, are timed: timing all of them would keep the client busier than the gateway.
    every = max(1, num_streams // NUM_TIMED)
    before = rig.gateway_cpu_s()
    paced = await asyncio.gather(
        *(read_stream(rig.port, max_tokens=count, timed=i % every == every // 2) for i in range(num_streams))
    )
    paced_cpu_s = rig.gateway_cpu_s() - before
    ages = [age for seen in paced for age in seen.ages_s[1:]]
    pace_s = PACES_S.get(num_streams, 0.05)
    arrivals = sorted(rig.pace(pace_s))
    direct = await read_directly(rig.address, num_streams, max_tokens=count)
    rig.pace(0.0)
    asked = sorted(seen.asked_s for seen in paced)
    requests = [arrived - sent for arrived, sent in zip(arrivals, asked, strict=True)]
    # At full speed: as many events as the gateway can handle.
    before, began = rig.gateway_cpu_s(), time.monotonic()
    total = max(4000, 30 * num_streams)
    each = total // num_streams
    await asyncio.gather(*(read_stream(rig.port, max_tokens=each, timed=False) for _ in range(num_streams)))
    elapsed, cpu_s = time.monotonic() - began, rig.gateway_cpu_s() - before
    events = each * num_streams
    return [
        str(num_streams),
        f"{PACES_S.get(num_streams, 0.05) * 1e3:.0f}",
        p50_p99(direct),
        p50_p99(ages),
        f"{(statistics.median(ages) - statistics.median(direct)) * 1e3:.2f}",
        p50_p99(requests),
        f"{events / elapsed:,.0f}",
        f"{paced_cpu_s / (count * num_streams) * 1e6:.0f} / {cpu_s / events * 1e6:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,64,512")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    args = parser.parse_args()
    rig = Rig()
    try:
        asyncio.run(bench(rig, 1))  # warm
        rows = [asyncio.run(bench(rig, int(n))) for n in args.streams.split(",")]
    finally:
        rig.close()
    import machine
    import torch

    lines = [
        "# The gateway's own cost",
        "",
        f"{machine.describe(torch.device('cpu'))}; fake engine, gateway and client are three processes on it.",
        "Token: from the end of the engine's step to the client's read, without a gateway (a client on the engine's own socket) and",
        "through it; added: the difference of the medians. All streams of a step come in one frame, so with many streams the median waits",
        "until half of the others are written. Request: from the client's first byte to the engine's inbox, all streams starting at once.",
        f"`make bench`, {time.strftime('%F')}.",
        "",
        "| streams | step, ms | token directly p50 / p99, ms | token p50 / p99, ms | **added p50, ms** "
        "| request p50 / p99, ms | events/s at full speed | **gateway's CPU for a token at this pace / at full speed, us** |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
