"""GET /debug/route: where a prompt would go now, and why. Runs nothing. Knows the query and the answer; the router explains."""

import msgspec
from aiohttp import web

from cluster.api.context import GATEWAY
from cluster.api.generation.prompts import encode_prompt
from cluster.router.policy import POLICIES
from workers.errors import RequestError


async def handle(request: web.Request) -> web.Response:
    """?prompt=TEXT or ?prompt_token_ids=1,2,3, and perhaps &policy=NAME."""
    gateway = request.app[GATEWAY]
    prompt = _prompt(request)
    policy = request.query.get("policy")
    chosen_policy = next((p for p in POLICIES if p == policy), None)
    if policy is not None and chosen_policy is None:
        raise RequestError(f"There is no policy {policy!r}; use one of {', '.join(POLICIES)}.", param="policy")
    token_ids = await encode_prompt(gateway.tokenizer, prompt, facts=gateway.router.facts)
    explanation = await gateway.router.explain(token_ids, policy=chosen_policy)
    return web.Response(body=msgspec.json.encode(explanation), content_type="application/json")


def _prompt(request: web.Request) -> str | list[int]:
    text, ids = request.query.get("prompt"), request.query.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise RequestError("Send either 'prompt' or 'prompt_token_ids' in the query.", param="prompt")
    if text is not None:
        return text
    assert ids is not None
    try:
        token_ids = [int(part) for part in ids.split(",")]
    except ValueError as e:
        raise RequestError(
            "'prompt_token_ids' must be token ids with commas between, like 1,2,3.", param="prompt_token_ids"
        ) from e
    return token_ids
