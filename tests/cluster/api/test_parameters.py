"""Every field of every request body changes the answer the way its definition says, or is refused by its name: one case each, at least.

The engine, the socket, the router and the application are the real ones, over the demo model. A field without a case fails the test
that counts them.
"""

import asyncio
import base64
import json
import math
import struct
import tempfile
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.test_utils import TestClient
from support.batch.app import batch_app
from support.servers.live_replica import TEMPLATE, TOKEN, TOKENIZER, LiveReplica, live_gateway

from cluster.api.endpoints.table import ENDPOINTS
from cluster.replicas.client import ReplicaClient
from cluster.text.chat.template import Message

PROMPT = "def fibonacci(n):"
GREEDY = {"model": "demo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
SAMPLED = GREEDY | {"temperature": 1, "seed": 5}
QUESTION = [{"role": "user", "content": "Write a function."}]
CHAT = {"model": "demo", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
TOOLS = CHAT | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 100, "parallel_tool_calls": False}


class Api:
    """Calls the server under test; answers are parsed, and a refusal is (status, error)."""

    def __init__(self, client: TestClient, replica: LiveReplica) -> None:
        self.client = client
        self.replica = replica

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        answer = await response.json()
        assert response.status == 200, answer
        return answer

    async def complete(self, body: dict[str, Any] = GREEDY, **fields: Any) -> dict[str, Any]:
        return await self.post("/v1/completions", body | fields)

    async def text(self, body: dict[str, Any] = GREEDY, **fields: Any) -> str:
        return (await self.complete(body, **fields))["choices"][0]["text"]

    async def ids(self, body: dict[str, Any] = GREEDY, **fields: Any) -> list[int]:
        return (await self.complete(body, return_token_ids=True, **fields))["choices"][0]["token_ids"]

    async def chat(self, body: dict[str, Any] = CHAT, **fields: Any) -> dict[str, Any]:
        return await self.post("/v1/chat/completions", body | fields)

    async def say(self, body: dict[str, Any] = CHAT, **fields: Any) -> str | None:
        return (await self.chat(body, **fields))["choices"][0]["message"]["content"]

    async def prompt_ids(self, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
        return (await self.chat(CHAT | {"messages": messages}, return_token_ids=True, **fields))["prompt_token_ids"]

    async def calls(self, **fields: Any) -> list[dict[str, Any]]:
        return (await self.chat(TOOLS, **fields))["choices"][0]["message"]["tool_calls"]

    async def events(self, body: dict[str, Any] = GREEDY, *, path: str = "/v1/completions", **fields: Any) -> list[Any]:
        response = await self.client.post(path, json=body | {"stream": True} | fields)
        blocks = (await response.text()).split("\n\n")
        assert response.status == 200, blocks
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block[6:]) for block in blocks[:-2]]

    async def refused(
        self, path: str, body: dict[str, Any], param: str | None, words: str, *, status: int = 400
    ) -> None:
        response = await self.client.post(path, json=body)
        answer = await response.json()
        assert response.status == status, answer
        assert answer["error"]["param"] == param, answer
        assert words in answer["error"]["message"], answer


@pytest.fixture(scope="module")
def replica() -> Iterator[LiveReplica]:
    replica = LiveReplica(max_model_len=1024, max_num_batched_tokens=256, num_kv_blocks=1024)
    yield replica
    replica.close()


@pytest.fixture
async def api(replica: LiveReplica) -> AsyncIterator[Api]:
    async with live_gateway(replica) as client:
        yield Api(client, replica)


Check = Callable[[Api], Awaitable[None]]
CASES: dict[str, Check] = {}


def case(*fields: str) -> Callable[[Check], Check]:
    """Marks the case of these fields, each as Struct.field."""

    def register(check: Check) -> Check:
        for name in fields:
            assert name not in CASES, f"{name} has two cases; join them"
            CASES[name] = check
        return check

    return register


# What completions and chat share.


@case("GenerationRequest.model")
async def model(api: Api) -> None:
    for path, body in (("/v1/completions", GREEDY), ("/v1/chat/completions", CHAT)):
        await api.refused(path, body | {"model": "gpt-4"}, "model", "does not exist", status=404)


