"""What tracing costs the gateway: CPU time for a token with spans and without, in turns.

    python benchmarks/tracing.py [--rounds 8] [--streams 32] [--tokens 128] [--output-json FILE]

Processes: a fake engine that steps at a fixed pace, a collector that takes spans and forgets them, two gateways (HTTP, router, detokenizer,
the real socket), one of which makes spans of every request, and a client that reads as fast as it can. CPU time counts all threads of a
gateway, so also the one that encodes spans and sends them. `--tree DIR` adds a gateway from another checkout, to hold a tree without this
code against one with it turned off.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

from gateway import read_stream, run_engine, run_gateway

PACE_S = 0.02


def run_collector(link: Connection) -> None:
    """Sends its address, and the number of bytes it got on each request."""
    num_bytes = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal num_bytes
            num_bytes += len(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    link.send(f"http://127.0.0.1:{server.server_address[1]}/v1/traces")
    while link.recv():
        link.send(num_bytes)


def run_traced(link: Connection, address: tuple[str, int], collector: str | None, tree: str | None) -> None:
    """A gateway that sends its spans there, or makes none, with the code of that tree."""
    if tree is not None:
        sys.path.insert(0, tree)
        for name in [name for name in sys.modules if name.split(".")[0] in ("cluster", "workers")]:
            del sys.modules[name]
    if collector is None:
        run_gateway(link, address)
        return
    from cluster.tracing.request import GatewayTracing
    from workers.tracing.settings import TracingConfig

    run_gateway(link, address, tracing=GatewayTracing(TracingConfig(url=collector), gateway_id="bench"))


async def load(port: int, *, num_streams: int, num_tokens: int, num_requests: int) -> None:
    """A closed loop: each stream's next request begins when its last one has ended."""
    left = num_requests

    async def stream() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await read_stream(port, max_tokens=num_tokens, timed=False)

    await asyncio.gather(*(stream() for _ in range(num_streams)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each request")
    parser.add_argument("--requests", type=int, default=64, help="of each turn")
    parser.add_argument(
        "--pace", type=float, default=PACE_S, help="seconds of an engine step; 0: as fast as the gateway can"
    )
    parser.add_argument("--tree", help="another checkout, for a third gateway")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    engine, there = spawn.Pipe()
    spawn.Process(target=run_engine, args=(there,), daemon=True).start()
    address = engine.recv()
    collector, there = spawn.Pipe()
    spawn.Process(target=run_collector, args=(there,), daemon=True).start()
    url = collector.recv()
    variants: dict[str, tuple[Connection, int]] = {}
    plans = {"off": (None, None), "on": (url, None)} | ({"absent": (None, args.tree)} if args.tree else {})
    for name, (to, tree) in plans.items():
        link, there = spawn.Pipe()
        spawn.Process(target=run_traced, args=(there, address, to, tree), daemon=True).start()
        variants[name] = (link, link.recv())
    engine.send(args.pace)
    engine.recv()

    def turn(name: str, num_requests: int) -> float:
        """Microseconds of CPU time for a token."""
        link, port = variants[name]
        link.send(True)
        before = link.recv()
        asyncio.run(load(port, num_streams=args.streams, num_tokens=args.tokens, num_requests=num_requests))
        time.sleep(1.2)  # for the last spans
        link.send(True)
        return (link.recv() - before) / (num_requests * args.tokens) * 1e6

    for name in variants:
        turn(name, args.streams)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(args.rounds):
        for name in list(variants)[:: 1 if i % 2 else -1]:
            found[name].append(turn(name, args.requests))
    collector.send(True)
    num_bytes = collector.recv()
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        ratios = [a / b - 1 for a, b in zip(values, found["off"], strict=True)]
        print(
            f"{name:7} {medians[name]:7.2f} us a token (of {min(values):.2f} to {max(values):.2f}); "
            f"{statistics.median(ratios):+.1%} of off in the median round, {medians[name] / medians['off'] - 1:+.1%} of the medians"
        )
    num_traced = args.streams + args.rounds * args.requests
    print(f"{num_bytes / num_traced:,.0f} bytes of spans a request of {args.tokens} tokens")
    if args.output_json:
        args.output_json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
