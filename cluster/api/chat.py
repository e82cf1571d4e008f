"""POST /v1/chat/completions: a conversation, answered.

Knows the endpoint's messages and answer shape; templates are cluster/text/chat.py's. The answer's text opens without the space its
first token may carry, unless it continues an assistant message with `prefix`.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence

import msgspec
from aiohttp import web

from cluster.api import request_options, sampling, sse
from cluster.api.completions import LONG_TEXT_CHARS, LOWEST_LOGPROB, refuse_hopeless
from cluster.api.gateway import GATEWAY, Gateway
from cluster.api.generation import Choice, Event, admit, check_shape, collect, make_choice, run, usage
from cluster.api.schemas import (
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenLogprob,
    TopLogprob,
    UserMessage,
    parse,
)
from cluster.text.chat import ChatPrompt, Message, Role
from cluster.text.output import PlacedLogprob
from cluster.text.tokenizer import Tokenizer
from workers.errors import RequestError
from workers.protocol import EngineFacts


async def handle(request: web.Request) -> web.StreamResponse:
    """One answer, or a stream of chunks."""
    gateway = request.app[GATEWAY]
    arrived = time.monotonic()
    deadline = request_options.deadline(request, arrived=arrived)
    body = parse(await request.read(), ChatRequest)
    gateway.check_model(body.model)
    facts = gateway.router.facts
    check_shape(gateway, body, num_prompts=1)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError("'max_tokens' and 'max_completion_tokens' differ; send one of them.", param="max_tokens")
    answer = ChatCompletion(id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()), model=body.model, choices=[])
    prompt = await _encode(gateway, body.messages, facts=facts)
    choices = _choices(gateway, body, prompt, facts=facts, answer_id=answer.id)
    with admit(gateway, choices, deadline=deadline) as admission:
        events = run(gateway, choices, request, admission=admission, arrived=arrived)
        async with contextlib.aclosing(events):
            if body.stream:
                return await _stream(request, gateway, events, answer=answer, body=body, choices=choices)
            wholes = await collect(events, choices)
    finished = [
        ChatChoice(
            index=c.index,
            message=ChatAnswer(content=whole.text),
            logprobs=render_logprobs(gateway.tokenizer, whole.logprobs) if body.logprobs else None,
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


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The template's messages: text parts joined, `developer` as `system`."""
    converted = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role: Role = "system"
        prefix = False
        if isinstance(message, UserMessage):
            role = "user"
        elif isinstance(message, AssistantMessage):
            role, prefix = "assistant", bool(message.prefix)
        converted.append(Message(role, text, prefix))
    return converted


async def _encode(gateway: Gateway, messages: Sequence[ChatMessage], *, facts: EngineFacts) -> ChatPrompt:
    template = gateway.chat_template
    if template is None:
        raise RequestError("This model has no chat template; use /v1/completions.", param="messages")
    converted = to_messages(messages)
    num_chars = sum(len(m.content) for m in converted)
    refuse_hopeless(num_chars, gateway.tokenizer, param="messages", facts=facts)
    if num_chars + 100 * len(converted) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(template.encode, converted)
    return template.encode(converted)


def _choices(
    gateway: Gateway, body: ChatRequest, prompt: ChatPrompt, *, facts: EngineFacts, answer_id: str
) -> list[Choice]:
    seed = sampling.random_seed() if body.seed is None else body.seed
    max_tokens = sampling.resolve_max_tokens(
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        default=None,
        num_prompt_tokens=len(prompt.token_ids),
        facts=facts,
        prompt_param="messages",
    )
    choices = []
    for copy in range(body.n or 1):
        params = sampling.sampling_params(
            body,
            max_tokens=max_tokens,
            seed=sampling.derive_seed(seed, copy),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            facts=facts,
        )
        choices.append(
            make_choice(
                gateway,
                body,
                answer_id=answer_id,
                index=copy,
                copy=copy,
                prompt_token_ids=prompt.token_ids,
                continues=prompt.continues,
                sampling=params,
            )
        )
    return choices


async def _stream(
    request: web.Request,
    gateway: Gateway,
    events: AsyncGenerator[Event, None],
    *,
    answer: ChatCompletion,
    body: ChatRequest,
    choices: list[Choice],
) -> web.StreamResponse:
    opened: set[int] = set()

    def chunk(part: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[part])

    def chunks(event: Event) -> Iterator[ChatChunk]:
        choice, step = event
        index = choice.index
        if index not in opened:
            opened.add(index)
            yield chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
        if step.text or step.logprobs:
            logprobs = render_logprobs(gateway.tokenizer, step.logprobs) if body.logprobs else None
            yield chunk(ChatChunkChoice(index=index, delta=ChatDelta(content=step.text), logprobs=logprobs))
        if step.finish_reason is not None:
            yield chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=step.finish_reason))

    def last_chunks() -> Iterator[ChatChunk]:
        if body.include_usage:
            yield ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[], usage=usage(choices))

    return await sse.stream(
        request,
        events,
        chunks=chunks,
        last_chunks=last_chunks,
        headers=lambda: request_options.debug_headers(request, choices),
        keep_alive_s=gateway.keep_alive_s,
    )


def render_logprobs(tokenizer: Tokenizer, placed: Sequence[PlacedLogprob]) -> ChatLogprobs:
    """OpenAI's list of tokens, each with its alternatives."""

    def top(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=tokenizer.token_text(token_id),
            logprob=max(logprob, LOWEST_LOGPROB),
            bytes=tokenizer.token_bytes(token_id),
        )

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=tokenizer.token_text(p.logprob.token_id),
                logprob=max(p.logprob.logprob, LOWEST_LOGPROB),
                bytes=tokenizer.token_bytes(p.logprob.token_id),
                top_logprobs=[top(*t) for t in p.logprob.top],
            )
            for p in placed
        ]
    )
