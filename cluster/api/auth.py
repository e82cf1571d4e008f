"""Bearer authentication: one key guards every path but the pages and /health, which load balancers probe without one.

Knows the key only as a hash, and compares in constant time. Keeps no sessions and no users.
"""

import hashlib
import hmac

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from cluster.api.errors import ErrorBody, Handler, envelope

OPEN_PATHS = frozenset({"/health", "/", "/docs"})  # the pages hold nothing; they ask the API, with a key


def make_middleware(api_key: str | None) -> Middleware:
    """Lets everything pass when there is no key."""
    expected = _digest(api_key) if api_key is not None else None

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is None or request.path in OPEN_PATHS or request.path.startswith("/static/"):
            return await handler(request)
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        # The hash is compared even without a key: the time taken says nothing about what was wrong.
        matches = hmac.compare_digest(_digest(key.strip()), expected)
        if scheme.lower() == "bearer" and matches:
            return await handler(request)
        message = (
            "Incorrect API key provided."
            if key
            else "You didn't provide an API key; send it as 'Authorization: Bearer KEY'."
        )
        body = ErrorBody(message=message, type="invalid_request_error", code="invalid_api_key")
        return envelope(body, status=401, headers={hdrs.WWW_AUTHENTICATE: "Bearer"})

    return middleware


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
