"""POST /admin/replicas/{id}/drain and GET /admin/cluster: the operator's endpoints, behind the same key as everything else.

Knows the paths and bodies; what they do is an `Admin`'s, and without one they do not exist.
"""

import math

import msgspec
from aiohttp import web

from cluster.api.context import GATEWAY, Admin
from workers.errors import RequestError


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    grace_s: float | None = None

    def __post_init__(self) -> None:
        if self.grace_s is not None and not 0 <= self.grace_s < math.inf:
            raise ValueError("'grace_s' must be 0 or a positive number of seconds")


async def drain(request: web.Request) -> web.Response:
    """Answers when the drain has begun, not when it is over: GET /admin/cluster shows the rest."""
    admin = _admin(request)
    body = await request.read()
    try:
        wish = msgspec.json.decode(body or b"{}", type=DrainRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RequestError(f'The body must be empty or like {{"grace_s": 10}}: {e}.', param="grace_s") from e
    replica_id = request.match_info["replica_id"]
    await admin.drain_replica(replica_id, wish.grace_s)
    answer = msgspec.json.encode({"id": replica_id, "state": "draining"})
    return web.Response(status=202, body=answer, content_type="application/json")


async def cluster(request: web.Request) -> web.Response:
    """Replicas, ranks, nodes and gateways as the controller last told."""
    body = msgspec.json.encode(_admin(request).cluster_view())
    return web.Response(body=body, content_type="application/json")


def _admin(request: web.Request) -> Admin:
    admin = request.app[GATEWAY].admin
    if admin is None:
        raise web.HTTPNotFound
    return admin
