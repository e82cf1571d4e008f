"""Rank 0 without Ray: a real engine on its thread, the real socket server in front of it, and a gateway's application that uses it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from aiohttp.test_utils import TestClient, TestServer

from cluster.api.app import make_app
from cluster.replicas.client import ReplicaClient
from cluster.router.router import Availability, Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from support.fakes.engines import make_config
from support.paths import DEMO_MODEL
from workers.config import EngineConfig
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.execution.numerics import fingerprint
from workers.engine.llm_engine import LLMEngine
from workers.engine.loop import EngineLoop
from workers.lora.peft_folder import read_adapter
from workers.rank.server import StreamServer

DEMO = DEMO_MODEL
TOKENIZER = load_tokenizer(DEMO)
TEMPLATE = MistralTemplate(TOKENIZER)
TOKEN = "secret"


_numerics: dict[str, str] = {}  # of the demo model, by the configuration


def _numerics_of(config: EngineConfig, runner: ModelRunner) -> str:
    """It takes as long as everything else that starts, and for the same weights it is the same."""
    if config.model_path != str(DEMO):
        return _known(fingerprint(runner))
    name = repr(config)
    if name not in _numerics:
        _numerics[name] = _known(fingerprint(runner))
    return _numerics[name]


def _known(numerics: str | None) -> str:
    assert numerics is not None, "rank 0 has one"
    return numerics


class LiveReplica:
    """Serves from the start at `address`, until `close`. settings: EngineConfig fields."""

    def __init__(self, folder: Path = DEMO, *, replica_id: str = "r0", **settings: Any) -> None:
        config = make_config(folder, **({"tokenizer_path": str(TOKENIZER.path)} | settings))
        self.core = LLMEngine(config).core
        numerics = _numerics_of(config, self.core.runner)
        self.facts = msgspec.structs.replace(self.core.facts(replica_id), numerics=numerics)
        self._loop = EngineLoop(self.core, lambda deltas, events: self.server.publish(deltas, events))
        self.server = StreamServer(
            self.facts, TOKEN, submit=self._loop.submit, abort=self._loop.abort, load=self.core.load
        )
        self.address = self.server.start()
        self._loop.start()

    def load_adapter(self, name: str, folder: Path) -> str:
        """As all ranks of a replica load it. Returns the revision that requests name; needs `enable_lora`."""
        adapters = self.core.runner.adapters
        assert adapters is not None, "enable_lora"
        revision = f"{name}@{read_adapter(folder, self.core.config.model, max_rank=256).digest}"
        adapters.load(revision, folder)
        return revision

    def close(self) -> None:
        assert self._loop.stop()
        self.server.close()


@contextlib.asynccontextmanager
async def live_gateway(replica: LiveReplica, **options: Any) -> AsyncIterator[TestClient]:
    """A client of an application whose only replica this is. options: of make_app."""
    async with ReplicaClient("r0", replica.address, TOKEN) as client:
        async with asyncio.timeout(10):
            while not client.is_ready(time.monotonic()):
                await asyncio.sleep(0.01)
        # As with a controller, requests wait for a replica that was lost. This client is reconnected after a loss, and can have one
        # though nothing is wrong: between tests its event loop stands still, and rank 0 takes a long silence for its end.
        router = Router()
        router.update([client], Availability(expected=True))
        arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": "demo", **options}
        async with TestClient(TestServer(make_app(router=router, **arguments))) as http:
            yield http
