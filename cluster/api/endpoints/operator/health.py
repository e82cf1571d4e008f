"""GET /health, /health/ready, /ping, /health/live and /metrics: the current state, for load balancers, people and Prometheus.

The first three answer 200 only if a request sent now would be served, possibly by starting a replica; /ping, which hosting platforms ask,
says no more than that, and with --public-health neither do the others to a request without a key. /health/live answers 200 while this
process's event loop runs; it needs no key. Knows only what the router reports.
"""

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.served_model import ServedModel
from cluster.api.server.auth import KEY
from cluster.api.server.errors import ModelNotFoundError
from cluster.router.router import Health


class ReplicaHealth(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: ready, not_ready or draining. `numerics`: replicas with the same one compute the same bits."""

    id: str
    ready: bool
    state: str
    num_running: int
    num_waiting: int
    reason: str | None = None
    numerics: str | None = None


class ModelHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One of several served models. `deployment`: its name; those of its replicas begin with it."""

    deployment: str | None
    model: str
    ready: bool
    reason: str | None = None


class HealthResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: "ok", or "unavailable" with a `reason`. `models`: where several are served; all must be ready."""

    status: str
    replicas: list[ReplicaHealth]
    reason: str | None = None
    models: list[ModelHealth] | UnsetType = UNSET


class LiveResponse(msgspec.Struct, frozen=True, kw_only=True):
    status: str = "ok"


async def live(request: web.Request) -> web.Response:
    """200 while this process can answer at all."""
    return web.Response(body=msgspec.json.encode(LiveResponse()), content_type="application/json")


class PingResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: "ok" or "unavailable"."""

    status: str


async def ping(request: web.Request) -> web.Response:
    """As /health/ready, without details."""
    ready = all(health.ready for _, health in _asked(request))
    answer = PingResponse(status="ok" if ready else "unavailable")
    return web.Response(status=200 if ready else 503, body=msgspec.json.encode(answer), content_type="application/json")


async def handle(request: web.Request) -> web.Response:
    """200 if a replica is ready, or if the cluster is scaled to zero and the next request starts one; otherwise 503.

    Of several models, all must be ready; ?model=NAME asks for one.
    """
    api, found = request.app[CONTEXT], _asked(request)
    ready = all(health.ready for _, health in found)
    is_brief = _is_brief(request)
    answer = HealthResponse(
        status="ok" if ready else "unavailable",
        reason=None if is_brief else _reason(found),
        replicas=[
            ReplicaHealth(
                id=s.replica_id,
                ready=s.ready,
                state=s.state,
                num_running=s.load.num_running,
                num_waiting=s.load.num_waiting,
                reason=s.reason,
                numerics=s.numerics,
            )
            for s in (() if is_brief else [s for _, health in found for s in health.replicas])
        ],
        models=UNSET if is_brief or len(api.models) == 1 else [_model_health(*one) for one in found],
    )
    return web.Response(status=200 if ready else 503, body=msgspec.json.encode(answer), content_type="application/json")


def _asked(request: web.Request) -> list[tuple[ServedModel, Health]]:
    """All models, or the one that the query names, each with its health. Raises ModelNotFoundError."""
    api, name = request.app[CONTEXT], request.query.get("model")
    models: tuple[ServedModel, ...] = api.models if name is None else (_one(api, name, request),)
    return [(model, model.router.health()) for model in models]


def _one(api: ApiContext, name: str, request: web.Request) -> ServedModel:
    served = api.serving(name)
    if _is_brief(request) and not served.model.serves(name):
        raise ModelNotFoundError("The model does not exist.", param="model", code="model_not_found")
    served.check_model(name, request[REQUEST_CONTEXT])
    return served.model


def _is_brief(request: web.Request) -> bool:
    """Whether the answer says no more than ready or not."""
    return request.app[CONTEXT].public_health and request.get(KEY) is None


def _reason(found: list[tuple[ServedModel, Health]]) -> str | None:
    """Of those that are not ready; if all are, of those that have no replica."""
    if len(found) == 1:
        return found[0][1].reason
    told = [one for one in found if not one[1].ready] or found
    return " ".join(f"{model.names[0]}: {health.reason}" for model, health in told if health.reason) or None


def _model_health(model: ServedModel, health: Health) -> ModelHealth:
    return ModelHealth(deployment=model.deployment, model=model.names[0], ready=health.ready, reason=health.reason)


async def metrics(request: web.Request) -> web.Response:
    """Metrics in the Prometheus text format."""
    body = request.app[CONTEXT].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
