"""The spans of one sequence at a gateway: the generation, and in it, for each replica that worked on it, the way there and the attempt.

Knows OpenTelemetry's conventions for generative AI. The router calls the methods, each once per attempt; a token costs nothing. Times are
Unix nanoseconds.
"""

import time
from typing import TYPE_CHECKING

import msgspec

from workers.errors import ReplicaUnavailableError, TramontaneError
from workers.protocol import GenerateRequest
from workers.tracing.attributes import Value, number, text
from workers.tracing.tracer import Span, Tracer, link

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

PROVIDER = "tramontane"
NANOSECONDS = 1_000_000_000


class SequenceTrace:
    """parent: of the generation's span. operation: `gen_ai.operation.name`."""

    def __init__(
        self, tracer: Tracer, parent: "SpanContext", request: GenerateRequest, *, operation: str, model: str
    ) -> None:
        self._tracer = tracer
        self._began_ns = time.time_ns()
        sampling = request.sampling
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.response.model": request.adapter or model,
            "gen_ai.response.id": request.request_id.rpartition("-")[0],
        }
        if sampling.max_tokens:
            attributes |= {
                "gen_ai.request.max_tokens": number(sampling.max_tokens),
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.seed": number(sampling.seed),
            }
        name = f"{operation} {model}".rstrip()
        self._span = tracer.start(name, parent, start_ns=self._began_ns, attributes=attributes)
        self._inside = self._span.context
        self._first_token_ns = 0
        self._routing_ns = 0  # since when it looks for a replica; 0 while it has one
        self._queued_ns = 0
        self._num_attempts = 0
        self._attempt: Span | None = None
        self._lost: SpanContext | None = None  # the attempt that the next one takes over from

    # For the router.

    def begin_route(self) -> None:
        """It needs a replica."""
        self._routing_ns, self._queued_ns = time.time_ns(), 0

    def queued(self) -> None:
        """No replica has room: it waits."""
        self._queued_ns = self._queued_ns or time.time_ns()

    def begin_attempt(self, request: GenerateRequest, replica_id: str, *, num_cached_tokens: int) -> GenerateRequest:
        """The request as it goes to this replica. num_cached_tokens: how many of the prompt the router expects there."""
        self._num_attempts += 1
        now_ns = time.time_ns()
        self._end_route(now_ns, replica_id, num_cached_tokens)
        attributes: dict[str, Value] = {"tramontane.replica.id": replica_id}
        if self._num_attempts > 1:
            attributes["tramontane.attempt"] = self._num_attempts
            attributes["tramontane.resumed_tokens"] = len(request.output_token_ids)
        links = () if self._lost is None else (link(self._lost, **{"tramontane.link": "continues"}),)
        self._attempt = self._tracer.start(
            "attempt", self._inside, kind="client", start_ns=now_ns, attributes=attributes, links=links
        )
        return msgspec.structs.replace(request, traceparent=self._attempt.traceparent)

    def first_token(self) -> None:
        """The replica has sent its first delta."""
        self._first_token_ns = self._first_token_ns or time.time_ns()

    def lost(self, error: ReplicaUnavailableError, *, num_tokens: int) -> None:
        """The replica was lost, and its own spans with it. num_tokens: those of the sequence so far."""
        attempt = self._attempt
        if attempt is None:
            return
        kind = "replica_crashed" if error.crashed else "replica_lost"
        attempt.fail(kind, str(error))
        attempt.add({"tramontane.replica.spans_lost": True})
        self._leave(attempt, kind, str(error), num_tokens)

    def moved(self, *, num_tokens: int) -> None:
        """The replica is being drained, and the sequence goes on elsewhere."""
        if self._attempt is not None:
            self._leave(self._attempt, "replica_drained", "", num_tokens)

    def end_attempt(self, *, num_tokens: int) -> None:
        """The sequence is no longer on the replica. num_tokens: what it got there."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.add({"tramontane.output_tokens": num_tokens})
            attempt.end()

    def _leave(self, attempt: Span, reason: str, message: str, num_tokens: int) -> None:
        self._lost = attempt.context
        event: dict[str, Value] = {"tramontane.failover.reason": reason, "tramontane.output_tokens": num_tokens}
        if message:
            event["tramontane.failover.message"] = text(message)
        self._span.add_event("failover", event)

    def _end_route(
        self, now_ns: int, replica_id: str | None = None, num_cached_tokens: int = 0, *, has_failed: bool = False
    ) -> None:
        """The span `route`, and in it `queue` if the sequence had to wait. replica_id: None if none was found by its end."""
        if not self._routing_ns:
            return
        attributes: dict[str, Value] = {}
        if replica_id is not None:
            attributes["tramontane.replica.id"] = replica_id
        if num_cached_tokens:
            attributes["tramontane.route.predicted_cached_tokens"] = num_cached_tokens
        route = self._tracer.start("route", self._inside, start_ns=self._routing_ns, attributes=attributes)
        if self._queued_ns:
            self._tracer.start("queue", route.context, start_ns=self._queued_ns).end(now_ns)
        if has_failed:
            route.fail("no_replica")
        route.end(now_ns)
        self._routing_ns = 0

    # For the code that runs sequences.

    def end(
        self,
        finish_reason: str,
        *,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_output_tokens: int,
        error: BaseException | None = None,
    ) -> None:
        """finish_reason: as in the metrics. The tokens are those that the client is told of, whichever replicas made them."""
        self.end_attempt(num_tokens=0)
        self._end_route(time.time_ns(), has_failed=error is not None)
        attributes: dict[str, Value] = {
            "gen_ai.response.finish_reasons": [finish_reason],
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_output_tokens,
        }
        if num_cached_tokens:
            attributes["gen_ai.usage.cache_read.input_tokens"] = num_cached_tokens
        if self._num_attempts > 1:
            attributes["tramontane.attempts"] = self._num_attempts
        if self._first_token_ns:
            attributes["gen_ai.response.time_to_first_chunk"] = (self._first_token_ns - self._began_ns) / NANOSECONDS
        self._span.add(attributes)
        if error is not None:
            self._span.fail(type(error).__name__, str(error) if isinstance(error, TramontaneError) else None)
        self._span.end()
