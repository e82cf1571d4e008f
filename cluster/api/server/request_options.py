"""What clients ask for in headers: a timeout, the request's id, whether to show the routing. And what the response's headers tell them.

Knows the headers' names and allowed values, and that a response names the fields of the body that were ignored. Bodies are in
cluster/api/schemas/.
"""

import logging
import math
import re
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.server.errors import Handler
from cluster.system.log import request_id_var
from workers.errors import RequestError

if TYPE_CHECKING:
    from cluster.api.generation.generation import Choice

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
REQUEST_TIMEOUT = "X-Request-Timeout"
DEBUG = "X-Tramontane-Debug"
IGNORED = "X-Tramontane-Ignored"
ADAPTER = "X-Tramontane-Adapter"
MOVED = "X-Tramontane-Moved"
OTHER_NUMERICS = "other-numerics"
_SANE_ID = re.compile(r"[!-~]{1,128}")


@web.middleware
async def request_id_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: puts the request's id into the response and into the log records of this request and its tasks."""
    request_id = request_id_of(request)
    token = request_id_var.set(request_id)
    try:
        response = await handler(request)
    finally:
        request_id_var.reset(token)
    if not response.prepared:
        response.headers[REQUEST_ID] = request_id
    return response


def request_id_of(request: web.Request) -> str:
    """The client's own, or a new one."""
    given = request.headers.get(REQUEST_ID, "")
    return given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: streams send their headers before the middleware gets the response."""
    request_id = request_id_var.get()
    if request_id is not None:
        response.headers[REQUEST_ID] = request_id


async def add_ignored(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: names the fields of the body that had no effect, also in the log."""
    context = request.get(REQUEST_CONTEXT)
    if context is not None and context.ignored:
        response.headers[IGNORED] = context.ignored_text
        log.info("Ignored fields of a request: %s.", context.ignored_text)


async def add_adapter(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: which revision of an adapter the request got."""
    context = request.get(REQUEST_CONTEXT)
    if context is not None and context.adapter is not None:
        response.headers[ADAPTER] = context.adapter


def deadline(request: web.Request, *, arrived: float) -> float | None:
    """When the client stops waiting, on the clock of `arrived`; None without the header. Raises RequestError."""
    text = request.headers.get(REQUEST_TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(
            f"{REQUEST_TIMEOUT} is {text!r}.",
            remedy="Send a positive number of seconds.",
            param=REQUEST_TIMEOUT,
            code="invalid_header",
        )
    return arrived + seconds


def num_numerics_changes(choices: Sequence["Choice"]) -> int:
    """How often, so far, a sequence continued in its middle on a replica that computes other last bits."""
    return sum([choice.trace.num_numerics_changes for choice in choices])


def moved_headers(num_changes: int) -> dict[str, str]:
    """Says that the output may differ from that of an undisturbed run; empty otherwise."""
    return {MOVED: OTHER_NUMERICS} if num_changes else {}


class MovedNote:
    """The header, for streams that have sent their headers before: what to write as a comment, once for each change."""

    def __init__(self) -> None:
        self._num_told = 0

    def __call__(self, num_changes: int) -> str:
        before, self._num_told = self._num_told, num_changes
        return f"{MOVED}: {OTHER_NUMERICS}" if num_changes > before else ""


def debug_headers(request: web.Request, choices: Sequence["Choice"]) -> dict[str, str]:
    """How the first sequence was routed, as far as known by now; empty unless the client asked for it."""
    if request.headers.get(DEBUG) != "1":
        return {}
    choice = choices[0]
    trace = choice.trace
    values = {
        "X-Tramontane-Replica": trace.replica_id,
        "X-Tramontane-Cached-Tokens-Predicted": trace.num_cached_tokens_predicted,
        "X-Tramontane-Cached-Tokens": choice.num_cached_tokens,
        "X-Tramontane-Failovers": trace.num_failovers,
    }
    return {name: str(value) for name, value in values.items() if value is not None}
