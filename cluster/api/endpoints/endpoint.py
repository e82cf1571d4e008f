"""One row of the table of endpoints: what the HTTP router serves and what /openapi.json describes. Knows no endpoint."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One row. `answer`: the type of a 200's JSON, None where it is no JSON of ours. `chunk`: of a stream's events.

    `form`: of the fields of a body that is no JSON but a form, which the handler reads itself.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    summary: str
    body: type | None = None
    form: type | None = None
    answer: Any = None
    chunk: Any = None
    success: int = 200
    content_type: str = "application/json"
    errors: tuple[int, ...] = ()
    query: tuple[str, ...] = ()
    is_open: bool = False  # needs no key
