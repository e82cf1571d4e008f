"""POST /admin/replicas/{id}/drain, GET /admin/cluster and /admin/operations. On a server with API keys they require an admin key.

Knows the paths and bodies; an `Admin` does the work. Without one, these paths are answered with 404.
"""

import math

import msgspec
from aiohttp import web

from cluster.api.context import CONTEXT, Admin
from cluster.api.server.body import take_body
from cluster.metrics.operations import operations
from workers.errors import RequestError


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`grace_s`: seconds until requests that still run move to other replicas. null: the server's default."""

    grace_s: float | None = None

    def __post_init__(self) -> None:
        if self.grace_s is not None and not 0 <= self.grace_s < math.inf:
            raise ValueError("'grace_s' must be 0 or a positive number of seconds")


async def drain(request: web.Request) -> web.Response:
    """Starts the drain and responds at once; GET /admin/cluster shows its progress."""
    admin = _admin(request)
    body = take_body(request)
    try:
        drain_request = msgspec.json.decode(body or b"{}", type=DrainRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(
            f"The body is invalid: {e}.", remedy='Send an empty body, or one like {"grace_s": 10}.', param="grace_s"
        ) from e
    replica_id = request.match_info["replica_id"]
    await admin.drain_replica(replica_id, drain_request.grace_s)
    answer = msgspec.json.encode({"id": replica_id, "state": "draining"})
    return web.Response(status=202, body=answer, content_type="application/json")


async def cluster(request: web.Request) -> web.Response:
    """Replicas, ranks, nodes and gateways, as the controller last reported them."""
    body = msgspec.json.encode(_admin(request).cluster_view())
    return web.Response(body=body, content_type="application/json")


async def operate(request: web.Request) -> web.Response:
    """What this gateway has measured since it started."""
    api = request.app[CONTEXT]
    found = operations(api.metrics, links=dict(api.links))
    return web.Response(body=msgspec.json.encode(found), content_type="application/json")


def _admin(request: web.Request) -> Admin:
    admin = request.app[CONTEXT].admin
    if admin is None:
        raise web.HTTPNotFound
    return admin
