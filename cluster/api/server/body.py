"""Reads, decodes and parses a request's body; a large one in a thread, so that it does not delay every stream and heartbeat.

Knows which bodies are large, and that the limit on bodies counts decoded bytes too. A body's bytes are dropped once they are parsed: a
stream may last for an hour. cluster/api/schemas/ defines what a body may contain.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from aiohttp import hdrs, web

from cluster.api.context import CONTEXT
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.parsing.parse import RequestT, parse
from cluster.api.server.content_coding import decode, parse_codings
from cluster.api.server.errors import HTTPError

LARGE_BYTES = 64 * 1024  # about a millisecond of parsing

_BODY = web.RequestKey("body", bytes)


async def receive_body(request: web.Request, *, timeout_s: float) -> None:
    """Reads and decodes the whole body, for `take_body`. Raises HTTPError if it is too large, too slow or not decodable."""
    max_bytes = request.client_max_size
    codings = parse_codings(",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())))
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError as e:
        raise HTTPError(
            408,
            f"The body did not arrive within {timeout_s:g} s.",
            remedy="Send it faster.",
            code="request_timeout",
        ) from e
    if codings and body:
        # In a thread, however small it is: its size says nothing about the work.
        decoded = await asyncio.to_thread(decode, body, codings, max_bytes=max_bytes)
        if decoded is None:
            raise _too_large(max_bytes)
        body = decoded
    request[_BODY] = body


def take_body(request: web.Request) -> bytes:
    """The decoded body. To be called once: the request does not keep it."""
    return request.pop(_BODY, b"")


def peek_body(request: web.Request) -> bytes:
    """The decoded body, which stays for `take_body`."""
    return request.get(_BODY, b"")


async def _read(request: web.Request, max_bytes: int) -> bytes:
    """As `request.read`, which would keep the bytes for as long as the request lives."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError(
        413,
        f"The request body is larger than {max_bytes} bytes.",
        remedy="Split it into several requests.",
        code="request_too_large",
    )


async def read_body(
    request: web.Request, kind: type[RequestT], *, adapt: Callable[[dict[str, Any]], None] | None = None
) -> RequestT:
    """The validated request; adapt: see `parse`. In Azure's paths, the deployment is its model. Raises RequestError naming the field.

    Fields without effect are noted in the request's context, from where they go to the response's header.
    """
    body, model = take_body(request), request.match_info.get("deployment")
    read = partial(parse, body, kind, model=model, strict=request.app[CONTEXT].strict, adapt=adapt)
    value, ignored = await asyncio.to_thread(read) if len(body) > LARGE_BYTES else read()
    request[REQUEST_CONTEXT].ignore(*ignored)
    return value
