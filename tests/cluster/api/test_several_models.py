"""Two models in one application: a request's `model` decides which replicas, adapters, limits and metrics are its own."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient
from prometheus_client.parser import text_string_to_metric_families
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica, tokens
from support.servers.live_replica import TEMPLATE, TOKENIZER

from cluster.adapters.served import ServedAdapters
from cluster.api.context import CONTEXT
from cluster.api.generation.structured import Grammars
from cluster.api.served_model import ServedModel
from cluster.keys.file import add_key
from cluster.keys.key import Limits, new_key
from cluster.keys.keyring import Keyring
from cluster.metrics.gateway import Metrics
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.router.replica import Availability
from cluster.router.router import Router

SQL = AdapterRevision(id="sql@1", name="sql", source="/sql", digest="1", rank=8, num_bytes=1, state=RevisionState.READY)
MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass
class World:
    client: TestClient
    first: FakeReplica
    second: FakeReplica
    other: ServedModel

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        response = await self.client.post(path, json=body, headers=headers)
        return response.status, json.loads(await response.text())

    async def get(self, path: str) -> tuple[int, Any]:
        response = await self.client.get(path)
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text

    def asked(self) -> tuple[int, int]:
        """How many sequences each model's replica has got since the last call."""
        numbers = len(self.first.requests), len(self.second.requests)
        self.first.requests.clear()
        self.second.requests.clear()
        return numbers


@contextlib.asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[World]:
    """`demo`, and `other` with a shorter context and the adapter `sql`."""
    first = FakeReplica(tokens(TOKENIZER.encode("first", bos=False)), replica_id="a-r0", max_model_len=2048)
    second = FakeReplica(tokens(TOKENIZER.encode("second", bos=False)), replica_id="b-r0", max_model_len=1024)
    adapters = ServedAdapters()
    adapters.update(Registry(adapters=(Adapter(name="sql", current="sql@1"),), revisions=(SQL,)))
    router = Router([second])
    beside = Metrics(Router([first]), model_name="demo")
    other = ServedModel(
        names=("other",),
        router=router,
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        metrics=Metrics(router, model_name="other", beside=beside),
        grammars=Grammars(TOKENIZER),
        adapters=adapters,
        deployment="b",
    )
    async with batch_app(path, [first], metrics=beside, deployment="a", others=[other], **options) as client:
        yield World(client, first, second, other)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with serving(tmp_path) as world:
        yield world


async def test_every_endpoint_goes_by_the_model(world: World) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Hello"},
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
        "/v1/responses": {"input": "Hello"},
        "/v1/embeddings": {"input": "Hello"},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/v1/moderations": {"input": "Hello"},
        "/invocations": {"prompt": "Hello"},
    }
    for path, body in bodies.items():
        for model, is_first in (("demo", True), ("other", False), ("sql", False)):
            if path == "/v1/moderations" and model == "sql":
                continue  # of ours, a moderation model's own name is the only other one
            await world.post(path, {"model": model, **body})
            asked = world.asked()
            assert (asked[0] > 0, asked[1] > 0) == (is_first, not is_first), (path, model, asked)
    for path, end in (("/openai/deployments/other/completions", {"prompt": "Hello"}),):
        status, answer = await world.post(path, end)
        assert (status, answer["choices"][0]["text"], world.asked()) == (200, " second", (0, 1))
    status, answer = await world.post(
        "/invocations", {"instances": [{"prompt": "a", "model": "other"}, {"prompt": "b"}]}
    )
    assert [p["choices"][0]["text"] for p in answer["predictions"]] == [" second", " first"]
    assert [
        (await world.post("/tokenize", {"model": m, "prompt": "a"}))[1]["max_model_len"] for m in ("demo", "sql")
    ] == [
        2048,
        1024,
    ]
    assert (await world.get("/tokenizer_info?model=other"))[1]["model_max_length"] == 1024
    assert (await world.get("/debug/route?prompt=a&model=other"))[1]["replicas"][0]["replica_id"] == "b-r0"


async def test_all_models_are_listed_and_an_unknown_one_is_refused_with_their_names(world: World) -> None:
    _, models = await world.get("/v1/models")
    assert [(m["id"], m["parent"], m["max_model_len"]) for m in models["data"]] == [
        ("demo", None, 2048),
        ("other", None, 1024),
        ("sql", "other", 1024),
    ]
    assert (await world.get("/v1/models/sql"))[1]["parent"] == "other"
    status, answer = await world.post("/v1/completions", {"model": "nope", "prompt": "a"})
    assert (status, answer["error"]["message"]) == (
        404,
        "The model 'nope' does not exist. Use 'demo' or 'other' or 'sql'.",
    )


