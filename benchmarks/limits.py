"""What a well-behaved client notices of bad neighbours, and what they cost the gateway in memory.

    python benchmarks/limits.py [--seconds 10] [--output benchmarks/results/limits.md]

Four processes: a fake engine that steps at a fixed pace and computes 128 sequences at once; a real gateway with a key file; the bad
neighbours, with their own key; and the well-behaved client, which requests short streams, a few at once.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from gateway import MODEL, ROOT, run_engine
from sections import kept_sections

PACE_S = 0.1  # about what a 7B model needs for a step of that many sequences; little enough work for two cores and four processes
MAX_NUM_SEQS = 128
NUM_TOKENS = 16  # of each stream of the well-behaved client
NUM_AT_ONCE = 4  # streams of it
NUM_IDLE, NUM_SLOW, NUM_QUEUED = 1000, 100, 2000
NUM_DEAF = 440  # read nothing: one in eleven asks for a whole answer of megabytes, the others for pages
DEADLINE_MARGIN_S = 30.0
SLOW_TOKENS = 4000
FLOOD_TOKENS = (16, 112)  # evenly spread, so that slots become free one by one
SETTLE_S = 8.0


def run_gateway(link: Connection, address: tuple[str, int], keys: Path) -> None:
    """Sends its port, then its resident bytes, running requests and connections on each request."""
    from cluster.api.app import make_app
    from cluster.api.server.listener import Listener
    from cluster.keys.keyring import Keyring
    from cluster.keys.ledger import Ledger, ledger_path
    from cluster.replicas.client import ReplicaClient
    from cluster.router.replica import Availability
    from cluster.router.router import Router
    from cluster.text.tokenizer import load_tokenizer

    async def main() -> None:
        async with ReplicaClient("fake", address, "secret") as client:
            router = Router()
            router.update([client], Availability())
            ledger = Ledger(ledger_path(keys))
            app = make_app(
                router=router,
                tokenizer=load_tokenizer(str(ROOT / "examples" / "demo_model")),
                chat_template=None,
                model_name=MODEL,
                keyring=Keyring(keys),
                ledger=ledger,
            )
            listener = await Listener(app).open("127.0.0.1", 0)
            writing = asyncio.create_task(ledger.run())
            link.send(listener.port)
            process = psutil.Process()
            while await asyncio.to_thread(link.recv):
                link.send((process.memory_info().rss, router.num_inflight_requests, listener.num_connections()))
            writing.cancel()
            await listener.close()
            await ledger.close()

    asyncio.run(main())


def request_of(key: str, *, path: str = "/v1/completions", **fields: object) -> bytes:
    data = json.dumps({"model": MODEL, "prompt": [1, 5, 6, 7], "stream": True, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def run_neighbours(link: Connection, port: int, key: str) -> None:
    """Follows commands: "idle", "slow", "deaf" or "flood" starts neighbours and answers once they run.

    None ends them and sends what they saw.
    """
    statuses: Counter[str] = Counter()
    num_deaf = 0

    async def idle() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.sleep(3600)
        finally:
            writer.close()

    async def slow() -> None:
        """Reads 200 bytes a second; the small buffer keeps the kernel from reading for it."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, request_of(key, max_tokens=SLOW_TOKENS, logprobs=1))
            statuses[(await loop.sock_recv(sock, 12))[9:].decode()] += 1
            while await loop.sock_recv(sock, 200):
                await asyncio.sleep(1)
        finally:
            sock.close()

    async def deaf() -> None:
        """Reads nothing until its connection is closed."""
        nonlocal num_deaf
        num_deaf += 1
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        page = b"GET /static/playground.js HTTP/1.1\r\nHost: x\r\n\r\n" * 30
        whole = request_of(key, path="/tokenize", prompt="a b c " * 200_000, stream=None)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(sock, page if num_deaf % 11 else whole)
            await asyncio.sleep(3600)
        finally:
            sock.close()

    async def flood() -> None:
        """Sends requests as fast as allowed: after Retry-After, or at once."""
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                writer.write(request_of(key, max_tokens=random.randint(*FLOOD_TOKENS)))
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                statuses[head[9:12]] += 1
                if "retry-after: " in head:
                    await asyncio.sleep(int(head.split("retry-after: ")[1].split("\r\n")[0]))
                else:
                    tail = b""
                    while b"[DONE]" not in tail:
                        tail = tail[-8:] + await reader.readuntil(b"\n")
            writer.close()

    async def main() -> None:
        kinds = {
            "idle": (idle, NUM_IDLE),
            "slow": (slow, NUM_SLOW),
            "deaf": (deaf, NUM_DEAF),
            "flood": (flood, NUM_QUEUED),
        }
        while True:
            command = await asyncio.to_thread(link.recv)
            if command == "end":
                return
            statuses.clear()
            tasks = []
            for name in command:
                kind, number = kinds[name]
                for i in range(number):
                    tasks.append(asyncio.create_task(kind()))
                    if i % 100 == 99:
                        await asyncio.sleep(0.05)
            await asyncio.sleep(SETTLE_S)
            link.send(None)
            await asyncio.to_thread(link.recv)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            failures = Counter(repr(e) for e in ended if e is not None and not isinstance(e, asyncio.CancelledError))
            link.send((dict(statuses), dict(failures)))

    asyncio.run(main())


