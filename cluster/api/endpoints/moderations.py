"""POST /v1/moderations: the served model itself classifies a text, as one of Mistral's 13 categories or none.

Every possible answer is scored. Its probability, given the question, is the product of its tokens' probabilities, including the end of
the answer. The scores are these probabilities divided by their sum: the distribution of a choice constrained to these answers. The
question is computed once; for the other answers it comes from the replica's prefix cache.
Knows the endpoint's body and response, and the scoring; the question's text is in cluster/text/chat/moderation.py.
"""

import asyncio
import math
import re
import time
import uuid

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.generation.answering import json_response
from cluster.api.generation.inputs import admit_inputs, run_inputs
from cluster.api.generation.prompts import check_text_length
from cluster.api.generation.sampling import too_long
from cluster.api.request_context import REQUEST_CONTEXT
from cluster.api.schemas.moderations import OPENAI_CATEGORIES, Moderation, ModerationRequest, ModerationResponse
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.chat.moderation import CATEGORIES, NOT_MODERATED, moderation_prompt
from cluster.text.chat.template import Message
from workers.errors import EngineError, RequestError
from workers.protocol import EngineFacts, GenerateRequest, SamplingParams, TokenDelta

ANSWERS = (*CATEGORIES, NOT_MODERATED)
_MODERATION_MODEL = re.compile(r"(omni|text|mistral)-moderation-[a-z0-9-]{1,40}")


async def handle(request: web.Request) -> web.Response:
    """One result for each input, in their order."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, ModerationRequest)
    api = api.serving(body.model)
    model = _served_model(api, body.model)
    api.check_model(model, context)
    texts = _texts(body)
    log_prompt(texts)
    facts = api.router.facts
    answer_id = f"modr-{uuid.uuid4().hex}"
    adapter = await api.use_model(model, context)
    answers = [api.tokenizer.encode(answer, bos=False) for answer in ANSWERS]
    questions = await asyncio.to_thread(_questions, api, texts, facts=facts)
    requests = [
        _scored(question, answer, facts=facts, request_id=f"{answer_id}-{i}-{k}", adapter=adapter)
        for i, question in enumerate(questions)
        for k, answer in enumerate(answers)
    ]
    with admit_inputs(api, requests, context=context, deadline=deadline) as admission:
        deltas: list[TokenDelta] = []
        for start in range(0, len(requests), len(ANSWERS)):
            # The first request fills the prefix cache for the others.
            for part in (requests[start : start + 1], requests[start + 1 : start + len(ANSWERS)]):
                deltas += await run_inputs(api, part, context=context, admission=admission, arrived=arrived)
    scores = [_score(delta) for delta in deltas]
    results = [_classify(scores[i : i + len(ANSWERS)]) for i in range(0, len(scores), len(ANSWERS))]
    return json_response(ModerationResponse(id=answer_id, model=model, results=results))


def _served_model(api: ApiContext, name: str | None) -> str:
    """The served model also answers for the moderation models of OpenAI and Mistral, which their clients name."""
    is_known = name in api.model_names or (name is not None and api.adapters.knows(name))
    if name is None or (not is_known and _MODERATION_MODEL.fullmatch(name)):
        return api.model_names[0]
    return name


def _texts(body: ModerationRequest) -> list[str]:
    """The texts to judge. As with OpenAI, parts belong to one text. Raises RequestError for a mixture."""
    if isinstance(body.input, str):
        return [body.input]
    texts = [item for item in body.input if isinstance(item, str)]
    parts = [item.text for item in body.input if not isinstance(item, str)]
    if texts and parts:
        raise RequestError("'input' mixes texts and parts of a text.", remedy="Send only one kind.", param="input")
    return texts or ["\n\n".join(parts)]


def _questions(api: ApiContext, texts: list[str], *, facts: EngineFacts) -> list[list[int]]:
    template = api.chat_template
    if template is None:
        raise RequestError(
            "Moderations need a chat template, which this model does not have.", code="moderations_disabled"
        )
    questions = []
    for text in texts:
        prompt = moderation_prompt(text)
        check_text_length(len(prompt), api.tokenizer, param="input", facts=facts)
        questions.append(template.encode([Message("user", prompt)]).token_ids)
    return questions


def _scored(
    question: list[int], answer: list[int], *, facts: EngineFacts, request_id: str, adapter: str | None
) -> GenerateRequest:
    """A request for the log-probabilities of the answer's tokens and of the end token."""
    token_ids = [*question, *answer, facts.eos_token_ids[0]]
    if len(token_ids) >= facts.max_model_len:
        raise too_long(len(token_ids), param="input", max_model_len=facts.max_model_len)
    sampling = SamplingParams(max_tokens=0, seed=0, prompt_logprobs=0, prompt_logprobs_start=len(question))
    return GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, sampling=sampling, adapter=adapter)


def _score(delta: TokenDelta) -> float:
    if delta.prompt_logprobs is None:
        raise EngineError("The replica sent no log-probabilities. It may run an older version.")
    return sum(entry.logprob for entry in delta.prompt_logprobs if entry is not None)


def _classify(logprobs: list[float]) -> Moderation:
    """logprobs: one for each of ANSWERS. The likeliest answer is the result."""
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    scores = [weight / sum(weights) for weight in weights]
    answer = ANSWERS[scores.index(max(scores))]
    score_of = dict(zip(CATEGORIES, scores, strict=False))
    members = {category: (category,) for category in CATEGORIES} | OPENAI_CATEGORIES
    return Moderation(
        flagged=answer != NOT_MODERATED,
        categories={name: answer in included for name, included in members.items()},
        category_scores={name: math.fsum(score_of[c] for c in included) for name, included in members.items()},
        category_applied_input_types={name: ["text"] for name in members},
    )
