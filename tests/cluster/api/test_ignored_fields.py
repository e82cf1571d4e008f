"""What happens to a field that cannot act: accepted and named in X-Tramontane-Ignored, or refused by its name. With --strict, refused.

A fake replica records what it gets, so that "no effect" means: the same prompt and the same sampling parameters as without the field.
"""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from support.fakes.replica import FakeReplica
from support.paths import DEMO_MODEL

from cluster.api.app import make_app
from cluster.api.request_context import MAX_IGNORED_CHARS
from cluster.api.schemas.parsing.foreign_fields import FOREIGN
from cluster.api.schemas.parsing.lenient import MAX_NAME_CHARS, MAX_PATHS
from cluster.router.router import Router
from cluster.text.chat.mistral_template import MistralTemplate
from cluster.text.tokenizer import load_tokenizer
from workers.protocol import GenerateRequest

TOKENIZER = load_tokenizer(DEMO_MODEL)
TEMPLATE = MistralTemplate(TOKENIZER)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HEADER = "X-Tramontane-Ignored"
USER = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PLAIN: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "demo", "prompt": "x", "seed": 1, "max_tokens": 2},
    CHAT: {"model": "demo", "messages": [USER], "seed": 1, "max_tokens": 2},
}


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[TestClient, FakeReplica]]:
    replica = FakeReplica(max_model_len=2048)
    arguments = {"tokenizer": TOKENIZER, "chat_template": TEMPLATE, "model_name": "demo", **options}
    async with TestClient(TestServer(make_app(router=Router([replica]), **arguments))) as client:
        yield client, replica


class Result(NamedTuple):
    status: int
    ignored: set[str]
    error: dict[str, Any]
    sent: GenerateRequest | None


async def send(client: TestClient, replica: FakeReplica, path: str, body: Any) -> Result:
    replica.requests.clear()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post(path, data=data, headers={"Content-Type": "application/json"})
    text = await response.text()
    header = response.headers.get(HEADER)
    error = json.loads(text)["error"] if response.status != 200 else {}
    sent = msgspec.structs.replace(replica.requests[0], request_id="") if replica.requests else None
    return Result(response.status, set(header.split(", ")) if header else set(), error, sent)


def user(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER | fields]}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": "y"} | fields, USER]}


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"} | fields]}]}


def called(**fields: Any) -> list[dict[str, Any]]:
    call = CALL | fields
    return [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ]


