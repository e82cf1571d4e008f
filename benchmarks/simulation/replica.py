"""A replica on a simulated clock: chunked prefill under a token budget, continuous batching, a prefix cache.

Knows requests and the seconds that a step takes. Does not know gateways and policies. Steps that only decode are computed together, up
to the end of the next stream or a new request, so that the cost of a simulation grows with prompts and not with tokens.

A step reads all weights and every running sequence's KV from memory, and multiplies each token with the weights:
    seconds = fixed + max(weights / bandwidth, tokens * flops per token / speed) + KV bytes read / bandwidth.
"""

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from simulation.traces import TraceRequest


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A 7B Mistral in bf16 on one A100 80GB: peaks from NVIDIA's data sheet, times what kernels usually reach."""

    weights_bytes: float = 7.24e9 * 2
    bandwidth: float = 2.039e12 * 0.8  # bytes/s
    flops: float = 312e12 * 0.55  # per second
    flops_per_token: float = 2 * 7.24e9
    attention_flops: float = 4 * 32 * 4096  # per token and token of its context: two products in each of 32 layers
    kv_bytes_per_token: float = 128 * 1024
    fixed_s: float = 0.002  # scheduling, launches, sampling
    kv_tokens: int = 400_000  # 80 GB * 0.9 less weights and activations, 128 KiB each
    block_size: int = 512  # the trace's
    max_num_seqs: int = 64  # EngineConfig's defaults
    max_num_batched_tokens: int = 1024

    def step_s(self, prefill: list[tuple[int, int]], num_decodes: int, decode_context: float) -> float:
        """prefill: (tokens, context before them) of each chunk. decode_context: the decoding sequences' lengths, summed."""
        flops = num_decodes * self.flops_per_token
        kv_tokens = decode_context
        for num_tokens, context in prefill:
            flops += num_tokens * (self.flops_per_token + self.attention_flops * (context + num_tokens / 2))
            kv_tokens += context
        memory_s = self.weights_bytes / self.bandwidth
        return self.fixed_s + max(memory_s, flops / self.flops) + kv_tokens * self.kv_bytes_per_token / self.bandwidth

    def demand_s(self, request: TraceRequest, batch: int = 16) -> float:
        """Seconds that a request costs a replica without a cache hit that decodes `batch` sequences at a time."""
        n, out = request.num_prompt_tokens, request.num_output_tokens
        prefill_s = n * (self.flops_per_token + self.attention_flops * n / 2) / self.flops
        token_s = (self.fixed_s + self.weights_bytes / self.bandwidth) / batch
        return prefill_s + out * (token_s + (n + out / 2) * self.kv_bytes_per_token / self.bandwidth)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on a replica. `num_computed` counts prompt tokens, the cached ones too."""

    request: TraceRequest
    submitted_s: float
    num_computed: int = 0
    num_cached: int = 0
    num_named: int = 0
    num_private: int = 0  # its blocks that no other sequence can find (yet)
    held: list[bytes] = field(default_factory=list)
    first_token_s: float | None = None


@dataclass(slots=True)
class Frame:
    """What rank 0 reports after a step, like workers.protocol.StepFrame."""

    made_s: float
    slot: int
    num_requests: int
    num_pending_tokens: int
    tokens_per_s: float
    kv_usage: float
    stored: list[bytes]
    evicted: list[bytes]
    first: list[Sequence]  # with their first token
    finished: list[Sequence]


class PrefixCache:
    """Blocks by content: those in use are counted, the others are evicted, least recently used first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_private = 0
        self.ref_counts: dict[bytes, int] = {}
        self.idle: OrderedDict[bytes, None] = OrderedDict()
        self.stored: list[bytes] = []
        self.evicted: list[bytes] = []

    @property
    def num_used(self) -> int:
        return self.num_private + len(self.ref_counts)

    def find(self, hashes: tuple[bytes, ...], limit: int) -> int:
        """How many leading blocks are cached, at most `limit`."""
        for i in range(min(limit, len(hashes))):
            if hashes[i] not in self.ref_counts and hashes[i] not in self.idle:
                return i
        return min(limit, len(hashes))

    def start(self, seq: Sequence, num_blocks: int, num_found: int) -> bool:
        """Uses the blocks found, and allocates the rest by evicting idle ones; False if there are too few."""
        found = seq.request.hashes[:num_found]
        num_revived = sum(h in self.idle for h in found)
        num_new = num_blocks - num_found
        if self.num_used + num_revived + num_new > self.num_blocks:
            return False
        for h in found:
            self.idle.pop(h, None)
            self.ref_counts[h] = self.ref_counts.get(h, 0) + 1
        seq.held = list(found)
        seq.num_private = num_new
        seq.num_named = num_found
        self.num_private += num_new
        while self.num_used + len(self.idle) > self.num_blocks:
            self.evicted.append(self.idle.popitem(last=False)[0])
        return True

    def name(self, seq: Sequence, num_full: int) -> None:
        """The sequence's blocks up to here are full, so others can find them. A duplicate stays private."""
        for h in seq.request.hashes[seq.num_named : num_full]:
            if h not in self.ref_counts and h not in self.idle:
                self.ref_counts[h] = 1
                seq.held.append(h)
                seq.num_private -= 1
                self.num_private -= 1
                self.stored.append(h)
        seq.num_named = max(seq.num_named, num_full)

    def release(self, seq: Sequence) -> None:
        self.num_private -= seq.num_private
        for h in reversed(seq.held):
            count = self.ref_counts[h] - 1
            if count:
                self.ref_counts[h] = count
            else:
                del self.ref_counts[h]
                self.idle[h] = None


