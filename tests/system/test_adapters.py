"""Adapters of a real deployment: replicas and the controller are killed while four adapters serve and one of them is replaced.

Each answer is compared, bit for bit, with what the same revision answered before anything was disturbed.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from support.checkpoints.adapters import write_adapter
from support.paths import DEMO_MODEL
from support.servers.system_server import API_KEY, Server

from workers.checkpoint.model_config import load_model_config

NAMES = ("support", "sql", "docs", "crm")
REPLACED = "support"
NUM_CLIENTS = 5
NUM_REPLICAS = 2
JOBS: tuple[dict[str, Any], ...] = (
    {"prompt": "def fibonacci(n):", "temperature": 0, "max_tokens": 40, "logprobs": 1},
    {"prompt": "import ", "temperature": 1.0, "seed": 7, "max_tokens": 60},
    {"prompt": "class Reader:\n    def ", "temperature": 0.9, "top_p": 0.9, "seed": 3, "max_tokens": 50, "n": 2},
)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """An adapter for each name, and one that replaces the first. Weak ones, so that the demo model still writes something."""
    model = load_model_config(DEMO_MODEL)
    names = (*NAMES, "replacement")
    return {name: write_adapter(tmp_path / name, model, seed=i, strength=0.05) for i, name in enumerate(names)}


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[Server]:
    loras = [option for name in NAMES for option in ("--lora", f"{name}={folders[name]}")]
    server = Server("--replicas", str(NUM_REPLICAS), "--max-loras", "3", *loras)
    try:
        yield server
    finally:
        server.kill()


@dataclass
class World:
    """answers: by (digest of the adapter's content, or None; number of the job). served: requests by revision."""

    server: Server
    session: aiohttp.ClientSession
    answers: dict[tuple[str | None, int], str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    served: Counter[str | None] = field(default_factory=Counter)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def post(self, path: str, body: object) -> str:
        async with self.session.post(self.server.url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200, text
            return text

    async def ask(self, model: str, job: int) -> tuple[str | None, str]:
        """The revision that answered, and the answer of every choice."""
        body = {**JOBS[job], "model": model, "stream": True}
        texts: dict[int, list[str]] = {}
        async with self.session.post(f"{self.server.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
            revision = response.headers.get("X-Tramontane-Adapter")
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    return revision, json.dumps({i: "".join(parts) for i, parts in sorted(texts.items())})
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    for choice in event["choices"]:
                        logprobs = json.dumps((choice["logprobs"] or {}).get("token_logprobs"))
                        texts.setdefault(choice["index"], []).append(choice["text"] + logprobs * bool(choice["text"]))
        raise RuntimeError("the connection closed in mid-stream")

    async def record(self, model: str) -> None:
        """What this model answers while nothing is disturbed."""
        for job in range(len(JOBS)):
            revision, answer = await self.ask(model, job)
            self.answers[_digest(revision), job] = answer

    async def client(self, number: int) -> None:
        choice = random.Random(number)
        while not self.stop.is_set():
            model, job = choice.choice((*NAMES, "demo_model")), choice.randrange(len(JOBS))
            try:
                revision, answer = await self.ask(model, job)
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as e:
                self.failures.append(f"job {job} of {model}: {e!r}; {await self.loads()}")
                continue
            self.served[revision] += 1
            if (revision or model).partition("@")[0] != model or answer != self.answers[_digest(revision), job]:
                self.wrong.append(f"job {job} of {revision or model}")

    async def loads(self) -> str:
        """What replicas and gateway hold now, for the message about a request that got stuck."""
        replicas = await asyncio.to_thread(self.server.replicas)
        return "; ".join(
            f"{name} {r['state']}: {r['load']['num_running']} running, {r['load']['num_waiting']} waiting, "
            f"step {r['load']['num_steps_total']}, age {r['load']['step_age_s']}"
            for name, r in replicas.items()
        )

    async def until_ready(self) -> None:
        async with asyncio.timeout(90):
            while len(await asyncio.to_thread(self.server.replicas, "ready")) < NUM_REPLICAS:
                await asyncio.sleep(0.05)

    async def until_promoted(self) -> None:
        """An operator tries again while the controller restarts."""
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(AssertionError, aiohttp.ClientError):
                    await self.post(f"/admin/adapters/{REPLACED}/promote", {})
                    return
                await asyncio.sleep(0.1)
                async with self.session.get(f"{self.server.url}/admin/adapters") as response:
                    adapters = (await response.json())["adapters"]
                if next(a for a in adapters if a["name"] == REPLACED)["canary"] is None:
                    return  # the answer was lost with the controller

    async def until_all_served(self) -> None:
        """Every name has answered, the replaced one with both revisions."""
        async with self.session.get(f"{self.server.url}/admin/adapters") as response:
            adapters = (await response.json())["adapters"]
        wanted = {a["current"] for a in adapters} | {a["previous"] for a in adapters if a["name"] == REPLACED}
        assert len(wanted) == len(NAMES) + 1, adapters
        async with asyncio.timeout(60):
            while not wanted <= {revision for revision, count in self.served.items() if count}:
                await asyncio.sleep(0.05)

    async def kill_a_replica(self, choice: random.Random) -> None:
        """One that works and lives: while the controller restarts, the view may still name a dead one."""
        async with asyncio.timeout(60):
            while True:
                replicas = await asyncio.to_thread(self.server.replicas, "ready")
                busy = [name for name, replica in replicas.items() if replica["load"]["num_running"]]
                for name in choice.sample(sorted(busy), len(busy)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(replicas[name]["ranks"][0]["pid"]).kill()
                        return
                await asyncio.sleep(0.1)


def controller_of(server: Server) -> psutil.Process:
    for process in server.all_descendants():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::Controller"):
                return process
    raise AssertionError("the server has no controller")


def _digest(revision: str | None) -> str | None:
    return None if revision is None else revision.partition("@")[2]


async def story(server: Server, folders: dict[str, Path], *, rounds: int) -> World:
    choice = random.Random(5)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    timeout = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        world = World(server, session)
        # The new content under another name answers with the same bits.
        await world.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(folders["replacement"])})
        for model in (*NAMES, "new", "demo_model"):
            await world.record(model)
        await world.post("/v1/unload_lora_adapter", {"lora_name": "new"})
        assert len({world.answers[key] for key in world.answers if key[1] == 0}) == 6, "all must differ"
        clients = [asyncio.create_task(world.client(i)) for i in range(NUM_CLIENTS)]
        for number in range(rounds):
            source = folders["replacement" if number % 2 == 0 else REPLACED]
            await world.kill_a_replica(choice)
            body = {"lora_name": REPLACED, "lora_path": str(source), "canary": "40%"}
            await world.post("/v1/load_lora_adapter", body)
            await world.until_ready()
            await world.kill_a_replica(choice)
            (await asyncio.to_thread(controller_of, server)).kill()
            await world.until_promoted()
            await world.until_ready()
        await world.until_all_served()
        world.stop.set()
        await asyncio.gather(*clients)
        return world


@pytest.mark.timeout(400)
@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.chaos)])
def test_nothing_is_lost_while_replicas_die_and_an_adapter_is_replaced(server, folders, rounds):
    world = asyncio.run(story(server, folders, rounds=rounds))
    assert world.failures == []
    assert world.wrong == []
    registry = json.loads(server.get("/admin/adapters")[1])
    support = next(a for a in registry["adapters"] if a["name"] == REPLACED)
    assert support["canary"] is None and support["previous"] is not None
    assert world.served[support["current"]] and world.served[support["previous"]], "both revisions must have served"
    assert all(sum(world.served[r] for r in world.served if (r or "").startswith(name)) for name in NAMES)
    held = sorted(r["id"] for r in registry["revisions"] if r["state"] in ("ready", "loading", "retiring"))
    assert {digest for _, _, digest in (r.partition("@") for r in held)} == set(_digests(world))
    server.wait_for(
        lambda: all(sorted(replica["adapters"]) == held for replica in server.replicas("ready").values()),
        timeout_s=30,
        what=f"have exactly the adapters {held} on every replica",
    )
    assert server.metric("num_failovers_total") > 0, "no stream was interrupted, so this run shows nothing"


def _digests(world: World) -> set[str]:
    return {digest for digest, _ in world.answers if digest is not None}
