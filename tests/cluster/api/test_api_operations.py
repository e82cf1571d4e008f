"""Options in headers and the endpoints for operators: deadlines, request ids, routing details, cluster health, /admin."""

import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.router.router import Availability, Router
from cluster.system.log import request_id_var
from cluster.text.tokenizer import load_tokenizer
from workers.errors import RequestError
from workers.protocol import CacheEvents, LoadReport, hash_block

TOKENIZER = load_tokenizer(DEMO_MODEL)
BODY: dict[str, Any] = {"model": "demo", "prompt": list(range(3, 23))}
FIRST_BLOCK = hash_block(b"", BODY["prompt"][:16])


@contextlib.asynccontextmanager
async def serving(*replicas: FakeReplica, **options: Any) -> AsyncIterator[tuple[TestClient, Router]]:
    router = Router(replicas, max_queued_tokens=30)
    app = make_app(router=router, tokenizer=TOKENIZER, chat_template=None, model_name="demo", **options)
    async with TestClient(TestServer(app)) as client:
        yield client, router


def idle(name: str, **options: Any) -> FakeReplica:
    replica = FakeReplica(tokens([42, 43, 44]), replica_id=name, **options)
    replica.load = LoadReport(tokens_per_s=1000.0)
    return replica


async def error_of(response: Any) -> dict[str, Any]:
    return (await response.json())["error"]


# Deadlines and bounds


@pytest.mark.parametrize("value", ["", "0", "-1", "soon", "nan", "inf"])
async def test_an_invalid_timeout(value: str) -> None:
    async with serving(idle("r0")) as (client, _):
        response = await client.post("/v1/completions", json=BODY, headers={"X-Request-Timeout": value})
        assert response.status == 400
        assert (await error_of(response))["param"] == "X-Request-Timeout"


@pytest.mark.parametrize("hold_after", [0, 1])
async def test_a_request_that_exceeds_its_timeout(hold_after: int) -> None:
    replica = idle("r0", hold_after=hold_after)
    async with serving(replica) as (client, router):
        headers = {"X-Request-Timeout": "0.1"}
        response = await client.post("/v1/completions", json=BODY, headers=headers)
        assert response.status == 504
        error = await error_of(response)
        assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        assert re.search(r"after the 0\.[01]\d s it was given", error["message"])
        streamed = await client.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
        if hold_after:
            last = (await streamed.text()).strip().rsplit("data: ", 1)[1]
            assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        else:
            assert streamed.status == 504
        assert replica.num_open == router.num_inflight_requests == 0
        metrics = await (await client.get("/metrics")).text()
        assert 'request_success_total{finished_reason="error",model_name="demo"} 2.0' in metrics


async def test_a_timeout_that_cannot_be_met_is_refused_with_retry_after() -> None:
    replica = idle("r0")
    replica.load = LoadReport(tokens_per_s=100.0, num_pending_tokens=1200)
    async with serving(replica) as (client, _):
        response = await client.post("/v1/completions", json=BODY, headers={"X-Request-Timeout": "5"})
        assert (response.status, response.headers["Retry-After"]) == (429, "12")
        assert not replica.requests


async def test_too_many_waiting_tokens() -> None:
    async with serving() as (client, router):
        router.update([], Availability(expected=True, facts=FakeReplica().facts))
        with router.admit(1, 20):
            response = await client.post("/v1/completions", json=BODY)
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert "20 of at most 30 prompt tokens wait" in (await error_of(response))["message"]


# Ids


@pytest.mark.parametrize("stream", [False, True])
async def test_every_response_has_a_request_id(stream: bool) -> None:
    async with serving(idle("r0")) as (client, _):
        body = BODY | {"stream": stream}
        own = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1"})
        assert own.headers["X-Request-Id"] == "abc-1"
        made = [(await client.post("/v1/completions", json=body)).headers["X-Request-Id"] for _ in range(2)]
        assert len(set(made)) == 2
        for bad in ("é", "x" * 129, "a b"):
            given = await client.post("/v1/completions", json=body, headers={"X-Request-Id": bad})
            assert given.headers["X-Request-Id"].startswith("req-"), bad
        for path in ("/health", "/nowhere", "/metrics"):
            assert (await client.get(path)).headers["X-Request-Id"]


async def test_log_records_of_a_request_have_its_id(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(request_id_var.get())

    handler = Listening()
    logger = logging.getLogger("cluster.router.router")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger=logger.name):
            async with serving(idle("a", lose_after=1), idle("b", lose_after=1), idle("c")) as (client, _):
                headers = {"X-Request-Id": "mine"}
                response = await client.post("/v1/completions", json=BODY | {"n": 2}, headers=headers)
                assert response.status == 200
    finally:
        logger.removeHandler(handler)
    assert seen
    assert set(seen) == {"mine"}
    assert request_id_var.get() is None


# Routing


@pytest.mark.parametrize("stream", [False, True])
async def test_debug_headers_only_on_request(stream: bool) -> None:
    replicas = [idle("r0"), idle("r1")]
    async with serving(*replicas) as (client, _):
        replicas[1].say(cache=CacheEvents(stored=[FIRST_BLOCK], reset=True))
        quiet = await client.post("/v1/completions", json=BODY | {"stream": stream})
        assert not [name for name in quiet.headers if name.startswith("X-Tramontane")]
        shown = await client.post(
            "/v1/completions", json=BODY | {"stream": stream}, headers={"X-Tramontane-Debug": "1"}
        )
        assert shown.headers["X-Tramontane-Replica"] == "r1"
        assert shown.headers["X-Tramontane-Cached-Tokens-Predicted"] == "16"
        assert shown.headers["X-Tramontane-Cached-Tokens"] == "1", "the count that the replica reported"
        assert shown.headers["X-Tramontane-Failovers"] == "0"
        metrics = await (await client.get("/metrics")).text()
        assert 'routing_predicted_cached_tokens_total{model_name="demo"} 32.0' in metrics
        assert 'routing_cached_tokens_total{model_name="demo"} 2.0' in metrics


