"""Runs the tables of tests/cluster/api/parameters: one row for each field of a request body, with a value and a proof of its effect.

Knows how to call the API and how to list a struct's fields; knows no field.
"""

import json
import types
import typing
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from aiohttp.test_utils import TestClient

from support.servers.live_replica import LiveReplica

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "def fibonacci(n):"
QUESTION = [{"role": "user", "content": "Write a function."}]
NUM_TOKENS = 16
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "demo", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0},
    CHAT: {"model": "demo", "messages": QUESTION, "max_tokens": NUM_TOKENS, "temperature": 0},
}
SAMPLED = {"temperature": 1, "seed": 5}


class Row(NamedTuple):
    """`field`: Struct.field, or several of them with commas. `prove(api, value)` fails unless sending the value has the promised effect."""

    field: str
    value: Any
    prove: "Callable[[Api, Any], Awaitable[None]]"

    @property
    def fields(self) -> list[str]:
        return self.field.split(", ")

    def __str__(self) -> str:
        return f"{self.fields[0]}={self.value!r:.40}"


@dataclass(frozen=True)
class Output:
    """What completions and chat have in common: the first choice, and the whole response."""

    response: dict[str, Any]

    @property
    def choice(self) -> dict[str, Any]:
        return self.response["choices"][0]

    @property
    def text(self) -> str:
        return text_of(self.choice)

    @property
    def token_ids(self) -> list[int]:
        return self.choice["token_ids"]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.response.get("prompt_token_ids") or self.choice["prompt_token_ids"]

    @property
    def usage(self) -> dict[str, Any]:
        return self.response["usage"]


def text_of(choice: dict[str, Any]) -> str:
    """Of a choice of completions or chat, whole or in a chunk."""
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice["delta"]).get("content") or ""


@dataclass(frozen=True)
class Api:
    """The server under test, over a real engine. `path`: the endpoint whose fields are tested.

    `known`: responses to the base bodies, which are greedy and so never change.
    """

    client: TestClient
    replica: LiveReplica
    path: str
    known: dict[str, Output] = field(default_factory=dict)

    async def post(self, body: dict[str, Any], *, path: str | None = None) -> dict[str, Any]:
        """The response to this body, which must be accepted."""
        response = await self.client.post(path or self.path, json=body)
        answer = await response.json()
        assert response.status == 200, answer
        return answer

    async def run(self, **fields: Any) -> Output:
        """The endpoint's base body with these fields, which must be accepted."""
        name = f"{self.path} {sorted(fields.items())}"
        output = self.known.get(name) or Output(await self.post(BASE[self.path] | fields))
        if fields.keys() <= {"max_tokens", "return_token_ids"}:
            self.known[name] = output
        return output

    async def text(self, **fields: Any) -> str:
        return (await self.run(**fields)).text

    async def ids(self, **fields: Any) -> list[int]:
        return (await self.run(return_token_ids=True, **fields)).token_ids

    async def chunks(self, **fields: Any) -> list[Any]:
        """The events of a stream, which must end with [DONE]."""
        response = await self.client.post(self.path, json=BASE[self.path] | {"stream": True} | fields)
        blocks = (await response.text()).split("\n\n")
        assert response.status == 200, blocks
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block[6:]) for block in blocks[:-2]]

    async def prompt_ids(self, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
        """The prompt of a conversation."""
        body = BASE[CHAT] | {"messages": messages, "return_token_ids": True, "max_tokens": 1} | fields
        return Output(await self.post(body, path=CHAT)).prompt_token_ids

    async def refused(self, fields: dict[str, Any], param: str | None, words: str, *, status: int = 400) -> None:
        """Sends the base body with these fields, which must be refused with an error that has `words` and names `param`."""
        response = await self.client.post(self.path, json=BASE.get(self.path, {}) | fields)
        answer = await response.json()
        assert response.status == status, answer
        assert answer["error"]["param"] == param, answer
        assert words in answer["error"]["message"], answer


def refused(words: str, *, status: int = 400, **others: Any) -> Callable[[Api, Any], Awaitable[None]]:
    """A proof: the value, given as a dictionary of fields, is refused with these words, naming its first field."""

    async def prove(api: Api, fields: dict[str, Any]) -> None:
        await api.refused(others | fields, next(iter(fields)), words, status=status)

    return prove


def fields_of(kind: Any) -> Iterator[str]:
    """Struct.field for each field of a struct and of all structs inside it. An inherited field belongs to the struct that declares it."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        for info in msgspec.structs.fields(kind):
            yield owned_name(kind, info.name)
            yield from fields_of(hints[info.name])
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        for argument in typing.get_args(kind):
            if isinstance(argument, type | types.UnionType) or typing.get_origin(argument) is not None:
                yield from fields_of(argument)


def owned_name(kind: type[msgspec.Struct], name: str) -> str:
    """Struct.field, with the struct that declares the field."""
    owner = next(c for c in reversed(kind.__mro__) if name in getattr(c, "__annotations__", {}))
    return f"{owner.__name__}.{name}"
