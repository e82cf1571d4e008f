"""Who computes how many tokens in the next step: continuous batching with chunked prefill and preemption by recompute.

Pure Python: knows requests and the KV cache manager; no torch, no ranks, no clock. There is no prefill or decode phase:
in every step a request's `num_computed_tokens` catches up with its `num_tokens`, as far as the token budget and the KV
blocks allow (vLLM V1, Sarathi-Serve).

The rule: requests are served by priority, of one priority the running before the waiting, then by arrival. Who is served takes
what it needs from those of worse priorities: their sequences, tokens and blocks, in this very step. So background requests
(batch lines) starve as long as others fill the engine: that is meant. Beside others they have a token budget of their own,
which keeps steps short for those that decode, and for whoever comes next; and none in a step that computes another's prompt.
"""

import bisect
import math
from dataclasses import dataclass, field

from workers.engine.request import Request
from workers.kv_cache.manager import KVCacheManager

# Steps after the last foreground request in which background ones still keep to their budget: where one came the next is near,
# and it must not find a long step under way. About a second of short steps.
FOREGROUND_IS_NEAR_STEPS = 200


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    request: Request
    num_new_tokens: int

    @property
    def completes(self) -> bool:
        """Whether this step computes the request's last token."""
        return self.request.num_computed_tokens + self.num_new_tokens == self.request.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the logits of its last token choose the next one in this step."""
        return self.completes and self.request.sampling.max_tokens > 0

    @property
    def prompt_rows(self) -> range:
        """The positions this step computes of those its `prompt_output` still waits for."""
        if self.request.prompt_output is None:
            return range(0)
        start, wanted = self.request.num_computed_tokens, self.request.prompt_output.rows
        return range(max(start, wanted.start), min(start + self.num_new_tokens, wanted.stop))


@dataclass(slots=True)
class _Step:
    """One step as it is being put together. The first `num_visited` of the running requests had their turn."""

    budget: int
    background_budget: int
    background_is_bounded: bool
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    num_visited: int = 0
    admits_below: float = math.inf  # waiting requests of smaller priorities only

    def budget_for(self, request: Request) -> int:
        return min(self.budget, self.background_budget) if request.is_background else self.budget

    def take(self, request: Request, num_new_tokens: int) -> None:
        self.scheduled.append(ScheduledRequest(request, num_new_tokens))
        self.num_visited += 1
        self.budget -= num_new_tokens
        if request.is_background:
            self.background_budget -= num_new_tokens
        elif num_new_tokens > 1 and self.background_is_bounded:
            self.background_budget = (
                0  # these are the longest steps: a first token waits for them, and everyone's next one
            )


class Scheduler:
    """max_background_tokens: of a step in which foreground requests take part, or did a moment ago; None for no bound."""

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_background_tokens: int | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_background_tokens = max_background_tokens
        self.num_preemptions_total = 0
        # Both sorted by Request.order.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._steps_without_foreground = FOREGROUND_IS_NEAR_STEPS

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def foreground_is_near(self) -> bool:
        """Whether background requests keep to their own budget in this step."""
        return self._steps_without_foreground < FOREGROUND_IS_NEAR_STEPS

    def schedule(self) -> list[ScheduledRequest]:
        """The next step, blocks allocated. Empty only when there is no work, or when `head_of_line` can never run."""
        step = self._begin_step()
        while (request := self._next(step)) is not None and step.budget_for(request) > 0:
            if request is self._next_waiting(step):
                self._start(request, step)
            else:
                self._grow(request, step)
        return step.scheduled

    def finish(self, request: Request) -> None:
        """Removes a request wherever it stands and frees its blocks."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.kv_cache.free(request)

    def _begin_step(self) -> _Step:
        if any(not requests[0].is_background for requests in (self.running, self.waiting) if requests):
            self._steps_without_foreground = 0
        else:
            self._steps_without_foreground += 1
        bound = self.max_background_tokens if self.foreground_is_near else None
        budget = self.max_num_batched_tokens
        return _Step(budget, budget if bound is None else bound, background_is_bounded=bound is not None)

    def _next(self, step: _Step) -> Request | None:
        """Whose turn it is. Everyone behind it in `running` has the same or a worse priority and no part in this step yet."""
        running = self.running[step.num_visited] if step.num_visited < len(self.running) else None
        waiting = self._next_waiting(step)
        if running is None or (waiting is not None and waiting.priority < running.priority):
            return waiting
        return running

    def _next_waiting(self, step: _Step) -> Request | None:
        return self.waiting[0] if self.waiting and self.waiting[0].priority < step.admits_below else None

    def _grow(self, request: Request, step: _Step) -> None:
        """A running request goes on; without room for it the last in order gives way, which may be itself."""
        num_new_tokens = min(request.num_tokens - request.num_computed_tokens, step.budget_for(request))
        while not self.kv_cache.grow(request, num_new_tokens):
            if self._preempt_last(step) is request:
                return
        step.take(request, num_new_tokens)

    def _start(self, request: Request, step: _Step) -> None:
        """A waiting request begins. Those of worse priorities give way to it, one by one from the last; equal ones do not."""
        prefix = self.kv_cache.find_prefix(request)
        num_missing = request.num_tokens - len(prefix) * self.kv_cache.block_size
        num_new_tokens = min(num_missing, step.budget_for(request))
        while len(self.running) >= self.max_num_seqs or not self.kv_cache.start(request, prefix, num_new_tokens):
            if not self.running or self.running[-1].priority <= request.priority:
                step.admits_below = request.priority  # nobody overtakes it, or a large request would wait for ever
                return
            self._preempt_last(step)
        self.waiting.pop(0)  # whoever gave way is behind it
        bisect.insort(self.running, request, key=lambda r: r.order)
        step.take(request, num_new_tokens)

    def _preempt_last(self, step: _Step) -> Request:
        """Sends the last running request back to wait; its tokens are kept and computed again later."""
        request = self.running.pop()
        self.kv_cache.free(request)
        request.num_preemptions += 1
        self.num_preemptions_total += 1
        self.add(request)
        # It would come back at once, or another like it, and push the next one out.
        step.admits_below = min(step.admits_below, request.priority)
        return request
