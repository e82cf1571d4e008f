"""GET /version: the server's version."""

from importlib.metadata import version

import msgspec
from aiohttp import web

from cluster.api.generation.answering import json_response


class VersionResponse(msgspec.Struct, frozen=True, kw_only=True):
    version: str


async def handle(request: web.Request) -> web.Response:
    """The version of the installed distribution."""
    return json_response(VersionResponse(version=version("tramontane")))
