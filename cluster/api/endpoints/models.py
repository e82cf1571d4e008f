"""GET /v1/models and /v1/models/{model}: what is served, under which names.

Knows the gateway's names and, once a replica was reached, the context length.
"""

from aiohttp import web

from cluster.api.context import GATEWAY, Gateway
from cluster.api.generation.answering import json_answer
from cluster.api.schemas.other import ModelCard, ModelList
from workers.errors import ReplicaUnavailableError


async def list_models(request: web.Request) -> web.Response:
    """Every served name."""
    gateway = request.app[GATEWAY]
    return json_answer(ModelList(data=[_card(gateway, name) for name in gateway.model_names]))


async def get_model(request: web.Request) -> web.Response:
    """One served name; 404 for any other."""
    gateway = request.app[GATEWAY]
    name = request.match_info["model"]
    gateway.check_model(name)
    return json_answer(_card(gateway, name))


def _card(gateway: Gateway, name: str) -> ModelCard:
    try:
        max_model_len: int | None = gateway.router.facts.max_model_len
    except ReplicaUnavailableError:
        max_model_len = None
    return ModelCard(id=name, created=gateway.created, max_model_len=max_model_len)
