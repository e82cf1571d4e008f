"""Runs the sequences of one request and merges their deltas, in the order of arrival.

Knows choices and the router; knows no HTTP and no response formats. Leaving `run`, for any reason, closes every stream it opened, which
frees the sequences on the replicas.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cluster.api.context import ApiContext
from cluster.api.request_context import RequestContext
from cluster.api.schemas.base import GenerationRequest, PromptTokensDetails, Usage
from cluster.api.server.errors import ClientGoneError
from cluster.api.server.shortcut import Shortcut
from cluster.router.admission.admission import Admission
from cluster.router.stream import Trace
from cluster.text.output.options import DEFAULT_OPTIONS, OutputOptions
from cluster.text.output.output_text import OutputStep, OutputText, PlacedLogprob
from workers.errors import EngineError, RequestError
from workers.protocol import FinishReason, GenerateRequest, SamplingParams, TokenDelta, TokenLogprob


@dataclass
class Choice:
    """One sequence of a response. `copy` numbers the sequences of one prompt: 0 to n-1.

    `num_cached_tokens` is None until the first delta, which also brings `prompt_logprobs` if requested. `sum_logprob`: over the output's
    tokens, where log-probabilities were requested. `options`: what `output` was made with. `numerics`: of the replica that generated the
    tokens that `request` has already.
    """

    index: int
    copy: int
    request: GenerateRequest
    output: OutputText
    context: RequestContext
    options: OutputOptions = DEFAULT_OPTIONS
    numerics: str | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    sum_logprob: float = 0.0
    trace: Trace = field(default_factory=Trace)

    def rename(self, answer_id: str) -> None:
        """Before it runs: its request is called after the response that the client gets."""
        self.request = msgspec.structs.replace(self.request, request_id=f"{answer_id}-{self.index}")

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprob / max(self.output.num_tokens, 1)


class Event(NamedTuple):
    """What one delta adds to a choice. `token_ids`: all generated tokens, including those without text."""

    choice: Choice
    step: OutputStep
    token_ids: list[int]
    is_first: bool


def make_choice(
    api: ApiContext,
    body: GenerationRequest,
    *,
    context: RequestContext,
    answer_id: str,
    index: int,
    copy: int,
    prompt_token_ids: list[int],
    continues: Sequence[int],
    sampling: SamplingParams,
    adapter: str | None = None,
    tool_calls_token_id: int | None = None,
    call_tags: bool = False,
    shows_end: bool = False,
    reads_thoughts: bool = False,
) -> Choice:
    """continues, tool_calls_token_id, call_tags, shows_end, reads_thoughts: see OutputText."""
    request = GenerateRequest(
        request_id=f"{answer_id}-{index}",
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        priority=context.priority_of(body.priority),
        adapter=adapter,
    )
    options = OutputOptions(
        continues=continues,
        stop=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=sampling.min_tokens,
        tool_calls_token_id=tool_calls_token_id,
        call_tags=call_tags,
        shows_end=shows_end,
        shows_special=body.shows_special_tokens,
        reads_thoughts=reads_thoughts,
    )
    return Choice(index, copy, request, options.open(api.tokenizer), context, options)


@contextlib.contextmanager
def admit(api: ApiContext, choices: Sequence[Choice], *, deadline: float | None) -> Iterator[Admission]:
    """Admits all of these sequences or none, within the API key's limits; see Router.admit."""
    requests = [c.request for c in choices]
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    context = choices[0].context
    num_charged = sum(len(c.request.prompt_token_ids) for c in choices if c.copy == 0)
    with (
        context.reserve(num_charged),
        api.router.admit(
            len(requests), num_tokens, priority=requests[0].priority, deadline=deadline, tenant=context.tenant
        ) as admission,
    ):
        yield admission


def usage(choices: Sequence[Choice]) -> Usage:
    """Each prompt counts once, however many sequences it has. The stop token counts as generated."""
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
    api: ApiContext,
    choices: Sequence[Choice],
    *,
    admission: Admission,
    arrived: float,
    is_gone: Callable[[], bool] | None = None,
    shortcut: Shortcut[Event] | None = None,
) -> AsyncGenerator[Event, None]:
    """Yields what each delta adds until every choice has finished.

    arrived: time.monotonic() at the request's first byte. is_gone: whether the client has disconnected. shortcut: where it is free, most
    events are written there and not yielded.
    Raises what the router raises, EngineError if the engine gave up a sequence, ClientGoneError if the client has disconnected.
    """
    events = (
        _run_one(api, choices[0], admission=admission, arrived=arrived, shortcut=shortcut)
        if len(choices) == 1
        else _merge(api, choices, admission=admission, arrived=arrived, shortcut=shortcut)
    )
    async with contextlib.aclosing(events):
        async for event in events:
            # A server with handler_cancellation=True cancels this task sooner; this check works without that setting.
            if is_gone is not None and is_gone():
                raise ClientGoneError("The client closed the connection.")
            yield event


