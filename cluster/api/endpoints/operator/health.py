"""GET /health, /health/ready, /ping, /health/live and /metrics: the current state, for load balancers, people and Prometheus.

The first three answer 200 only if a request sent now would be served, possibly by starting a replica; /ping, which hosting platforms ask,
says no more than that, and with --public-health neither do the others to a request without a key. /health/live answers 200 while this
process's event loop runs; it needs no key. Knows only what the router reports.
"""

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from cluster.api.context import CONTEXT
from cluster.api.server.auth import KEY


class ReplicaHealth(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: ready, not_ready or draining. `numerics`: replicas with the same one compute the same bits."""

    id: str
    ready: bool
    state: str
    num_running: int
    num_waiting: int
    reason: str | None = None
    numerics: str | None = None


class HealthResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: "ok", or "unavailable" with a `reason`."""

    status: str
    replicas: list[ReplicaHealth]
    reason: str | None = None


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
    ready = request.app[CONTEXT].router.health().ready
    answer = PingResponse(status="ok" if ready else "unavailable")
    return web.Response(status=200 if ready else 503, body=msgspec.json.encode(answer), content_type="application/json")


async def handle(request: web.Request) -> web.Response:
    """200 if a replica is ready, or if the cluster is scaled to zero and the next request starts one; otherwise 503."""
    api = request.app[CONTEXT]
    health = api.router.health()
    is_brief = api.public_health and request.get(KEY) is None
    answer = HealthResponse(
        status="ok" if health.ready else "unavailable",
        reason=None if is_brief else health.reason,
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
            for s in (() if is_brief else health.replicas)
        ],
    )
    return web.Response(
        status=200 if health.ready else 503, body=msgspec.json.encode(answer), content_type="application/json"
    )


async def metrics(request: web.Request) -> web.Response:
    """Metrics in the Prometheus text format."""
    body = request.app[CONTEXT].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
