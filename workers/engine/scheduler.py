"""Who computes how many tokens in the next step: continuous batching with chunked prefill and preemption by recompute.

Pure Python: knows requests and the KV cache manager; no torch, no ranks, no clock. There is no prefill or decode phase:
in every step a request's `num_computed_tokens` catches up with its `num_tokens`, as far as the token budget and the KV
blocks allow (vLLM V1, Sarathi-Serve).
"""

import bisect
from dataclasses import dataclass

from workers.engine.kv_cache_manager import KVCacheManager
from workers.engine.request import Request


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


class Scheduler:
    """Requests are served in the order (priority, arrival); running ones before waiting ones."""

    def __init__(self, kv_cache: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions_total = 0
        # Both sorted by Request.order.
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[ScheduledRequest]:
        """The next step, blocks allocated. Empty only when there is no work, or when `head_of_line` can never run."""
        budget = self.max_num_batched_tokens
        scheduled = []
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            num_new_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            while not self.kv_cache.grow(request, num_new_tokens):
                # The last in order gives way; nobody behind `request` has been scheduled in this step yet.
                preempted = True
                if self._preempt_last() is request:
                    break
            else:
                scheduled.append(ScheduledRequest(request, num_new_tokens))
                budget -= num_new_tokens
                i += 1
        # Whoever was just preempted would come back at once and push the next one out.
        while not preempted and self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            request = self.waiting[0]
            prefix = self.kv_cache.find_prefix(request)
            num_new_tokens = min(request.num_tokens - len(prefix) * self.kv_cache.block_size, budget)
            if not self.kv_cache.start(request, prefix, num_new_tokens):
                break
            bisect.insort(self.running, self.waiting.pop(0), key=lambda r: r.order)
            scheduled.append(ScheduledRequest(request, num_new_tokens))
            budget -= num_new_tokens
        return scheduled

    def finish(self, request: Request) -> None:
        """Removes a request wherever it stands and frees its blocks."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.kv_cache.free(request)

    def _preempt_last(self) -> Request:
        """Sends the last running request back to wait; its tokens are kept and computed again later."""
        request = self.running.pop()
        self.kv_cache.free(request)
        request.num_preemptions += 1
        self.num_preemptions_total += 1
        self.add(request)
        return request
