"""Runs requests that compute a prompt and generate nothing, for embeddings and moderations.

Runs a few at a time, so that one HTTP request with 2,048 inputs does not fill the whole server and is not refused for lack of room.
Knows admission and the router; does not know what the results are for.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from cluster.api.context import ApiContext
from cluster.api.generation.generation import raise_if_failed
from cluster.api.request_context import RequestContext
from cluster.router.admission.admission import Admission
from cluster.router.stream import Trace
from workers.errors import EngineError
from workers.protocol import GenerateRequest, TokenDelta

MAX_AT_ONCE = 32


@contextlib.contextmanager
def admit_inputs(
    api: ApiContext, requests: Sequence[GenerateRequest], *, context: RequestContext, deadline: float | None
) -> Iterator[Admission]:
    """Admits as many of them as run at once, within the API key's limits. Raises what Router.admit raises."""
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    num_sequences = min(len(requests), MAX_AT_ONCE)
    priority = requests[0].priority
    with (
        context.reserve(num_tokens),
        api.router.admit(
            num_sequences, num_tokens, priority=priority, deadline=deadline, tenant=context.tenant
        ) as admission,
    ):
        yield admission


async def run_inputs(
    api: ApiContext,
    requests: Sequence[GenerateRequest],
    *,
    context: RequestContext,
    admission: Admission,
    arrived: float,
) -> list[TokenDelta]:
    """The last delta of each request, in their order. Raises what the router raises, EngineError if the engine gave one up."""
    slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(request: GenerateRequest) -> TokenDelta:
        async with slots:
            return await _run_one(api, request, context=context, admission=admission, arrived=arrived)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(request)) for request in requests]
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return [task.result() for task in tasks]


async def _run_one(
    api: ApiContext, request: GenerateRequest, *, context: RequestContext, admission: Admission, arrived: float
) -> TokenDelta:
    metrics = api.metrics.sequence(
        num_prompt_tokens=len(request.prompt_token_ids),
        arrived=arrived,
        is_line=context.is_batch_line,
        adapter=request.adapter,
    )
    outcome, num_cached_tokens = "abort", 0
    error: Exception | None = None
    spans = None if context.trace is None else context.trace.sequence(request)
    try:
        generating = api.router.generate(
            request, admission=admission, trace=Trace(spans=spans), max_crashes=context.max_crashes
        )
        async with contextlib.aclosing(generating) as deltas:
            async for delta in deltas:
                raise_if_failed(delta)
                if delta.finish_reason is not None:
                    outcome, num_cached_tokens = delta.finish_reason.value, delta.num_cached_tokens or 0
                    context.add_cached_tokens(num_cached_tokens)
                    return delta
        raise EngineError("The engine ended this request before it was complete.")
    except Exception as e:
        outcome, error = "error", e
        raise
    finally:
        metrics.ended(outcome)
        if spans is not None:
            spans.end(
                outcome,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=num_cached_tokens,
                num_output_tokens=0,
                error=error,
            )