# Fields that change nothing: (endpoint, fields, the paths in the header).
BOTH = (COMPLETIONS, CHAT)
IGNORED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    *(
        (BOTH, {name: value}, name)
        for name, value in {
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "safety_identifier": "u",
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "flex",
            "truncation_side": "left",
            "spaces_between_special_tokens": True,
            "repeat_penalty": 1.1,
            "repeat_last_n": 64,
            "typical_p": 0.5,
            "tfs_z": 1.0,
            "mirostat": 2,
            "num_ctx": 4096,
            "keep_alive": "5m",
            "options": {"num_ctx": 4096},
            "cache_prompt": True,
            "guided_decoding_backend": "xgrammar",
            "vllm_xargs": {},
            "length_penalty": 1.0,
            "use_beam_search": False,
            "logits_processors": [],
            "structural_tag": None,
            "return_tokens_as_token_ids": False,
            "grammar": "",
            "foo": None,
            "extra_body": {"a": 1},
            "stream_options": {"include_usage": True},
        }.items()
    ),
    *(
        ((CHAT,), {name: value}, name)
        for name, value in {
            "verbosity": "low",
            "reasoning_effort": "high",
            "reasoning": {"effort": "low"},
            "prediction": {"type": "content", "content": "x"},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "echo": False,
            "best_of": None,
            "suffix": None,
            "prompt": "x",
            "add_special_tokens": False,
            "add_generation_prompt": True,
            "top_logprobs": 0,
            "modalities": ["text"],
            "audio": None,
            "functions": [],
            "function_call": "none",
            "web_search_options": None,
            "documents": None,
        }.items()
    ),
    ((COMPLETIONS,), {"messages": []}, "messages"),
    ((CHAT,), {"best_of": 1}, "best_of"),
    ((CHAT,), {"best_of": 1.0}, "best_of"),
    ((CHAT,), {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ((CHAT,), {"stream": True, "stream_options": {"include_obfuscation": False}}, "stream_options.include_obfuscation"),
    ((CHAT,), {"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    ((CHAT,), user(name="Ann"), "messages[].name"),
    ((CHAT,), user(cache_control={"type": "ephemeral"}), "messages[].cache_control"),
    ((CHAT,), user(id="m1", timestamp=5), "messages[].id, messages[].timestamp"),
    ((CHAT,), user(tool_calls=None, tool_call_id=None), "messages[].tool_calls, messages[].tool_call_id"),
    ((CHAT,), part(cache_control={"type": "ephemeral"}), "messages[].content[].cache_control"),
]


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [(path, fields, named) for paths, fields, named in IGNORED for path in paths],
    ids=lambda v: str(v)[:40],
)
async def test_fields_without_effect_are_accepted_and_named(path: str, fields: dict[str, Any], named: str) -> None:
    async with serving() as (client, replica):
        plain = await send(client, replica, path, PLAIN[path])
        result = await send(client, replica, path, PLAIN[path] | fields)
    assert result.status == 200, result.error
    assert result.ignored == set(named.split(", "))
    assert result.sent == plain.sent, "the field must not change the prompt or the sampling"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reasoning_content", "thoughts"),
        ("reasoning", None),
        ("thinking_blocks", [{"type": "thinking"}]),
        ("provider_specific_fields", {}),
        ("parsed", {"a": 1}),
        ("annotations", []),
        ("audio", None),
        ("function_call", None),
        ("id", "x"),
    ],
)
async def test_what_clients_send_back_with_an_answer(name: str, value: Any) -> None:
    async with serving() as (client, replica):
        plain = await send(client, replica, CHAT, PLAIN[CHAT] | assistant())
        result = await send(
            client, replica, CHAT, PLAIN[CHAT] | assistant(refusal=None, tool_calls=None, **{name: value})
        )
    assert (result.status, result.ignored) == (200, {f"messages[].{name}"}), result.error
    assert result.sent == plain.sent


