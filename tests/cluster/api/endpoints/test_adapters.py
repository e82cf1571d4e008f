"""Adapters over HTTP: as models of every endpoint, and their loading and unloading as vLLM answers it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.adapters.served import ServedAdapters
from cluster.api.app import make_app
from cluster.api.context import CONTEXT
from cluster.api.line_executor import ApiLineExecutor
from cluster.api.server.errors import NotFoundError
from cluster.batch.records import Line
from cluster.keys.key import Limits, new_key
from cluster.keys.keyring import Keyring
from cluster.protocol.adapters import Adapter, AdapterRevision, Registry, RevisionState
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.errors import RequestError
from workers.protocol import CacheEvents, hash_block, root_hash

TOKENIZER = load_tokenizer(DEMO_MODEL)
BODY = {"model": "support", "prompt": [3, 4, 5], "max_tokens": 2}


def revision(digest: str, state: str = "ready", **fields: Any) -> AdapterRevision:
    return AdapterRevision(
        id=f"support@{digest}",
        name="support",
        source="/adapters/support",
        digest=digest,
        rank=8,
        num_bytes=100,
        state=RevisionState(state),
        loaded_at=1796016227.0,
        **fields,
    )


SUPPORT = Registry(adapters=(Adapter(name="support", current="support@a"),), revisions=(revision("a"),))
CANARY = Registry(
    adapters=(Adapter(name="support", current="support@a", canary="support@b", canary_share=0.5),),
    revisions=(revision("a"), revision("b")),
)


class FakeAdmin:
    """Notes what it is asked for. `error`: raised instead of an answer."""

    def __init__(self, served: ServedAdapters) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self._served = served

    async def load_adapter(self, name, source, *, share=None, in_place=False, base_model=None):
        self.asked.append(("load", name, source, share, in_place))
        if self.error is not None:
            raise self.error
        self._served.update(SUPPORT)
        return SUPPORT.revisions[0]

    async def change_adapter(self, change, name):
        self.asked.append((change, name))
        if self.error is not None:
            raise self.error
        return SUPPORT


class World:
    def __init__(self, client: TestClient, replica: FakeReplica, served: ServedAdapters, admin: FakeAdmin) -> None:
        self.client, self.replica, self.served, self.admin = client, replica, served, admin

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any, Any]:
        """Status, parsed body or text, headers."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.client.post(path, json=body, headers=headers)
        text = await response.text()
        is_json = response.content_type == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers


@contextlib.asynccontextmanager
async def serving(registry: Registry = SUPPORT, **options: Any) -> AsyncIterator[World]:
    replica = FakeReplica(tokens([42, 43]), hold_after=options.pop("hold_after", None))
    served = ServedAdapters()
    served.update(registry)
    admin = FakeAdmin(served)
    app = make_app(
        router=Router([replica]),
        tokenizer=TOKENIZER,
        chat_template=MistralTemplate(TOKENIZER),
        model_name="demo",
        adapters=served,
        admin=admin,
        **options,
    )
    async with TestClient(TestServer(app)) as client:
        yield World(client, replica, served, admin)


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [3, 4, 5], "max_tokens": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "stream": True}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
        ("/openai/deployments/support/chat/completions", {"messages": MESSAGES, "max_tokens": 2}),
    ],
)
async def test_a_request_names_an_adapter_as_its_model(path, body):
    async with serving() as world:
        status, answer, headers = await world.post(path, {"model": "support", **body})
        assert status == 200, answer
        assert headers["X-Tramontane-Adapter"] == "support@a"
        assert {r.adapter for r in world.replica.requests} == {"support@a"}
        assert '"model":"support"' in (answer if isinstance(answer, str) else json.dumps(answer).replace(" ", ""))
        assert world.served.streams() == {}


async def test_the_model_itself_has_no_adapter_and_no_header():
    async with serving() as world:
        _, _, headers = await world.post("/v1/completions", {**BODY, "model": "demo"})
        assert "X-Tramontane-Adapter" not in headers and world.replica.requests[0].adapter is None


async def test_the_router_hashes_the_blocks_of_an_adapter_apart():
    """The same tokens have other keys and values under an adapter, and under another revision of it."""
    assert len({root_hash(None), root_hash("support@a"), root_hash("support@b")}) == 3


async def test_a_canary_gets_its_share_by_the_request_id_and_choices_stay_together():
    async with serving(CANARY) as world:
        chosen = []
        for i in range(40):
            body = {**BODY, "n": 3, "temperature": 1.0}
            _, _, headers = await world.post("/v1/completions", body, X_Request_Id=f"req-{i % 20}")
            chosen.append(headers["X-Tramontane-Adapter"])
        assert set(chosen) == {"support@a", "support@b"} and chosen[:20] == chosen[20:]
        by_request: dict[str, set[str | None]] = {}
        for request in world.replica.requests:
            by_request.setdefault(request.request_id.rsplit("-", 1)[0], set()).add(request.adapter)
        assert all(len(revisions) == 1 for revisions in by_request.values()), "all choices of a request are alike"


