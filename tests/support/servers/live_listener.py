"""The real listener and application over a real engine, without Ray, as a target for fuzzers: in this process or in its own.

The engine's short context bounds the cost of a request. Knows no fuzzer.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import psutil

from cluster.api.app import make_app
from cluster.api.server.listener import Listener
from cluster.keys.keyring import Keyring
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Router
from cluster.system.log import setup_logging
from cluster.system.malloc import return_large_blocks
from support.paths import ROOT
from support.servers.live_replica import DEMO, TEMPLATE, TOKEN, TOKENIZER, LiveReplica

MODEL = "demo_model"
KEY = "fuzz-key"
MAX_MODEL_LEN = 704  # a moderation takes 600


@contextlib.asynccontextmanager
async def live_listener(
    *,
    folder: Path = DEMO,
    max_model_len: int = MAX_MODEL_LEN,
    head_timeout_s: float = 10.0,
    body_timeout_s: float = 10.0,
) -> AsyncIterator[str]:
    """Yields its URL. It listens on loopback, on a free port, and requires KEY. folder: a model for the demo model's tokenizer."""
    replica = LiveReplica(folder, max_model_len=max_model_len, num_kv_blocks=2048, max_num_batched_tokens=512)
    try:
        async with ReplicaClient("r0", replica.address, TOKEN) as client:
            async with asyncio.timeout(10):
                while not client.is_ready(time.monotonic()):
                    await asyncio.sleep(0.01)
            app = make_app(
                router=Router([client]),
                tokenizer=TOKENIZER,
                chat_template=TEMPLATE,
                model_name=MODEL,
                keyring=Keyring(None, api_key=KEY),
                body_timeout_s=body_timeout_s,
            )
            listener = await Listener(app, head_timeout_s=head_timeout_s).open("127.0.0.1", 0)
            try:
                yield f"http://127.0.0.1:{listener.port}"
            finally:
                await listener.close()
    finally:
        replica.close()


class FuzzTarget:
    """A process that runs only `live_listener`, with timeouts of seconds. `log`: its log so far."""

    def __init__(self, *, head_timeout_s: float = 2.0, body_timeout_s: float = 2.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(head_timeout_s), str(body_timeout_s)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._info = psutil.Process(self._process.pid)
        self.url = self._process.stdout.readline().strip()
        assert self.url, f"the target did not start:\n{self.log}"
        self.port = int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def rss_bytes(self) -> int:
        return self._info.memory_info().rss

    @property
    def num_connections(self) -> int:
        """Connections to its port, including unclosed ones of disconnected clients."""
        return sum(c.laddr.port == self.port and c.status != "LISTEN" for c in self._info.net_connections("tcp"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # the process ends then
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(5)
            self._process.stdout.close()
            self._process.stderr.close()

    def _read(self) -> None:
        for line in self._process.stderr:
            self._lines.append(line)


async def main(head_timeout_s: float, body_timeout_s: float) -> None:
    """Serves until stdin ends."""
    setup_logging("info")
    return_large_blocks()  # as `serve` does
    async with live_listener(head_timeout_s=head_timeout_s, body_timeout_s=body_timeout_s) as url:
        print(url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*map(float, sys.argv[1:])))