# The same request in two forms: (endpoint, fields, the fields that mean the same).
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (COMPLETIONS, {"seed": None, "random_seed": 7}, {"seed": 7}),
    (COMPLETIONS, {"random_seed": 1}, {}),
    (COMPLETIONS, {"top_p": 0}, {"temperature": 0}),
    (COMPLETIONS, {"stop": list("abcdefghijklmnop")}, {}),
    (COMPLETIONS, {"guided_regex": "[0-9]{4}"}, {"structured_outputs": {"regex": "[0-9]{4}"}}),
    (COMPLETIONS, {"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
    (COMPLETIONS, {"guided_grammar": 'start: "a"'}, {"structured_outputs": {"grammar": 'start: "a"'}}),
    (COMPLETIONS, {"guided_json": {"type": "null"}}, {"structured_outputs": {"json": {"type": "null"}}}),
    (COMPLETIONS, {"guided_json": '{"type": "null"}'}, {"structured_outputs": {"json": {"type": "null"}}}),
    (COMPLETIONS, {"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}),
    (
        CHAT,
        {"response_format": {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}}},
        {"structured_outputs": {"json": {"type": "object", "maxProperties": 0}}},
    ),
    (CHAT, {"tools": [TOOL], "tool_choice": "any"}, {"tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"tools": [TOOL | {"type": None}]}, {"tools": [TOOL]}),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, {}),
    *(
        (CHAT, {"messages": [{"role": "user", "content": [{"type": kind, "text": "x"}]}]}, {})
        for kind in ("text", "input_text", "output_text")
    ),
    (CHAT, assistant(content=[{"type": "refusal", "refusal": "y"}]), assistant()),
    (CHAT, assistant(content=None, refusal="y"), assistant()),
    (CHAT, {"messages": called(type=None)}, {"messages": called()}),
    (CHAT, {"messages": called(function={"name": "f", "arguments": {}})}, {"messages": called()}),
    (CHAT, {"messages": called(function={"name": "f", "arguments": None})}, {"messages": called()}),
    (
        CHAT,
        {"messages": called(function={"name": "f", "arguments": {"a": "é"}})},
        {"messages": called(function={"name": "f", "arguments": '{"a": "é"}'})},
    ),
    (
        CHAT,
        {"messages": [*called()[:2], {"role": "tool", "tool_call_id": "call_1", "content": None}]},
        {"messages": [*called()[:2], {"role": "tool", "tool_call_id": "call_1", "content": ""}]},
    ),
    (
        CHAT,
        {"messages": [USER, {"role": "assistant", "content": "y"}], "continue_final_message": True},
        {"messages": [USER, {"role": "assistant", "content": "y", "prefix": True}]},
    ),
]


@pytest.mark.parametrize(("path", "fields", "same"), SAME, ids=lambda v: str(v)[:40])
async def test_other_forms_act_like_ours(path: str, fields: dict[str, Any], same: dict[str, Any]) -> None:
    async with serving() as (client, replica):
        result = await send(client, replica, path, PLAIN[path] | fields)
        expected = await send(client, replica, path, PLAIN[path] | same)
    assert (result.status, result.ignored) == (200, set()), result.error
    assert expected.status == 200, expected.error
    assert result.sent is not None and expected.sent is not None
    for name in ("temperature", "seed", "grammar"):
        assert getattr(result.sent.sampling, name) == getattr(expected.sent.sampling, name), name
    assert result.sent.prompt_token_ids == expected.sent.prompt_token_ids


# Fields that would change the answer: (endpoint, fields, words of the message). The param is the first field.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"use_beam_search": True}, "'use_beam_search' is not supported by this server. Beam search"),
    (COMPLETIONS, {"logits_processors": ["x.y"]}, "not supported"),
    (COMPLETIONS, {"return_tokens_as_token_ids": True}, "not supported"),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}, "not supported"),
    (COMPLETIONS, {"truncation_side": "right"}, "keeps the end of the prompt"),
    (COMPLETIONS, {"structural_tag": "{}"}, "not supported"),
    (COMPLETIONS, {"guided_whitespace_pattern": " "}, "not supported"),
    (COMPLETIONS, {"regex": "a"}, "Send `structured_outputs`"),
    (COMPLETIONS, {"guided_choice": ["b"], "guided_regex": "a"}, "cannot be combined"),
    (COMPLETIONS, {"guided_json": "{"}, "not valid JSON"),
    (
        COMPLETIONS,
        {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
        "'structured_outputs.whitespace_pattern'",
    ),
    (COMPLETIONS, {"random_seed": 2}, "differ"),
    (CHAT, {"functions": [{"name": "f"}]}, "Send `tools`"),
    (CHAT, {"function_call": {"name": "f"}}, "Send `tool_choice`"),
    (CHAT, {"modalities": ["text", "audio"]}, "text only"),
    (CHAT, {"audio": {"voice": "x"}}, "text only"),
    (CHAT, {"web_search_options": {}}, "search the web"),
    (CHAT, {"chat_template": "{{ messages }}"}, "not supported"),
    (CHAT, {"documents": [{"text": "x"}]}, "into a message"),
    (CHAT, {"echo": True}, "not supported"),
    (CHAT, {"best_of": 2}, "not supported"),
    (CHAT, {"echo": 0}, "not supported"),
    (CHAT, {"best_of": True}, "not supported"),
    (COMPLETIONS, {"return_tokens_as_token_ids": 0.0}, "not supported"),
    (CHAT, {"tools": [{"type": "web_search"}]}, "Only tools of type 'function' are supported"),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "'tools[].type'"),
    (CHAT, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}, "tools": [TOOL]}, "'tool_choice.type'"),
    (CHAT, {"tool_choice": "any"}, "needs 'tools'"),
    (CHAT, {"continue_final_message": True}, "last message of the assistant"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True} | assistant(), "cannot be combined"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "parts of text",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "parts of text"),
    (CHAT, user(images=["AAAA"]), "'messages[].images'"),
    (CHAT, assistant(audio={"id": "a"}), "'messages[].audio'"),
    (CHAT, assistant(function_call={"name": "f", "arguments": "{}"}), "'messages[].function_call'"),
]


