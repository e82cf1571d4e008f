"""POST /v1/completions: a prompt as text or token ids, continued.

Knows the endpoint's prompt forms and answer shape. The text of an answer goes on where the prompt's ended: a first token `▁world`
behind "Hello" is " world".
"""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence

import msgspec
from aiohttp import web

from cluster.api import request_options, sampling, sse
from cluster.api.gateway import GATEWAY, Gateway
from cluster.api.generation import Choice, Event, admit, check_shape, collect, make_choice, run, usage
from cluster.api.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, parse
from cluster.text.output import PlacedLogprob
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts

LONG_TEXT_CHARS = 4096  # about a millisecond of encoding; longer texts are encoded in a thread
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


async def handle(request: web.Request) -> web.StreamResponse:
    """One answer, or a stream of chunks."""
    gateway = request.app[GATEWAY]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = parse(await request.read(), CompletionRequest)
    gateway.check_model(body.model)
    facts = gateway.router.facts
    prompts = split_prompt(body.prompt)
    check_shape(gateway, body, num_prompts=len(prompts))
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("'best_of' other than n is not supported by this server; leave it out.", param="best_of")
    answer = Completion(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    choices = await _choices(gateway, body, prompts, facts=facts, answer_id=answer.id)
    with admit(gateway, choices, deadline=deadline) as admission:
        events = run(gateway, choices, request, admission=admission, arrived=arrived)
        async with contextlib.aclosing(events):
            if body.stream:
                return await _stream(request, gateway, events, answer=answer, body=body, choices=choices)
            wholes = await collect(events, choices)
    finished = [
        CompletionChoice(
            index=c.index,
            text=whole.text,
            logprobs=None if body.logprobs is None else render_logprobs(gateway.tokenizer, whole.logprobs),
            finish_reason=c.output.finish_reason,
        )
        for c, whole in zip(choices, wholes, strict=True)
    ]
    answer = msgspec.structs.replace(answer, choices=finished, usage=usage(choices))
    return web.Response(
        body=msgspec.json.encode(answer),
        content_type="application/json",
        headers=request_options.debug_headers(request, choices),
    )


def split_prompt(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts a body's `prompt` holds. Raises RequestError for an empty or a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(isinstance(p, list) and not p for p in prompt):
        raise RequestError("'prompt' holds an empty list; send at least one text or token id.", param="prompt")
    token_ids = [p for p in prompt if isinstance(p, int)]
    prompts = [p for p in prompt if not isinstance(p, int)]
    if token_ids and not prompts:
        return [token_ids]
    if token_ids or len({type(p) for p in prompts}) > 1:
        raise RequestError("'prompt' mixes texts and token ids; use one of them.", param="prompt")
    return prompts


async def _choices(
    gateway: Gateway, body: CompletionRequest, prompts: list[str | list[int]], *, facts: EngineFacts, answer_id: str
) -> list[Choice]:
    choices: list[Choice] = []
    for prompt in prompts:
        token_ids = await encode_prompt(gateway.tokenizer, prompt, facts=facts)
        max_tokens = sampling.resolve_max_tokens(
            body.max_tokens,
            default=max(sampling.DEFAULT_COMPLETION_TOKENS, body.min_tokens or 0),
            num_prompt_tokens=len(token_ids),
            facts=facts,
            prompt_param="prompt",
        )
        # With the client's seed a prompt's text does not depend on its neighbours; without one, equal prompts differ.
        seed = sampling.random_seed() if body.seed is None else body.seed
        for copy in range(body.n or 1):
            params = sampling.sampling_params(
                body,
                max_tokens=max_tokens,
                seed=sampling.derive_seed(seed, copy),
                logprobs=body.logprobs,
                facts=facts,
            )
            choices.append(
                make_choice(
                    gateway,
                    body,
                    answer_id=answer_id,
                    index=len(choices),
                    copy=copy,
                    prompt_token_ids=token_ids,
                    continues=token_ids,
                    sampling=params,
                )
            )
    return choices


async def encode_prompt(tokenizer: Tokenizer, prompt: str | list[int], *, facts: EngineFacts) -> list[int]:
    """Token ids of one prompt, text with the beginning-of-sequence token before it. Raises RequestError."""
    if isinstance(prompt, list):
        sampling.check_token_ids(prompt, param="prompt", vocab_size=facts.vocab_size)
        return prompt
    refuse_hopeless(len(prompt), tokenizer, param="prompt", facts=facts)
    if len(prompt) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(tokenizer.encode, prompt)
    return tokenizer.encode(prompt)


def refuse_hopeless(num_chars: int, tokenizer: Tokenizer, *, param: str, facts: EngineFacts) -> None:
    """Raises RequestError for a text too long whatever its tokens are, before time is spent on encoding it."""
    least = math.ceil(num_chars / tokenizer.max_piece_chars)
    if least >= facts.max_model_len:
        raise sampling.too_long(least, param=param, max_model_len=facts.max_model_len, at_least=True)


async def _stream(
    request: web.Request,
    gateway: Gateway,
    events: AsyncGenerator[Event, None],
    *,
    answer: Completion,
    body: CompletionRequest,
    choices: list[Choice],
) -> web.StreamResponse:
    def chunks(event: Event) -> Iterator[Completion]:
        choice, step = event
        if step.text or step.logprobs or step.finish_reason is not None:
            logprobs = None if body.logprobs is None else render_logprobs(gateway.tokenizer, step.logprobs)
            part = CompletionChoice(
                index=choice.index, text=step.text, logprobs=logprobs, finish_reason=step.finish_reason
            )
            yield Completion(id=answer.id, created=answer.created, model=answer.model, choices=[part])

    def last_chunks() -> Iterator[Completion]:
        if body.include_usage:
            yield msgspec.structs.replace(answer, usage=usage(choices))

    return await sse.stream(
        request,
        events,
        chunks=chunks,
        last_chunks=last_chunks,
        headers=lambda: request_options.debug_headers(request, choices),
        keep_alive_s=gateway.keep_alive_s,
    )


def render_logprobs(tokenizer: Tokenizer, placed: Sequence[PlacedLogprob]) -> CompletionLogprobs:
    """OpenAI's parallel lists. The chosen token is always among `top_logprobs`, even beyond the number asked for."""
    tops: list[dict[str, float]] = []
    for p in placed:
        top: dict[str, float] = {}
        for token_id, logprob in [*p.logprob.top, (p.logprob.token_id, p.logprob.logprob)]:
            # Two tokens may read the same; the likelier one, which comes first, stays.
            top.setdefault(tokenizer.token_text(token_id), max(logprob, LOWEST_LOGPROB))
        tops.append(top)
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(p.logprob.token_id) for p in placed],
        token_logprobs=[max(p.logprob.logprob, LOWEST_LOGPROB) for p in placed],
        top_logprobs=tops,
        text_offset=[p.text_offset for p in placed],
    )
