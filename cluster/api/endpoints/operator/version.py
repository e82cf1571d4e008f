"""GET /version: which release answers."""

from importlib.metadata import version

from aiohttp import web

from cluster.api.generation.answering import json_answer
from cluster.api.schemas.other import VersionAnswer


async def handle(request: web.Request) -> web.Response:
    """The installed distribution's version."""
    return json_answer(VersionAnswer(version=version("tramontane")))