@dataclass
class Seen:
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    refused: int = 0


async def behave(port: int, key: str, *, seconds: float, sample: Callable[[], int]) -> tuple[Seen, int]:
    """Runs streams, a few at once, for `seconds`. Returns what it saw and the gateway's peak memory during that time."""
    seen, peak, until = Seen(), 0, time.monotonic() + seconds
    clients = [asyncio.create_task(behave_one(port, key, seen, until=until)) for _ in range(NUM_AT_ONCE)]
    while not all(client.done() for client in clients):
        peak = max(peak, await asyncio.to_thread(sample))
        await asyncio.sleep(0.25)
    await asyncio.gather(*clients)
    return seen, peak


async def behave_one(port: int, key: str, seen: Seen, *, until: float) -> None:
    """One stream after the other."""
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        last = asked = time.monotonic()
        writer.write(request_of(key, max_tokens=NUM_TOKENS))
        first = True
        while True:
            line = await reader.readuntil(b"\n")
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                seen.refused += 1
                break
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: {"):
                now = time.monotonic()
                (seen.ttft_s if first else seen.gaps_s).append(now - (asked if first else last))
                first, last = False, now
        writer.close()


def p50_p99(values: list[float]) -> str:
    values = sorted(values)
    return f"{statistics.median(values) * 1e3:.0f} / {values[min(len(values) - 1, int(0.99 * len(values)))] * 1e3:.0f}"


class Rig:
    def __init__(self, folder: Path) -> None:
        from cluster.keys.file import add_key
        from cluster.keys.key import new_key

        keys = folder / "keys.json"
        secrets = {}
        for name in ("polite", "neighbour"):
            key, secrets[name] = new_key(name)
            add_key(keys, key)
        self.polite = secrets["polite"]
        spawn = multiprocessing.get_context("spawn")
        self._processes = []

        def start(target: object, *arguments: object) -> Connection:
            here, there = spawn.Pipe()
            process = spawn.Process(target=target, args=(there, *arguments), daemon=True)  # type: ignore[arg-type]
            process.start()
            self._processes.append(process)
            return here

        self.engine = start(run_engine, MAX_NUM_SEQS)
        address = self.engine.recv()
        self.gateway = start(run_gateway, address, keys)
        self.port = self.gateway.recv()
        self.neighbours = start(run_neighbours, self.port, secrets["neighbour"])
        self.engine.send(PACE_S)
        self.engine.recv()

    def rss(self) -> int:
        self.gateway.send(True)
        return self.gateway.recv()[0]

    def measure(self, kinds: tuple[str, ...], seconds: float) -> list[str]:
        before = self.rss()
        if kinds:
            self.neighbours.send(kinds)
            self.neighbours.recv()
        seen, peak = asyncio.run(behave(self.port, self.polite, seconds=seconds, sample=self.rss))
        statuses: dict[str, int] = {}
        if kinds:
            self.neighbours.send(None)
            statuses, failures = self.neighbours.recv()
            if failures:
                print(f"neighbours failed: {failures}")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.gateway.send(True)
            if not self.gateway.recv()[1]:
                break
            time.sleep(0.1)
        time.sleep(1)
        counts = ", ".join(f"{n} times {status}" for status, n in sorted(statuses.items())) or "–"
        mib = (f"{value / 2**20:.0f}" for value in (before, peak, self.rss()))
        return [p50_p99(seen.ttft_s), p50_p99(seen.gaps_s), str(seen.refused), " / ".join(mib), counts]

    def time_deaf(self) -> str:
        """One sentence: how many connections that read nothing are left when their deadline has passed."""
        from cluster.api.server.listener import WRITE_TIMEOUT_S

        def num_connections() -> int:
            self.gateway.send(True)
            return self.gateway.recv()[2]

        before, began = self.rss(), time.monotonic()
        self.neighbours.send(("deaf",))
        self.neighbours.recv()
        at_first, peak = num_connections(), self.rss()
        while (left := num_connections()) and time.monotonic() - began < WRITE_TIMEOUT_S + DEADLINE_MARGIN_S:
            peak = max(peak, self.rss())
            time.sleep(1)
        took_s = time.monotonic() - began
        self.neighbours.send(None)
        self.neighbours.recv()
        return (
            f"{NUM_DEAF} clients that read nothing, {NUM_DEAF // 11} of them with a whole answer of 2.4 MB, the others with 30 pages: "
            f"{at_first} connections\nat first, {left} after {took_s:.0f} s; the deadline is {WRITE_TIMEOUT_S:g} s. Memory before, peak, "
            f"after: {before >> 20} / {peak >> 20} / {self.rss() >> 20} MiB."
        )

    def close(self) -> None:
        self.neighbours.send("end")
        self.gateway.send(False)
        self.engine.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file")
    args = parser.parse_args()
    scenes: list[tuple[str, tuple[str, ...]]] = [
        ("alone", ()),
        (f"{NUM_IDLE:,} idle connections", ("idle",)),
        (f"{NUM_SLOW} readers of 200 bytes a second", ("slow",)),
        (f"{NUM_QUEUED:,} clients that send requests all the time", ("flood",)),
        ("all of these", ("idle", "slow", "flood")),
        ("alone again", ()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        try:
            rig.measure((), 1)  # warm
            rows = []
            for name, kinds in scenes:
                rows.append([name, *rig.measure(kinds, args.seconds)])
                print(rows[-1], flush=True)
            deaf = rig.time_deaf()
        finally:
            rig.close()
    import machine
    import torch

    lines = [
        "# Bad neighbours",
        "",
        f"{machine.describe(torch.device('cpu'))}; fake engine ({MAX_NUM_SEQS} sequences at once, {PACE_S * 1e3:.0f} ms a step), gateway,",
        "neighbours and the well-behaved client are four processes on it. The client requests streams of "
        f"{NUM_TOKENS} tokens, {NUM_AT_ONCE} at once;",
        "the neighbours share another API key. A key may hold three quarters of the gateway's 1,024 sequences, and keys take turns: the",
        "client is neither refused nor last in the queue, but it waits until a sequence of the neighbours ends. Time to first token (TTFT)",
        "and gap between tokens are as the client sees them; memory is the gateway's resident memory before, its peak during, and after.",
        f"`make bench`, {time.strftime('%F')}.",
        "",
        "| neighbours | TTFT p50 / p99, ms | gap p50 / p99, ms | client refused | memory, MiB | answers to the neighbours |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        deaf,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text + kept_sections(args.output))


if __name__ == "__main__":
    main()
