"""POST /invocations, and the predict path of the hosting platform: one address for every kind of request.

What the body has decides: `messages` is a chat completion, `prompt` a completion, `input` embeddings. Vertex AI's form, a list of
`instances` with common `parameters`, gets a list of `predictions`. Without `model` it is the served one, since a platform's endpoint has
just one. Knows no platform; the endpoints themselves do the work.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints import chat, completions, embeddings
from cluster.api.generation import answering
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.chat import ChatRequest
from cluster.api.schemas.completions import CompletionRequest
from cluster.api.schemas.embeddings import EmbeddingRequest
from cluster.api.schemas.parsing.parse import parse
from cluster.api.schemas.parsing.structure import check_structure
from cluster.api.server import request_options
from cluster.api.server.body import LARGE_BYTES, peek_body, take_body
from workers.errors import RequestError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Predictions(msgspec.Struct, frozen=True, kw_only=True):
    """One response for each instance, in their order."""

    predictions: list[Any]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """`prepare`: from a parsed body to what runs; None: `embeddings.complete` does both."""

    body: type[msgspec.Struct]
    handle: Handler
    check: Callable[[ApiContext, Any, RequestContext], None]
    prepare: Callable[[ApiContext, Any, RequestContext], Awaitable[answering.Prepared]] | None


_KINDS = {
    "messages": _Kind(body=ChatRequest, handle=chat.handle, check=chat.check, prepare=chat.prepare),
    "prompt": _Kind(
        body=CompletionRequest, handle=completions.handle, check=completions.check, prepare=completions.prepare
    ),
    "input": _Kind(body=EmbeddingRequest, handle=embeddings.handle, check=embeddings.check, prepare=None),
}


async def handle(request: web.Request) -> web.StreamResponse:
    """The response of the endpoint that the body is for, or predictions."""
    api, arrived = request.app[CONTEXT], time.monotonic()
    data = peek_body(request)
    fields = await asyncio.to_thread(_decode, data) if len(data) > LARGE_BYTES else _decode(data)
    if "instances" in fields:
        take_body(request)
        return await _predict(request, api, fields, arrived=arrived)
    kind = _kind_of(fields)
    if "model" not in fields:
        request.match_info["deployment"] = api.model_names[0]
    return await kind.handle(request)


def _decode(data: bytes) -> dict[str, Any]:
    """Raises RequestError."""
    check_structure(data)
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f"The request body is not valid JSON: {e}.", code="invalid_json") from e
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    return fields


def _kind_of(fields: dict[str, Any]) -> _Kind:
    for name, kind in _KINDS.items():
        if name in fields:
            return kind
    raise RequestError(
        "The body has neither 'messages' nor 'prompt' nor 'input'.",
        remedy="Send the body of /v1/chat/completions, /v1/completions or /v1/embeddings.",
        code="missing_required_parameter",
    )


async def _predict(
    request: web.Request, api: ApiContext, fields: dict[str, Any], *, arrived: float
) -> web.StreamResponse:
    """All instances at once. If one cannot be answered, its error is the response."""
    context = request[REQUEST_CONTEXT]
    instances, parameters = fields.get("instances"), fields.get("parameters") or {}
    if not isinstance(instances, list) or not instances or not isinstance(parameters, dict):
        raise RequestError(
            "'instances' must be a list that is not empty, and 'parameters' an object.", param="instances"
        )
    if len(instances) > api.max_sequences_per_request:
        raise RequestError(
            f"The request has {len(instances)} instances; the limit is {api.max_sequences_per_request}.",
            remedy="Split it into several requests.",
            param="instances",
        )
    unknown = sorted(set(fields) - {"instances", "parameters"})
    context.ignore(*unknown)
    read = partial(_read_all, api, instances, parameters, context)
    bodies = await asyncio.to_thread(read)
    deadline = request_options.deadline(request, arrived=arrived)

    def is_gone() -> bool:
        return request.transport is None or request.transport.is_closing()

    async def one(kind: _Kind, body: Any) -> msgspec.Struct:
        served = api.serving(body.model)
        if kind.prepare is None:
            return await embeddings.complete(served, body, context, deadline=deadline, arrived=arrived)
        prepared = await kind.prepare(served, body, context)
        return await answering.complete(served, prepared, deadline=deadline, arrived=arrived, is_gone=is_gone)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(kind, body)) for kind, body in bodies]
    except* Exception as e:
        raise e.exceptions[0] from None
    return answering.json_response(Predictions(predictions=[task.result() for task in tasks]))


def _read_all(
    api: ApiContext, instances: list[Any], parameters: dict[str, Any], context: RequestContext
) -> list[tuple[_Kind, Any]]:
    """The checked bodies. A text is a prompt. Raises RequestError that names the instance."""
    bodies = []
    for index, instance in enumerate(instances):
        fields = {"prompt": instance} if isinstance(instance, str) else instance
        try:
            if not isinstance(fields, dict):
                raise RequestError("It must be an object or a text.")
            fields = {"model": api.model_names[0], **parameters, **fields}
            kind = _kind_of(fields)
            body: Any
            body, ignored = parse(msgspec.json.encode(fields), kind.body, strict=api.strict)
            context.ignore(*ignored)
            kind.check(api.serving(body.model), body, context)
            if getattr(body, "stream", None):
                raise RequestError("It cannot be streamed.", remedy="Remove 'stream'.", param="stream")
        except RequestError as e:
            raise RequestError(f"instances[{index}]: {e}", param=f"instances[{index}]", code=e.code) from e
        bodies.append((kind, body))
    return bodies