@pytest.mark.parametrize(("path", "fields", "words"), REFUSED, ids=lambda v: str(v)[:40])
async def test_fields_that_would_change_the_answer_are_refused_by_name(
    path: str, fields: dict[str, Any], words: str
) -> None:
    async with serving() as (client, replica):
        result = await send(client, replica, path, PLAIN[path] | fields)
    assert (result.status, result.error["param"]) == (400, next(iter(fields))), result.error
    assert words in result.error["message"]
    assert result.sent is None


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
def test_every_foreign_field_has_a_meaning_and_no_struct_has_it(kind: type[msgspec.Struct]) -> None:
    for name, foreign in FOREIGN[kind].items():
        assert foreign.meaning.endswith("."), name
        assert name not in kind.__struct_fields__ or foreign.neutral is not None, f"{name} acts"


FULL: dict[str, dict[str, Any]] = {
    COMPLETIONS: PLAIN[COMPLETIONS]
    | {
        "stream": True,
        "stream_options": {"include_usage": True},
        "structured_outputs": {"regex": "a"},
    },
    CHAT: PLAIN[CHAT]
    | {
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    "/v1/embeddings": {"model": "demo", "input": "x"},
    "/tokenize": {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "s"}]}, USER],
        "tools": [TOOL],
    },
    "/detokenize": {"tokens": [5]},
}
FORMATTED = PLAIN[CHAT] | {
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}
}
# What the client defines, and so may have any key.
FREE = ("parameters", "schema")


def levels(value: Any, path: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """(object, path) for every object of a body that has a schema of its own."""
    if isinstance(value, dict):
        yield value, path
        for key, child in value.items():
            if key not in FREE:
                yield from levels(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for child in value:
            yield from levels(child, f"{path}[]")


BODIES = [*FULL.items(), (CHAT, FORMATTED)]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda v: str(v)[:24])
async def test_every_unknown_field_at_every_level_is_accepted_reported_and_changes_nothing(
    path: str, body: dict[str, Any]
) -> None:
    places = [place for _, place in levels(body)]
    async with serving() as (client, replica), serving(strict=True) as (strict, _):
        plain = await send(client, replica, path, body)
        assert (await send(strict, replica, path, body)).status == plain.status
        for i, place in enumerate(places):
            for name, value in (("no_such_field", {"a": [1]}), ("Content", None), ("x-y.z", "\n")):
                changed = deepcopy(body)
                list(levels(changed))[i][0][name] = value
                where = f"{place}.{name}" if place else name
                result = await send(client, replica, path, changed)
                assert result.ignored == {where}
                assert (result.status, result.sent) == (plain.status, plain.sent), result.error
                refused = await send(strict, replica, path, changed)
                assert (refused.status, refused.error["code"]) == (400, "unknown_parameter")
                assert f"argument supplied: {where}." in refused.error["message"]
                assert refused.error["param"] == where.partition(".")[0].partition("[")[0]


STRICT: list[tuple[dict[str, Any], str | None]] = [
    # (fields, the path that is refused)
    ({"metadata": {}}, None),
    ({"metadata": None, "store": False, "functions": [], "function_call": "none", "modalities": ["text"]}, None),
    (assistant(refusal=None, audio=None, function_call=None, annotations=[]), None),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"stream_options": {}}, "stream_options"),
    (user(name="Ann"), "messages[].name"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    (part(cache_control={"type": "ephemeral"}), "messages[].content[].cache_control"),
]


