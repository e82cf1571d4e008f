"""POST /v1/score and /v1/rerank: how well texts go together, by their embeddings or by the model's own probabilities.

Knows both bodies and the two kinds of scores. A text that occurs in many pairs is embedded once; a first text that many others continue is
computed once and then found in the prefix cache.
"""

import time
import uuid
from collections.abc import Sequence

import numpy as np
from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints.embeddings import NO_EMBEDDINGS
from cluster.api.generation.answering import json_response
from cluster.api.generation.inputs import admit_inputs, run_inputs
from cluster.api.generation.prompts import encode_prompt, truncate
from cluster.api.generation.sampling import too_long
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.embeddings import InputUsage
from cluster.api.schemas.scores import (
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    RerankUsage,
    ScoreItem,
    ScoreList,
    ScoreRequest,
    Texts,
)
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from workers.errors import EngineError, RequestError
from workers.protocol import EngineFacts, GenerateRequest, SamplingParams, TokenDelta

Pairs = Sequence[tuple[str, str]]


async def score(request: web.Request) -> web.Response:
    """One score for each pair, in their order."""
    arrived = time.monotonic()
    body = await read_body(request, ScoreRequest)
    pairs = _pairs(body.text_1, body.text_2)
    scores, usage, answer_id = await _score(request, body, pairs, params=("text_1", "text_2"), arrived=arrived)
    return json_response(
        ScoreList(
            id=f"score-{answer_id}",
            created=int(time.time()),
            model=body.model,
            data=[ScoreItem(index=i, score=value) for i, value in enumerate(scores)],
            usage=usage,
        )
    )


async def rerank(request: web.Request) -> web.Response:
    """The documents, best first; equal ones in their order."""
    arrived = time.monotonic()
    body = await read_body(request, RerankRequest)
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    pairs = [(body.query, text) for text in texts]
    scores, usage, answer_id = await _score(request, body, pairs, params=("query", "documents"), arrived=arrived)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    shows = body.return_documents is not False
    return json_response(
        RerankResponse(
            id=f"rerank-{answer_id}",
            model=body.model,
            usage=RerankUsage(total_tokens=usage.total_tokens),
            results=[
                RerankResult(
                    index=i, relevance_score=scores[i], document=RerankDocument(text=texts[i]) if shows else None
                )
                for i in order[: body.top_n or None]
            ],
        )
    )


def _pairs(first: Texts, second: Texts) -> list[tuple[str, str]]:
    firsts = [first] if isinstance(first, str) else first
    seconds = [second] if isinstance(second, str) else second
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise RequestError(
            f"'text_1' has {len(firsts)} texts and 'text_2' has {len(seconds)}.",
            remedy="Send one text_1, or as many of both.",
            param="text_2",
        )
    return list(zip(firsts, seconds, strict=True))


async def _score(
    request: web.Request,
    body: ScoreRequest | RerankRequest,
    pairs: Pairs,
    *,
    params: tuple[str, str],
    arrived: float,
) -> tuple[list[float], InputUsage, str]:
    api, context = request.app[CONTEXT].serving(body.model), request[REQUEST_CONTEXT]
    deadline = request_options.deadline(request, arrived=arrived)
    api.check_model(body.model, context)
    is_similarity = body.scoring != "logprob"
    if is_similarity and not api.serves_embeddings:
        raise RequestError(NO_EMBEDDINGS, remedy="Send 'scoring': 'logprob'.", code="embeddings_disabled")
    if not is_similarity:
        api.ignore(context, truncate_prompt_tokens=body.truncate_prompt_tokens)
    log_prompt(pairs)
    answer_id = uuid.uuid4().hex
    adapter = await api.use_model(body.model, context)
    make = _embedded if is_similarity else _continued
    requests, places = await make(api, body, pairs, context, params=params, answer_id=answer_id, adapter=adapter)
    with admit_inputs(api, requests, context=context, deadline=deadline) as admission:
        # The first request fills the prefix cache for the others.
        num_first = 0 if is_similarity else 1
        deltas: list[TokenDelta] = []
        for part in (requests[:num_first], requests[num_first:]):
            if part:
                deltas += await run_inputs(api, part, context=context, admission=admission, arrived=arrived)
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    usage = InputUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    if not is_similarity:
        return [_logprob(delta) for delta in deltas], usage, answer_id
    vectors = [_unit_vector(delta) for delta in deltas]
    return [float(vectors[i] @ vectors[j]) for i, j in places], usage, answer_id


