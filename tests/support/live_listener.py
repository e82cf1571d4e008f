"""The real listener and application over a real engine in this process, without Ray: what fuzzers aim at.

The engine's short context bounds what a request can cost. Knows no fuzzer.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from live_replica import TEMPLATE, TOKEN, TOKENIZER, LiveReplica

from cluster.api.app import make_app
from cluster.api.listener import Listener
from cluster.keys.keyring import Keyring
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Router

MODEL = "demo_model"


@contextlib.asynccontextmanager
async def live_listener(*, api_key: str, max_model_len: int = 64) -> AsyncIterator[str]:
    """Yields its URL. It listens on loopback, on a port of its own."""
    replica = LiveReplica(max_model_len=max_model_len)
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
                keyring=Keyring(None, api_key=api_key),
            )
            listener = await Listener(app).open("127.0.0.1", 0)
            try:
                yield f"http://127.0.0.1:{listener.port}"
            finally:
                await listener.close()
    finally:
        replica.close()