async def test_debug_headers_count_failovers() -> None:
    async with serving(idle("a", lose_after=1), idle("b")) as (client, router):
        for _ in range(2):  # one of two requests goes to the replica that is lost, in either order
            response = await client.post("/v1/completions", json=BODY, headers={"X-Tramontane-Debug": "1"})
            if router.num_failovers_total:
                break
        assert (response.headers["X-Tramontane-Replica"], response.headers["X-Tramontane-Failovers"]) == ("b", "1")


async def test_debug_route_explains_and_sends_nothing() -> None:
    replicas = [idle("r0"), idle("r1")]
    async with serving(*replicas, api_key="key") as (client, _):
        replicas[0].say(cache=CacheEvents(stored=[FIRST_BLOCK], reset=True))
        headers = {"Authorization": "Bearer key"}
        ids = ",".join(map(str, BODY["prompt"]))
        answer = await (await client.get(f"/debug/route?prompt_token_ids={ids}", headers=headers)).json()
        assert (answer["policy"], answer["chosen"], answer["num_prompt_tokens"]) == ("prefix", "r0", 20)
        assert [(r["replica_id"], r["num_cached_tokens"], r["chosen"]) for r in answer["replicas"]] == [
            ("r0", 16, True),
            ("r1", 0, False),
        ]
        assert "16 of the prompt's 20 tokens are cached there" in answer["reason"]
        text = await client.get("/debug/route", params={"prompt": "Hello", "policy": "least_load"}, headers=headers)
        assert (await text.json())["num_prompt_tokens"] == len(TOKENIZER.encode("Hello"))
        for query, param in (
            ("", "prompt"),
            ("?prompt=a&prompt_token_ids=1", "prompt"),
            ("?prompt_token_ids=1,x", "prompt_token_ids"),
            ("?prompt_token_ids=99999", "prompt"),
            ("?prompt=a&policy=best", "policy"),
        ):
            response = await client.get(f"/debug/route{query}", headers=headers)
            assert (response.status, (await error_of(response))["param"]) == (400, param), query
        assert (await client.get("/debug/route?prompt=a")).status == 401
    assert not replicas[0].requests + replicas[1].requests


# Health of a cluster


async def test_health_says_whether_a_request_would_be_served() -> None:
    async with serving() as (client, router):
        facts = FakeReplica().facts
        for outlook, status, word, reason in (
            (Availability(), 503, "unavailable", "The server has no replica."),
            (
                Availability(expected=True, reason="Replica r0 is loading.", facts=facts),
                503,
                "unavailable",
                "Replica r0 is loading.",
            ),
            (
                Availability(expected=True, scaled_to_zero=True, facts=facts),
                200,
                "ok",
                "No replica runs; the next request starts one.",
            ),
        ):
            router.update([], outlook)
            response = await client.get("/health")
            answer = await response.json()
            assert (response.status, answer["status"], answer["reason"]) == (status, word, reason)
        replicas = [idle("r0"), idle("r1"), idle("r2")]
        replicas[1].drain_until = 0.0
        replicas[2].reason = "Away."
        router.update(replicas, Availability())
        answer = await (await client.get("/health")).json()
        assert [(r["id"], r["state"], r["ready"]) for r in answer["replicas"]] == [
            ("r0", "ready", True),
            ("r1", "draining", False),
            ("r2", "not_ready", False),
        ]


# Admin


@dataclass(frozen=True)
class View:
    replicas: tuple[str, ...]


class FakeAdmin:
    def __init__(self) -> None:
        self.drained: list[tuple[str, float | None]] = []

    async def drain_replica(self, replica_id: str, grace_s: float | None) -> None:
        if replica_id != "r0":
            raise RequestError(f"There is no replica {replica_id!r}.", param="replica_id")
        self.drained.append((replica_id, grace_s))

    def cluster_view(self) -> object:
        return View(("r0",))


async def test_admin_drains_and_shows() -> None:
    admin = FakeAdmin()
    async with serving(idle("r0"), admin=admin, api_key="key") as (client, _):
        headers = {"Authorization": "Bearer key"}
        assert (await client.post("/admin/replicas/r0/drain")).status == 401
        assert (await client.get("/admin/cluster")).status == 401
        assert (await client.post("/admin/replicas/r0/drain", headers=headers)).status == 202
        response = await client.post("/admin/replicas/r0/drain", json={"grace_s": 10}, headers=headers)
        assert await response.json() == {"id": "r0", "state": "draining"}
        assert admin.drained == [("r0", None), ("r0", 10.0)]
        for body in ({"grace_s": -1}, {"grace_s": "x"}, {"grace": 1}, []):
            response = await client.post("/admin/replicas/r0/drain", json=body, headers=headers)
            assert (response.status, (await error_of(response))["param"]) == (400, "grace_s"), body
        response = await client.post("/admin/replicas/r9/drain", headers=headers)
        assert (response.status, (await error_of(response))["message"]) == (400, "There is no replica 'r9'.")
        assert await (await client.get("/admin/cluster", headers=headers)).json() == {"replicas": ["r0"]}


async def test_without_an_admin_the_admin_paths_do_not_exist() -> None:
    async with serving(idle("r0")) as (client, _):
        for response in (await client.get("/admin/cluster"), await client.post("/admin/replicas/r0/drain")):
            assert response.status == 404
            assert (await error_of(response))["code"] == "unknown_url"
