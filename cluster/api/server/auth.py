"""Bearer authentication: which key a request carries, and which paths need one.

Without a key only liveness and the page's own files answer, which hold no data. What operators use needs an admin's key. Paths are
taken from the route that matched, so that no spelling of a path is one thing here and another in the router. Keeps no sessions.
"""

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from cluster.api.server.errors import Handler, Refusal
from cluster.keys.key import ApiKey, NotAllowedError
from cluster.keys.keyring import Keyring

KEY = web.RequestKey("key", ApiKey)  # absent where no key is needed
OPEN = ("/health/live", "/", "/docs", "/static/{name}")
ADMIN = ("/admin/", "/debug/", "/metrics")


def make_middleware(keyring: Keyring) -> Middleware:
    """Lets everything pass when the keyring guards nothing."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = path_of(request)
        if not keyring.guards or path in OPEN:
            return await handler(request)
        key = request[KEY] = _authenticate(request, keyring)
        if path.startswith(ADMIN) and not key.admin:
            raise NotAllowedError("This API key is no admin's, which this path needs.", code="admin_key_required")
        return await handler(request)

    return middleware


def path_of(request: web.Request) -> str:
    """The matched route's, with names for its variables; "" for a path that is not there."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def _authenticate(request: web.Request, keyring: Keyring) -> ApiKey:
    scheme, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    key = keyring.find(secret.strip())
    if scheme.lower() == "bearer" and key is not None:
        return key
    message = (
        "Incorrect API key provided."
        if secret
        else "You didn't provide an API key; send it as 'Authorization: Bearer KEY'."
    )
    raise Refusal(401, message, code="invalid_api_key", headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
