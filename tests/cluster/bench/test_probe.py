"""What a server takes, found out by requests to a server that answers as a test says."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cluster.bench.probe import probe
from cluster.bench.prompts import WORDS
from cluster.bench.transport import Broken
from workers.errors import ConfigError, ReplicaUnavailableError, TramontaneError


class Answer:
    def __init__(self, status: int, data: bytes) -> None:
        self.status = status
        self.headers: Mapping[str, str] = {}
        self._data: bytes | None = data

    async def chunk(self) -> tuple[float, bytes] | None:
        data, self._data = self._data, None
        return None if data is None else (0.0, data)

    def close(self) -> None:
        pass


class Server:
    """refuses: says of a body whether it gets 400. tokenize: the answer to /tokenize; None: there is none."""

    def __init__(
        self,
        refuses: Callable[[dict[str, Any]], bool] = lambda _: False,
        *,
        tokenize: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _: None,
        failure: Broken | int | None = None,
    ) -> None:
        self._refuses, self._tokenize, self._failure = refuses, tokenize, failure
        self.bodies: list[dict[str, Any]] = []

    async def post(self, path: str, body: bytes) -> Answer:
        if isinstance(self._failure, Broken):
            raise self._failure
        decoded = json.loads(body)
        if path == "/tokenize":
            found = self._tokenize(decoded)
            return Answer(404, b"") if found is None else Answer(200, json.dumps(found).encode())
        self.bodies.append(decoded)
        if self._failure is not None:
            return Answer(self._failure, b'{"error": {"message": "no."}}')
        if self._refuses(decoded):
            return Answer(400, b'{"error": {"message": "I do not know this field."}}')
        events = [{"choices": [{"text": "a", "finish_reason": "length"}]}]
        if "stream_options" in decoded:
            events.append({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 1}})
        return Answer(200, b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n")


async def probed(server: Server, **options: Any) -> Any:
    return await probe(server, name="http://s", model="m", endpoint="completions", fields={}, **options)


def vllm(body: dict[str, Any]) -> dict[str, Any] | None:
    return {"count": 1, "tokens": [5 + i for i in range(len(body["prompt"].split()))]} if "prompt" in body else None


def llama_cpp(body: dict[str, Any]) -> dict[str, Any] | None:
    return {"tokens": [9 + i for i in range(len(body["content"].split()))]} if "content" in body else None


@pytest.mark.parametrize(("tokenize", "first"), [(vllm, 5), (llama_cpp, 9)])
async def test_ids_come_from_either_form_of_tokenize(
    tokenize: Callable[[dict[str, Any]], dict[str, Any] | None], first: int
) -> None:
    server = Server(tokenize=tokenize)
    found = await probed(server)
    assert found.prompts.token_ids == tuple(range(first, first + len(WORDS)))
    assert (found.ignore_eos, found.include_usage, found.notes) == (True, True, ())
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "tokenize", [lambda _: None, lambda _: {"tokens": [1, 2]}, lambda _: {"tokens": "x"}, lambda _: {"ids": [1]}]
)
async def test_without_a_usable_tokenize_prompts_are_text(
    tokenize: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> None:
    found = await probed(Server(tokenize=tokenize))
    assert found.prompts.token_ids is None
    assert "Prompts are sent as text, so their lengths are approximate." in found.notes


async def test_only_what_is_refused_is_left_out() -> None:
    found = await probed(Server(lambda body: "ignore_eos" in body, tokenize=vllm))
    assert (found.prompts.token_ids is not None, found.ignore_eos, found.include_usage) == (True, False, True)
    found = await probed(
        Server(lambda body: isinstance(body["prompt"], list) or "stream_options" in body, tokenize=vllm)
    )
    assert (found.prompts.token_ids is not None, found.ignore_eos, found.include_usage) == (False, True, False)


async def test_the_upper_part_of_a_vocabulary_and_text_if_wanted() -> None:
    found = await probed(Server(tokenize=vllm), vocab_size=800)
    assert (found.prompts.token_ids[0], found.prompts.token_ids[-1]) == (100, 799)
    found = await probed(Server(tokenize=vllm), want_text=True)
    assert (found.prompts.token_ids, [n for n in found.notes if "sent as text" in n]) == (None, [])


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (401, ConfigError, "refuses this client: no. Give a key"),
        (404, ConfigError, "has no /v1/completions, or not this model: no. Check --url"),
        (400, ConfigError, "refuses even a request for one token (HTTP 400): no. Check"),
        (503, ReplicaUnavailableError, "does not answer a request for one token (HTTP 503): no. Check that it runs"),
        (Broken("timeout", "nothing came for 3 s"), ReplicaUnavailableError, "(timeout): nothing came for 3 s. Check"),
    ],
)
async def test_a_server_that_answers_nothing_is_named(
    failure: Broken | int, kind: type[TramontaneError], words: str
) -> None:
    with pytest.raises(kind) as e:
        await probed(Server(failure=failure))
    assert words in str(e.value)
