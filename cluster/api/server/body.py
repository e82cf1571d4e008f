"""Reads, decodes and parses a request's body; a large one in a thread, so that it does not delay every stream and heartbeat.

Knows which bodies are large, and that the limit on bodies counts decoded bytes too. cluster/api/schemas/ defines what a body may contain.
"""

import asyncio
from functools import partial

from aiohttp import hdrs, web

from cluster.api.context import CONTEXT
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.parse import RequestT, parse
from cluster.api.server.content_coding import decode, parse_codings
from cluster.api.server.errors import HTTPError

LARGE_BYTES = 64 * 1024  # about a millisecond of parsing

DECODED = web.RequestKey("decoded", bytes)


async def receive_body(request: web.Request, *, timeout_s: float) -> None:
    """Reads and decodes the whole body, for `body_of`. Raises HTTPError if it is too large, too slow or not decodable."""
    max_bytes = request.client_max_size
    codings = parse_codings(",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())))
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.read()
    except web.HTTPRequestEntityTooLarge as e:
        raise _too_large(max_bytes) from e
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
        request[DECODED] = decoded


async def body_of(request: web.Request) -> bytes:
    """The decoded body."""
    decoded = request.get(DECODED)
    return await request.read() if decoded is None else decoded


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError(
        413,
        f"The request body is larger than {max_bytes} bytes.",
        remedy="Split it into several requests.",
        code="request_too_large",
    )


async def read_body(request: web.Request, kind: type[RequestT]) -> RequestT:
    """The validated request; in Azure's paths, the deployment is its model. Raises RequestError naming the field.

    Fields without effect are noted in the request's context, from where they go to the response's header.
    """
    body, model = await body_of(request), request.match_info.get("deployment")
    read = partial(parse, body, kind, model=model, strict=request.app[CONTEXT].strict)
    value, ignored = await asyncio.to_thread(read) if len(body) > LARGE_BYTES else read()
    request[REQUEST_CONTEXT].ignore(*ignored)
    return value
