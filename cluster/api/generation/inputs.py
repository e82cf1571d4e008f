"""Requests that compute a prompt and generate nothing: what embeddings and moderations run on.

A few at a time, so that one HTTP request of 2,048 inputs neither takes all of the server's room nor is refused for want of it.
Knows admission and the router; not what the results are for.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from cluster.api.context import Gateway
from cluster.api.generation.generation import raise_if_failed
from cluster.api.generation.origin import HTTP, Origin
from cluster.api.server import limits
from cluster.router.admission import Admission
from workers.errors import EngineError
from workers.protocol import GenerateRequest, TokenDelta

MAX_AT_ONCE = 32


@contextlib.contextmanager
def admit_inputs(
    gateway: Gateway, requests: Sequence[GenerateRequest], *, deadline: float | None
) -> Iterator[Admission]:
    """Room for as many of them as run at once, within the key's limits. Raises as Router.admit does."""
    num_tokens = sum(len(r.prompt_token_ids) for r in requests)
    num_sequences = min(len(requests), MAX_AT_ONCE)
    priority = requests[0].priority
    with (
        limits.reserve(num_tokens),
        gateway.router.admit(
            num_sequences, num_tokens, priority=priority, deadline=deadline, tenant=limits.tenant()
        ) as admission,
    ):
        yield admission


async def run_inputs(
    gateway: Gateway,
    requests: Sequence[GenerateRequest],
    *,
    origin: Origin = HTTP,
    admission: Admission,
    arrived: float,
) -> list[TokenDelta]:
    """The last delta of each request, in their order. Raises what the router raises, EngineError for one the engine gave up."""
    turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(request: GenerateRequest) -> TokenDelta:
        async with turns:
            return await _run_one(gateway, request, origin=origin, admission=admission, arrived=arrived)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(request)) for request in requests]
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return [task.result() for task in tasks]


async def _run_one(
    gateway: Gateway, request: GenerateRequest, *, origin: Origin, admission: Admission, arrived: float
) -> TokenDelta:
    metrics = gateway.metrics.sequence(
        num_prompt_tokens=len(request.prompt_token_ids), arrived=arrived, is_line=origin.is_line
    )
    outcome = "abort"
    try:
        generating = gateway.router.generate(request, admission=admission, max_crashes=origin.max_crashes)
        async with contextlib.aclosing(generating) as deltas:
            async for delta in deltas:
                raise_if_failed(delta)
                if delta.finish_reason is not None:
                    outcome = delta.finish_reason.value
                    limits.cached(delta.num_cached_tokens or 0)
                    return delta
        raise EngineError("The engine ended this request before it was complete.")
    except Exception:
        outcome = "error"
        raise
    finally:
        metrics.ended(outcome)