def raise_if_failed(delta: TokenDelta) -> None:
    """Raises RequestError if the engine refused the sequence, EngineError if it gave it up."""
    if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        message = delta.error or "The engine ended this request before it was complete."
        raise RequestError(message) if delta.refused else EngineError(message)


@dataclass
class Whole:
    """All of one choice, for a response in one piece."""

    choice: Choice
    text: str = ""
    logprobs: list[PlacedLogprob] = field(default_factory=list)
    steps: list[OutputStep] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


async def collect(events: AsyncGenerator[Event, None], choices: Sequence[Choice]) -> list[Whole]:
    """Runs to the end. Returns one result per choice, in their order."""
    results = {c.index: Whole(c) for c in choices}
    async for event in events:
        result = results[event.choice.index]
        result.steps.append(event.step)
        result.token_ids += event.token_ids
    for result in results.values():
        result.text = "".join([step.text for step in result.steps])
        result.logprobs = [placed for step in result.steps for placed in step.logprobs]
    return list(results.values())


async def _run_one(
    api: ApiContext, choice: Choice, *, admission: Admission, arrived: float, shortcut: Shortcut[Event] | None
) -> AsyncGenerator[Event, None]:
    metrics = api.metrics.sequence(
        num_prompt_tokens=len(choice.request.prompt_token_ids),
        arrived=arrived,
        is_line=choice.context.is_batch_line,
        adapter=choice.request.adapter,
    )
    trace = choice.trace
    if choice.context.trace is not None:
        trace.spans = choice.context.trace.sequence(choice.request)
    outcome = "abort"
    error: Exception | None = None
    is_first = True

    def push(delta: TokenDelta) -> Event:
        num_before = choice.output.num_tokens
        step = choice.output.push(delta)
        num_new = choice.output.num_tokens - num_before
        if delta.logprobs is not None:
            choice.sum_logprob += sum(entry.logprob for entry in delta.logprobs[:num_new])
        metrics.produced(num_new, time.monotonic())
        choice.context.add_output_tokens(num_new)
        return Event(choice, step, delta.token_ids[:num_new], is_first)

    def take(delta: TokenDelta) -> bool:
        assert shortcut is not None
        if not shortcut.is_free():
            return False
        shortcut.write(push(delta))
        return True

    try:
        deltas = api.router.generate(
            choice.request,
            admission=admission,
            trace=trace,
            max_crashes=choice.context.max_crashes,
            numerics=choice.numerics,
            # What may end with any of its tokens is for the loop below.
            take=take if shortcut is not None and choice.output.is_only_text else None,
        )
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                raise_if_failed(delta)
                if choice.num_cached_tokens is None and trace.queue_s is not None:
                    choice.num_cached_tokens = delta.num_cached_tokens or 0
                    if choice.copy == 0:
                        choice.context.add_cached_tokens(choice.num_cached_tokens)
                    metrics.queued(trace.queue_s)
                    if trace.num_cached_tokens_predicted is not None:
                        metrics.routed(
                            num_predicted_cached=trace.num_cached_tokens_predicted, num_cached=choice.num_cached_tokens
                        )
                if delta.prompt_logprobs is not None:
                    choice.prompt_logprobs = delta.prompt_logprobs
                event = push(delta)
                is_first, reason = False, event.step.finish_reason
                if reason is not None:
                    outcome = reason.value
                yield event
                if reason is not None:
                    return
        # `_merge` would wait for this one for ever.
        raise EngineError("The sequence ended without a reason.")
    except Exception as e:
        outcome, error = "error", e
        choice.context.mark_failed()
        raise
    finally:
        metrics.ended(outcome)
        if trace.spans is not None:
            trace.spans.end(
                outcome,
                num_prompt_tokens=len(choice.request.prompt_token_ids),
                num_cached_tokens=choice.num_cached_tokens or 0,
                num_output_tokens=choice.output.num_tokens,
                error=error,
            )


async def _merge(
    api: ApiContext,
    choices: Sequence[Choice],
    *,
    admission: Admission,
    arrived: float,
    shortcut: Shortcut[Event] | None,
) -> AsyncGenerator[Event, None]:
    # Bounded, so that a slow client slows down the streams it reads from.
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue(maxsize=len(choices))
    is_yielding = False
    past_queue: Shortcut[Event] | None = None
    if shortcut is not None:
        past_queue, ahead = Shortcut(), shortcut
        past_queue.open(
            is_free=lambda: not is_yielding and queue.empty() and ahead.is_free(),
            write=lambda event: ahead.write(event),
        )

    async def pump(choice: Choice) -> None:
        try:
            async with contextlib.aclosing(
                _run_one(api, choice, admission=admission, arrived=arrived, shortcut=past_queue)
            ) as events:
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
            if event.step.finish_reason is not None:
                num_open -= 1
            is_yielding = True
            yield event
            is_yielding = False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
