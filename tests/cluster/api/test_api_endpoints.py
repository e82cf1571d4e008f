"""Every endpoint against a scripted replica: response formats, streams, usage, disconnects, errors in mid-stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica, tokens
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.protocol import FinishReason, TokenDelta

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
MODEL = "demo"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, bos=False)


def ids_behind(prompt: str, text: str) -> list[int]:
    """Tokens that continue the prompt with this text."""
    whole = TOKENIZER.encode(prompt + text)
    return whole[len(TOKENIZER.encode(prompt)) :]


Connect = Callable[..., Any]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(replica: FakeReplica, *, max_inflight_requests: int = 16, **options: Any) -> TestClient:
            router = Router([replica], max_inflight_requests=max_inflight_requests)
            arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": MODEL, **options}
            client = TestClient(TestServer(make_app(router=router, **arguments)))
            await stack.enter_async_context(client)
            return client

        yield start


async def events(response: Any) -> list[Any]:
    """The parsed events of a stream; "[DONE]" is a string."""
    assert response.status == 200, await response.text()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    blocks = (await response.text()).split("\n\n")
    assert blocks.pop() == ""
    assert all(b.startswith("data: ") for b in blocks)
    return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks]


async def test_completion(connect: Connect) -> None:
    replica = FakeReplica(tokens(ids_behind("Hello", " world of"), stop_token_id=2))
    client = await connect(replica)
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "seed": 7, "top_k": -1})
    answer = await response.json()
    assert response.status == 200
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
    assert answer["choices"] == [{"index": 0, "text": " world of", "logprobs": None, "finish_reason": "stop"}]
    prompt = TOKENIZER.encode("Hello")
    num_output = len(ids_behind("Hello", " world of")) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_output,
        "total_tokens": len(prompt) + num_output,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    (request,) = replica.requests
    assert request.prompt_token_ids == prompt
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.top_k) == (16, 7, 0)
    assert request.sampling.temperature == 1.0


async def test_every_sampling_field_reaches_the_replica(connect: Connect) -> None:
    replica = FakeReplica()
    client = await connect(replica)
    fields = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": 0,
        "seed": 11,
    }
    body = {
        "model": MODEL,
        "prompt": [5, 6],
        "stop_token_ids": [9],
        "logit_bias": {"8": -100},
        "priority": -3,
        "user": "u",
    }
    response = await client.post("/v1/completions", json=body | fields)
    assert response.status == 200, await response.text()
    (request,) = replica.requests
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert (request.sampling.stop_token_ids, request.sampling.logit_bias) == ((9,), {8: -100.0})
    assert (request.prompt_token_ids, request.priority) == ([5, 6], -3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [[1]]),
        (["a b", "c"], [TOKENIZER.encode("a b"), TOKENIZER.encode("c")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_prompt_forms_and_n(connect: Connect, prompt: Any, expected: list[list[int]]) -> None:
    replica = FakeReplica()
    client = await connect(replica)
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "n": 2, "seed": 3})
    answer = await response.json()
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    asked = sorted(replica.requests, key=lambda r: int(r.request_id.rsplit("-", 1)[1]))
    assert [r.prompt_token_ids for r in asked] == [p for p in expected for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected)), "a prompt counts once, whatever n is"
    assert answer["usage"]["completion_tokens"] == 2 * len(asked)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(expected)
    seeds = [r.sampling.seed for r in asked]
    assert seeds[0] == 3, "the first sequence keeps the request's seed"
    assert seeds[0] != seeds[1]
    assert seeds[:2] * len(expected) == seeds, "a prompt's sequences do not depend on the other prompts"


async def test_without_a_seed_every_sequence_gets_a_different_one(connect: Connect) -> None:
    replica = FakeReplica()
    client = await connect(replica)
    for _ in range(2):
        await client.post("/v1/completions", json={"model": MODEL, "prompt": ["a", "a"], "n": 2})
    assert len({r.sampling.seed for r in replica.requests}) == 8


async def test_streamed_completion(connect: Connect) -> None:
    text = " wörld 日本 of"
    client = await connect(FakeReplica(tokens(ids_behind("Hello", text), stop_token_id=2)))
    body = {"model": MODEL, "prompt": "Hello", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = await events(await client.post("/v1/completions", json=body))
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == text
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 3
    assert len({c["id"] for c in chunks}) == 1
    assert all(c["usage"] is None for c in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids_behind("Hello", text)) + 1


async def test_streamed_choices_have_their_indexes(connect: Connect) -> None:
    client = await connect(FakeReplica(tokens(ids("one two three"))))
    body = {"model": MODEL, "prompt": "", "stream": True, "n": 3}
    *chunks, _ = await events(await client.post("/v1/completions", json=body))
    texts = ["", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["one two three"] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_aborts_the_replicas_work(connect: Connect, stream: bool) -> None:
    replica = FakeReplica(tokens(ids("one two, three four")))
    client = await connect(replica)
    body = {"model": MODEL, "prompt": "", "stop": ["o, th"], "stream": stream}
    response = await client.post("/v1/completions", json=body)
    if stream:
        choices = [e["choices"][0] for e in (await events(response))[:-1]]
        text, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
    else:
        (choice,) = (await response.json())["choices"]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == ("one tw", "stop")
    assert replica.aborted == [replica.requests[0].request_id]
    assert replica.num_open == 0


async def test_the_stop_string_can_be_kept(connect: Connect) -> None:
    client = await connect(FakeReplica(tokens(ids("one two, three"))))
    body = {"model": MODEL, "prompt": "", "stop": ",", "include_stop_str_in_output": True}
    answer = await (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == "one two,"


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(connect: Connect, stream: bool) -> None:
    output = ids_behind("Hello", " one two 日")
    client = await connect(FakeReplica(tokens(output, stop_token_id=2)))
    body = {"model": MODEL, "prompt": "Hello", "logprobs": 2, "stream": stream, "max_tokens": 50}
    response = await client.post("/v1/completions", json=body)
    if stream:
        parts = [e["choices"][0]["logprobs"] for e in (await events(response))[:-1]]
        logprobs: dict[str, list[Any]] = {name: [x for p in parts for x in p[name]] for name in parts[0]}
    else:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [TOKENIZER.token_text(i) for i in [*output, 2]], (
        "one entry per token, including the end token"
    )
    assert logprobs["token_logprobs"] == [-0.5] * (len(output) + 1)
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(
        top[t] == -0.5 and len(top) == 2 for t, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )


async def test_chat(connect: Connect) -> None:
    replica = FakeReplica(tokens(ids("Hi there"), stop_token_id=2))
    client = await connect(replica)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    answer = await response.json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": "Hi there", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    (request,) = replica.requests
    assert TOKENIZER.decode(request.prompt_token_ids) == "Be brief.\n\nHel\n\nlo"
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids), "the rest of the context"


async def test_a_response_can_be_sent_back_and_a_prefix_is_continued(connect: Connect) -> None:
    replica = FakeReplica(tokens(ids("three")))
    client = await connect(replica)
    question = {"role": "user", "content": "Count"}
    first = await (await client.post("/v1/chat/completions", json={"model": MODEL, "messages": [question]})).json()
    sent_back = first["choices"][0]["message"] | {"tool_calls": None, "annotations": []}
    messages = [question, sent_back, question, {"role": "assistant", "content": "One, two", "prefix": True}]
    response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    answer = await response.json()
    assert response.status == 200, answer
    assert answer["choices"][0]["message"]["content"] == " three", "the output continues the prefix"


async def test_streamed_chat(connect: Connect) -> None:
    client = await connect(FakeReplica(tokens(ids("Hi there"))))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_completion_tokens": 5}
    *chunks, done = await events(await client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == "Hi there"
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(connect: Connect, stream: bool) -> None:
    output = ids("Hi 日")
    client = await connect(FakeReplica(tokens(output)))
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": 1,
        "stream": stream,
    }
    response = await client.post("/v1/chat/completions", json=body)
    if stream:
        parts = [e["choices"][0]["logprobs"] for e in (await events(response))[:-1]]
        content = [x for p in parts if p for x in p["content"]]
    else:
        content = (await response.json())["choices"][0]["logprobs"]["content"]
    assert bytes(b for c in content for b in c["bytes"]).decode() == " Hi 日"
    assert all(c["top_logprobs"] == [{k: c[k] for k in ("token", "logprob", "bytes")}] for c in content)


async def test_models(connect: Connect) -> None:
    client = await connect(FakeReplica(), model_name=["demo", "org/alias"])
    listed = await (await client.get("/v1/models")).json()
    assert [(m["id"], m["object"], m["max_model_len"]) for m in listed["data"]] == [
        ("demo", "model", 256),
        ("org/alias", "model", 256),
    ]
    assert (await (await client.get("/v1/models/org/alias")).json())["id"] == "org/alias"
    answer = await client.post("/v1/completions", json={"model": "org/alias", "prompt": "x"})
    assert (await answer.json())["model"] == "org/alias"


async def test_health_reports_the_replica_state(connect: Connect) -> None:
    replica = FakeReplica()
    client = await connect(replica)
    response = await client.get("/health")
    assert (response.status, (await response.json())["status"]) == (200, "ok")
    replica.reason = "Replica fake-0 is waiting for rank 1, which does not answer."
    response = await client.get("/health")
    answer = await response.json()
    assert (response.status, answer["status"], answer["reason"]) == (503, "unavailable", replica.reason)
    assert answer["replicas"][0]["ready"] is False
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert response.status == 503
    assert (await response.json())["error"]["message"] == replica.reason


async def test_metrics(connect: Connect) -> None:
    client = await connect(FakeReplica(tokens(ids("a b c"), stop_token_id=2)))
    await client.post("/v1/completions", json={"model": MODEL, "prompt": "a b"})
    await client.post("/v1/completions", json={"model": "other", "prompt": "a b"})
    await client.get("/no/such/path")
    response = await client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = (await response.text()).splitlines()
    model = '{model_name="demo"}'
    num_prompt, num_output = len(TOKENIZER.encode("a b")), len(ids("a b c")) + 1
    for line in (
        'tramontane:num_requests_running{engine="fake-0",model_name="demo"} 1.0',
        'tramontane:kv_cache_usage_perc{engine="fake-0",model_name="demo"} 0.25',
        'tramontane:replica_ready{engine="fake-0",model_name="demo"} 1.0',
        'tramontane:num_requests_inflight{model_name="demo"} 0.0',
        f"tramontane:prompt_tokens_total{model} {num_prompt}.0",
        f"tramontane:generation_tokens_total{model} {num_output}.0",
        f"tramontane:time_to_first_token_seconds_count{model} 1.0",
        f"tramontane:inter_token_latency_seconds_count{model} {num_output - 1}.0",
        f"tramontane:e2e_request_latency_seconds_count{model} 1.0",
        'tramontane:request_success_total{finished_reason="stop",model_name="demo"} 1.0',
        'tramontane:http_requests_total{path="/v1/completions",status="404"} 1.0',
        'tramontane:http_requests_total{path="unknown",status="404"} 1.0',
    ):
        assert line in lines, f"{line} is not among\n" + "\n".join(x for x in lines if x.startswith(line.split("{")[0]))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_disconnects_frees_the_replica(
    connect: Connect, stream: bool, hold_after: int, n: int
) -> None:
    replica = FakeReplica(tokens(ids("one two three four")), hold_after=hold_after)
    client = await connect(replica)
    async with ClientSession(timeout=ClientTimeout(total=20)) as session:
        body = {"model": MODEL, "prompt": "x", "stream": stream, "n": n}
        sending = asyncio.create_task(session.post(client.make_url("/v1/completions"), json=body))
        await replica.holding.wait()
        if stream and hold_after:
            response = await sending
            await response.content.readany()
            response.close()
        else:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    async with asyncio.timeout(10):
        while replica.num_open:
            await replica.closed.wait()
            replica.closed.clear()
    assert sorted(replica.aborted) == sorted(r.request_id for r in replica.requests)
    metrics = await (await client.get("/metrics")).text()
    assert f'request_success_total{{finished_reason="abort",model_name="demo"}} {n}.0' in metrics
    assert 'tramontane:num_requests_inflight{model_name="demo"} 0.0' in metrics


async def test_a_server_without_handler_cancellation_notices_at_the_next_token() -> None:
    replica = FakeReplica(tokens(ids("one two three four")), hold_after=1)
    router = Router([replica])
    app = make_app(router=router, tokenizer=TOKENIZER, chat_template=TEMPLATE, model_name=MODEL)
    server = TestServer(app)
    await server.start_server()
    assert server.runner is not None
    assert server.runner.server is not None
    server.runner.server.handler_cancellation = False
    async with TestClient(server) as client:
        sending = asyncio.create_task(client.post("/v1/completions", json={"model": MODEL, "prompt": "x"}))
        await replica.holding.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await client.session.close()
        async with asyncio.timeout(10):
            while any(c.transport is not None for c in server.runner.server.connections):
                await asyncio.sleep(0)
            replica.release.set()
            await replica.closed.wait()
    assert replica.aborted


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_engine_error(connect: Connect, path: str, n: int) -> None:
    def script(request: Any) -> list[TokenDelta]:
        bad = TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="The engine stopped.")
        return [TokenDelta(request_id=request.request_id, token_ids=[42]), bad]

    replica = FakeReplica(script)
    client = await connect(replica)
    body = {"model": MODEL, "n": n} | (
        {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    )
    response = await client.post(path, json=body)
    assert response.status == 500
    assert (await response.json())["error"]["message"] == "The engine stopped."
    *_, last = await events(await client.post(path, json=body | {"stream": True}))
    assert last["error"]["message"] == "The engine stopped.", "the stream ends with the error, without [DONE]"
    assert replica.num_open == 0


async def test_a_lost_replica(connect: Connect) -> None:
    before = await connect(FakeReplica(lambda request: []))
    body = {"model": MODEL, "prompt": "x", "stream": True}
    response = await before.post("/v1/completions", json=body)
    assert response.status == 503, "before the first token a stream still has a status"
    assert response.headers["Retry-After"] == "1"
    middle = await connect(FakeReplica(lambda r: [TokenDelta(request_id=r.request_id, token_ids=[42])]))
    *_, last = await events(await middle.post("/v1/completions", json=body))
    assert (last["error"]["type"], last["error"]["message"]) == ("service_unavailable_error", "Replica fake-0 is lost.")


async def test_an_unexpected_exception_reveals_nothing_to_the_client(connect: Connect) -> None:
    client = await connect(FakeReplica(lambda request: [ZeroDivisionError("secret")]))
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert response.status == 500
    assert "secret" not in await response.text()
    assert (await response.json())["error"]["type"] == "server_error"


async def test_a_full_server_refuses_whole_requests(connect: Connect) -> None:
    replica = FakeReplica(hold_after=0)
    client = await connect(replica, max_inflight_requests=3)
    body = {"model": MODEL, "prompt": "x"}
    first = asyncio.create_task(client.post("/v1/completions", json=body | {"n": 2}))
    await replica.holding.wait()
    refused = await client.post("/v1/completions", json=body | {"n": 2, "stream": True})
    assert refused.status == 429
    assert refused.headers["Retry-After"] == "1"
    assert (await refused.json())["error"]["code"] == "rate_limit_exceeded"
    replica.release.set()
    assert (await first).status == 200
    assert (await client.post("/v1/completions", json=body | {"n": 3})).status == 200


async def test_the_openai_client(connect: Connect) -> None:
    replica = FakeReplica(tokens(ids("Hi there"), stop_token_id=2))
    client = await connect(replica, api_key="key")
    async with openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="key", max_retries=0) as api:
        assert [m.id async for m in api.models.list()] == [MODEL]
        completion = await api.completions.create(model=MODEL, prompt="", logprobs=1, stop=["\n"], seed=1)
        assert completion.choices[0].text == "Hi there"
        chat = await api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2
        )
        assert chat.choices[0].message.content == "Hi there"
        stream = await api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        assert text == "Hi there"
        assert usage is not None
        assert usage.completion_tokens == len(ids("Hi there")) + 1
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await api.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="'functions' is not supported"):
            await api.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                functions=[{"name": "f"}],
            )
