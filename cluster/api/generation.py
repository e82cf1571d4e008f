"""Runs the sequences of one HTTP request and merges what they say, in the order it comes.

Knows choices, the router and the request's connection. Does not know how an endpoint words its answer. Leaving `run`, for
whatever reason, closes every stream it opened, and so frees what the replicas hold.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from cluster.api.errors import ClientGoneError
from cluster.api.gateway import Gateway
from cluster.api.schemas import GenerationRequest, PromptTokensDetails, Usage
from cluster.router.admission import Admission
from cluster.router.stream import Trace
from cluster.text.output import OutputStep, OutputText, PlacedLogprob
from workers.errors import EngineError, RequestError
from workers.protocol import FinishReason, GenerateRequest, SamplingParams


@dataclass
class Choice:
    """One sequence of an answer. `copy` counts the sequences of one prompt: 0 to n-1."""

    index: int
    copy: int
    request: GenerateRequest
    output: OutputText
    num_cached_tokens: int | None = None  # None before the first delta
    trace: Trace = field(default_factory=Trace)


Event = tuple[Choice, OutputStep]


def make_choice(
    gateway: Gateway,
    body: GenerationRequest,
    *,
    answer_id: str,
    index: int,
    copy: int,
    prompt_token_ids: list[int],
    continues: Sequence[int],
    sampling: SamplingParams,
) -> Choice:
    """continues: the ids whose text stands before the answer's (see Detokenizer)."""
    request = GenerateRequest(
        request_id=f"{answer_id}-{index}",
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        priority=body.priority or 0,
    )
    output = OutputText(
        gateway.tokenizer,
        continues=continues,
        stop=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=sampling.min_tokens,
    )
    return Choice(index, copy, request, output)


def check_shape(gateway: Gateway, body: GenerationRequest, *, num_prompts: int) -> None:
    """Raises RequestError for a body whose fields contradict each other or ask for too many sequences."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
    if not all(body.stop_strings):
        raise RequestError("'stop' must not hold an empty string.", param="stop")
    total, most = num_prompts * (body.n or 1), gateway.max_sequences_per_request
    if total > most:
        raise RequestError(
            f"The request asks for {total} sequences ({num_prompts} prompts times n), more than the {most} one request may have.",
            param="n" if num_prompts <= most else "prompt",
        )


def admit(
    gateway: Gateway, choices: Sequence[Choice], *, deadline: float | None
) -> contextlib.AbstractContextManager[Admission]:
    """Room for all of these sequences or none; see Router.admit."""
    requests = [c.request for c in choices]
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    return gateway.router.admit(len(requests), num_tokens, priority=requests[0].priority, deadline=deadline)


def usage(choices: Sequence[Choice]) -> Usage:
    """Each prompt counts once however many sequences it got; the stop token counts as generated."""
    first_copies = [c for c in choices if c.copy == 0]
    prompt = sum(len(c.request.prompt_token_ids) for c in first_copies)
    completion = sum(c.output.num_tokens for c in choices)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(c.num_cached_tokens or 0 for c in first_copies)),
    )


async def run(
    gateway: Gateway, choices: Sequence[Choice], http_request: web.Request, *, admission: Admission, arrived: float
) -> AsyncGenerator[Event, None]:
    """Yields (choice, what it adds) until every choice has finished. arrived: time.monotonic() at the request's first byte.

    Raises what the router raises, EngineError for a sequence the engine gave up, ClientGoneError when nobody listens any more.
    """
    events = (
        _run_one(gateway, choices[0], admission=admission, arrived=arrived)
        if len(choices) == 1
        else _merge(gateway, choices, admission=admission, arrived=arrived)
    )
    async with contextlib.aclosing(events):
        async for event in events:
            # A server run with handler_cancellation=True cancels us sooner; this needs no such setting.
            if http_request.transport is None or http_request.transport.is_closing():
                raise ClientGoneError("The client closed the connection.")
            yield event


@dataclass
class Whole:
    """All of one choice, for an answer in one piece."""

    text: str = ""
    logprobs: list[PlacedLogprob] = field(default_factory=list)


async def collect(events: AsyncGenerator[Event, None], choices: Sequence[Choice]) -> list[Whole]:
    """Runs to the end; one result per choice, in their order."""
    texts: list[list[str]] = [[] for _ in choices]
    results = [Whole() for _ in choices]
    async for choice, step in events:
        texts[choice.index].append(step.text)
        results[choice.index].logprobs += step.logprobs
    for result, parts in zip(results, texts, strict=True):
        result.text = "".join(parts)
    return results


async def _run_one(
    gateway: Gateway, choice: Choice, *, admission: Admission, arrived: float
) -> AsyncGenerator[Event, None]:
    metrics = gateway.metrics.sequence(num_prompt_tokens=len(choice.request.prompt_token_ids), arrived=arrived)
    trace = choice.trace
    outcome = "abort"
    try:
        deltas = gateway.router.generate(choice.request, admission=admission, trace=trace)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise EngineError(delta.error or "The engine ended this request before it was complete.")
                if choice.num_cached_tokens is None and trace.queue_s is not None:
                    choice.num_cached_tokens = delta.num_cached_tokens or 0
                    metrics.queued(trace.queue_s)
                    if trace.num_cached_tokens_predicted is not None:
                        metrics.routed(
                            num_predicted_cached=trace.num_cached_tokens_predicted, num_cached=choice.num_cached_tokens
                        )
                num_before = choice.output.num_tokens
                step = choice.output.push(delta)
                metrics.produced(choice.output.num_tokens - num_before, time.monotonic())
                if step.finish_reason is not None:
                    outcome = step.finish_reason.value
                yield choice, step
                if step.finish_reason is not None:
                    return
    except Exception:
        outcome = "error"
        raise
    finally:
        metrics.ended(outcome)


async def _merge(
    gateway: Gateway, choices: Sequence[Choice], *, admission: Admission, arrived: float
) -> AsyncGenerator[Event, None]:
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue(
        maxsize=len(choices)
    )  # a slow reader slows the readers below

    async def pump(choice: Choice) -> None:
        try:
            async with contextlib.aclosing(_run_one(gateway, choice, admission=admission, arrived=arrived)) as events:
                async for event in events:
                    await queue.put(event)
        except Exception as e:
            await queue.put(e)

    tasks = [asyncio.create_task(pump(choice), name=choice.request.request_id) for choice in choices]
    try:
        num_open = len(tasks)
        while num_open:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event[1].finish_reason is not None:
                num_open -= 1
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
