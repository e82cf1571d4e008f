"""POST /v1/embeddings: the mean of the model's last hidden states over the tokens of each input.

Knows the endpoint's input forms and its response; the engine does the pooling.
"""

import base64
import time
import uuid

import numpy as np
import numpy.typing as npt
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.generation.answering import json_response
from cluster.api.generation.inputs import admit_inputs, run_inputs
from cluster.api.generation.prompts import encode_prompt, split_prompt, truncate
from cluster.api.generation.sampling import too_long
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.embeddings import MAX_INPUTS, EmbeddingItem, EmbeddingList, EmbeddingRequest, InputUsage
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from workers.errors import EngineError, RequestError
from workers.protocol import EngineFacts, GenerateRequest, SamplingParams, TokenDelta

NO_EMBEDDINGS = "Embeddings are disabled on this server (--no-embeddings)."


async def handle(request: web.Request) -> web.Response:
    """One embedding for each input, in their order."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, EmbeddingRequest)
    api = api.serving(body.model)
    check(api, body, context)
    log_prompt(body.input)
    return json_response(await complete(api, body, context, deadline=deadline, arrived=arrived))


def check(api: ApiContext, body: EmbeddingRequest, context: RequestContext) -> None:
    """Checks all that needs no replica. Raises RequestError."""
    if not api.serves_embeddings:
        raise RequestError(NO_EMBEDDINGS, code="embeddings_disabled")
    api.check_model(body.model, context)
    inputs = split_prompt(body.input, param="input")
    if len(inputs) > MAX_INPUTS:
        raise RequestError(
            f"'input' has {len(inputs)} inputs; the limit is {MAX_INPUTS} per request.",
            remedy="Split them into several requests.",
            param="input",
        )


async def complete(
    api: ApiContext,
    body: EmbeddingRequest,
    context: RequestContext,
    *,
    deadline: float | None = None,
    arrived: float,
) -> EmbeddingList:
    """The response. Raises what the router raises, and RequestError for what the model cannot do."""
    facts = api.router.facts
    num_dimensions = _num_dimensions(body, facts)
    answer_id = f"embd-{uuid.uuid4().hex}"
    adapter = await api.use_model(body.model, context)
    requests = await _requests(api, body, context, facts=facts, answer_id=answer_id, adapter=adapter)
    with admit_inputs(api, requests, context=context, deadline=deadline) as admission:
        deltas = await run_inputs(api, requests, context=context, admission=admission, arrived=arrived)
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    as_base64 = body.encoding_format == "base64"
    vectors = [_vector(delta, num_dimensions) for delta in deltas]
    return EmbeddingList(
        id=answer_id,
        model=body.model,
        data=[EmbeddingItem(index=i, embedding=_render(vector, as_base64)) for i, vector in enumerate(vectors)],
        usage=InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


async def _requests(
    api: ApiContext,
    body: EmbeddingRequest,
    context: RequestContext,
    *,
    facts: EngineFacts,
    answer_id: str,
    adapter: str | None,
) -> list[GenerateRequest]:
    keep = body.truncate_prompt_tokens
    requests = []
    for i, text in enumerate(split_prompt(body.input, param="input")):
        encoded = await encode_prompt(api.tokenizer, text, facts=facts, truncates=keep is not None, param="input")
        token_ids = truncate(encoded, keep, facts=facts, num_output=None)
        if len(token_ids) >= facts.max_model_len:
            raise too_long(len(token_ids), param="input", max_model_len=facts.max_model_len)
        requests.append(
            GenerateRequest(
                request_id=f"{answer_id}-{i}",
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=0, seed=0),
                priority=context.priority_of(body.priority),
                embed=True,
                adapter=adapter,
            )
        )
    return requests


def _num_dimensions(body: EmbeddingRequest, facts: EngineFacts) -> int:
    """How many numbers the request asks for. Raises RequestError."""
    requested = {name: getattr(body, name) for name in ("dimensions", "output_dimension")}
    sent = {name: number for name, number in requested.items() if number is not None}
    if len(set(sent.values())) > 1:
        raise RequestError(
            "'dimensions' and 'output_dimension' mean the same and differ.",
            remedy="Send one of them.",
            param="output_dimension",
        )
    for name, number in sent.items():
        if number > facts.hidden_size:
            raise RequestError(
                f"{name!r} is {number}; this model's embeddings have {facts.hidden_size} dimensions.",
                remedy=f"Send at most {facts.hidden_size}.",
                param=name,
            )
    return next(iter(sent.values()), facts.hidden_size)


def _vector(delta: TokenDelta, num_dimensions: int) -> npt.NDArray[np.float32]:
    """The first numbers of an embedding, scaled to length 1 as OpenAI does; a whole embedding as it is."""
    if delta.embedding is None:
        raise EngineError("The replica sent no embedding. It may run an older version.")
    vector = np.frombuffer(delta.embedding, "<f4")
    if num_dimensions == len(vector):
        return vector
    kept = vector[:num_dimensions].astype(np.float64)
    return (kept / (np.linalg.norm(kept) or 1.0)).astype("<f4")


def _render(vector: npt.NDArray[np.float32], as_base64: bool) -> list[float] | str:
    return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
