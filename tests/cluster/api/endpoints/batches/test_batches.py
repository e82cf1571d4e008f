"""/v1/batches with the real store and runner: the result of each line, its owner and its cost, and which batches are accepted."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestClient
from support.batch.app import batch_app
from support.fakes.replica import FakeReplica, tokens
from support.servers.live_replica import TOKEN, TOKENIZER, LiveReplica

from cluster.api.line_endpoints import LINE_ENDPOINTS
from cluster.batch.records import ENDPOINTS
from cluster.keys.file import add_key, revoke_key
from cluster.keys.key import Limits, new_key
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger, Sums, read_usage
from cluster.replicas.client import ReplicaClient
from workers.errors import ReplicaUnavailableError
from workers.protocol import BATCH_PRIORITY

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 2}
ENDED = ("completed", "failed", "expired", "cancelled")


def lines(bodies: Sequence[dict[str, Any]], url: str = COMPLETIONS) -> bytes:
    """An input file; the custom_ids are the lines' numbers."""
    requests = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


class Api:
    """Calls the server under test."""

    def __init__(self, client: TestClient, headers: dict[str, str] | None = None) -> None:
        self.client = client
        self.headers = headers or {}

    async def get(self, path: str) -> Any:
        response = await self.client.get(path, headers=self.headers)
        assert response.status == 200, await response.text()
        return await response.json()

    async def upload(self, content: bytes) -> str:
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", content, filename="in.jsonl")
        response = await self.client.post("/v1/files", data=form, headers=self.headers)
        assert response.status == 200, await response.text()
        return (await response.json())["id"]

    async def post(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        response = await self.client.post("/v1/batches", json=body, headers=self.headers)
        return response.status, await response.json()

    async def start(self, content: bytes, url: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
        file_id = await self.upload(content)
        body = {"input_file_id": file_id, "endpoint": url, "completion_window": "24h"}
        status, batch = await self.post(body | fields)
        assert status == 200, batch
        assert batch["status"] == "validating"
        return batch

    async def until(self, batch: dict[str, Any], condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while not condition(batch):
                await asyncio.sleep(0.01)
                batch = await self.get(f"/v1/batches/{batch['id']}")
        return batch

    async def run(self, content: bytes, url: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
        return await self.until(await self.start(content, url, **fields), lambda b: b["status"] in ENDED)

    async def results(self, batch: dict[str, Any], kind: str = "output") -> dict[str, dict[str, Any]]:
        """The results by custom_id."""
        if batch[f"{kind}_file_id"] is None:
            return {}
        response = await self.client.get(f"/v1/files/{batch[f'{kind}_file_id']}/content", headers=self.headers)
        found = [json.loads(line) for line in (await response.read()).splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}


@pytest.fixture
async def replica() -> FakeReplica:
    return FakeReplica(tokens([42, 43]))


@pytest.fixture
async def api(tmp_path: Path, replica: FakeReplica) -> AsyncIterator[Api]:
    async with batch_app(tmp_path, [replica]) as client:
        yield Api(client)


async def test_each_line_has_its_answer(api: Api, replica: FakeReplica) -> None:
    batch = await api.run(lines([BODY, BODY | {"seed": 7}, BODY | {"priority": 3}, BODY | {"n": 2}]))
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 4, "completed": 4, "failed": 0})
    assert batch["model"] == "demo"
    assert batch["errors"] is None and batch["error_file_id"] is None
    assert batch["usage"]["input_tokens"] == 12
    assert batch["usage"]["output_tokens"] == 10 == batch["usage"]["total_tokens"] - 12
    assert batch["usage"]["input_tokens_details"]["cached_tokens"] == 4
    found = await api.results(batch)
    assert sorted(found) == ["0", "1", "2", "3"]
    for line in found.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"].startswith("req-")
        assert line["response"]["body"]["object"] == "text_completion"
        assert line["response"]["body"]["choices"][0]["text"] == TOKENIZER.decode([42, 43])
    asked = {r.sampling.seed: r for r in replica.requests}
    assert 7 in asked and len(asked) == 5, "every sequence has its own seed"
    assert sorted(r.priority - BATCH_PRIORITY for r in replica.requests) == [0, 0, 0, 0, 3]


async def test_a_line_without_a_seed_gets_the_same_one_again(tmp_path: Path) -> None:
    """The seed depends on the batch and the custom_id, so it is the same each time the line runs."""
    first, second = FakeReplica(hold_after=1), FakeReplica(hold_after=1)
    async with batch_app(tmp_path, [first]) as client:
        batch = await Api(client).start(lines([BODY]))
        await asyncio.wait_for(first.holding.wait(), 10)
    assert first.num_open == 0, "a service that stops aborts its lines"
    second.release.set()
    async with batch_app(tmp_path, [second]) as client:
        ended = await Api(client).until(batch, lambda b: b["status"] in ENDED)
        assert ended["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert first.requests[0].sampling.seed == second.requests[0].sampling.seed


REFUSED_LINES = [
    (BODY | {"stream": True}, "stream", "cannot be streamed"),
    (BODY | {"priority": -1}, "priority", "0 or more"),
    (BODY | {"temperature": 9}, "temperature", "Invalid value"),
    (BODY | {"use_beam_search": True}, "use_beam_search", "not supported"),
    (BODY | {"model": "gpt-4"}, "model", "does not exist"),
    (BODY | {"max_tokens": 0}, "max_tokens", "would be empty"),
    (BODY | {"best_of": 1, "n": 2}, "best_of", "at least n"),
]


async def test_lines_that_can_never_run_fail_the_batch_before_it_starts(api: Api, replica: FakeReplica) -> None:
    batch = await api.run(lines([BODY, *(body for body, _, _ in REFUSED_LINES)]))
    assert batch["status"] == "failed"
    assert batch["failed_at"] >= batch["created_at"]
    assert [(e["line"], e["param"]) for e in batch["errors"]["data"]] == [
        (i + 2, param) for i, (_, param, _) in enumerate(REFUSED_LINES)
    ]
    for error, (_, _, words) in zip(batch["errors"]["data"], REFUSED_LINES, strict=True):
        assert words in error["message"]
    assert replica.requests == []


async def test_a_line_with_fields_without_effect_is_answered_and_the_log_names_them(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cluster.api.line_executor"):
        batch = await api.run(lines([BODY | {"colour": 1, "metadata": {"a": "b"}}, BODY]))
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    named = [r.getMessage() for r in caplog.records if "Ignored" in r.getMessage()]
    assert named == ["Ignored fields of a batch line: colour, metadata."]


async def test_a_strict_server_refuses_such_a_line(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [FakeReplica()], strict=True) as client:
        batch = await Api(client).run(lines([BODY | {"colour": 1}, BODY | {"metadata": {"a": "b"}}, BODY]))
    assert batch["status"] == "failed"
    errors = batch["errors"]["data"]
    assert [(e["line"], e["param"], e["code"]) for e in errors] == [
        (1, "colour", "unknown_parameter"),
        (2, "metadata", "unsupported_parameter"),
    ]


async def test_a_request_the_model_cannot_serve_fails_its_own_line_only(api: Api) -> None:
    batch = await api.run(lines([BODY, BODY | {"prompt": [5] * 300}, BODY | {"prompt": [4096]}]))
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 3, "completed": 1, "failed": 2})
    assert sorted(await api.results(batch)) == ["0"]
    errors = await api.results(batch, "error")
    answer = await api.client.post(COMPLETIONS, json=BODY | {"prompt": [5] * 300})
    assert errors["1"]["response"]["status_code"] == answer.status == 400
    assert errors["1"]["response"]["body"] == await answer.json()
    assert errors["1"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert errors["2"]["response"]["status_code"] == 400


async def test_a_line_that_kills_replicas_is_found_and_the_others_are_answered(tmp_path: Path) -> None:
    script = tokens([42, 43])

    def deadly(request: Any) -> Any:
        if request.prompt_token_ids == [666]:
            raise ReplicaUnavailableError("The replica is dead.", crashed=True)
        return script(request)

    async with batch_app(tmp_path, [FakeReplica(deadly)]) as client:
        api = Api(client)
        batch = await api.run(lines([BODY, BODY | {"prompt": [666]}, BODY]))
        assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
        errors = await api.results(batch, "error")
        assert list(errors) == ["1"]
        assert "crash" in errors["1"]["error"]["message"]


async def test_cancel(tmp_path: Path) -> None:
    slow = FakeReplica(hold_after=1)
    async with batch_app(tmp_path, [slow]) as client:
        api = Api(client)
        batch = await api.start(lines([BODY] * 3))
        await asyncio.wait_for(slow.holding.wait(), 10)
        response = await client.delete(f"/v1/files/{batch['input_file_id']}")
        assert response.status == 400, "a batch reads it"
        response = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert (response.status, (await response.json())["status"]) == (200, "cancelling")
        ended = await api.until(batch, lambda b: b["status"] in ENDED)
        assert ended["status"] == "cancelled"
        assert ended["request_counts"]["completed"] == 0
        assert slow.num_open == 0
        response = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert (response.status, (await response.json())["error"]["code"]) == (400, "batch_ended")
        assert (await client.delete(f"/v1/files/{batch['input_file_id']}")).status == 200


async def test_a_batch_expires(tmp_path: Path) -> None:
    async with batch_app(tmp_path, [FakeReplica(hold_after=1)]) as client:
        api = Api(client)
        batch = await api.run(lines([BODY] * 2), completion_window="1s")
        assert batch["status"] == "expired"
        assert batch["expired_at"] >= batch["expires_at"] == batch["created_at"] + 1
        assert {e["error"]["code"] for e in (await api.results(batch, "error")).values()} == {"batch_expired"}


async def test_output_files_expire_if_requested(api: Api) -> None:
    after = {"anchor": "created_at", "seconds": 7200}
    batch = await api.run(lines([BODY]), output_expires_after=after, metadata={"run": "7"})
    assert batch["metadata"] == {"run": "7"}
    file = await api.get(f"/v1/files/{batch['output_file_id']}")
    assert (file["purpose"], file["expires_at"]) == ("batch_output", file["created_at"] + 7200)


async def test_online_requests_and_lines_share_a_replica(api: Api, replica: FakeReplica) -> None:
    batch = await api.start(lines([BODY] * 20))
    response = await api.client.post(COMPLETIONS, json=BODY)
    assert response.status == 200
    await api.until(batch, lambda b: b["status"] == "completed")
    text = await (await api.client.get("/metrics")).text()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    name = '{model_name="demo"}'
    assert values['tramontane:batch_lines_total{model_name="demo",outcome="completed"}'] == 20
    assert values[f"tramontane:batch_generation_tokens_total{name}"] == 40
    assert values[f"tramontane:generation_tokens_total{name}"] == 42
    assert values[f"tramontane:time_to_first_token_seconds_count{name}"] == 1, (
        "batch lines do not count in the latency metrics"
    )
    assert f"tramontane:num_batch_lines_pending{name}" in values


WRONG = [
    ({"endpoint": "/v1/moderations"}, "endpoint", 400),
    ({"completion_window": "soon"}, "completion_window", 400),
    ({"completion_window": "1000d"}, "completion_window", 400),
    ({"input_file_id": "file-none"}, "input_file_id", 404),
    ({"input_file_id": "\0"}, "input_file_id", 404),
    ({"metadata": {"k": 1}}, "metadata", 400),
    ({"metadata": {"k" * 65: "v"}}, "metadata", 400),
    ({"metadata": {"k": "v" * 513}}, "metadata", 400),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", 400),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after", 400),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after", 400),
]


async def test_wrong_bodies(api: Api) -> None:
    body = {"input_file_id": await api.upload(lines([BODY])), "endpoint": COMPLETIONS, "completion_window": "24h"}
    for fields, param, status in WRONG:
        found, answer = await api.post(body | fields)
        assert (found, answer["error"]["param"]) == (status, param), (fields, answer)
    for name in body:
        found, answer = await api.post({k: v for k, v in body.items() if k != name})
        assert (found, answer["error"]["param"]) == (400, name), answer
    assert (await api.get("/v1/batches"))["data"] == []
    output = (await api.run(lines([BODY])))["output_file_id"]
    found, answer = await api.post(body | {"input_file_id": output})
    assert (found, answer["error"]["code"]) == (400, "invalid_purpose")
    for path in ("/v1/batches/batch_0", "/v1/batches/%00"):
        response = await api.client.get(path)
        assert (response.status, (await response.json())["error"]["code"]) == (404, "batch_not_found")


async def test_embeddings_where_they_are_disabled(tmp_path: Path, replica: FakeReplica) -> None:
    async with batch_app(tmp_path, [replica], serves_embeddings=False) as client:
        api = Api(client)
        body = {"input_file_id": await api.upload(b"x"), "endpoint": "/v1/embeddings", "completion_window": "24h"}
        status, answer = await api.post(body)
        assert (status, answer["error"]["code"]) == (400, "embeddings_disabled")


def test_every_endpoint_that_lines_may_name_is_there() -> None:
    assert tuple(LINE_ENDPOINTS) == ENDPOINTS


async def test_responses_and_messages_as_lines(tmp_path: Path) -> None:
    """The same answers as over HTTP, and a response may go on from a stored one."""
    replica = FakeReplica(tokens(TOKENIZER.encode("Fine", bos=False), stop_token_id=2), max_model_len=256)
    path, bodies = "/v1/responses", [{"input": "Hi", "seed": 3}, {"input": "And?", "max_output_tokens": 9}]

    def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
        output = [{k: v for k, v in item.items() if k != "id"} for item in answer.get("output", [])]
        return {k: v for k, v in answer.items() if k not in ("id", "created_at", "completed_at")} | {"output": output}

    async def directly(path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await api.client.post(path, json=body)
        assert response.status == 200, await response.text()
        return await response.json()

    async with batch_app(tmp_path, [replica]) as client:
        api = Api(client)
        first = await directly(path, {"model": "demo", "input": "Hello"})
        bodies = [{"model": "demo", "previous_response_id": first["id"], **body} for body in bodies]
        batch = await api.run(lines(bodies, path), path)
        assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}, batch
        found = await api.results(batch)
        for i, body in enumerate(bodies):
            answer = found[str(i)]["response"]["body"]
            assert answer["output"][0]["content"][0]["text"] == "Fine" and answer["store"] is False
            assert without_ids(answer) == without_ids(await directly(path, body | {"store": False}))
            assert (await client.get(f"{path}/{answer['id']}")).status == 404, "it is in the output file only"
        prompts = {tuple(request.prompt_token_ids) for request in replica.requests}
        assert len(prompts) == 3, "with what was said before"

        refused = await api.run(lines([bodies[0] | {"store": True}, bodies[0] | {"background": True}], path), path)
        assert [error["param"] for error in refused["errors"]["data"]] == ["store", "background"]

        path = "/v1/messages"
        body = {"model": "demo", "max_tokens": 9, "system": "Be kind.", "messages": [{"role": "user", "content": "Hi"}]}
        batch = await api.run(lines([body, {k: v for k, v in body.items() if k != "max_tokens"}], path), path)
        assert [(e["line"], e["param"]) for e in batch["errors"]["data"]] == [(2, "max_tokens")]
        batch = await api.run(lines([body], path), path)
        answer = (await api.results(batch))["0"]["response"]["body"]
        assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": "Fine"}], "end_turn")
        assert without_ids(answer) == without_ids(await directly(path, body))


async def test_pages(tmp_path: Path, replica: FakeReplica) -> None:
    async with batch_app(tmp_path, [replica], runs=False) as client:
        api = Api(client)
        ids = [(await api.start(lines([BODY])))["id"] for _ in range(3)]
        page = await api.get("/v1/batches?limit=2")
        assert [b["id"] for b in page["data"]] == [ids[2], ids[1]]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (True, ids[2], ids[1])
        page = await api.get(f"/v1/batches?limit=2&after={ids[1]}")
        assert ([b["id"] for b in page["data"]], page["has_more"]) == ([ids[0]], False)
        for query, param in (("limit=101", "limit"), ("after=batch_x", "after"), ("order=asc", "order")):
            response = await client.get(f"/v1/batches?{query}")
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_lines_are_charged_to_their_key_and_its_models_apply(tmp_path: Path) -> None:
    path, headers, keys = tmp_path / "keys.json", {}, {}
    limits = {"a": Limits(requests_per_minute=2, tokens_per_minute=10), "b": Limits(models=("other",)), "c": Limits()}
    for name, limit in limits.items():
        key, secret = new_key(name, limits=limit)
        add_key(path, key)
        headers[name], keys[name] = {"Authorization": f"Bearer {secret}"}, key
    ledger = Ledger(tmp_path / "usage.db")
    options = {"keyring": Keyring(path), "ledger": ledger, "model_name": ("demo", "other")}
    replica = FakeReplica(tokens([42, 43]))
    async with batch_app(tmp_path / "data", [replica], **options) as client:
        batch = await Api(client, headers["a"]).start(lines([BODY] * 10))
        ended = await Api(client, headers["a"]).until(batch, lambda b: b["status"] in ENDED)
        assert ended["request_counts"]["completed"] == 10, "limits per minute do not apply to batch lines"
        response = await client.get(f"/v1/batches/{batch['id']}", headers=headers["b"])
        assert response.status == 404
        assert (await Api(client, headers["b"]).get("/v1/batches"))["data"] == []
        failed = await Api(client, headers["b"]).run(lines([BODY]))
        assert (failed["status"], failed["errors"]["data"][0]["code"]) == ("failed", "model_not_allowed")
    await ledger.close()
    used = {(group.key_name, group.endpoint): sums for group, sums in read_usage(tmp_path / "usage.db")}
    assert used["a", "/v1/completions (batch)"] == Sums(10, 30, 10, 20, 0)
    # Another key's response is not a conversation to go on with.
    async with batch_app(tmp_path / "data", [FakeReplica()], keyring=Keyring(path, api_key="own")) as client:
        response = await client.post(
            "/v1/responses", json={"model": "demo", "input": "x"}, headers={"Authorization": "Bearer own"}
        )
        line = {"model": "demo", "input": "y", "previous_response_id": (await response.json())["id"]}
        api = Api(client, headers["a"])
        batch = await api.run(lines([line], "/v1/responses"), "/v1/responses")
        error = (await api.results(batch, "error"))["0"]["response"]["body"]["error"]
        assert error["code"] == "previous_response_not_found"
    # If a key is revoked while its batch waits, nothing is charged.
    async with batch_app(tmp_path / "data", [FakeReplica()], keyring=Keyring(path), runs=False) as client:
        waiting = await Api(client, headers["c"]).start(lines([BODY]))
    revoke_key(path, keys["c"].id)
    replica.requests.clear()
    async with batch_app(tmp_path / "data", [replica], keyring=Keyring(path, api_key="own")) as client:
        admin = Api(client, {"Authorization": "Bearer own"})
        ended = await admin.until(waiting, lambda b: b["status"] in ENDED)
        assert (ended["status"], ended["errors"]["data"][0]["code"]) == ("failed", "api_key_revoked")
    assert replica.requests == []


# The real engine, and the official client.


def rounded(value: Any) -> Any:
    """The last digits of log-probabilities depend on what else is computed in the same step."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Api]:
    replica = LiveReplica(max_model_len=256, max_num_batched_tokens=256, num_kv_blocks=256)
    try:
        async with ReplicaClient("r0", replica.address, TOKEN) as client, asyncio.timeout(60):
            while not client.is_ready(time.monotonic()):
                await asyncio.sleep(0.01)
            async with batch_app(tmp_path, [client]) as http:
                yield Api(http)
    finally:
        replica.close()


async def test_lines_answer_as_http_does(live: Api) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0, "seed": 1}
    cases = {
        COMPLETIONS: {"prompt": "def f(", "max_tokens": 5, "temperature": 1.2, "seed": 3, "logprobs": 2, "n": 2},
        "/v1/chat/completions": chat | {"response_format": {"type": "json_object"}},
        "/v1/embeddings": {"input": ["one", "two"]},
    }
    for url, fields in cases.items():
        body = {"model": "demo", **fields}
        response = await live.client.post(url, json=body)
        expected = await response.json()
        assert response.status == 200, expected
        batch = await live.run(lines([body], url), url)
        got = (await live.results(batch))["0"]["response"]["body"]
        for answer in (expected, got):  # these differ between any two runs of the same request
            for name in ("id", "created"):
                answer.pop(name, None)
            answer["usage"].pop("prompt_tokens_details", None)
        if url == "/v1/embeddings":
            for one, other in zip(expected.pop("data"), got.pop("data"), strict=True):
                assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)
        assert rounded(got) == rounded(expected)


async def test_the_openai_client(live: Api, tmp_path: Path) -> None:
    server = f"http://{live.client.host}:{live.client.port}/v1"
    async with openai.AsyncOpenAI(base_url=server, api_key="none", max_retries=0) as client:
        path = tmp_path / "in.jsonl"
        path.write_bytes(lines([{"model": "demo", "prompt": f"{i} and", "max_tokens": 3} for i in range(5)]))
        with path.open("rb") as source:
            file = await client.files.create(
                file=source, purpose="batch", expires_after={"anchor": "created_at", "seconds": 86400}
            )
        assert (file.purpose, file.filename, file.bytes) == ("batch", "in.jsonl", path.stat().st_size)
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            metadata={"of": "the test"},
            output_expires_after={"anchor": "created_at", "seconds": 86400},
        )
        async with asyncio.timeout(20):
            while batch.status not in ENDED:
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert batch.status == "completed" and batch.output_file_id and batch.error_file_id is None
        assert batch.request_counts and batch.request_counts.completed == batch.request_counts.total == 5
        assert batch.usage and batch.usage.output_tokens <= 15
        output = await client.files.content(batch.output_file_id)
        assert [json.loads(line)["custom_id"] for line in output.text.splitlines()] == list("01234")
        assert [b.id async for b in client.batches.list(limit=1)] == [batch.id]
        assert {f.id async for f in client.files.list(limit=1)} == {file.id, batch.output_file_id}
        assert (await client.files.retrieve(file.id)).id == file.id
        with pytest.raises(openai.BadRequestError, match="can no longer be cancelled"):
            await client.batches.cancel(batch.id)
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
