"""Which requests compute how many tokens in the next step: continuous batching with chunked prefill and preemption by recomputation.

Pure Python: knows requests and the KV cache manager; no torch, no ranks, no clock. There is no prefill or decode phase: in every step a
request's `num_computed_tokens` catches up with its `num_tokens`, as far as the token budget and the KV blocks allow (vLLM V1,
Sarathi-Serve).

The rule: requests are served by priority; at equal priority running ones come before waiting ones, then the order of arrival counts. A
request takes what it needs from requests of worse priority: their slots, tokens and blocks, in the same step. So background requests
(lines of batches) starve while others fill the engine; that is intended. Next to others they have a token budget of their own, which
keeps steps short for requests that decode and for those that arrive next. They get no tokens in a step that computes another's prompt.

While foreground requests decode, a step computes as many tokens of prompts as `PromptPace` allows.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.engine.scheduling.prompt_pace import PromptPace
from workers.engine.scheduling.request import Request, ScheduledRequest
from workers.kv_cache.manager import KVCacheManager
from workers.lora.slots import NO_SLOT, AdapterSlots
from workers.protocol import BATCH_PRIORITY

# Background requests keep to their budget for this many steps after the last foreground request: another one often follows soon, and a
# long step would delay it. About a second of short steps.
FOREGROUND_IS_NEAR_STEPS = 200


@dataclass(slots=True)
class PrefixCounts:
    """Prompt tokens looked up in the prefix cache, at each request's first admission, and those found. Only ever grow."""

    queries_total: int = 0
    hits_total: int = 0
    background_queries_total: int = 0
    background_hits_total: int = 0

    def add(self, request: Request) -> None:
        num_hits = request.num_cached_tokens or 0
        self.queries_total += request.num_prompt_tokens
        self.hits_total += num_hits
        if request.is_background:
            self.background_queries_total += request.num_prompt_tokens
            self.background_hits_total += num_hits


@dataclass(slots=True)
class _Step:
    """One step while it is being built. The first `num_visited` of the running requests had their turn."""

    budget: int
    background_budget: int
    background_is_bounded: bool
    prompt_budget: int = 0
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    num_visited: int = 0
    num_passed: int = 0  # of the first waiting requests: their adapters have no slot
    draining: str | None = None  # the adapter that takes no request after the first of those
    admits_below: float = math.inf  # waiting requests of smaller priorities only

    def budget_for(self, request: Request) -> int:
        return min(self.budget, self.background_budget) if request.is_background else self.budget

    def add(self, request: Request, num_new_tokens: int) -> None:
        self.scheduled.append(ScheduledRequest.of(request, num_new_tokens))
        self.num_visited += 1
        self.budget -= num_new_tokens
        if num_new_tokens > 1:
            self.prompt_budget -= num_new_tokens
            request.num_prompt_chunks += 1
        if request.is_background:
            self.background_budget -= num_new_tokens
        elif num_new_tokens > 1 and self.background_is_bounded:
            # These are the longest steps: one request's first token waits for them, and every other's next token.
            self.background_budget = 0


