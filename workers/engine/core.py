"""The engine on rank 0: schedule, broadcast, execute, sample, update.

Owns the requests between `add_request` and their last delta. Knows no sockets and no text. All methods belong to one thread, except
`load`, which may be called from any.
"""

import itertools
import logging
from collections.abc import Callable, Sequence, Set

import numpy as np
import torch

from workers.config import EngineConfig
from workers.engine.advance import advance, failure
from workers.engine.batch import STOP, ForwardBatch, dummy_batch, make_batch
from workers.engine.model_runner import ModelRunner
from workers.engine.prompt_outputs import PromptReader, make_prompt_output
from workers.engine.report import engine_facts, load_report
from workers.engine.request import Request, ScheduledRequest, make_request
from workers.engine.scheduler import Scheduler
from workers.engine.step_clock import StepClock
from workers.errors import RequestError
from workers.kv_cache.manager import KVCacheManager
from workers.parallel.group import TensorParallel
from workers.protocol import CacheEvents, EngineFacts, GenerateRequest, LoadReport, TokenDelta
from workers.sampling.grammar import Grammars
from workers.sampling.sampler import Sampled, SamplingRow, sample

log = logging.getLogger(__name__)

# With nothing to do but compile grammars, the engine thread checks this often whether there is something else.
COMPILING_POLL_S = 0.01

# While every running request waits for the mask of a slow grammar: as often, and with a forward pass as often, as when it is idle.
MASKS_POLL_S = 0.01
HELD_HEARTBEAT_S = 0.5

# From logits [len(rows), vocab_size] to the next tokens of each row, at least one.
SampleTokens = Callable[[torch.Tensor, Sequence[SamplingRow]], Sequence[Sequence[Sampled]]]
# By request id, see Grammars.begin_masks.
Masks = dict[str, np.ndarray]


