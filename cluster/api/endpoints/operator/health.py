"""GET /health, /health/ready, /health/live and /metrics: what is true now, for load balancers, people and Prometheus.

Ready, and /health with it, says 200 only when a request sent now would be served, if need be by waking a replica. Live says that this
process's event loop runs, to anybody and without a key. Knows nothing the router does not tell it.
"""

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from cluster.api.context import GATEWAY


class ReplicaHealth(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    ready: bool
    state: str  # ready, not_ready or draining
    num_running: int
    num_waiting: int
    reason: str | None = None


class HealthAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`status`: "ok", or "unavailable" with the reason in one sentence."""

    status: str
    replicas: list[ReplicaHealth]
    reason: str | None = None


class LiveAnswer(msgspec.Struct, frozen=True, kw_only=True):
    status: str = "ok"


async def live(request: web.Request) -> web.Response:
    """200 whenever this process can answer at all."""
    return web.Response(body=msgspec.json.encode(LiveAnswer()), content_type="application/json")


async def handle(request: web.Request) -> web.Response:
    """200 when a replica is ready or sleeps on purpose, else 503."""
    health = request.app[GATEWAY].router.health()
    answer = HealthAnswer(
        status="ok" if health.ready else "unavailable",
        reason=health.reason,
        replicas=[
            ReplicaHealth(
                id=s.replica_id,
                ready=s.ready,
                state=s.state,
                num_running=s.load.num_running,
                num_waiting=s.load.num_waiting,
                reason=s.reason,
            )
            for s in health.replicas
        ],
    )
    return web.Response(
        status=200 if health.ready else 503, body=msgspec.json.encode(answer), content_type="application/json"
    )


async def metrics(request: web.Request) -> web.Response:
    """The Prometheus text format."""
    body = request.app[GATEWAY].metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
