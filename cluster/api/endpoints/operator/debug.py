"""GET /debug/route: which replica a prompt would be sent to now, and why. Runs nothing. Knows the query; the router explains."""

import msgspec
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.generation.prompts import encode_prompt
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.protocol.routing import ROUTING_POLICIES
from cluster.system.log import request_id_var
from workers.errors import RequestError


async def handle(request: web.Request) -> web.Response:
    """?prompt=TEXT or ?prompt_token_ids=1,2,3, optionally with &policy=NAME, and &model=NAME for another model or an adapter."""
    api = request.app[CONTEXT].serving(request.query.get("model"))
    prompt = _prompt(request)
    policy = request.query.get("policy")
    chosen_policy = next((p for p in ROUTING_POLICIES if p == policy), None)
    if policy is not None and chosen_policy is None:
        raise RequestError(
            f"There is no policy {policy!r}.", remedy=f"Use one of {', '.join(ROUTING_POLICIES)}.", param="policy"
        )
    token_ids = await encode_prompt(api.tokenizer, prompt, facts=api.router.facts)
    explanation = await api.router.explain(token_ids, policy=chosen_policy, adapter=_adapter(request, api))
    return web.Response(body=msgspec.json.encode(explanation), content_type="application/json")


def _adapter(request: web.Request, api: ApiContext) -> str | None:
    """The revision that a request with this model would get; None for the model itself. Raises RequestError."""
    name = request.query.get("model")
    if name is None:
        return None
    api.check_model(name, request[REQUEST_CONTEXT])
    return api.adapters.resolve(name, request_id_var.get() or "")


def _prompt(request: web.Request) -> str | list[int]:
    text, ids = request.query.get("prompt"), request.query.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise RequestError(
            "Exactly one of 'prompt' and 'prompt_token_ids' is required.",
            remedy="Send either of them in the query.",
            param="prompt",
        )
    if text is not None:
        return text
    assert ids is not None
    try:
        token_ids = [int(part) for part in ids.split(",")]
    except ValueError as e:
        raise RequestError(
            "'prompt_token_ids' is not a list of token ids.",
            remedy="Send ids separated by commas, like 1,2,3.",
            param="prompt_token_ids",
        ) from e
    return token_ids
