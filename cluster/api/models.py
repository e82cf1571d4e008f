"""GET /v1/models and /v1/models/{model}: what is served, under which names.

Knows the gateway's names and, once a replica was reached, the context length.
"""

import msgspec
from aiohttp import web

from cluster.api.gateway import GATEWAY, Gateway
from cluster.api.schemas.other import ModelCard, ModelList
from workers.errors import ReplicaUnavailableError


async def list_models(request: web.Request) -> web.Response:
    """Every served name."""
    gateway = request.app[GATEWAY]
    return _json(ModelList(data=[_card(gateway, name) for name in gateway.model_names]))


async def get_model(request: web.Request) -> web.Response:
    """One served name; 404 for any other."""
    gateway = request.app[GATEWAY]
    name = request.match_info["model"]
    gateway.check_model(name)
    return _json(_card(gateway, name))


def _card(gateway: Gateway, name: str) -> ModelCard:
    try:
        max_model_len: int | None = gateway.router.facts.max_model_len
    except ReplicaUnavailableError:
        max_model_len = None
    return ModelCard(id=name, created=gateway.created, max_model_len=max_model_len)


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
