"""The middleware that makes each request's context, checks its API key's limits, and records its usage at the end.

Knows the HTTP side: which requests count, the rate limit headers, the ledger entry. The arithmetic is in cluster/keys/accounts.py.
"""

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from cluster.api.context import CONTEXT
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.server.auth import ADMIN, KEY, path_of
from cluster.api.server.errors import Handler
from cluster.api.server.tracing import TRACE
from cluster.keys.accounts import Accounts, RequestUsage
from cluster.keys.ledger import Group, Ledger, Sums, today


def make_middleware(
    accounts: Accounts, ledger: Ledger | None = None, *, check_room: Callable[[str | None], None]
) -> Middleware:
    """Runs after authentication and before anything expensive, such as reading the body.

    check_room: raises OverloadedError if a tenant's next sequence would not be admitted, so that a flood of requests is refused cheaply.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        key, path = request.get(KEY), path_of(request)
        if key is None or request.method != "POST" or not path or path.startswith(ADMIN):
            context = request[REQUEST_CONTEXT] = RequestContext(trace=request.get(TRACE))
            if key is None and request.method == "POST" and _needs_room(path):
                check_room(None)
            with context.at_end:
                return await handler(request)
        usage = accounts.usage(key, path)
        context = request[REQUEST_CONTEXT] = RequestContext(usage=usage, trace=request.get(TRACE))
        try:
            with accounts.running(usage), context.at_end:
                if _needs_room(path):
                    check_room(context.tenant)
                return await handler(request)
        except Exception:
            usage.failed = True
            raise
        finally:
            request.app[CONTEXT].metrics.used_by_key(
                key.name, num_prompt_tokens=usage.num_prompt_tokens, num_output_tokens=usage.num_output_tokens
            )
            if ledger is not None:
                record(ledger, usage)

    return middleware


def record(ledger: Ledger, usage: RequestUsage) -> None:
    """Adds one request and all that it used."""
    group = Group(today(), usage.key.id, usage.model, usage.endpoint, usage.key.name)
    tokens = (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens)
    ledger.add(group, Sums(1, *tokens, int(usage.failed)))


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: the x-ratelimit-* headers, with the values at the start of the response."""
    context = request.get(REQUEST_CONTEXT)
    if context is not None and context.usage is not None:
        response.headers.update(context.usage.rate_limit_headers())


def _needs_room(path: str) -> bool:
    """Whether the request runs on a replica now. Files and batches do not: their lines run later and have limits of their own."""
    runs_nothing = ("/v1/files", "/v1/batches", "/v1/responses/", "/v1/messages/", *ADMIN)
    return path.startswith(("/v1/", "/openai/", "/invocations")) and not path.startswith(runs_nothing)
