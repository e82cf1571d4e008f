"""POST /v1/fim/completions: fill in the text between a prompt and a suffix, in the form of Mistral's client.

Knows the endpoint's body. The prompt is that of a completion with `suffix`, the answer that of chat: chat_format.py formats it.
"""

import time
import uuid

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints import completions
from cluster.api.endpoints.chat_format import ChatFormatter
from cluster.api.generation.answering import Prepared, answer
from cluster.api.generation.prompts import check_text_length, in_thread_if_long
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.base import SampledRequest
from cluster.api.schemas.chat import ChatCompletion
from cluster.api.schemas.completions import CompletionRequest, FimRequest
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.infilling import encode_infilling
from workers.errors import RequestError


async def handle(request: web.Request) -> web.StreamResponse:
    """One response, or a stream of chunks."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, FimRequest)
    api = api.serving(body.model)
    completions.check(api, _completion(body, body.prompt), context)
    log_prompt([body.prompt, body.suffix])
    prepared = await _prepare(api, body, context)
    return await answer(request, api, prepared, deadline=deadline, arrived=arrived)


async def _prepare(api: ApiContext, body: FimRequest, context: RequestContext) -> Prepared:
    tokenizer, suffix = api.tokenizer, body.suffix or ""
    if tokenizer.control_token_id("[PREFIX]") is None or tokenizer.control_token_id("[SUFFIX]") is None:
        raise RequestError(
            "This model cannot fill in the middle: its vocabulary has no [PREFIX] and [SUFFIX].",
            remedy="Use /v1/completions without a suffix.",
            code="infilling_unsupported",
        )
    facts, num_chars = api.router.facts, len(body.prompt) + len(suffix)
    check_text_length(num_chars, tokenizer, param="prompt", facts=facts)
    token_ids = await in_thread_if_long(num_chars, lambda: encode_infilling(tokenizer, body.prompt, suffix))
    room = max(1, facts.max_model_len - len(token_ids))  # the default here: all that fits
    completion = _completion(body, token_ids, max_tokens=room if body.max_tokens is None else body.max_tokens)
    prepared = await completions.prepare(api, completion, context)
    head = ChatCompletion(id=f"fim-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    return Prepared(
        body=completion,
        choices=prepared.choices,
        formatter=ChatFormatter(api, completion, head, prepared.choices),
    )


def _completion(body: FimRequest, prompt: str | list[int], *, max_tokens: int | None = None) -> CompletionRequest:
    shared = {name: getattr(body, name) for name in SampledRequest.__struct_fields__}
    if max_tokens is not None:
        shared["max_tokens"] = max_tokens
    return CompletionRequest(prompt=prompt if isinstance(prompt, str) else list(prompt), **shared)