async def test_a_key_may_be_for_one_of_them(tmp_path: Path) -> None:
    key, secret = new_key("alice", limits=Limits(models=("other",)))
    add_key(tmp_path / "keys.json", key)
    async with serving(tmp_path / "data", keyring=Keyring(tmp_path / "keys.json")) as world:
        headers = {"Authorization": f"Bearer {secret}"}
        status, answer = await world.post("/v1/completions", {"model": "other", "prompt": "a"}, **headers)
        assert (status, answer["choices"][0]["text"]) == (200, " second")
        status, answer = await world.post("/v1/completions", {"model": "demo", "prompt": "a"}, **headers)
        assert (status, answer["error"]["code"], world.asked()) == (403, "model_not_allowed", (0, 1))


async def test_ready_means_that_every_model_is(world: World) -> None:
    status, health = await world.get("/health/ready")
    assert (status, [r["id"] for r in health["replicas"]]) == (200, ["a-r0", "b-r0"])
    world.second.reason = "Rank 0 of b-r0 is stuck."
    status, health = await world.get("/health/ready")
    assert (status, health["reason"]) == (503, "other: Rank 0 of b-r0 is stuck.")
    assert [(m["deployment"], m["model"], m["ready"]) for m in health["models"]] == [
        ("a", "demo", True),
        ("b", "other", False),
    ]
    assert [(await world.get(f"/health/ready?model={m}"))[0] for m in ("demo", "other", "nope")] == [200, 503, 404]
    assert (await world.get("/ping"))[0] == 503
    facts = world.second.facts
    world.other.router.update([], Availability(expected=True, scaled_to_zero=True, facts=facts))
    status, health = await world.get("/health/ready")
    assert (status, health["status"]) == (200, "ok"), "what is scaled to zero is healthy: the next request starts it"


async def test_each_model_has_its_own_metrics_under_the_same_names(world: World) -> None:
    await world.post("/v1/completions", {"model": "other", "prompt": "a"})
    _, text = await world.get("/metrics")
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "Prometheus refuses a family that is there twice"
    found = {(s.name, s.labels.get("model_name")): s.value for f in families for s in f.samples}
    prefix = "tramontane:num_replicas_ready"
    assert found[prefix, "demo"] == found[prefix, "other"] == 1.0
    generated = "tramontane:generation_tokens_total"
    assert found[generated, "other"] > 0 == found[generated, "demo"]


async def test_the_lines_of_one_file_may_name_different_models(world: World) -> None:
    names = ("demo", "other", "sql", "other")
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": name, "prompt": f"{i}", "max_tokens": 8},
        }
        for i, name in enumerate(names)
    ]
    form = FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", "\n".join(map(json.dumps, lines)).encode(), filename="lines.jsonl")
    file = await (await world.client.post("/v1/files", data=form)).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = await (await world.client.post("/v1/batches", json=body)).json()
    while (batch := (await world.get(f"/v1/batches/{batch['id']}"))[1])["status"] not in ("completed", "failed"):
        pass
    output = await (await world.client.get(f"/v1/files/{batch['output_file_id']}/content")).text()
    texts = {d["custom_id"]: d["response"]["body"]["choices"][0]["text"] for d in map(json.loads, output.splitlines())}
    assert texts == {"0": " first", "1": " second", "2": " second", "3": " second"}
    _, text = await world.get("/metrics")
    assert 'batch_lines_total{model_name="other",outcome="completed"} 3.0' in text


async def test_a_request_is_refused_before_its_body_is_read_only_if_no_model_has_room(tmp_path: Path) -> None:
    async with serving(tmp_path) as world:
        models = world.client.app[CONTEXT].models  # type: ignore[union-attr]  # a served application
        with contextlib.ExitStack() as full:
            full.enter_context(models[0].router.admit(1024))
            status, _ = await world.post("/v1/completions", {"model": "other", "prompt": "a"})
            assert status == 200
            status, _ = await world.post("/v1/completions", {"model": "demo", "prompt": "a"})
            assert status == 429
