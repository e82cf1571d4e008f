"""GET /v1/models and /v1/models/{model}: the names of the served models, and their adapters.

Knows the names, what the model can be used for and, once a replica has reported it, the context length.
"""

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.generation.answering import json_response
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.models import Capabilities, ModelCard, ModelList
from cluster.api.server.auth import KEY
from workers.errors import ReplicaUnavailableError


async def list_models(request: web.Request) -> web.Response:
    """All served names that the API key may use."""
    key = request.get(KEY)
    served = [request.app[CONTEXT].serving(model.names[0]) for model in request.app[CONTEXT].models]
    names = [(api, name) for api in served for name in (*api.model_names, *api.adapters.names)]
    return json_response(ModelList(data=[_card(api, name) for api, name in names if key is None or key.may_use(name)]))


async def get_model(request: web.Request) -> web.Response:
    """One served name; 404 for any other, 403 for one that the API key may not use."""
    name = request.match_info["model"]
    api = request.app[CONTEXT].serving(name)
    api.check_model(name, request[REQUEST_CONTEXT])
    if (key := request.get(KEY)) is not None:
        key.check_model(name if name in api.model_names else api.adapters.adapter_of(name))
    return json_response(_card(api, name))


def _card(api: ApiContext, name: str) -> ModelCard:
    try:
        max_model_len: int | None = api.router.facts.max_model_len
    except ReplicaUnavailableError:
        max_model_len = None
    template = api.chat_template
    base = api.model_names[0]
    adapter = None if name in api.model_names else api.adapters.revision_of(name)
    return ModelCard(
        id=name,
        created=api.created if adapter is None else int(adapter.loaded_at or api.created),
        max_model_len=max_model_len,
        max_context_length=max_model_len,
        aliases=[other for other in api.model_names if other != name] if adapter is None else [],
        capabilities=Capabilities(
            completion_chat=template is not None,
            function_calling=template is not None and template.supports_tools,
            moderation=template is not None,
            completion_fim=api.tokenizer.control_token_id("[SUFFIX]") is not None,
        ),
        type="base" if adapter is None else "fine-tuned",
        root=base if adapter is None else adapter.source,
        parent=None if adapter is None else base,
    )
