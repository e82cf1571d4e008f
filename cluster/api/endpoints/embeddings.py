"""POST /v1/embeddings: the mean over an input's tokens of the model's last hidden states.

Knows the endpoint's input forms and answer shape; the engine does the pooling.
"""

import base64
import sys
import time
import uuid
from array import array

from aiohttp import web

from cluster.api.context import GATEWAY, Gateway
from cluster.api.generation.answering import json_answer
from cluster.api.generation.inputs import admit_inputs, run_inputs
from cluster.api.generation.origin import HTTP, Origin
from cluster.api.generation.prompts import encode_prompt, split_prompt, truncate
from cluster.api.generation.sampling import too_long
from cluster.api.schemas.other import MAX_INPUTS, EmbeddingItem, EmbeddingList, EmbeddingRequest, InputUsage
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from workers.errors import EngineError, RequestError
from workers.protocol import EngineFacts, GenerateRequest, SamplingParams, TokenDelta


async def handle(request: web.Request) -> web.Response:
    """One embedding for each input, in their order."""
    gateway = request.app[GATEWAY]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, EmbeddingRequest)
    check(gateway, body)
    log_prompt(body.input)
    return json_answer(await complete(gateway, body, deadline=deadline, arrived=arrived))


def check(gateway: Gateway, body: EmbeddingRequest) -> None:
    """As far as that needs no replica. Raises RequestError."""
    if not gateway.serves_embeddings:
        raise RequestError("This server was started without embeddings (--no-embeddings).", code="embeddings_disabled")
    gateway.check_model(body.model)
    inputs = split_prompt(body.input, param="input")
    if len(inputs) > MAX_INPUTS:
        raise RequestError(f"'input' holds {len(inputs)} inputs; send at most {MAX_INPUTS} at once.", param="input")


async def complete(
    gateway: Gateway,
    body: EmbeddingRequest,
    origin: Origin = HTTP,
    *,
    deadline: float | None = None,
    arrived: float,
) -> EmbeddingList:
    """Raises what the router raises, and RequestError for what the model cannot do."""
    facts = gateway.router.facts
    if body.dimensions is not None and body.dimensions != facts.hidden_size:
        raise RequestError(
            f"This model's embeddings have {facts.hidden_size} dimensions and cannot be shortened; leave 'dimensions' out.",
            param="dimensions",
        )
    requests = await _requests(gateway, body, origin, facts=facts)
    with admit_inputs(gateway, requests, deadline=deadline) as admission:
        deltas = await run_inputs(gateway, requests, origin=origin, admission=admission, arrived=arrived)
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    as_base64 = body.encoding_format == "base64"
    return EmbeddingList(
        model=body.model,
        data=[EmbeddingItem(index=i, embedding=_render(delta, as_base64)) for i, delta in enumerate(deltas)],
        usage=InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


async def _requests(
    gateway: Gateway, body: EmbeddingRequest, origin: Origin, *, facts: EngineFacts
) -> list[GenerateRequest]:
    keep, answer_id = body.truncate_prompt_tokens, f"embd-{uuid.uuid4().hex}"
    requests = []
    for i, text in enumerate(split_prompt(body.input, param="input")):
        encoded = await encode_prompt(gateway.tokenizer, text, facts=facts, truncates=keep is not None, param="input")
        token_ids = truncate(encoded, keep, facts=facts, num_output=None)
        if len(token_ids) >= facts.max_model_len:
            raise too_long(len(token_ids), param="input", max_model_len=facts.max_model_len)
        requests.append(
            GenerateRequest(
                request_id=f"{answer_id}-{i}",
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=0, seed=0),
                priority=origin.priority_of(body.priority),
                embed=True,
            )
        )
    return requests


def _render(delta: TokenDelta, as_base64: bool) -> list[float] | str:
    if delta.embedding is None:
        raise EngineError("The replica sent no embedding; it may be of an older version.")
    if as_base64:
        return base64.b64encode(delta.embedding).decode()
    values = array("f")
    values.frombytes(delta.embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