@case("GenerationRequest.max_tokens")
async def max_tokens(api: Api) -> None:
    for count in (1, 5):
        answer = await api.complete(max_tokens=count)
        assert answer["usage"]["completion_tokens"] == count
        assert answer["choices"][0]["finish_reason"] == "length"
    assert (await api.chat(max_tokens=3))["usage"]["completion_tokens"] == 3
    nothing = await api.complete(max_tokens=0, echo=True)
    assert nothing["choices"][0]["text"] == PROMPT
    assert nothing["usage"]["completion_tokens"] == 0
    await api.refused("/v1/completions", GREEDY | {"max_tokens": 0}, "max_tokens", "'echo' or 'prompt_logprobs'")
    await api.refused("/v1/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens", "'prompt_logprobs'")


@case("GenerationRequest.n")
async def n(api: Api) -> None:
    answer = await api.complete(SAMPLED, n=3)
    texts = [c["text"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert texts[0] == await api.text(SAMPLED)
    assert len(set(texts)) >= 2
    assert answer["usage"]["completion_tokens"] == 3 * 16
    answer = await api.chat(CHAT | {"temperature": 1, "seed": 1}, n=2)
    assert len({c["message"]["content"] for c in answer["choices"]}) == 2


@case("GenerationRequest.stream", "StreamOptions.include_usage", "StreamOptions.continuous_usage_stats")
async def stream(api: Api) -> None:
    whole = await api.complete()
    chunks = await api.events()
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert all(c["usage"] is None for c in chunks)
    *chunks, last = await api.events(stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(c["usage"] is None for c in chunks)
    *chunks, last = await api.events(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert (counts[0] < counts[-1], counts[-1]) == (True, 16)
    chat = [c["choices"][0]["delta"].get("content", "") for c in await api.events(CHAT, path="/v1/chat/completions")]
    assert "".join(chat) == await api.say()
    *chunks, last = await api.events(
        CHAT,
        path="/v1/chat/completions",
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert last["choices"] == []
    assert all(c["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for c in chunks)


@case("GenerationRequest.stream_options")
async def stream_options(api: Api) -> None:
    options = {"include_usage": True}
    await api.refused("/v1/completions", GREEDY | {"stream_options": options}, "stream_options", "needs 'stream'")
    body = GREEDY | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    await api.refused("/v1/completions", body, "stream_options", "include_usage")


@case("GenerationRequest.stop", "GenerationRequest.include_stop_str_in_output")
async def stop(api: Api) -> None:
    text = await api.text()
    end = text[6:9]
    answer = await api.complete(stop=end)
    assert answer["choices"][0]["text"] == text[: text.index(end)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert await api.text(stop=["never in it", end]) == text[: text.index(end)]
    kept = await api.text(stop=end, include_stop_str_in_output=True)
    assert kept == text[: text.index(end) + len(end)]
    await api.refused("/v1/completions", GREEDY | {"stop": list("abcde")}, "stop", "length <= 4")


@case("GenerationRequest.temperature")
async def temperature(api: Api) -> None:
    assert await api.text() == await api.text(seed=3), "greedy takes no notice of a seed"
    hot = {await api.text(temperature=1.5, seed=seed) for seed in range(4)}
    assert len(hot) == 4
    assert len({await api.text(temperature=0.001, seed=seed) for seed in range(4)}) == 1


@case("GenerationRequest.top_p", "GenerationRequest.top_k", "GenerationRequest.min_p")
async def truncated_sampling(api: Api) -> None:
    greedy = await api.ids()
    free = await api.ids(SAMPLED)
    assert free != greedy
    for fields in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert await api.ids(SAMPLED, **fields) == greedy, fields
    for fields in ({"top_p": 1}, {"top_k": 0}, {"top_k": -1}, {"min_p": 0}):
        assert await api.ids(SAMPLED, **fields) == free, fields


@case(
    "GenerationRequest.presence_penalty",
    "GenerationRequest.frequency_penalty",
    "GenerationRequest.repetition_penalty",
)
async def penalties(api: Api) -> None:
    body = GREEDY | {"max_tokens": 48}
    num_distinct = len(set(await api.ids(body)))
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}):
        assert len(set(await api.ids(body, **fields))) > num_distinct, fields
    assert len(set(await api.ids(body, frequency_penalty=-2))) <= num_distinct


@case("GenerationRequest.logit_bias")
async def logit_bias(api: Api) -> None:
    first, *_ = await api.ids()
    assert first not in await api.ids(logit_bias={str(first): -100})
    assert set(await api.ids(logit_bias={"77": 100})) == {77}


@case("GenerationRequest.seed")
async def seed(api: Api) -> None:
    assert await api.text(SAMPLED) == await api.text(SAMPLED)
    assert await api.text(SAMPLED, seed=6) != await api.text(SAMPLED)
    body = {name: value for name, value in SAMPLED.items() if name != "seed"}
    assert await api.text(body) != await api.text(body)


@case("GenerationRequest.user")
async def user(api: Api) -> None:
    assert await api.text(user="u-1") == await api.text()
    await api.refused("/v1/completions", GREEDY | {"user": 5}, "user", "str")


@case(
    "GenerationRequest.response_format",
    "SchemaFormat.json_schema",
    "JsonSchemaFormat.name",
    "JsonSchemaFormat.description",
    "JsonSchemaFormat.schema",
    "JsonSchemaFormat.strict",
)
async def response_format(api: Api) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"enum": ["one", 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    described = {"name": "x", "description": "d", "schema": schema, "strict": True}
    wanted = {"type": "json_schema", "json_schema": described}
    for seed in range(3):
        fields = {"response_format": wanted, "temperature": 1, "seed": seed, "max_tokens": 60}
        for text in (await api.text(**fields), await api.say(**fields)):
            assert json.loads(text)["x"] in ("one", 2)
    fields = {"temperature": 1.5, "seed": 3, "max_tokens": 24}
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "any"}}):
        assert (await api.say(response_format=wanted, **fields)).lstrip()[0] == "{"
    assert await api.say(response_format={"type": "text"}) == await api.say()
    for path, body in (("/v1/completions", GREEDY), ("/v1/chat/completions", CHAT)):
        await api.refused(path, body | {"response_format": {"type": "xml"}}, "response_format", "json_schema")
        nameless = {"type": "json_schema", "json_schema": {"schema": schema}}
        await api.refused(path, body | {"response_format": nameless}, "response_format", "name")


@case("GenerationRequest.min_tokens", "GenerationRequest.stop_token_ids", "GenerationRequest.ignore_eos")
async def ends(api: Api) -> None:
    ids = await api.ids()
    stop = ids[4]
    at = ids.index(stop)
    answer = await api.complete(stop_token_ids=[stop], return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == ids[: at + 1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    later = await api.ids(stop_token_ids=[stop], min_tokens=at + 3)
    assert len(later) >= at + 3
    assert stop not in later[: at + 3], "it is not chosen before min_tokens"
    to_eos = {"logit_bias": {"2": 100}, "max_tokens": 4}
    assert await api.ids(**to_eos) == [2]
    assert await api.ids(**to_eos, ignore_eos=True) == [2, 2, 2, 2]
    body = GREEDY | {"min_tokens": 17}
    await api.refused("/v1/completions", body, "min_tokens", "more than the 16")


@case("GenerationRequest.bad_words")
async def bad_words(api: Api) -> None:
    text = await api.text(max_tokens=40)
    word = next(w for w in text.split() if w.isalpha() and len(w) > 1)
    assert word not in (await api.text(max_tokens=40, bad_words=[word])).split()


@case("GenerationRequest.allowed_token_ids")
async def allowed_token_ids(api: Api) -> None:
    assert set(await api.ids(SAMPLED, allowed_token_ids=[70, 71, 72])) <= {70, 71, 72}
    await api.refused("/v1/completions", GREEDY | {"allowed_token_ids": [4096]}, "allowed_token_ids", "4096")
    no_way = GREEDY | {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}
    await api.refused("/v1/completions", no_way, "allowed_token_ids", "'min_tokens' forbids")
    words = [ids[0] for ids in TOKENIZER.bad_words_ids(["return"])]
    await api.refused("/v1/completions", GREEDY | {"allowed_token_ids": words, "bad_words": ["return"]}, None, "banned")


@case("GenerationRequest.truncate_prompt_tokens")
async def truncate_prompt_tokens(api: Api) -> None:
    ids = TOKENIZER.encode(PROMPT)
    answer = await api.complete(truncate_prompt_tokens=4, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == [1, *ids[-3:]]
    assert answer["usage"]["prompt_tokens"] == 4
    long = [5] * 1100
    await api.refused("/v1/completions", GREEDY | {"prompt": long}, "prompt", "context")
    fits = await api.complete(prompt=long, truncate_prompt_tokens=-1)
    assert fits["usage"]["prompt_tokens"] == 1024 - 16
    assert (await api.chat(truncate_prompt_tokens=3))["usage"]["prompt_tokens"] == 3
    body = GREEDY | {"truncate_prompt_tokens": 0}
    await api.refused("/v1/completions", body, "truncate_prompt_tokens", "leaves no prompt")


@case("GenerationRequest.prompt_logprobs")
async def prompt_logprobs(api: Api) -> None:
    ids = TOKENIZER.encode(PROMPT)
    (choice,) = (await api.complete(prompt_logprobs=2))["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(ids) - 1
    for token_id, entry in zip(ids[1:], others, strict=True):
        assert str(token_id) in entry
        assert sorted(e["rank"] for e in entry.values())[:2] == [1, 2]
        assert all(e["logprob"] <= 0 for e in entry.values())
    echoed = await api.complete(echo=True, logprobs=0, max_tokens=0)
    own = [entry[str(i)]["logprob"] for i, entry in zip(ids[1:], others, strict=True)]
    assert echoed["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(own)
    answer = await api.chat(prompt_logprobs=0, return_token_ids=True)
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    streamed = await api.events(prompt_logprobs=2)
    assert streamed[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert all("prompt_logprobs" not in c["choices"][0] for c in streamed[1:])


@case("GenerationRequest.return_token_ids")
async def return_token_ids(api: Api) -> None:
    plain, (choice,) = await api.complete(), (await api.complete(return_token_ids=True))["choices"]
    assert "token_ids" not in plain["choices"][0]
    assert choice["prompt_token_ids"] == TOKENIZER.encode(PROMPT)
    assert len(choice["token_ids"]) == 16
    streamed = await api.events(return_token_ids=True)
    assert [i for c in streamed for i in c["choices"][0]["token_ids"]] == choice["token_ids"]
    answer = await api.chat(return_token_ids=True)
    assert answer["prompt_token_ids"] == TEMPLATE.encode([Message("user", QUESTION[0]["content"])]).token_ids
    streamed = await api.events(CHAT | {"return_token_ids": True}, path="/v1/chat/completions")
    ids = [i for c in streamed for i in c["choices"][0].get("token_ids", [])]
    assert ids == answer["choices"][0]["token_ids"]


@case(
    "GenerationRequest.structured_outputs",
    "StructuredOutputs.json",
    "StructuredOutputs.regex",
    "StructuredOutputs.choice",
    "StructuredOutputs.grammar",
)
async def structured_outputs(api: Api) -> None:
    fields = {"temperature": 1, "seed": 9, "max_tokens": 40}
    for schema in ({"enum": ["red", "green"]}, json.dumps({"enum": ["red", "green"]})):
        assert json.loads(await api.say(structured_outputs={"json": schema}, **fields)) in ("red", "green")
    assert await api.say(structured_outputs={"choice": ["yes", "no"]}, **fields) in ("yes", "no")
    digits = await api.say(structured_outputs={"regex": "[0-9]{4}"}, **fields)
    assert (len(digits), digits.isdigit()) == (4, True)
    grammar = 'start: "a" ("b" | "c") "d"'
    assert await api.say(structured_outputs={"grammar": grammar}, **fields) in ("abd", "acd")
    assert await api.text(structured_outputs={"choice": [" yes", " no"]}, **fields) in (" yes", " no")
    for wrong, words in (
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "exactly one"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: ???"}, "cannot be used"),
        ({"json": "{"}, "JSON"),
    ):
        body = CHAT | {"structured_outputs": wrong}
        await api.refused("/v1/chat/completions", body, "structured_outputs", words)
    both = CHAT | {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}
    await api.refused("/v1/chat/completions", both, "structured_outputs", "one of them")
    for name, value in (("ignore_eos", True), ("min_tokens", 2), ("bad_words", ["x"]), ("allowed_token_ids", [7])):
        body = CHAT | {"structured_outputs": {"regex": "a"}, name: value}
        await api.refused("/v1/chat/completions", body, name, "cannot be combined")


@case("GenerationRequest.priority")
async def priority(api: Api) -> None:
    seen = []
    add = api.replica.core.add_request
    api.replica.core.add_request = lambda request: (seen.append(request.priority), add(request))[1]  # type: ignore[method-assign]
    try:
        await api.text(priority=-4)
        await api.text()
    finally:
        del api.replica.core.add_request
    assert seen == [-4, 0]


# Completions.


@case("CompletionRequest.prompt")
async def prompt(api: Api) -> None:
    ids = TOKENIZER.encode(PROMPT)
    text = await api.text()
    assert await api.text(prompt=ids) == text
    both = await api.complete(prompt=[PROMPT, "import os"])
    assert both["choices"][0]["text"] == text
    assert both["choices"][1]["text"] == await api.text(prompt="import os") != text
    assert (await api.complete(prompt=[ids, ids]))["choices"][1]["text"] == text


@case("CompletionRequest.suffix")
async def suffix(api: Api) -> None:
    body = GREEDY | {"suffix": "return a"}
    await api.refused("/v1/completions", body, "suffix", "[SUFFIX]")  # the demo's vocabulary lacks it
    await api.refused("/v1/completions", body | {"echo": True}, "echo", "cannot be combined")
    await api.refused("/v1/completions", body | {"prompt": [5, 6]}, "suffix", "text")
    assert await api.text(suffix="") == await api.text()


@case("CompletionRequest.echo")
async def echo(api: Api) -> None:
    text = await api.text()
    assert await api.text(echo=True) == PROMPT + text
    assert "".join(c["choices"][0]["text"] for c in await api.events(echo=True)) == PROMPT + text
    (choice,) = (await api.complete(echo=True, logprobs=1))["choices"]
    found = choice["logprobs"]
    ids = TOKENIZER.encode(PROMPT)
    assert found["tokens"][: len(ids)] == [TOKENIZER.token_text(i) for i in ids]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(math.isfinite(p) and p <= 0 for p in found["token_logprobs"][1:])
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[2:]:
        assert choice["text"].startswith(token, offset)
    assert len({len(values) for values in found.values()}) == 1
    streamed = [c["choices"][0]["logprobs"] for c in await api.events(echo=True, logprobs=1)]
    assert [p for part in streamed for p in part["token_logprobs"]] == found["token_logprobs"]
    assert [o for part in streamed for o in part["text_offset"]] == found["text_offset"]


@case("CompletionRequest.logprobs")
async def logprobs(api: Api) -> None:
    (plain,), (choice,) = (await api.complete())["choices"], (await api.complete(logprobs=3))["choices"]
    assert choice["text"] == plain["text"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == max(top.values()) == logprob, "greedy takes the likeliest"
        assert len(top) in (2, 3)  # two of them may read the same
    assert all(len(top) == 1 for top in (await api.complete(logprobs=0))["choices"][0]["logprobs"]["top_logprobs"])


@case("CompletionRequest.best_of")
async def best_of(api: Api) -> None:
    answer = await api.complete(SAMPLED, n=4, logprobs=0)
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in answer["choices"]}
    ordered = sorted(means, key=means.get, reverse=True)
    best = await api.complete(SAMPLED, best_of=4, n=2)
    assert [c["text"] for c in best["choices"]] == ordered[:2]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 4 * 16
    await api.refused("/v1/completions", SAMPLED | {"best_of": 1, "n": 2}, "best_of", "at least n")
    await api.refused("/v1/completions", SAMPLED | {"best_of": 2, "stream": True}, "best_of", "streamed")


# Chat.


@case(
    "ChatRequest.messages",
    "SystemMessage.content",
    "DeveloperMessage.content",
    "UserMessage.content",
    "AssistantMessage.content",
    "TextPart.text",
    "TextPart.type",
)
async def messages(api: Api) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    expected = TEMPLATE.encode([Message(role, text) for role, text in turns]).token_ids
    assert await api.prompt_ids([{"role": role, "content": text} for role, text in turns]) == expected
    parts = [
        {"role": role.replace("system", "developer"), "content": [{"type": "text", "text": t} for t in text]}
        for role, text in turns
    ]
    assert await api.prompt_ids(parts) == expected
    for part in ({"text": "x"}, {"type": "image_url", "text": "x"}):
        body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
        await api.refused("/v1/chat/completions", body, "messages", "type")


@case("AssistantMessage.prefix")
async def prefix(api: Api) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "def f(", "prefix": True}]
    expected = TEMPLATE.encode([Message("user", QUESTION[0]["content"]), Message("assistant", "def f(", prefix=True)])
    assert await api.prompt_ids(begun) == expected.token_ids
    del begun[1]["prefix"]
    await api.refused("/v1/chat/completions", CHAT | {"messages": begun}, "messages", "prefix")


@case(
    "AssistantMessage.refusal",
    "AssistantMessage.audio",
    "AssistantMessage.function_call",
    "AssistantMessage.annotations",
)
async def null_fields_of_an_answer(api: Api) -> None:
    plain = {"role": "assistant", "content": "b"}
    turns = [*QUESTION, plain, *QUESTION]
    expected = await api.prompt_ids(turns)
    turns[1] = plain | {"refusal": None, "audio": None, "function_call": None, "annotations": []}
    assert await api.prompt_ids(turns) == expected
    for name, value in (("refusal", "no"), ("audio", {}), ("function_call", {}), ("annotations", [1])):
        turns[1] = plain | {name: value}
        await api.refused("/v1/chat/completions", CHAT | {"messages": turns}, "messages", f"{name}'")


@case("ChatRequest.max_completion_tokens")
async def max_completion_tokens(api: Api) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    assert (await api.chat(body, max_completion_tokens=3))["usage"]["completion_tokens"] == 3
    await api.refused("/v1/chat/completions", CHAT | {"max_completion_tokens": 3}, "max_tokens", "differ")


@case("ChatRequest.logprobs", "ChatRequest.top_logprobs")
async def chat_logprobs(api: Api) -> None:
    assert (await api.chat())["choices"][0]["logprobs"] is None
    (choice,) = (await api.chat(logprobs=True, top_logprobs=2))["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in content).lstrip(" ") == choice["message"]["content"].lstrip(" ")
    for entry in content:
        assert entry["logprob"] == max(t["logprob"] for t in entry["top_logprobs"])
        assert len(entry["top_logprobs"]) == 2
    (choice,) = (await api.chat(logprobs=True))["choices"]
    assert all(t["top_logprobs"] == [] for t in choice["logprobs"]["content"])
    await api.refused("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'")


@case("ChatRequest.safe_prompt")
async def safe_prompt(api: Api) -> None:
    text = TOKENIZER.decode(await api.prompt_ids(QUESTION, safe_prompt=True))
    assert "Always assist with care, respect, and truth" in text
    assert "Always assist" not in TOKENIZER.decode(await api.prompt_ids(QUESTION, safe_prompt=False))


@case(
    "ChatRequest.tools",
    "Tool.type",
    "Tool.function",
    "FunctionDefinition.name",
    "FunctionDefinition.description",
    "FunctionDefinition.parameters",
)
async def tools(api: Api) -> None:
    for seed in range(3):
        (call,) = await api.calls(temperature=1, seed=seed)
        assert call["type"] == "function"
        assert call["function"]["name"] == "add"
        assert list(json.loads(call["function"]["arguments"])) == ["a"]
    text = TOKENIZER.decode(await api.prompt_ids(QUESTION, tools=[TOOL]))
    assert all(word in text for word in ("add", "Adds.", "maximum"))
    await api.refused("/v1/chat/completions", TOOLS | {"tools": [TOOL, TOOL]}, "tools", "same name")
    body = TOOLS | {"response_format": {"type": "json_object"}}
    await api.refused("/v1/chat/completions", body, "response_format", "tools")
    await api.refused("/v1/chat/completions", TOOLS | {"tools": [TOOL | {"type": "x"}]}, "tools", "type")


@case("FunctionDefinition.strict")
async def strict(api: Api) -> None:
    odd = {
        "type": "object",
        "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {"const": "x"}}},
    }
    for is_strict in (False, True):
        function = {"name": "f", "parameters": odd, "strict": is_strict}
        body = TOOLS | {"tools": [{"type": "function", "function": function}], "max_tokens": 5}
        if is_strict:
            await api.refused("/v1/chat/completions", body, "tools", "f")
        else:
            await api.chat(body)


@case("ChatRequest.tool_choice", "NamedToolChoice.function", "NamedToolChoice.type", "FunctionChoice.name")
async def tool_choice(api: Api) -> None:
    other = {"type": "function", "function": {"name": "sub", "parameters": TOOL["function"]["parameters"]}}
    both = TOOLS | {"tools": [TOOL, other]}
    for name in ("add", "sub"):
        named = {"type": "function", "function": {"name": name}}
        answer = await api.chat(both, tool_choice=named, temperature=1, seed=4)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == name
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
    none = await api.chat(both, tool_choice="none", parallel_tool_calls=None, max_tokens=16)
    assert none["choices"][0]["message"] == (await api.chat())["choices"][0]["message"]
    assert "tool_calls" not in none["choices"][0]["message"]
    auto = await api.chat(both, tool_choice="auto", logit_bias={str(TOKENIZER.tool_calls_token_id): 100})
    assert auto["choices"][0]["message"]["tool_calls"]
    named = {"type": "function", "function": {"name": "mul"}}
    await api.refused("/v1/chat/completions", both | {"tool_choice": named}, "tool_choice", "none of the tools")
    await api.refused("/v1/chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", "'tools'")


@case("ChatRequest.parallel_tool_calls")
async def parallel_tool_calls(api: Api) -> None:
    counts = [len(await api.calls(temperature=1.5, seed=seed)) for seed in range(4)]
    assert counts == [1] * 4
    many = [
        len(await api.calls(temperature=1.5, seed=seed, parallel_tool_calls=True, max_tokens=300)) for seed in range(8)
    ]
    assert max(many) > 1
    await api.refused("/v1/chat/completions", CHAT | {"parallel_tool_calls": True}, "parallel_tool_calls", "'tools'")


@case(
    "AssistantMessage.tool_calls",
    "ToolCall.id",
    "ToolCall.type",
    "ToolCall.index",
    "ToolCall.function",
    "FunctionCall.name",
    "FunctionCall.arguments",
    "ToolMessage.content",
    "ToolMessage.tool_call_id",
    "ToolMessage.name",
)
async def tool_results(api: Api) -> None:
    (call,) = await api.calls()
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}]},
        {"role": "tool", "tool_call_id": call["id"], "content": "it is 42", "name": "add"},
    ]
    text = TOKENIZER.decode(await api.prompt_ids(turns))
    assert all(word in text for word in ("add", "it is 42", call["id"]))
    turns[2] = turns[2] | {"tool_call_id": "unknown00"}
    await api.refused("/v1/chat/completions", CHAT | {"messages": turns}, "messages", "'tool_call_id'")
    turns[1] = {"role": "assistant", "content": "", "tool_calls": [call | {"type": "x"}]}
    await api.refused("/v1/chat/completions", CHAT | {"messages": turns}, "messages", "type")


# The other endpoints.


@case(
    "EmbeddingRequest.model",
    "EmbeddingRequest.input",
    "EmbeddingRequest.encoding_format",
    "EmbeddingRequest.dimensions",
    "EmbeddingRequest.user",
    "EmbeddingRequest.priority",
    "EmbeddingRequest.truncate_prompt_tokens",
)
async def embeddings(api: Api) -> None:
    size = api.replica.core.config.model.hidden_size
    body = {"model": "demo", "input": ["one", "two"], "user": "u", "dimensions": size, "priority": 1}
    answer = await api.post("/v1/embeddings", body)
    one, two = (item["embedding"] for item in answer["data"])
    assert len(one) == len(two) == size
    assert one != two
    assert answer["usage"]["prompt_tokens"] == len(TOKENIZER.encode("one")) + len(TOKENIZER.encode("two"))
    alone = await api.post("/v1/embeddings", {"model": "demo", "input": TOKENIZER.encode("one")})
    assert alone["data"][0]["embedding"] == pytest.approx(one, abs=1e-5)
    coded = await api.post("/v1/embeddings", body | {"encoding_format": "base64"})
    data = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack(f"<{size}f", data)) == pytest.approx(one, abs=1e-5)
    short = await api.post("/v1/embeddings", {"model": "demo", "input": PROMPT, "truncate_prompt_tokens": 3})
    assert short["usage"]["prompt_tokens"] == 3
    await api.refused("/v1/embeddings", body | {"dimensions": size - 1}, "dimensions", "cannot be shortened")
    await api.refused("/v1/embeddings", body | {"model": "x"}, "model", "does not exist", status=404)
    await api.refused("/v1/embeddings", body | {"input": []}, "input", "empty")


@case("ModerationRequest.input", "ModerationRequest.model")
async def moderations(api: Api) -> None:
    answer = await api.post("/v1/moderations", {"input": ["a", "b"]})
    for result in answer["results"]:
        assert len(result["category_scores"]) == len(result["categories"]) == 13
        assert 0 < sum(result["category_scores"].values()) < 1
        assert result["flagged"] == any(result["categories"].values())
    one = await api.post("/v1/moderations", {"input": "a", "model": "demo"})
    assert one["results"][0]["category_scores"] == pytest.approx(answer["results"][0]["category_scores"], abs=1e-5)
    await api.refused("/v1/moderations", {"input": "a", "model": "x"}, "model", "does not exist", status=404)


@case(
    "TokenizeRequest.model",
    "TokenizeRequest.prompt",
    "TokenizeRequest.messages",
    "TokenizeRequest.tools",
    "TokenizeRequest.add_special_tokens",
    "TokenizeRequest.return_token_strs",
)
async def tokenize(api: Api) -> None:
    ids = TOKENIZER.encode(PROMPT)
    answer = await api.post("/tokenize", {"model": "demo", "prompt": PROMPT, "return_token_strs": True})
    assert (answer["tokens"], answer["count"]) == (ids, len(ids))
    assert answer["token_strs"] == [TOKENIZER.token_text(i) for i in ids]
    assert answer["max_model_len"] == 1024
    plain = await api.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False})
    assert plain["tokens"] == ids[1:]
    assert "token_strs" not in plain
    chat = await api.post("/tokenize", {"messages": QUESTION, "tools": [TOOL]})
    assert chat["tokens"] == await api.prompt_ids(QUESTION, tools=[TOOL])
    await api.refused("/tokenize", {}, "prompt", "either")
    await api.refused("/tokenize", {"model": "x", "prompt": "a"}, "model", "does not exist", status=404)


@case("DetokenizeRequest.tokens", "DetokenizeRequest.model")
async def detokenize(api: Api) -> None:
    assert await api.post("/detokenize", {"tokens": TOKENIZER.encode(PROMPT), "model": "demo"}) == {"prompt": PROMPT}
    await api.refused("/detokenize", {"tokens": [4096]}, "tokens", "4096")
    await api.refused("/detokenize", {"tokens": [5], "model": "x"}, "model", "does not exist", status=404)


@case(
    "FileUpload.file",
    "FileUpload.purpose",
    "FileUpload.expires_after",
    "BatchRequest.input_file_id",
    "BatchRequest.endpoint",
    "BatchRequest.completion_window",
    "BatchRequest.metadata",
    "BatchRequest.output_expires_after",
    "ExpiresAfter.anchor",
    "ExpiresAfter.seconds",
)
async def batches(api: Api) -> None:
    """What they refuse is in test_files.py and test_batches.py."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "demo", "input": "one"}}
    form = aiohttp.FormData()
    fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    for name, value in fields.items():
        form.add_field(name, value)
    form.add_field("file", json.dumps(line).encode(), filename="in.jsonl")
    body = {"endpoint": "/v1/embeddings", "completion_window": "2h", "metadata": {"k": "v"}}
    body["output_expires_after"] = {"anchor": "created_at", "seconds": 7200}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            ReplicaClient("r0", api.replica.address, TOKEN) as replica,
            batch_app(Path(folder), [replica]) as client,
        ):
            file = await (await client.post("/v1/files", data=form)).json()
            assert (file["purpose"], file["expires_at"] - file["created_at"]) == ("batch", 3600)
            batch = await (await client.post("/v1/batches", json=body | {"input_file_id": file["id"]})).json()
            assert batch["expires_at"] - batch["created_at"] == 7200
            while batch["status"] != "completed":
                await asyncio.sleep(0.02)
                batch = await (await client.get(f"/v1/batches/{batch['id']}")).json()
            assert (batch["metadata"], batch["request_counts"]["completed"]) == ({"k": "v"}, 1)
            output = await (await client.get(f"/v1/files/{batch['output_file_id']}")).json()
            assert output["expires_at"] - output["created_at"] == 7200
            content = await (await client.get(f"/v1/files/{output['id']}/content")).text()
            assert json.loads(content)["response"]["body"]["object"] == "list"


@case("DrainRequest.grace_s")
async def drain(api: Api) -> None:
    response = await api.client.post("/admin/replicas/r0/drain", json={"grace_s": -1})
    assert response.status == 404, (
        "without a controller there is no /admin; tests/cluster/api/test_api_operations.py has one"
    )


@pytest.mark.parametrize("check", dict.fromkeys(CASES.values()), ids=lambda check: check.__name__)
async def test_field(api: Api, check: Check) -> None:
    await check(api)
    async with asyncio.timeout(10):  # the last abort may be on its way
        while api.replica.core.has_work():
            await asyncio.sleep(0.01)


def test_every_field_of_every_body_has_a_case() -> None:
    fields = {name for e in ENDPOINTS for kind in (e.body, e.form) if kind is not None for name in _fields(kind)}
    assert fields - CASES.keys() == set(), "these fields of request bodies have no case here"
    assert CASES.keys() - fields == set(), "these cases are of fields that no body has"


def _fields(kind: Any) -> Iterator[str]:
    """Struct.field of a struct and of all it holds; a field inherited from an older struct is that one's."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            owner = next(c for c in reversed(kind.__mro__) if field.name in getattr(c, "__annotations__", {}))
            yield f"{owner.__name__}.{field.name}"
            yield from _fields(hints[field.name])
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        for argument in typing.get_args(kind):
            if (
                isinstance(argument, type)
                or typing.get_origin(argument) is not None
                or isinstance(argument, types.UnionType)
            ):
                yield from _fields(argument)
