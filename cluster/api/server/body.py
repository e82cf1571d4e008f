"""Reads and parses a request's body; a large one in a thread, so that it does not delay every stream and heartbeat.

Knows which bodies are large. cluster/api/schemas/ defines what a body may contain.
"""

import asyncio

from aiohttp import web

from cluster.api.schemas.parse import RequestT, parse

LARGE_BYTES = 64 * 1024  # about a millisecond of parsing


async def read_body(request: web.Request, kind: type[RequestT]) -> RequestT:
    """The validated request. Raises RequestError naming the field."""
    body = await request.read()
    return await asyncio.to_thread(parse, body, kind) if len(body) > LARGE_BYTES else parse(body, kind)