class Replica:
    """`submit` and `end_step` return when the step now running ends; None: idle. A later answer replaces an earlier one."""

    def __init__(self, slot: int, hardware: Hardware) -> None:
        self.slot = slot
        self.hardware = hardware
        self.cache = PrefixCache(hardware.kv_tokens // hardware.block_size)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[tuple[int, int, Sequence]] = []  # heap of (step it ends at, tie, sequence)
        self.context = 0  # of the decoding sequences, summed
        self.num_pending_tokens = 0
        self.step = 0
        self.busy_s = 0.0
        self.num_computed_tokens = 0
        self._chunks: list[tuple[Sequence, int]] = []
        self._began_s = 0.0
        self._each_s = 0.0
        self._num_steps = 0
        self._recent_tokens = self._recent_s = 0.0
        self._ties = 0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def submit(self, seq: Sequence, now: float) -> float | None:
        """The end of the step that the request now waits for; None if that did not change."""
        self.waiting.append(seq)
        self.num_pending_tokens += seq.request.num_prompt_tokens
        if self._num_steps == 0:
            return self._begin(now)
        if self._num_steps > 1:
            taken = min(self._num_steps, int((now - self._began_s) / self._each_s) + 1)
            if taken < self._num_steps:
                self._num_steps = taken
                return self._began_s + taken * self._each_s
        return None

    def end_step(self, now: float) -> tuple[Frame, float | None]:
        """The result of the step that ends now, and the end of the next one."""
        first: list[Sequence] = []
        num_steps, took = self._num_steps, self._num_steps * self._each_s
        self.step += num_steps
        self.busy_s += took
        self.context += num_steps * len(self.decoding)
        if self._chunks:
            self._recent_s = 0.9 * self._recent_s + took
            num_tokens = len(self.decoding) + sum(n for _, n in self._chunks)
            self._recent_tokens = 0.9 * self._recent_tokens + num_tokens
        for seq, num_tokens in self._chunks:
            seq.num_computed += num_tokens
            self.num_computed_tokens += num_tokens
            self.num_pending_tokens -= num_tokens
            self.cache.name(seq, seq.num_computed // self.hardware.block_size)
            if seq.num_computed == seq.request.num_prompt_tokens:
                seq.first_token_s = now
                first.append(seq)
                self.prefilling.remove(seq)
                self.context += seq.request.num_prompt_tokens + 1
                self._ties += 1
                heapq.heappush(self.decoding, (self.step + seq.request.num_output_tokens - 1, self._ties, seq))
        finished = []
        while self.decoding and self.decoding[0][0] <= self.step:
            seq = heapq.heappop(self.decoding)[2]
            self.context -= seq.request.num_prompt_tokens + seq.request.num_output_tokens
            self.cache.release(seq)
            finished.append(seq)
        return self._frame(now, first, finished), self._begin(now)

    def _frame(self, now: float, first: list[Sequence], finished: list[Sequence]) -> Frame:
        cache = self.cache
        stored, evicted = cache.stored, cache.evicted
        cache.stored, cache.evicted = [], []
        speed = self._recent_tokens / self._recent_s if self._recent_s else 0.0
        usage = cache.num_used / cache.num_blocks
        pending = self.num_pending_tokens + len(self.decoding)
        return Frame(now, self.slot, self.num_requests, pending, speed, usage, stored, evicted, first, finished)

    def _begin(self, now: float) -> float | None:
        hardware = self.hardware
        self._admit()
        budget = hardware.max_num_batched_tokens - len(self.decoding)
        self._chunks = []
        for seq in self.prefilling:
            num_tokens = min(budget, seq.request.num_prompt_tokens - seq.num_computed)
            if num_tokens <= 0:
                break
            self._chunks.append((seq, num_tokens))
            budget -= num_tokens
        if not self._chunks and not self.decoding:
            self._num_steps = 0
            return None
        self._num_steps = 1 if self._chunks else self.decoding[0][0] - self.step
        shapes = [(n, seq.num_computed) for seq, n in self._chunks]
        # Sequences grow while steps are computed together, so their mean length over those steps counts.
        context = self.context + len(self.decoding) * (self._num_steps - 1) / 2
        self._each_s = hardware.step_s(shapes, len(self.decoding), context)
        self._began_s = now
        return now + self._num_steps * self._each_s

    def _admit(self) -> None:
        """First come, first served; a prompt joins when the ones before it leave budget for it."""
        size = self.hardware.block_size
        budget = self.hardware.max_num_batched_tokens - len(self.decoding)
        budget -= sum(s.request.num_prompt_tokens - s.num_computed for s in self.prefilling)
        while self.waiting and budget > 0 and len(self.prefilling) + len(self.decoding) < self.hardware.max_num_seqs:
            seq = self.waiting[0]
            request = seq.request
            num_found = self.cache.find(request.hashes, (request.num_prompt_tokens - 1) // size)
            # Includes the blocks of its output, so that nothing is ever preempted.
            num_blocks = -(-(request.num_prompt_tokens + request.num_output_tokens) // size)
            if not self.cache.start(seq, num_blocks, num_found):
                return
            self.waiting.popleft()
            self.prefilling.append(seq)
            seq.num_computed = seq.num_cached = num_found * size
            self.num_pending_tokens -= seq.num_cached
            budget -= request.num_prompt_tokens - seq.num_cached