class Scheduler:
    """max_background_tokens: the most that background requests get of a step while foreground requests are near; None for no limit.
    pace: bounds the prompts of a step while others decode; None for no bound. slots: of adapters, where requests may have some.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_background_tokens: int | None = None,
        pace: PromptPace | None = None,
        slots: AdapterSlots | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_background_tokens = max_background_tokens
        self.pace = pace
        self.slots = slots
        self.num_preemptions_total = 0
        self.prefix_counts = PrefixCounts()
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
        """The next step, blocks allocated. Empty only without work, when all running requests are held, or when nothing runs and the
        first waiting request can never run.
        """
        step = self._begin_step()
        self._grow_decoding(step)
        if not self.waiting and step.num_visited == len(self.running):
            return step.scheduled
        step.prompt_budget = self._prompt_budget()
        while (request := self._next(step)) is not None and (budget := step.budget_for(request)) > 0:
            if budget > step.prompt_budget and request.num_pending_tokens > 1:
                budget = step.prompt_budget
            if request is self._next_waiting(step):
                if budget > 0:
                    self._start(request, step, budget)
                else:
                    step.admits_below = -math.inf
            elif budget <= 0 or request.is_held:
                step.num_visited += 1
            else:
                self._grow(request, step, budget)
        return step.scheduled

    def shows_speed(self, scheduled: Sequence[ScheduledRequest]) -> bool:
        """Whether the seconds of the step just scheduled show how fast pending tokens are computed: steps that compute prompts do.
        Background requests that keep to a budget catch up slowly, and show nothing.
        """
        held_back = self.foreground_is_near
        return any(s.num_new_tokens > 1 and not (held_back and s.request.is_background) for s in scheduled)

    def took(self, scheduled: Sequence[ScheduledRequest], step_s: float) -> None:
        """A step of this scheduler took `step_s`. Later ones are bounded by what that shows."""
        if self.pace is not None:
            parts = [(s.num_new_tokens, s.num_before) for s in scheduled if s.num_new_tokens > 1]
            num_prompt_tokens = sum(new for new, _ in parts)
            pairs = sum(new * (before + new / 2) for new, before in parts)
            self.pace.add(
                num_decoding=len(scheduled) - len(parts),
                num_prompt_tokens=num_prompt_tokens,
                step_s=step_s,
                num_before=pairs / max(1, num_prompt_tokens),
            )

    def finish(self, request: Request) -> None:
        """Removes a running or waiting request and frees its blocks."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)
            self.kv_cache.free(request.sequence)

    def preempt_last(self) -> Request:
        """As `preempt`, the last running request."""
        request = self.running[-1]
        self.preempt(request)
        return request

    def preempt(self, request: Request) -> None:
        """Sends a running request back to the queue. It keeps its tokens and computes them again later."""
        self._stop(request)
        request.num_preemptions += 1
        self.num_preemptions_total += 1
        self.add(request)

    def _stop(self, request: Request) -> None:
        """It runs no longer, and holds neither blocks nor its adapter's slot."""
        self.running.remove(request)
        self.kv_cache.free(request.sequence)
        if self.slots is not None and request.adapter is not None:
            self.slots.end(request.adapter)
            request.adapter_slot = NO_SLOT

    def _begin_step(self) -> _Step:
        if any(not requests[0].is_background for requests in (self.running, self.waiting) if requests):
            self._steps_without_foreground = 0
        else:
            self._steps_without_foreground += 1
        bound = self.max_background_tokens if self.foreground_is_near else None
        budget = self.max_num_batched_tokens
        return _Step(
            budget,
            budget if bound is None else bound,
            background_is_bounded=bound is not None,
        )

    def _prompt_budget(self) -> int:
        """The most tokens of prompts in the next step. Background requests that decode bound nothing."""
        if self.pace is None or not (self.waiting or any(r.num_pending_tokens > 1 for r in self.running)):
            return self.max_num_batched_tokens
        decoding = [r for r in self.running if r.num_pending_tokens == 1 and not r.is_held]
        if all(r.is_background for r in decoding):
            return self.max_num_batched_tokens
        begun = [r for r in self.running if r.num_pending_tokens > 1]
        num_prompts = sum(not r.is_background for r in begun)
        num_prompts += bisect.bisect_left(self.waiting, BATCH_PRIORITY, key=lambda r: r.priority)
        return self.pace.max_prompt_tokens(
            num_decoding=len(decoding),
            num_prompts=num_prompts,
            num_before=begun[0].num_computed_tokens if begun else 0,
        )

    def _grow_decoding(self, step: _Step) -> None:
        """The first of the running requests, up to one that `schedule` has to look at more closely: what it would do for them, in a small
        part of its time. Each computes one token, and needs nothing that another one has.
        """
        scheduled, grow, has_room = step.scheduled, self.kv_cache.grow, self.kv_cache.has_room
        best_waiting = self.waiting[0].priority if self.waiting else math.inf
        best_bounded = BATCH_PRIORITY if step.background_is_bounded else math.inf
        for request in self.running[: step.budget]:
            sequence, priority = request.sequence, request.priority
            num_before = sequence.num_computed_tokens
            num_pending = len(sequence.token_ids) - num_before + (request.unread_row is not None)
            if num_pending != 1 or priority > best_waiting or priority >= best_bounded:
                break
            if request.constraint is not None and request.is_held:
                break
            if not has_room(sequence) and not grow(sequence, 1):
                break
            scheduled.append(ScheduledRequest(request, 1, num_before, True, request.sampling.max_tokens > 0))
        step.num_visited = len(scheduled)
        step.budget -= len(scheduled)

    def _next(self, step: _Step) -> Request | None:
        """Whose turn it is. All requests after it in `running` have the same or a worse priority and no part in this step yet."""
        running = self.running[step.num_visited] if step.num_visited < len(self.running) else None
        waiting = self._next_waiting(step)
        if running is None or (waiting is not None and waiting.priority < running.priority):
            return waiting
        return running

    def _next_waiting(self, step: _Step) -> Request | None:
        request = self.waiting[step.num_passed] if step.num_passed < len(self.waiting) else None
        return None if request is None or request.priority >= step.admits_below else request

    def _grow(self, request: Request, step: _Step, budget: int) -> None:
        """A running request continues. Without room for it the last in order is preempted, which may be the request itself."""
        num_new_tokens = min(request.num_pending_tokens, budget)
        while not self.kv_cache.grow(request.sequence, num_new_tokens):
            if self._preempt_last(step) is request:
                return
        step.add(request, num_new_tokens)

    def _start(self, request: Request, step: _Step, budget: int) -> None:
        """A waiting request starts. Requests of worse priority are preempted for it, one by one from the last; equal ones are not."""
        if not self._has_slot(request, step):
            step.num_passed += 1
            return
        sequence = request.sequence
        prefix = self.kv_cache.find_prefix(sequence, request.max_prefix_tokens)
        num_missing = request.num_tokens - prefix.num_blocks * self.kv_cache.block_size
        num_new_tokens = min(num_missing, budget)
        while len(self.running) >= self.max_num_seqs or not self.kv_cache.start(sequence, prefix, num_new_tokens):
            if not self.running or self.running[-1].priority <= request.priority:
                # No other may overtake it, or a large request would wait forever.
                step.admits_below = request.priority
                return
            self._preempt_last(step)
        # Still at this place: requests preempted for it are queued after it.
        self.waiting.pop(step.num_passed)
        if self.slots is not None and request.adapter is not None:
            request.adapter_slot = self.slots.start(request.adapter)
        bisect.insort(self.running, request, key=lambda r: r.order)
        if request.num_preemptions == 0:
            request.num_cached_tokens = min(sequence.num_computed_tokens, request.num_prompt_tokens)
            if self.kv_cache.enable_prefix_caching:
                self.prefix_counts.add(request)
            if request.spans is not None:
                request.spans.start(request)
        step.add(request, num_new_tokens)

    def _has_slot(self, request: Request, step: _Step) -> bool:
        """Whether its adapter has a slot or can get one, if need be from requests of worse priority. See `AdapterSlots`."""
        slots, adapter = self.slots, request.adapter
        if slots is None or adapter is None:
            return True
        if adapter == step.draining:
            return False
        if slots.has_room(adapter):
            return True
        better = {r.adapter for r in self.running if r.priority <= request.priority}
        leaving = slots.draining([other for other in slots.adapters if other not in better])
        if leaving is None:
            step.draining = step.draining or slots.draining()
            return False
        # None of them has a part in this step yet: all come after the request whose turn it is.
        for other in [r for r in self.running if r.adapter == leaving]:
            self._preempt(other, step)
        return True

    def _preempt_last(self, step: _Step) -> Request:
        request = self.running[-1]
        self._preempt(request, step)
        return request

    def _preempt(self, request: Request, step: _Step) -> None:
        self.preempt(request)
        # Otherwise it, or another like it, would start again in this step and preempt the next one.
        step.admits_below = min(step.admits_below, request.priority)
