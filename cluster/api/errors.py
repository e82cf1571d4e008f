"""Every failure leaves in OpenAI's envelope: {"error": {"message", "type", "param", "code"}}.

Knows which of our exceptions is which status. Raises nothing itself: handlers raise `workers.errors`, and the one middleware
here turns them, aiohttp's own refusals (404, 405, 413) and surprises into answers.
"""

import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web

from workers.errors import (
    DeadlineExceededError,
    EngineError,
    OverloadedError,
    ReplicaUnavailableError,
    RequestError,
    TramontaneError,
)

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorBody


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here; answered with 404."""


class ClientGoneError(TramontaneError):
    """The client closed the connection; nobody reads the answer."""


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """(HTTP status, body) for an exception. What is not ours says nothing of its inside; it goes to the log instead."""
    message = str(error)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, ModelNotFoundError) else 400
        return status, ErrorBody(message=message, type="invalid_request_error", param=error.param, code=error.code)
    if isinstance(error, OverloadedError):
        return 429, ErrorBody(message=message, type="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, ReplicaUnavailableError):
        return 503, ErrorBody(message=message, type="service_unavailable_error", code="service_unavailable")
    if isinstance(error, DeadlineExceededError):
        return 504, ErrorBody(message=message, type="timeout_error", code="deadline_exceeded")
    if isinstance(error, ClientGoneError):
        return 499, ErrorBody(message=message, type="invalid_request_error", code="client_closed_request")
    if isinstance(error, EngineError):
        return 500, ErrorBody(message=message, type="server_error", code="engine_error")
    log.error("A request failed in a way nobody foresaw.", exc_info=error)
    message = "The server failed on this request; its log says why."
    return 500, ErrorBody(message=message, type="server_error", code="internal_error")


def envelope(error: ErrorBody, *, status: int, headers: dict[str, str] | None = None) -> web.Response:
    """The JSON answer for an error."""
    return web.Response(
        status=status,
        headers=headers,
        body=msgspec.json.encode(ErrorEnvelope(error=error)),
        content_type="application/json",
    )


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: whatever goes wrong inside becomes an envelope."""
    try:
        return await handler(request)
    except web.HTTPException as e:
        return _from_aiohttp(request, e)
    except Exception as e:
        status, body = describe(e)
        headers: dict[str, str] = {}
        if isinstance(e, OverloadedError):
            headers[hdrs.RETRY_AFTER] = str(e.retry_after_s)
        elif isinstance(e, ReplicaUnavailableError):
            headers[hdrs.RETRY_AFTER] = "1"
        return envelope(body, status=status, headers=headers)


def _from_aiohttp(request: web.Request, e: web.HTTPException) -> web.Response:
    headers: dict[str, str] = {}
    code: str | None = None
    message = f"{e.reason}."
    if isinstance(e, web.HTTPNotFound):
        message = f"Unknown request URL: {request.method} {request.path}."
        code = "unknown_url"
    elif isinstance(e, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(e.allowed_methods))
        message = f"{request.path} does not take {request.method}; use {allowed}."
        code, headers[hdrs.ALLOW] = "method_not_allowed", allowed
    elif isinstance(e, web.HTTPRequestEntityTooLarge):
        message = f"The request body is larger than {request.client_max_size} bytes."
        code = "request_too_large"
    kind = "invalid_request_error" if e.status < 500 else "server_error"
    return envelope(ErrorBody(message=message, type=kind, code=code), status=e.status, headers=headers)