@pytest.mark.parametrize(("fields", "refused"), STRICT, ids=lambda v: str(v)[:40])
async def test_a_strict_server_refuses_what_has_no_effect(fields: dict[str, Any], refused: str | None) -> None:
    async with serving(strict=True) as (client, replica):
        result = await send(client, replica, CHAT, PLAIN[CHAT] | fields)
    if refused is None:
        assert result.status == 200, result.error
    else:
        assert (result.status, result.error["code"]) == (400, "unsupported_parameter")
        assert f"'{refused}'" in result.error["message"]


HOSTILE = [
    # (name, its path in the header)
    ("a\r\nSet-Cookie: b", "a??Set-Cookie:?b"),
    ("a,b", "a?b"),
    ("", '""'),
    ("naïve", "na?ve"),
    ("\0", "?"),
    ("x" * 2_000_000, "x" * MAX_NAME_CHARS + "..."),
    ("__proto__", "__proto__"),
]


@pytest.mark.parametrize(("name", "shown"), HOSTILE, ids=lambda v: repr(v)[:30])
async def test_hostile_names_reach_neither_the_header_nor_the_log(
    name: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (client, replica), serving(strict=True) as (strict, _):
        with caplog.at_level(logging.INFO, "cluster.api"):
            result = await send(client, replica, COMPLETIONS, PLAIN[COMPLETIONS] | {name: 1})
        assert (result.status, result.ignored) == (200, {shown})
        lines = [r.getMessage() for r in caplog.records if "Ignored" in r.getMessage()]
        assert lines == [f"Ignored fields of a request: {shown}."]
        refused = await send(strict, replica, COMPLETIONS, PLAIN[COMPLETIONS] | {name: 1})
        assert refused.error["message"].startswith(f"Unrecognized request argument supplied: {shown}.")


async def test_a_flood_of_names_gives_a_short_header() -> None:
    async with serving() as (client, replica):
        names = {f"{i:06}{'n' * MAX_NAME_CHARS}": 1 for i in range(100_000)}
        response = await client.post(COMPLETIONS, json=PLAIN[COMPLETIONS] | names | {"user": "u"})
        assert response.status == 200
        header = response.headers[HEADER]
        assert len(header) <= MAX_IGNORED_CHARS
        assert header.endswith(", ...")
        assert 20 < header.count(",") <= MAX_PATHS
        refused = await send(client, replica, COMPLETIONS, PLAIN[COMPLETIONS] | names | {"use_beam_search": True})
        assert refused.error["param"] == "use_beam_search", "a flood does not hide a field that would change the answer"


async def test_the_header_is_on_streams_and_errors_and_readable_for_web_pages() -> None:
    origin = "https://app.example"
    async with serving(cors_origins=[origin]) as (client, _):
        for fields, status in (({"stream": True}, 200), ({"stream": False}, 200), ({"max_tokens": 5000}, 400)):
            body = PLAIN[CHAT] | {"metadata": {}} | fields
            response = await client.post(CHAT, json=body, headers={"Origin": origin})
            assert (response.status, response.headers[HEADER]) == (status, "metadata")
            assert HEADER in response.headers["Access-Control-Expose-Headers"].split(", ")
        response = await client.post(CHAT, json=PLAIN[CHAT])
        assert HEADER not in response.headers


@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/v1/models", "/v1/models/demo", "/health", "/health/live", "/tokenize"]
)
async def test_a_trailing_slash_means_the_same_path(path: str) -> None:
    async with serving() as (client, _):
        body = PLAIN.get(path, {"prompt": "x"})
        for spelling in (path, f"{path}/"):
            sends = client.post(spelling, json=body) if path in PLAIN or path == "/tokenize" else client.get(spelling)
            assert (await sends).status == 200, spelling
        metrics = await (await client.get("/metrics")).text()
        assert f'{path}/"' not in metrics
