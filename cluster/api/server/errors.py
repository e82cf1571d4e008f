"""Every failure leaves in OpenAI's envelope: {"error": {"message", "type", "param", "code"}}.

Knows which of our exceptions is which status, and what aiohttp's own refusals (404, 405, 413) become. Handlers raise `workers.errors`,
what stands at the door raises `Refusal`, and the one middleware here turns them and surprises into answers. No message repeats a path
or a header; a surprise says nothing of its inside, and even the log gets only where it happened: its message may hold a prompt.
"""

import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from aiohttp import hdrs, web

from cluster.batch.errors import BatchError
from cluster.keys.key import NotAllowedError
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
MAX_MESSAGE_CHARS = 2000  # a message may quote what was sent, which may be megabytes


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorBody


class NotFoundError(RequestError):
    """The request names something that is not here, or not its key's; answered with 404."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served here."""


class ClientGoneError(TramontaneError):
    """The client closed the connection; nobody reads the answer."""


class Refusal(TramontaneError):
    """What HTTP itself has a status for. `headers` go with the answer."""

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """(HTTP status, body) for an exception. What is not ours says nothing of its inside; the log says where it happened."""
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    if isinstance(error, Refusal):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, ErrorBody(message=message, type=kind, code=error.code)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, NotFoundError) else 403 if isinstance(error, NotAllowedError) else 400
        return status, ErrorBody(message=message, type="invalid_request_error", param=error.param, code=error.code)
    if isinstance(error, OverloadedError):
        return 429, ErrorBody(message=message, type="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, ReplicaUnavailableError):
        return 503, ErrorBody(message=message, type="service_unavailable_error", code="service_unavailable")
    if isinstance(error, BatchError):
        log.error("A request about files or batches failed: %s", error)
        message = "Files and batches cannot be read or written now; the server's log says why. Nothing is lost; try again later."
        return 503, ErrorBody(message=message, type="service_unavailable_error", code="store_unavailable")
    if isinstance(error, DeadlineExceededError):
        return 504, ErrorBody(message=message, type="timeout_error", code="deadline_exceeded")
    if isinstance(error, ClientGoneError):
        return 499, ErrorBody(message=message, type="invalid_request_error", code="client_closed_request")
    if isinstance(error, EngineError):
        return 500, ErrorBody(message=message, type="server_error", code="engine_error")
    if isinstance(error, web.RequestPayloadError):
        message = "The request body could not be read: its transfer or content encoding is broken."
        return 400, ErrorBody(message=message, type="invalid_request_error", code="invalid_body")
    log_surprise(error)
    message = "The server failed on this request; its log says where."
    return 500, ErrorBody(message=message, type="server_error", code="internal_error")


def log_surprise(error: BaseException) -> None:
    """Types and places, without messages."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    places = [f"{type(e).__name__} at\n{''.join(traceback.format_tb(e.__traceback__))}" for e in reversed(chain)]
    log.error("A request failed in a way nobody foresaw: %s", "which led to ".join(places).rstrip())


def retry_headers(error: Exception) -> dict[str, str]:
    """Retry-After, where a retry helps, and what a refusal brings along."""
    if isinstance(error, OverloadedError):
        return {hdrs.RETRY_AFTER: str(error.retry_after_s)}
    if isinstance(error, ReplicaUnavailableError | BatchError):
        return {hdrs.RETRY_AFTER: "1"}
    return error.headers if isinstance(error, Refusal) else {}


def envelope(error: ErrorBody, *, status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    """The JSON answer for an error."""
    return web.Response(
        status=status,
        headers=headers,
        body=msgspec.json.encode(ErrorEnvelope(error=error)),
        content_type="application/json",
    )


def answer(error: Exception) -> web.Response:
    """The envelope for any exception, aiohttp's included."""
    if isinstance(error, web.HTTPException):
        error = _from_aiohttp(error)
    status, body = describe(error)
    response = envelope(body, status=status, headers=retry_headers(error))
    if status in (408, 413):  # the rest of the body may still come, and nobody would read it
        response.force_close()
    return response


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong inside becomes an envelope."""
    try:
        return await handler(request)
    except Exception as e:
        return answer(e)


def _from_aiohttp(e: web.HTTPException) -> Refusal:
    if isinstance(e, web.HTTPNotFound):
        return Refusal(404, "There is nothing at this path; see /openapi.json for what there is.", code="unknown_url")
    if isinstance(e, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(e.allowed_methods))
        message = f"This path takes {allowed} and no other method."
        return Refusal(405, message, code="method_not_allowed", headers={hdrs.ALLOW: allowed})
    if isinstance(e, web.HTTPRequestEntityTooLarge):
        return Refusal(413, "The request body is too large; send less at once.", code="request_too_large")
    return Refusal(e.status, f"{e.reason}.", code="http_error")
