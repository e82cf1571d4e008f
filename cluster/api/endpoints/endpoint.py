"""One row of the table of endpoints, which is both served and described in /openapi.json. Knows no specific endpoint."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Statuses of errors: of any body, of a model's name, while something is generated, of files, batches and stored responses.
BODY_ERRORS = (400, 408, 413, 415)
MODEL_ERRORS = (403, 404)
RUN_ERRORS = (429, 500, 503, 504)
STORE_ERRORS = (400, 404, 503)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One row.

    `response`: the type of a successful response's JSON, None for other contents. `chunk`: the type of a stream's events. `form`: the
    type of the fields if the body is a form, which the handler reads itself. `is_open`: needs no API key.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    summary: str
    body: type | None = None
    form: type | None = None
    response: Any = None
    chunk: Any = None
    success: int = 200
    content_type: str = "application/json"
    errors: tuple[int, ...] = ()
    query: tuple[str, ...] = ()
    is_open: bool = False
