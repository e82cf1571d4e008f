"""Turns every failure into OpenAI's error format: {"error": {"message", "type", "param", "code"}}.

Knows the status of each of our exceptions, and converts aiohttp's own errors (404, 405, 413). Handlers raise `workers.errors`; middlewares
also raise `HTTPError`. No message repeats a path or a header. An unexpected exception reveals nothing to the client, and the log gets only
its type and place: its message may contain a prompt.
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
# Endpoints of other servers that clients ask for, and what to use here.
INSTEAD = {
    "/v1/messages/batches": "POST /v1/batches",
    "/v1/chat/moderations": "POST /v1/moderations",
    "/v1/classifications": "POST /v1/moderations",
    "/v1/agents": "POST /v1/responses or /v1/chat/completions",
    "/v1/agents/completions": "POST /v1/responses or /v1/chat/completions",
    "/v1/conversations": "POST /v1/responses with 'previous_response_id'",
    "/v1/responses/compact": "POST /v1/responses with 'truncation': 'auto', or with a summary as 'input'",
    "/rerank": "POST /v1/rerank",
    "/v2/rerank": "POST /v1/rerank",
    "/score": "POST /v1/score",
    "/v1/batch/jobs": "POST /v1/batches",
    "/api/chat": "POST /v1/chat/completions",
    "/api/generate": "POST /v1/completions",
    "/api/embed": "POST /v1/embeddings",
    "/api/tags": "GET /v1/models",
    "/chat/completions": "POST /v1/chat/completions: the base URL ends with /v1",
    "/completions": "POST /v1/completions: the base URL ends with /v1",
    "/embeddings": "POST /v1/embeddings: the base URL ends with /v1",
    "/models": "GET /v1/models: the base URL ends with /v1",
    "/v1/v1/chat/completions": "POST /v1/chat/completions: the base URL ends with one /v1",
    "/openai/v1/chat/completions": "POST /v1/chat/completions: the base URL ends with /v1",
    "/v1/v1/completions": "POST /v1/completions: the base URL ends with one /v1",
}
# Below these, other servers have endpoints for sound, pictures and scanned pages.
_NOT_TEXT = ("/v1/audio/", "/v1/images/", "/v1/videos", "/v1/ocr", "/v1/realtime")
THREADS_UNSUPPORTED = "thread_unsupported_request"  # Anthropic's name
MAX_MESSAGE_CHARS = 2000  # a message may quote the request, which may have megabytes


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorBody


class NotFoundError(RequestError):
    """The request names something that does not exist or belongs to another key; answered with 404."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that this server does not have."""


class ClientGoneError(TramontaneError):
    """The client closed the connection; no response can reach it."""


class HTTPError(TramontaneError):
    """An error with its HTTP status. `headers` are added to the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        remedy: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, param=param)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """The HTTP status and the body for an exception. An unexpected one reveals nothing; the log has its place."""
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}…"
    if isinstance(error, HTTPError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, ErrorBody(message=message, type=kind, param=error.param, code=error.code)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, NotFoundError) else 403 if isinstance(error, NotAllowedError) else 400
        return status, ErrorBody(message=message, type="invalid_request_error", param=error.param, code=error.code)
    if isinstance(error, OverloadedError):
        return 429, ErrorBody(message=message, type="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, ReplicaUnavailableError):
        return 503, ErrorBody(message=message, type="service_unavailable_error", code="service_unavailable")
    if isinstance(error, BatchError):
        log.error("A request about files or batches failed: %s", error)
        message = "Files, batches and stored responses are not available now. Nothing is lost: try again later. The log has the reason."
        return 503, ErrorBody(message=message, type="service_unavailable_error", code="store_unavailable")
    if isinstance(error, DeadlineExceededError):
        return 504, ErrorBody(message=message, type="timeout_error", code="deadline_exceeded")
    if isinstance(error, ClientGoneError):
        return 499, ErrorBody(message=message, type="invalid_request_error", code="client_closed_request")
    if isinstance(error, EngineError):
        return 500, ErrorBody(message=message, type="server_error", code="engine_error")
    if isinstance(error, web.RequestPayloadError):
        message = "The request body could not be read: its transfer or content encoding is malformed."
        return 400, ErrorBody(message=message, type="invalid_request_error", code="invalid_body")
    log_unexpected(error)
    message = "The server failed to process this request. Its log has the details."
    return 500, ErrorBody(message=message, type="server_error", code="internal_error")


def log_unexpected(error: BaseException) -> None:
    """Logs the types and places of an exception and its causes, without their messages."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    places = [f"{type(e).__name__} at\n{''.join(traceback.format_tb(e.__traceback__))}" for e in reversed(chain)]
    log.error("A request failed unexpectedly: %s", "which led to ".join(places).rstrip())


