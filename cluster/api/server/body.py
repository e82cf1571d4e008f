"""A request's body, read and parsed: beside the event loop when it is large, where it would keep every stream and heartbeat waiting.

Knows how long a body may keep the loop. What it may hold is cluster/api/schemas/'s.
"""

import asyncio

from aiohttp import web

from cluster.api.schemas.parse import RequestT, parse

LARGE_BYTES = 64 * 1024  # about a millisecond of parsing


async def read_body(request: web.Request, kind: type[RequestT]) -> RequestT:
    """The validated request. Raises RequestError naming the field."""
    body = await request.read()
    return await asyncio.to_thread(parse, body, kind) if len(body) > LARGE_BYTES else parse(body, kind)
