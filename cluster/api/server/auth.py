"""Authentication: which API key a request has, and which paths need one.

Only liveness and the web page's own files, which contain no data, answer without a key. The endpoints for operators require an admin key.
Paths come from the matched route, so that every spelling of a path means the same here and in the router. There are no sessions.
"""

from collections.abc import Collection, Mapping

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from cluster.api.server.errors import Handler, HTTPError
from cluster.keys.key import ApiKey, NotAllowedError
from cluster.keys.keyring import Keyring

# Not set where no key is needed.
KEY = web.RequestKey("key", ApiKey)
OPEN = ("/health/live", "/", "/docs", "/static/{name}")
ADMIN = ("/admin/", "/debug/", "/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def make_middleware(keyring: Keyring, *, public: Collection[str] = ()) -> Middleware:
    """Allows every request if the keyring requires no key. public: paths that also answer without one, and then say less."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = path_of(request)
        if not keyring.guards or path in OPEN or (path in public and not secret_of(request.headers)):
            return await handler(request)
        key = request[KEY] = _authenticate(request, keyring)
        if path.startswith(ADMIN) and not key.admin:
            raise NotAllowedError(
                "This endpoint requires an admin key.",
                remedy="Use a key that was created with --admin.",
                code="admin_key_required",
            )
        return await handler(request)

    return middleware


def path_of(request: web.Request) -> str:
    """The path of the matched route, with names for its variables and without a slash at its end; "" if there is none."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical.rstrip("/") or "/"


def secret_of(headers: Mapping[str, str]) -> str:
    """The key that the headers carry; "" if none does.

    A bearer token in Authorization wins over `x-api-key`, which wins over `api-key`: exactly one of them is tried. Another scheme in
    Authorization, for example a reverse proxy's own, says nothing about the key.
    """
    scheme, _, token = headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer or headers.get("X-Api-Key", "").strip() or headers.get("Api-Key", "").strip()


def _authenticate(request: web.Request, keyring: Keyring) -> ApiKey:
    secret = secret_of(request.headers)
    key = keyring.find(secret)
    if key is not None:
        return key
    raise HTTPError(
        401,
        "Incorrect API key provided." if secret else "You didn't provide an API key.",
        remedy="Send your key in the header 'Authorization: Bearer KEY', 'x-api-key: KEY' or 'api-key: KEY'.",
        code="invalid_api_key",
        headers={hdrs.WWW_AUTHENTICATE: "Bearer"},
    )