class EngineCore:
    """`allocate_kv_cache` must have run on every rank before. `sample_tokens`: None samples one token a row from its logits."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        tp: TensorParallel,
        *,
        sample_tokens: SampleTokens | None = None,
    ) -> None:
        self.config = config
        self.runner = runner
        self.tp = tp
        self.kv_cache = KVCacheManager(
            num_blocks=runner.num_blocks,
            block_size=config.block_size,
            sliding_window=config.model.sliding_window,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_background_tokens=config.background_tokens,
        )
        self.max_model_len = self._max_model_len()
        self.grammars = Grammars(
            config.tokenizer_path, vocab_size=config.model.vocab_size, eos_token_ids=config.model.eos_token_ids
        )
        self.clock = StepClock()
        self._sample_tokens = sample_tokens or self._sample_one_each
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0

    @property
    def num_requests(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._requests)

    def add_request(self, message: GenerateRequest) -> None:
        """Raises RequestError for a request that can never be served, and keeps nothing of it."""
        if message.request_id in self._requests:
            raise RequestError(f"Request id {message.request_id!r} is already in use.", param="request_id")
        request = make_request(
            message,
            arrival=next(self._arrivals),
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.max_model_len,
        )
        request.prompt_output = make_prompt_output(message)
        if message.sampling.grammar is None:
            self.scheduler.add(request)
        else:
            # The scheduler does not know the request until its grammar is compiled.
            self.grammars.compile(request.request_id, message.sampling.grammar, message.output_token_ids)
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        """Removes a request at any stage and frees its blocks. Unknown ids are ignored: the request may have ended a moment ago."""
        request = self._requests.pop(request_id, None)
        if request is not None and not self.grammars.forget(request_id):
            self.scheduler.finish(request)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or self.grammars.num_compiling > 0

    def step(self) -> list[TokenDelta]:
        """One forward pass for as many requests as fit; empty without work. Raises GroupError if a rank is gone."""
        failed = self._admit_compiled()
        scheduled = self._schedule()
        if not scheduled:
            if self.scheduler.running:
                self._wait_for_masks()
                return failed
            return failed + self._fail_first_waiting()
        self.clock.start()
        batch = self._broadcast(scheduled)
        logits, masks, late = self._execute(batch, scheduled)
        sampled = self._sample(scheduled, logits, masks, late)
        deltas = self._update(scheduled, sampled, late)
        self.clock.end()
        self._measure_speed(scheduled)
        return failed + deltas

    def take_cache_events(self) -> CacheEvents | None:
        """How the prefix cache changed since the last call; None without changes."""
        return self.kv_cache.pool.take_events()

    def heartbeat(self) -> None:
        """A forward pass of one dummy token on all ranks: shows that every rank works while the engine is idle."""
        self.clock.start()
        batch = dummy_batch(1, 1, self.config.block_size)
        self.tp.broadcast(batch.pack())
        self.runner.execute(batch)
        self.runner.synchronize()
        self.clock.end()

    def shutdown(self) -> None:
        """Stops the followers. The core is not usable afterwards."""
        self.tp.broadcast(STOP)
        self.grammars.close()

    def load(self) -> LoadReport:
        return load_report(
            self.scheduler,
            self.clock,
            self.tp,
            num_compiling=self.grammars.num_compiling,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
        )

    def facts(self, replica_id: str) -> EngineFacts:
        return engine_facts(
            self.config,
            replica_id=replica_id,
            tensor_parallel_size=self.tp.size,
            max_model_len=self.max_model_len,
            num_blocks=self.kv_cache.pool.num_blocks,
            attention_backend=self.runner.attention_backend,
        )

    def _admit_compiled(self) -> list[TokenDelta]:
        """Gives requests whose grammar is compiled to the scheduler; ends those whose grammar cannot be used."""
        failed = []
        timeout_s = 0.0 if self.scheduler.has_work() else COMPILING_POLL_S
        for compiled in self.grammars.take_compiled(timeout_s=timeout_s):
            request = self._requests[compiled.request_id]
            request.constraint = compiled.constraint
            self.scheduler.add(request)
            if compiled.error is not None:
                failed.append(self._fail(request, compiled.error))
        return failed

    def _schedule(self) -> list[ScheduledRequest]:
        # Empty twice means that nothing can run: the first call may have preempted every request, the second starts from there.
        return self.scheduler.schedule() or self.scheduler.schedule()

    def _broadcast(self, scheduled: Sequence[ScheduledRequest]) -> ForwardBatch:
        batch = make_batch(scheduled, self.config.block_size)
        self.tp.broadcast(batch.pack())
        return batch

    def _execute(
        self, batch: ForwardBatch, scheduled: Sequence[ScheduledRequest]
    ) -> tuple[torch.Tensor | None, Masks, Set[str]]:
        """Logits [num_sampling_seqs, vocab_size], the masks of grammars, computed on other threads in the meantime, and the ids of the
        requests whose masks are not there yet.
        """
        constraints = {s.request.request_id: s.request.constraint for s in scheduled if s.samples}
        masks = self.grammars.begin_masks({name: c for name, c in constraints.items() if c is not None})
        logits = self.runner.execute(batch, PromptReader(scheduled))
        if masks is None:
            return logits, {}, frozenset()
        if not masks.are_there:
            self.runner.synchronize()  # `take` measures the forward pass
        return logits, *masks.take()

    def _sample(
        self, scheduled: Sequence[ScheduledRequest], logits: torch.Tensor | None, masks: Masks, late: Set[str]
    ) -> dict[str, Sequence[Sampled]]:
        """The next tokens of each sampling request that has its mask, by request id."""
        requests = [s.request for s in scheduled if s.samples]
        if late and logits is not None:
            logits = logits[[i for i, request in enumerate(requests) if request.request_id not in late]]
            requests = [request for request in requests if request.request_id not in late]
        if not requests:
            # Sampling waits for the device by itself. Without it, `forward_age_s` must not run ahead of the device.
            self.runner.synchronize()
            return {}
        assert logits is not None, "rank 0 gathers the logits"
        rows = [SamplingRow(r.sampling, r.token_ids, r.num_prompt_tokens, masks.get(r.request_id)) for r in requests]
        return dict(zip((r.request_id for r in requests), self._sample_tokens(logits, rows), strict=True))

    def _sample_one_each(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[list[Sampled]]:
        return [[one] for one in sample(logits, rows, eos_token_ids=self.config.model.eos_token_ids)]

    def _update(
        self, scheduled: Sequence[ScheduledRequest], sampled: dict[str, Sequence[Sampled]], late: Set[str]
    ) -> list[TokenDelta]:
        deltas = []
        for s in scheduled:
            request, completes = s.request, s.completes
            if request.request_id in late:
                # Its last token is computed again, with the same logits, once the mask for them is there.
                self.kv_cache.commit(request.sequence, s.num_new_tokens - 1)
                continue
            self.kv_cache.commit(request.sequence, s.num_new_tokens)
            if not completes:
                continue
            if request.num_output_tokens == 0:
                self._prompt_tokens_total += request.num_prompt_tokens
            deltas += self._advance(request, sampled.get(request.request_id, ()))
        return deltas

    def _advance(self, request: Request, sampled: Sequence[Sampled]) -> list[TokenDelta]:
        """`sampled` is empty for a request that samples nothing and only reads its prompt."""
        deltas = advance(
            request, sampled, eos_token_ids=self.config.model.eos_token_ids, max_model_len=self.max_model_len
        )
        self._generated_tokens_total += sum(len(delta.token_ids) for delta in deltas)
        if deltas[-1].finish_reason is not None:
            self.abort(request.request_id)
        elif request.constraint is not None:
            self.grammars.prepare_mask(request.constraint)
        return deltas

    def _fail(self, request: Request, error: str) -> TokenDelta:
        """Ends this request alone; `error` is for the user."""
        self.abort(request.request_id)
        return failure(request.request_id, error)

    def _wait_for_masks(self) -> None:
        """Every running request is held. Returns once one of them can go on, or something else may have happened."""
        held = [request.constraint for request in self.scheduler.running if request.constraint is not None]
        self.grammars.wait_for_any([constraint for constraint in held if constraint.is_held], MASKS_POLL_S)
        if (self.clock.forward_age_s() or 0.0) > HELD_HEARTBEAT_S:
            self.heartbeat()

    def _fail_first_waiting(self) -> list[TokenDelta]:
        """Nothing can be scheduled: either there is no work, or the first request can never run and would block all others."""
        if not self.scheduler.waiting:
            return []
        request = self.scheduler.waiting[0]
        log.error("Request %s cannot be scheduled in an otherwise empty engine and ends.", request.request_id)
        message = f"The request needs more KV cache than this replica has. Use fewer than {request.num_tokens} tokens."
        return [self._fail(request, message)]

    def _max_model_len(self) -> int:
        """The configured length, or less where the KV cache cannot hold one sequence of it."""
        config, num_blocks = self.config, self.kv_cache.pool.num_blocks
        if self.kv_cache.max_blocks_held(config.max_model_len, config.max_num_batched_tokens) <= num_blocks:
            return config.max_model_len
        fits = num_blocks * config.block_size
        log.warning(
            "The KV cache of %s blocks holds one sequence of %s tokens, not the %s of max_model_len: longer requests "
            "are refused.",
            num_blocks, fits, config.max_model_len,
        )  # fmt: skip
        return fits

    def _measure_speed(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Steps that compute prompts count: they show how fast pending tokens are computed. Background requests that keep to a budget
        catch up slowly, and show nothing.
        """
        held_back = self.scheduler.foreground_is_near
        if any(s.num_new_tokens > 1 and not (held_back and s.request.is_background) for s in scheduled):
            self.clock.add_speed(sum(s.num_new_tokens for s in scheduled))