async def _embedded(
    api: ApiContext,
    body: ScoreRequest | RerankRequest,
    pairs: Pairs,
    context: RequestContext,
    *,
    params: tuple[str, str],
    answer_id: str,
    adapter: str | None,
) -> tuple[list[GenerateRequest], list[tuple[int, int]]]:
    """One request for each text, and where the two texts of each pair are among them."""
    facts, keep = api.router.facts, body.truncate_prompt_tokens
    place_of: dict[str, int] = {}
    requests: list[GenerateRequest] = []
    for pair in pairs:
        for text, param in zip(pair, params, strict=True):
            if text in place_of:
                continue
            place_of[text] = len(requests)
            encoded = await encode_prompt(api.tokenizer, text, facts=facts, truncates=keep is not None, param=param)
            token_ids = truncate(encoded, keep, facts=facts, num_output=None)
            sampling = SamplingParams(max_tokens=0, seed=0)
            requests.append(
                _request(
                    token_ids,
                    sampling,
                    f"score-{answer_id}-{len(requests)}",
                    param=param,
                    facts=facts,
                    adapter=adapter,
                    priority=context.priority_of(body.priority),
                    embed=True,
                )
            )
    return requests, [(place_of[first], place_of[second]) for first, second in pairs]


async def _continued(
    api: ApiContext,
    body: ScoreRequest | RerankRequest,
    pairs: Pairs,
    context: RequestContext,
    *,
    params: tuple[str, str],
    answer_id: str,
    adapter: str | None,
) -> tuple[list[GenerateRequest], list[tuple[int, int]]]:
    """One request for each pair, for the log-probabilities of the second text's tokens."""
    facts, requests = api.router.facts, []
    for i, (first, second) in enumerate(pairs):
        before = await encode_prompt(api.tokenizer, first, facts=facts, param=params[0])
        after = api.tokenizer.encode_continuation(second)
        if not after:
            raise RequestError(f"{params[1]!r} contains an empty text.", remedy="Remove it.", param=params[1])
        sampling = SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0, prompt_logprobs_start=len(before))
        requests.append(
            _request(
                [*before, *after],
                sampling,
                f"score-{answer_id}-{i}",
                param=params[1],
                facts=facts,
                adapter=adapter,
                priority=context.priority_of(body.priority),
                embed=False,
            )
        )
    return requests, []


def _request(
    token_ids: list[int],
    sampling: SamplingParams,
    request_id: str,
    *,
    param: str,
    facts: EngineFacts,
    adapter: str | None,
    priority: int,
    embed: bool,
) -> GenerateRequest:
    if len(token_ids) >= facts.max_model_len:
        raise too_long(len(token_ids), param=param, max_model_len=facts.max_model_len)
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=sampling,
        priority=priority,
        embed=embed,
        adapter=adapter,
    )


def _unit_vector(delta: TokenDelta) -> np.ndarray:
    if delta.embedding is None:
        raise EngineError("The replica sent no embedding. It may run an older version.")
    vector = np.frombuffer(delta.embedding, "<f4").astype(np.float64)
    return np.asarray(vector / (np.linalg.norm(vector) or 1.0))


def _logprob(delta: TokenDelta) -> float:
    if delta.prompt_logprobs is None:
        raise EngineError("The replica sent no log-probabilities. It may run an older version.")
    return sum(entry.logprob for entry in delta.prompt_logprobs if entry is not None)
