"""POST /v1/completions: continue a prompt (text or token ids), echo it, or fill in the text before a suffix.

Knows the endpoint's prompt forms; completion_format.py formats the response. The output's text continues the prompt's: a first token
`▁world` after "Hello" is " world".
"""

import time
import uuid
from collections.abc import Sequence

from aiohttp import web

from cluster.api.context import CONTEXT, ApiContext
from cluster.api.endpoints.completion_format import CompletionFormatter
from cluster.api.generation import sampling
from cluster.api.generation.answering import Prepared, answer, check_shape
from cluster.api.generation.generation import Choice, make_choice
from cluster.api.generation.prompts import check_text_length, encode_prompt, in_thread_if_long, split_prompt, truncate
from cluster.api.generation.structured import check_combination, structured_output
from cluster.api.request_context import REQUEST_CONTEXT, RequestContext
from cluster.api.schemas.completions import Completion, CompletionRequest
from cluster.api.server import request_options
from cluster.api.server.body import read_body
from cluster.system.log import log_prompt
from cluster.text.infilling import encode_infilling
from workers.errors import RequestError
from workers.protocol import EngineFacts


async def handle(request: web.Request) -> web.StreamResponse:
    """One response, or a stream of chunks."""
    api, context = request.app[CONTEXT], request[REQUEST_CONTEXT]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = await read_body(request, CompletionRequest)
    api = api.serving(body.model)
    check(api, body, context)
    log_prompt(body.prompt)
    prepared = await prepare(api, body, context)
    return await answer(request, api, prepared, deadline=deadline, arrived=arrived)


def check(api: ApiContext, body: CompletionRequest, context: RequestContext) -> None:
    """Checks all that needs no replica. Raises RequestError."""
    api.check_model(body.model, context)
    prompts = split_prompt(body.prompt)
    _check_fields(body, prompts)
    check_shape(api, body, context, num_prompts=len(prompts), num_copies=body.num_copies)
    if body.suffix or not any(isinstance(prompt, str) for prompt in prompts):
        api.ignore(context, add_special_tokens=body.add_special_tokens)


async def prepare(api: ApiContext, body: CompletionRequest, context: RequestContext) -> Prepared:
    """Raises RequestError for what the model cannot do, ReplicaUnavailableError while the model's facts are not known yet."""
    head = Completion(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    facts = api.router.facts
    adapter = await api.use_model(body.model, context)
    choices = await _choices(api, body, context, facts=facts, answer_id=head.id, adapter=adapter)
    return Prepared(body=body, choices=choices, formatter=CompletionFormatter(api, body, head, choices))


def _check_fields(body: CompletionRequest, prompts: Sequence[str | list[int]]) -> None:
    """Raises RequestError for combinations that make no sense."""
    n = body.n or 1
    if body.best_of is not None and body.best_of < n:
        raise RequestError(
            f"'best_of' is {body.best_of}, less than 'n', which is {n}.", remedy="Send at least n.", param="best_of"
        )
    if body.best_of is not None and body.best_of > n and body.stream:
        raise RequestError(
            "'best_of' above 'n' cannot be streamed: which sequences are best is only known at the end.",
            remedy="Remove 'best_of' or 'stream'.",
            param="best_of",
        )
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise RequestError(
            "'max_tokens' is 0, so the response would be empty.",
            remedy="Send at least 1, or request 'echo' or 'prompt_logprobs'.",
            param="max_tokens",
        )
    if body.suffix:
        if body.echo:
            raise RequestError("'echo' cannot be combined with 'suffix'.", remedy="Remove one of them.", param="echo")
        if not all(isinstance(p, str) for p in prompts):
            raise RequestError(
                "'suffix' cannot follow a prompt of token ids.", remedy="Send the prompt as text.", param="suffix"
            )


async def _choices(
    api: ApiContext,
    body: CompletionRequest,
    context: RequestContext,
    *,
    facts: EngineFacts,
    answer_id: str,
    adapter: str | None,
) -> list[Choice]:
    num_copies = body.num_copies
    choices: list[Choice] = []
    wanted = structured_output(body)
    if wanted is not None:
        check_combination(body, wanted[1])
    counts = [count for count in (body.logprobs if body.echo else None, body.prompt_logprobs) if count is not None]
    needs_ranking = num_copies > (body.n or 1)
    pieces = api.tokenizer.shown_pieces(shows_special=body.shows_special_tokens)
    grammars: dict[bool, str] = {}  # by whether the output starts the text
    for prompt in split_prompt(body.prompt):
        token_ids = await _encode(api, body, prompt, facts=facts)
        grammar = None
        if wanted is not None:
            # No text comes before the output: its first token loses a leading space.
            at_start = pieces.opens_text(token_ids)
            if at_start not in grammars:
                grammars[at_start] = await api.grammars.compile(
                    wanted[0], at_start=at_start, param=wanted[1], facts=facts, tenant=context.tenant
                )
            grammar = grammars[at_start]
        max_tokens = sampling.resolve_max_tokens(
            body.max_tokens,
            default=sampling.default_completion_tokens(body, api.sampling_defaults),
            num_prompt_tokens=len(token_ids),
            facts=facts,
            prompt_param="prompt",
        )
        # With the client's seed, a prompt's output does not depend on the other prompts; without one, equal prompts get different outputs.
        seed = context.seed_of(body.requested_seed)
        for copy in range(num_copies):
            params = sampling.sampling_params(
                body,
                max_tokens=max_tokens,
                seed=sampling.derive_seed(seed, copy),
                logprobs=0 if needs_ranking and body.logprobs is None else body.logprobs,
                prompt_logprobs=max(counts, default=None),
                grammar=grammar,
                tokenizer=api.tokenizer,
                facts=facts,
                defaults=api.sampling_defaults,
            )
            choices.append(
                make_choice(
                    api,
                    body,
                    context=context,
                    answer_id=answer_id,
                    index=len(choices),
                    copy=copy,
                    prompt_token_ids=token_ids,
                    continues=token_ids,
                    sampling=params,
                    adapter=adapter,
                    # Clients that score a continuation with echo expect one entry for each token.
                    shows_end=True,
                )
            )
    return choices


async def _encode(
    api: ApiContext, body: CompletionRequest, prompt: str | list[int], *, facts: EngineFacts
) -> list[int]:
    tokenizer, keep = api.tokenizer, body.truncate_prompt_tokens
    if body.suffix and isinstance(prompt, str):
        if keep is not None:
            raise RequestError(
                "'truncate_prompt_tokens' cannot be combined with 'suffix'.",
                remedy="Shorten the prompt or the suffix.",
                param="truncate_prompt_tokens",
            )
        suffix, num_chars = body.suffix, len(prompt) + len(body.suffix)
        check_text_length(num_chars, tokenizer, param="prompt", facts=facts)
        return await in_thread_if_long(num_chars, lambda: encode_infilling(tokenizer, prompt, suffix))
    adds = body.add_special_tokens is not False
    token_ids = await encode_prompt(tokenizer, prompt, facts=facts, truncates=keep is not None, add_special_tokens=adds)
    return truncate(token_ids, keep, facts=facts, num_output=body.max_tokens)
