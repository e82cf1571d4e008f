"""Decides which origins and which bodies are accepted, and sets the security headers of every response.

A server without a key trusts every client that can reach it. So it must not be reachable by a web page of another origin: not by CORS, not
by a form, and not by a name that the page's owner points at this machine (DNS rebinding). Bodies must be JSON, except where a form is
expected, and arrive in time. Knows no key and no endpoint.
"""

import ipaddress
import re
from collections.abc import Container, Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict

from cluster.api.server.auth import path_of
from cluster.api.server.body import receive_body
from cluster.api.server.content_coding import unsupported
from cluster.api.server.errors import Handler, HTTPError

BODY_TIMEOUT_S = 60.0
_METHODS = "GET, POST, DELETE, OPTIONS"
_HEADERS = "Authorization, Content-Type, X-Request-Id, X-Request-Timeout, X-Tramontane-Debug"
_EXPOSED = (
    "Retry-After, X-Request-Id, X-Tramontane-Ignored, X-Tramontane-Moved, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests, "
    "X-RateLimit-Limit-Tokens, X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens"
)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}")
_HTML_POLICY = "default-src 'self'; frame-ancestors 'none'"


class OriginGuard:
    """origins: of web pages that may use this server, or "*". guarded: whether an API key is needed. local_only: serve only requests that
    address this machine by a local name, such as localhost."""

    def __init__(self, *, origins: Sequence[str] = (), guarded: bool, local_only: bool = False) -> None:
        self._origins = frozenset(origins)
        self._guarded = guarded
        self._local_only = local_only

    def make_middleware(self) -> Middleware:
        """Runs before authentication: a preflight request has no key."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self._local_only and not is_local(request.headers.get(hdrs.HOST, "")):
                raise HTTPError(
                    403,
                    "This server has no API key and can only be reached by a local name, such as localhost.",
                    remedy="Start it with --api-key to reach it by another name.",
                    code="host_not_allowed",
                )
            origin = request.headers.get(hdrs.ORIGIN)
            allowed = origin is not None and self._allows(origin)
            if allowed and request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
                return _preflight(request)
            if origin is not None and not allowed and not self._guarded and not _is_same(origin, request):
                raise HTTPError(
                    403,
                    "This server has no API key and refuses requests from web pages of other origins.",
                    remedy="Allow the page's origin with --cors-origin.",
                    code="origin_not_allowed",
                )
            return await handler(request)

        return middleware

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `on_response_prepare`."""
        harden(response.headers)
        if not self._origins:
            return
        response.headers.add(hdrs.VARY, "Origin")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and self._allows(origin):
            # Never with Allow-Credentials: a page needs an API key; cookies mean nothing here.
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if "*" in self._origins else origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED

    def _allows(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins


def _preflight(request: web.Request) -> web.Response:
    requested = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    extra = f", {requested}" if _HEADER_NAMES.fullmatch(requested) else ""
    return web.Response(
        status=204,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: _METHODS,
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _HEADERS + extra,  # OpenAI's client sends a dozen of its own
            hdrs.ACCESS_CONTROL_MAX_AGE: "600",
        },
    )


def _is_same(origin: str, request: web.Request) -> bool:
    return origin.partition("://")[2].lower() == request.headers.get(hdrs.HOST, "").lower()


def is_local(host: str) -> bool:
    """Whether a Host header has a local name of this machine."""
    name = re.sub(r":\d*$", "", host).lower().removeprefix("[").removesuffix("]").rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def harden(headers: CIMultiDict[str]) -> None:
    """Sets the headers that every response has. The server's version is not among them."""
    headers[hdrs.SERVER] = "tramontane"
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    if headers.get(hdrs.CONTENT_TYPE, "").startswith("text/html"):
        headers.setdefault("Content-Security-Policy", _HTML_POLICY)


def make_body_middleware(timeout_s: float = BODY_TIMEOUT_S, *, forms: Container[str] = ()) -> Middleware:
    """The innermost middleware: reads the body before the handler runs. forms: paths whose handlers read a form themselves."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST" or request.match_info.http_exception is not None:
            return await handler(request)
        if path_of(request) in forms:
            if request.content_type != "multipart/form-data":
                raise HTTPError(
                    415,
                    "The body must be a form.",
                    remedy="Send it with the header 'Content-Type: multipart/form-data'.",
                    code="unsupported_media_type",
                )
            if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
                raise unsupported("A form cannot have a Content-Encoding.", ())
            return await handler(request)
        # A form on another site can send any text, but not with this type; see https://fetch.spec.whatwg.org/#cors-safelisted-request-header
        if request.body_exists and hdrs.CONTENT_TYPE in request.headers and request.content_type != "application/json":
            raise HTTPError(
                415,
                "The body must be JSON.",
                remedy="Send it with the header 'Content-Type: application/json'.",
                code="unsupported_media_type",
            )
        await receive_body(request, timeout_s=timeout_s)
        return await handler(request)

    return middleware