async def test_a_revision_can_be_named_itself():
    async with serving(CANARY) as world:
        for _ in range(5):
            status, answer, headers = await world.post("/v1/completions", {**BODY, "model": "support@b"})
            assert (status, headers["X-Tramontane-Adapter"]) == (200, "support@b") and answer["model"] == "support@b"


async def test_a_request_counts_until_its_stream_has_ended_or_its_client_is_gone():
    async with serving(hold_after=1) as world:
        response = await world.client.post("/v1/completions", json={**BODY, "stream": True})
        await world.replica.holding.wait()
        assert world.served.streams() == {"support@a": 1}
        response.close()
        async with asyncio.timeout(5):
            while world.served.streams():
                await asyncio.sleep(0.005)


async def test_a_stream_keeps_its_revision_when_the_name_moves_on():
    async with serving(hold_after=1) as world:
        answer = asyncio.create_task(world.post("/v1/completions", BODY))
        await world.replica.holding.wait()
        world.served.update(
            Registry(
                adapters=(Adapter(name="support", current="support@b", previous="support@a"),),
                revisions=(revision("a"), revision("b")),
            )
        )
        assert world.served.streams() == {"support@a": 1}
        world.replica.release.set()
        assert (await answer)[2]["X-Tramontane-Adapter"] == "support@a"
        assert (await world.post("/v1/completions", BODY))[2]["X-Tramontane-Adapter"] == "support@b"


async def test_unknown_failed_and_loading_adapters_are_404_with_the_reason():
    states = {"failed": {"reason": "q_proj has NaN."}, "loading": {}}
    for state, fields in states.items():
        registry = Registry(adapters=(), revisions=(revision("a", state, **fields),))
        async with serving(registry) as world:
            status, answer, _ = await world.post("/v1/completions", BODY)
            assert status == 404 and answer["error"]["code"] == "model_not_found"
            what = "could not be loaded: q_proj has NaN." if fields else "is being loaded."
            assert answer["error"]["message"] == f"The adapter support@a {what} Use 'demo'."
    async with serving() as world:
        _, answer, _ = await world.post("/v1/completions", {**BODY, "model": "other"})
        assert answer["error"]["message"] == "The model 'other' does not exist. Use 'demo' or 'support'."


async def test_the_first_load_is_waited_for():
    loading = Registry(adapters=(Adapter(name="support"),), revisions=(revision("a", "loading"),))
    async with serving(loading) as world:
        answer = asyncio.create_task(world.post("/v1/chat/completions", {"model": "support", "messages": MESSAGES}))
        await asyncio.sleep(0.02)
        assert not answer.done() and not world.replica.requests
        world.served.update(SUPPORT)
        assert (await answer)[0] == 200


async def test_models_lists_adapters_with_parent_and_root():
    async with serving() as world:
        cards = (await (await world.client.get("/v1/models")).json())["data"]
        assert [(c["id"], c["parent"], c["root"]) for c in cards] == [
            ("demo", None, "demo"),
            ("support", "demo", "/adapters/support"),
        ]
        card = await (await world.client.get("/v1/models/support")).json()
        assert card == cards[1] and card["created"] == 1796016227 and card["type"] == "fine-tuned"


async def test_a_key_may_be_limited_to_an_adapter():
    key, secret = new_key("tenant", limits=Limits(models=("support",)))
    keyring = Keyring(api_key="own")
    keyring.get, keyring.find = lambda _: key, lambda s: key if s == secret else None  # type: ignore[method-assign]
    async with serving(keyring=keyring) as world:
        bearer = {"Authorization": f"Bearer {secret}"}
        assert (await world.post("/v1/completions", BODY, **bearer))[0] == 200
        assert (await world.post("/v1/completions", {**BODY, "model": "support@a"}, **bearer))[0] == 200
        assert (await world.post("/v1/completions", {**BODY, "model": "demo"}, **bearer))[0] == 403
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/admin/adapters/support/promote"):
            status, answer, _ = await world.post(path, {"lora_name": "x", "lora_path": "/x"}, **bearer)
            assert (status, answer["error"]["code"]) == (403, "admin_key_required")
        assert world.admin.asked == []


