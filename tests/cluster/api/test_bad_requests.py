"""Every bad request gets its status, and an error that names the field to change."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "x"}


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[TestClient, FakeReplica]]:
    replica = FakeReplica(max_model_len=64)
    arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": "demo", **options}
    async with TestClient(TestServer(make_app(router=Router([replica]), **arguments))) as client:
        yield client, replica


async def error_of(response: Any) -> dict[str, Any]:
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].strip()
    return body["error"]


BAD_COMPLETIONS = [
    # (fields, param, part of the message)
    ({"model": None}, "model", "model"),
    ({"prompt": None}, "prompt", "prompt"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": [[]]}, "prompt", "empty list"),
    ({"prompt": ["a", 1]}, "prompt", "mixes"),
    ({"prompt": ["a", [1]]}, "prompt", "mixes"),
    ({"prompt": [1, [1]]}, "prompt", "mixes"),
    ({"prompt": [True]}, "prompt", "prompt"),
    ({"prompt": [1.5]}, "prompt", "prompt"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [4096]}, "prompt", "token id 4096, which this model does not have. Use ids from 0 to 4095."),
    ({"prompt": [10**40]}, "prompt", "token id"),
    ({"prompt": {"text": "x"}}, "prompt", "prompt"),
    ({"prompt": [5] * 64}, "prompt", "64 tokens"),
    ({"prompt": "x " * 40_000}, "prompt", "at least"),
    ({"max_tokens": 0}, "max_tokens", "'echo' or 'prompt_logprobs'"),
    ({"max_tokens": -5}, "max_tokens", ">= 0"),
    ({"max_tokens": 1.5}, "max_tokens", "int"),
    ({"max_tokens": "5"}, "max_tokens", "int"),
    (
        {"max_tokens": 63},
        "max_tokens",
        "maximum context length is 64 tokens, but the request needs 65: 2 in the prompt and 63",
    ),
    ({"max_tokens": 10**30}, "max_tokens", "maximum context length"),
    ({"temperature": -0.1}, "temperature", ">= 0"),
    ({"temperature": 2.1}, "temperature", "<= 2"),
    ({"temperature": "hot"}, "temperature", "float"),
    ({"temperature": 10**400}, "temperature", "range"),
    ({"top_p": 1.5}, "top_p", "<= 1"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"min_p": 1.1}, "min_p", "<= 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", ">= -2"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 129}, "n", "<= 128"),
    ({"n": 5, "prompt": ["a"] * 2}, "n", "10 sequences"),
    ({"prompt": ["a"] * 9}, "prompt", "9 sequences"),
    ({"best_of": 1, "n": 2}, "best_of", "at least n"),
    ({"best_of": 9}, "n", "9 sequences"),
    ({"logprobs": 21}, "logprobs", "<= 20"),
    ({"logprobs": True}, "logprobs", "int"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "token id 4096"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "<= 100"),
    ({"logit_bias": {"word": 1}}, "logit_bias", "int"),
    ({"stop": ["a"] * 17}, "stop", "length <= 16"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a", ""]}, "stop", "length >= 1"),
    ({"stop": [1]}, "stop", "str"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "token id -1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than the 4"),
    ({"seed": 2**63}, "seed", "<= 9223372036854775807"),
    ({"seed": 1.5}, "seed", "int"),
    ({"stream": "yes"}, "stream", "bool"),
    ({"priority": 2**40}, "priority", "<="),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_COMPLETIONS, ids=lambda v: str(v)[:40])
async def test_bad_completions(fields: dict[str, Any], param: str | None, says: str) -> None:
    body = {"model": "demo", "prompt": "x"} | fields
    async with serving(max_sequences_per_request=8) as (client, replica):
        response = await client.post(COMPLETIONS, json=body)
        error = await error_of(response)
        assert (response.status, error["type"]) == (400, "invalid_request_error"), error
        assert error["param"] == param
        assert says in error["message"]
        assert not replica.requests, "the request must be refused before it reaches a replica"


BAD_CHATS = [
    ({"messages": None}, "messages", "messages"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": "hi"}, "messages", "array"),
    ({"messages": [{"content": "x"}]}, "messages", "role"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "wizard"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
    ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "tool_call_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "image_url"),
    ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]}, "messages", "tool_calls"),
    ({"messages": [{"role": "user", "content": "x " * 100}]}, "messages", "maximum context length is 64"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "at least"),
    ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
    ({"logprobs": 2}, "logprobs", "bool"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"max_completion_tokens": 100}, "max_tokens", "100 for the output"),
    ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_CHATS, ids=lambda v: str(v)[:40])
async def test_bad_chats(fields: dict[str, Any], param: str, says: str) -> None:
    async with serving() as (client, replica):
        response = await client.post(CHAT, json={"model": "demo", "messages": [USER]} | fields)
        error = await error_of(response)
        assert (response.status, error["type"]) == (400, "invalid_request_error"), error
        assert error["param"] == param
        assert says in error["message"]
        assert not replica.requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "demo", "prompt": "x", "temperature": NaN}',
        b'{"model": "demo", "prompt": "x", "temperature": Infinity}',
        b'{"model": "demo", "prompt": "x", "temperature": 1e999}',
        b'{"model": "demo", "prompt": "\xff"}',
        b'{"model": "demo", "prompt": "\\ud83d half"}',
        b'{"model": "demo", "prompt": ' + b"[" * 100_000,
        b"\x00" * 10,
    ],
    ids=lambda b: repr(b)[:40],
)
async def test_bodies_that_are_not_a_json_object(body: bytes) -> None:
    async with serving() as (client, _):
        response = await client.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"})
        error = await error_of(response)
        assert (response.status, error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_wrong_addresses(method: str, path: str, status: int, code: str) -> None:
    async with serving() as (client, _):
        response = await client.request(method, path)
        error = await error_of(response)
        assert (response.status, error["code"]) == (status, code)
        if status == 405:
            assert response.headers["Allow"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_another_model(path: str) -> None:
    async with serving() as (client, _):
        body = {"model": "gpt-4"} | ({"prompt": "x"} if path == COMPLETIONS else {"messages": [USER]})
        response = await client.post(path, json=body)
        error = await error_of(response)
        assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'gpt-4'" in error["message"]
        assert "'demo'" in error["message"]


async def test_a_body_that_is_too_large() -> None:
    async with serving(max_body_bytes=1000) as (client, _):
        response = await client.post(COMPLETIONS, json={"model": "demo", "prompt": "x" * 2000})
        error = await error_of(response)
        assert (response.status, error["code"]) == (413, "request_too_large")
        assert "1000 bytes" in error["message"]


async def test_a_model_without_a_chat_template() -> None:
    async with serving(chat_template=None) as (client, _):
        response = await client.post(CHAT, json={"model": "demo", "messages": [USER]})
        assert response.status == 400
        assert "/v1/completions" in (await error_of(response))["message"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("Bearer secrét", 401),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
)
async def test_everything_but_liveness_needs_the_key(header: str | None, status: int) -> None:
    headers = {"Authorization": header} if header else {}
    async with serving(api_key="secret") as (client, replica):
        for method, path, body in (
            ("POST", COMPLETIONS, {"model": "demo", "prompt": "x"}),
            ("POST", CHAT, {"model": "demo", "messages": [USER]}),
            ("GET", "/v1/models", None),
            ("GET", "/metrics", None),
            ("GET", "/health", None),
            ("GET", "/health/ready", None),
        ):
            response = await client.request(method, path, json=body, headers=headers)
            assert response.status == status, path
            if status == 401:
                assert (await error_of(response))["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        if status == 401:
            assert (await client.get("/nowhere", headers=headers)).status == 401, (
                "without a key a client does not learn which paths exist"
            )
            assert not replica.requests
        assert (await client.get("/health/live", headers=headers)).status == 200


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"[" * 65 + b"]" * 65, "more than 64 levels deep"),
        (b'"' + b"[" * 100 + b'"', "the prompt has 101 tokens"),  # brackets in a text
        (b'"\\"' + b"[" * 100 + b'"', "the prompt has 102 tokens"),
        (b'"\\\\", "user": ' + b"[" * 100 + b"]" * 100, "more than 64 levels deep"),
        (b"[" + b"[5]," * 100_000 + b"[5]]", "100,003 lists and objects"),
        (b"[" + b"5," * 2_000_000 + b"5]", "2,000,003 values"),
        (b"[" + b"[]," * 1000 + b"[5]]", "empty list"),
    ],
    ids=lambda v: repr(v)[:20],
)
async def test_the_size_of_a_body_is_checked_before_it_is_decoded(value: bytes, says: str) -> None:
    async with serving() as (client, _):
        body = b'{"model": "demo", "prompt": ' + value + b"}"
        response = await client.post(COMPLETIONS, data=body, headers={"Content-Type": "application/json"})
        error = await error_of(response)
        assert response.status == 400
        assert says in error["message"]
