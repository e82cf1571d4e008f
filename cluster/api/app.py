"""Builds the HTTP application. It is the only constructor, so that a server, a test and a notebook get the same application.

Knows every endpoint and what they share (ApiContext in context.py). Opens no port and starts no replica: the caller runs the application,
with `handler_cancellation=True`, so that a request ends at once if its client disconnects:

    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, auto_decompress=False)
"""

from collections.abc import Callable, Mapping, Sequence

from aiohttp import hdrs, web

from cluster.adapters.served import ServedAdapters
from cluster.api import pages
from cluster.api.context import CONTEXT, NO_BATCHES, Admin, ApiContext, Batches
from cluster.api.endpoints import openapi
from cluster.api.endpoints.table import ENDPOINTS, platform_paths
from cluster.api.generation.structured import Grammars
from cluster.api.served_model import ServedModel
from cluster.api.server import auth, errors, limits, request_options
from cluster.api.server.origin_guard import BODY_TIMEOUT_S, OriginGuard, make_body_middleware
from cluster.api.server.sse import KEEP_ALIVE_S
from cluster.api.server.tracing import make_middleware as make_tracing_middleware
from cluster.config.platform import Platform
from cluster.config.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from cluster.keys.accounts import Accounts
from cluster.keys.keyring import Keyring
from cluster.keys.ledger import Ledger
from cluster.metrics.gateway import Metrics
from cluster.router.router import Router
from cluster.text.chat.template import ChatTemplate
from cluster.text.tokenizer import Tokenizer
from cluster.tracing.request import GatewayTracing
from workers.errors import OverloadedError

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_SEQUENCES_PER_REQUEST = 128


def make_app(
    *,
    router: Router,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    model_name: str | Sequence[str],
    api_key: str | None = None,
    keyring: Keyring | None = None,
    accounts: Accounts | None = None,
    ledger: Ledger | None = None,
    cors_origins: Sequence[str] = (),
    local_only: bool = False,
    body_timeout_s: float = BODY_TIMEOUT_S,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_sequences_per_request: int = MAX_SEQUENCES_PER_REQUEST,
    metrics: Metrics | None = None,
    admin: Admin | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
    sampling_defaults: SamplingDefaults = NO_DEFAULTS,
    serves_embeddings: bool = True,
    strict: bool = False,
    public_health: bool = False,
    links: Mapping[str, str] | None = None,
    platform: Platform | None = None,
    batches: Batches | None = None,
    no_batches: str = NO_BATCHES,
    adapters: ServedAdapters | None = None,
    deployment: str | None = None,
    others: Sequence[ServedModel] = (),
    tracing: GatewayTracing | None = None,
) -> web.Application:
    """The OpenAI-compatible application.

    tokenizer: `load_tokenizer(folder)`. chat_template: `load_text(folder)`'s, or None for a model that cannot chat.
    model_name: the served name or names; the first is the default.
    keyring: the API keys; auth.py lists the paths that need none. api_key: short for a keyring with this key only.
    accounts, ledger: the usage of the keys, in memory and on the disk. cors_origins, local_only: see origin_guard.py.
    max_sequences_per_request: the number of prompts times n. admin: without it, /admin is answered with 404.
    keep_alive_s: a stream that is silent for so many seconds gets a comment, so that no proxy closes it.
    sampling_defaults: for what a request does not say. strict: fields of a body that have no effect are refused instead of ignored.
    batches: the store of files and batches; without it, their endpoints respond with the error `no_batches`.
    public_health: /health/ready and /ping need no key. platform: the one that hosts this server, whose own paths are served too.
    links: name -> address, which the page shows to operators.
    adapters: those that requests can name as their model.
    others: further models; `deployment` is the first one's name then.
    tracing: makes the spans of requests; None: there are none.
    """
    names = (model_name,) if isinstance(model_name, str) else tuple(model_name)
    assert names, "make_app needs at least one served model name"
    first = ServedModel(
        names=names,
        router=router,
        tokenizer=tokenizer,
        chat_template=chat_template,
        metrics=metrics or Metrics(router, model_name=names[0]),
        grammars=Grammars(tokenizer),
        sampling_defaults=sampling_defaults,
        adapters=adapters or ServedAdapters(),
        deployment=deployment,
    )
    api = ApiContext(
        models=(first, *others),
        model=first,
        max_sequences_per_request=max_sequences_per_request,
        keep_alive_s=keep_alive_s,
        serves_embeddings=serves_embeddings,
        strict=strict,
        public_health=public_health,
        links={} if links is None else links,
        admin=admin,
        batches=batches,
        no_batches=no_batches,
        body_timeout_s=body_timeout_s,
        tracing=tracing,
    )
    keyring = keyring or Keyring(api_key=api_key)
    ready_path = None if platform is None else platform.ready_path
    public = {"/health/ready", "/ping", *([ready_path] if ready_path else [])} if public_health else set()
    origin_guard = OriginGuard(origins=cors_origins, guarded=keyring.guards, local_only=local_only)
    app = web.Application(
        middlewares=[
            request_options.request_id_middleware if tracing is None else make_tracing_middleware(tracing),
            _count_responses,
            errors.middleware,
            origin_guard.make_middleware(),
            auth.make_middleware(keyring, public=public),
            limits.make_middleware(accounts or Accounts(), ledger, check_room=_check_room(api.models)),
            make_body_middleware(body_timeout_s, forms={e.path for e in ENDPOINTS if e.form is not None}),
        ],
        client_max_size=max_body_bytes,
    )
    app[CONTEXT] = api
    app.on_response_prepare.append(_close_connection_if_closing)
    app.on_response_prepare.extend(
        [request_options.add_request_id, request_options.add_ignored, request_options.add_adapter]
    )
    app.on_response_prepare.extend([origin_guard.add_headers, limits.add_headers])
    app[openapi.OPENAPI] = openapi.render(ENDPOINTS)
    endpoints = (*ENDPOINTS, *platform_paths(platform))
    routes = {"GET": web.get, "POST": web.post, "DELETE": web.delete}
    # Some clients put a slash at the end of a path. First, since a model's name may have slashes.
    app.add_routes([routes[e.method](f"{e.path}/", e.handler) for e in endpoints if e.path != "/"])
    app.add_routes([routes[e.method](e.path, e.handler) for e in endpoints])
    app.add_routes(pages.routes())
    return app


def _check_room(models: Sequence[ServedModel]) -> Callable[[str | None], None]:
    """Before a body is read nobody knows its model: only if none has room is the request refused."""
    checks = [model.router.check_room for model in models]
    if len(checks) == 1:
        return checks[0]

    def check(tenant: str | None) -> None:
        refusals = []
        for check_one in checks:
            try:
                check_one(tenant)
            except OverloadedError as e:
                refusals.append(e)
        if len(refusals) == len(checks):
            raise min(refusals, key=lambda e: e.retry_after_s)

    return check


async def _close_connection_if_closing(request: web.Request, response: web.StreamResponse) -> None:
    """While the gateway closes, clients must not reuse the connection: their next request has to reach another gateway."""
    if request.app[CONTEXT].router.closing is not None:
        response.force_close()
        response.headers[hdrs.CONNECTION] = "close"


@web.middleware
async def _count_responses(request: web.Request, handler: errors.Handler) -> web.StreamResponse:
    response = await handler(request)
    request.app[CONTEXT].metrics.answered(auth.path_of(request) or "unknown", response.status)
    return response