async def test_batch_lines_name_adapters_and_resolve_when_they_run():
    async with serving() as world:
        executor = ApiLineExecutor(world.client.app[CONTEXT])
        body = json.dumps(BODY).encode()
        assert executor.check("/v1/completions", body, owner="") == "support"
        assert world.served.streams() == {}, "a validated line uses nothing"
        with pytest.raises(RequestError, match="'other' does not exist"):
            executor.check("/v1/completions", json.dumps({**BODY, "model": "other"}).encode(), owner="")
        line = Line(number=1, custom_id="x", offset=0, num_bytes=len(body))
        result = await executor.execute(line, endpoint="/v1/completions", body=body, seed=1, owner="")
        assert result.status_code == 200 and world.replica.requests[0].adapter == "support@a"
        assert world.served.streams() == {}


async def test_load_and_unload_answer_as_vllm_does():
    async with serving() as world:
        status, answer, headers = await world.post(
            "/v1/load_lora_adapter", {"lora_name": "support", "lora_path": "/a", "load_inplace": True}
        )
        assert (status, answer) == (200, "Success: LoRA adapter 'support' added successfully.")
        assert headers["X-Tramontane-Adapter"] == "support@a"
        status, answer, _ = await world.post("/v1/unload_lora_adapter", {"lora_name": "support", "lora_int_id": 1})
        assert (status, answer) == (200, "Success: LoRA adapter 'support' removed successfully.")
        await world.post("/v1/load_lora_adapter", {"lora_name": "s", "lora_path": "/a", "canary": "12.5%"})
        await world.post("/v1/load_lora_adapter", {"lora_name": "s", "lora_path": "/a", "canary": 0.25})
        assert world.admin.asked == [
            ("load", "support", "/a", None, True),
            ("unload", "support"),
            ("load", "s", "/a", 0.125, False),
            ("load", "s", "/a", 0.25, False),
        ]


@pytest.mark.parametrize("canary", [0, -1, 1.5, "0%", "150%", "x", "nan"])
async def test_a_canary_is_a_share(canary):
    async with serving() as world:
        body = {"lora_name": "s", "lora_path": "/a", "canary": canary}
        status, answer, _ = await world.post("/v1/load_lora_adapter", body)
        assert (status, answer["error"]["param"]) == (400, "canary") and world.admin.asked == []


async def test_errors_come_in_the_envelope():
    async with serving() as world:
        for body in ({}, {"lora_name": "s"}, {"lora_name": "", "lora_path": "/a"}):
            status, answer, _ = await world.post("/v1/load_lora_adapter", body)
            assert status == 400 and answer["error"]["param"] in ("lora_name", "lora_path")
        world.admin.error = NotFoundError("The lora adapter 'x' cannot be found.", code="lora_not_found")
        status, answer, _ = await world.post("/v1/unload_lora_adapter", {"lora_name": "x"})
        assert (status, answer["error"]["code"]) == (404, "lora_not_found")


async def test_promote_rollback_and_list():
    async with serving() as world:
        for change in ("promote", "rollback"):
            status, answer, _ = await world.post(f"/admin/adapters/support/{change}", {})
            assert (status, answer["current"]) == (200, "support@a")
        assert world.admin.asked == [("promote", "support"), ("rollback", "support")]
        listed = await (await world.client.get("/admin/adapters")).json()
        assert [a["name"] for a in listed["adapters"]] == ["support"]
        assert listed["revisions"][0]["digest"] == "a"


async def test_the_routing_explanation_knows_the_cache_of_a_revision():
    """A prefix that a replica has for one revision is none for another, or for the base."""
    prompt = list(range(40))
    cached = hash_block(root_hash("support@a"), prompt[:16])
    async with serving(CANARY) as world:
        await world.post("/v1/completions", BODY)
        world.replica.say(CacheEvents(stored=[cached], reset=True))
        ids = ",".join(map(str, prompt))
        found = {}
        for model in ("demo", "support@a", "support@b"):
            response = await world.client.get(f"/debug/route?prompt_token_ids={ids}&model={model}")
            found[model] = [r["num_cached_tokens"] for r in (await response.json())["replicas"]]
        assert found == {"demo": [0], "support@a": [16], "support@b": [0]}
        assert (await world.client.get(f"/debug/route?prompt_token_ids={ids}&model=other")).status == 404


async def test_metrics_count_by_revision():
    async with serving() as world:
        await world.post("/v1/completions", BODY)
        text = await (await world.client.get("/metrics")).text()
        labels = 'adapter="support",model_name="demo",revision="support@a"'
        assert f"tramontane:adapter_generation_tokens_total{{{labels}}} 2.0" in text
        assert f"tramontane:adapter_prompt_tokens_total{{{labels}}} 3.0" in text
        assert 'finished_reason="length",model_name="demo",revision="support@a"} 1.0' in text