def retry_headers(error: Exception) -> dict[str, str]:
    """Retry-After where a retry may succeed, and the error's own headers."""
    if isinstance(error, OverloadedError):
        return {hdrs.RETRY_AFTER: str(error.retry_after_s)}
    if isinstance(error, ReplicaUnavailableError | BatchError):
        return {hdrs.RETRY_AFTER: "1"}
    return error.headers if isinstance(error, HTTPError) else {}


def envelope(error: ErrorBody, *, status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    """The JSON response for an error."""
    return web.Response(
        status=status,
        headers=headers,
        body=msgspec.json.encode(ErrorEnvelope(error=error)),
        content_type="application/json",
    )


# Anthropic's names of errors by status.
_MESSAGE_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def encode_message_error(error: Exception) -> bytes:
    """The error as Anthropic's clients expect it."""
    status, body = describe(error)
    kind = _MESSAGE_ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    told: dict[str, object] = {"type": kind, "message": body.message, "param": body.param, "code": body.code}
    if body.code == THREADS_UNSUPPORTED:
        told["details"] = {"error_code": body.code}  # where the client looks for it, to do without
    return msgspec.json.encode({"type": "error", "error": told})


def error_response(error: Exception, path: str = "") -> web.Response:
    """The response for any exception, including aiohttp's. path: the request's."""
    if isinstance(error, web.HTTPException):
        error = _from_aiohttp(error)
    status, body = describe(error)
    response = envelope(body, status=status, headers=retry_headers(error))
    if path.startswith("/v1/messages"):
        response.body = encode_message_error(error)
    if status in (408, 413):  # the rest of the body may still arrive and would not be read
        response.force_close()
    return response


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception of the handler into an error response."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return error_response(_unknown_url(request.path), request.path)
    except web.HTTPMethodNotAllowed as e:
        if request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            return error_response(_NO_WEBSOCKETS, request.path)
        # A path may look like that of something with an id, which has other methods.
        known = request.path.rstrip("/") in INSTEAD
        return error_response(_unknown_url(request.path) if known else e, request.path)
    except Exception as e:
        return error_response(e, request.path)


_NO_WEBSOCKETS = HTTPError(
    400,
    "This server does not speak WebSocket.",
    remedy="Send POST requests, with 'stream': true for events as they come.",
    code="websocket_unsupported",
)


def _unknown_url(path: str) -> HTTPError:
    instead = INSTEAD.get(path.rstrip("/"))
    what = "There is no endpoint at this path." if instead is None else "This server does not have this endpoint."
    if path.startswith(_NOT_TEXT):
        what = "This server does not have this endpoint: the model reads and writes text only."
    return HTTPError(
        404,
        what,
        remedy="See /docs or /openapi.json for a list." if instead is None else f"Use {instead}.",
        code="unknown_url",
    )


def _from_aiohttp(e: web.HTTPException) -> HTTPError:
    if isinstance(e, web.HTTPNotFound):
        return _unknown_url("")
    if isinstance(e, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(e.allowed_methods))
        return HTTPError(
            405,
            "This path does not support the request's method.",
            remedy=f"Use {allowed}.",
            code="method_not_allowed",
            headers={hdrs.ALLOW: allowed},
        )
    if isinstance(e, web.HTTPRequestEntityTooLarge):
        return HTTPError(
            413,
            "The request body is too large.",
            remedy="Split it into several requests.",
            code="request_too_large",
        )
    return HTTPError(e.status, f"{e.reason}.", code="http_error")
