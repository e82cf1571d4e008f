"""What a request costs its key: the middleware around it, and the few words handlers say meanwhile.

The words find the request's `Use` in a context variable, which the tasks of a request inherit; where no key is needed they do nothing.
Knows HTTP's side; the arithmetic is cluster/keys/accounts.py's. Admin paths cost nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from cluster.api.server.auth import KEY, path_of
from cluster.api.server.errors import Handler
from cluster.keys.accounts import Accounts, Use
from cluster.keys.key import OWN_ID
from cluster.keys.ledger import Group, Ledger, Sums, today

USE = web.RequestKey("use", Use)  # for the headers
_use: ContextVar[Use | None] = ContextVar("use", default=None)


def make_middleware(
    accounts: Accounts, ledger: Ledger | None = None, *, check_room: Callable[[str | None], None]
) -> Middleware:
    """Inside authentication, outside everything that costs something, such as reading the body.

    check_room: raises OverloadedError when a tenant's next sequence would not fit; so a flood is refused for a fraction of its price.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        key, path = request.get(KEY), path_of(request)
        if key is None and request.method == "POST" and _takes_room(path):
            check_room(None)
        if key is None or request.method != "POST" or not path or path.startswith("/admin/"):
            return await handler(request)
        use = request[USE] = accounts.use(key, path)
        token = _use.set(use)
        try:
            with accounts.running(use):
                if _takes_room(path):
                    check_room(tenant())
                return await handler(request)
        except Exception:
            use.failed = True
            raise
        finally:
            _use.reset(token)
            if ledger is not None:
                write(ledger, use)

    return middleware


@contextlib.contextmanager
def using(use: Use) -> Iterator[None]:
    """What handlers say inside is said to this use: for a line of a batch, which comes through no middleware."""
    token = _use.set(use)
    try:
        yield
    finally:
        _use.reset(token)


def write(ledger: Ledger, use: Use) -> None:
    """One request, with all that it used."""
    group = Group(today(), use.key.id, use.model, use.endpoint, use.key.name)
    tokens = (use.num_prompt_tokens, use.num_cached_tokens, use.num_completion_tokens)
    ledger.add(group, Sums(1, *tokens, int(use.failed)))


def _takes_room(path: str) -> bool:
    """Whether it computes something. Files and batches only make work for later, which has a room of its own."""
    return path.startswith("/v1/") and not path.startswith(("/v1/files", "/v1/batches"))


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: x-ratelimit-*, as it stands when the answer begins."""
    use = request.get(USE)
    if use is not None:
        response.headers.update(use.rate_limit_headers())


def check_model(name: str) -> None:
    """For a name that is served here. Raises NotAllowedError when it is not for this key."""
    if use := _use.get():
        use.model = name
        use.key.check_model(name)


def priority(asked: int | None) -> int:
    """Of the request, as far as its key may have it."""
    use = _use.get()
    return asked or 0 if use is None else use.key.priority(asked)


def tenant() -> str | None:
    """Whose request it is, for the router; None where nobody needs a key, and for the server's own key, which has no limits."""
    use = _use.get()
    return None if use is None or use.key.id == OWN_ID else use.key.id


def reserve(num_prompt_tokens: int) -> contextlib.AbstractContextManager[None]:
    """Around a generation. Raises OverloadedError while the key has too few tokens left this minute."""
    use = _use.get()
    return contextlib.nullcontext() if use is None else use.reserve(num_prompt_tokens)


def produced(num_tokens: int) -> None:
    """Generated tokens, as they come."""
    if use := _use.get():
        use.produced(num_tokens)


def cached(num_tokens: int) -> None:
    """Prompt tokens that a replica had computed before."""
    if use := _use.get():
        use.num_cached_tokens += num_tokens


def failed() -> None:
    """A sequence ended with an error, perhaps when the answer had already begun."""
    if use := _use.get():
        use.failed = True
