"""The engine on rank 0: schedule, broadcast, execute, sample, update.

Owns the requests between `add_request` and their last delta. Knows no sockets and no text. All methods belong to one thread, except
`load`, which may be called from any.
"""

import itertools
import logging
from collections.abc import Sequence

import torch

from workers.config import EngineConfig
from workers.engine.adapters import EngineAdapters
from workers.engine.batch import STOP, ForwardBatch, capture_message, dummy_batch, make_batch
from workers.engine.execution.model_runner import ModelRunner
from workers.engine.outputs.advance import advance, advance_plainly, failure
from workers.engine.outputs.in_flight import LaunchedStep
from workers.engine.outputs.next_tokens import SampleTokens, make_sampling, no_tokens, rows_of
from workers.engine.outputs.prompt_outputs import PromptReader, make_prompt_output
from workers.engine.report import engine_facts, load_report
from workers.engine.scheduling.prompt_pace import PromptPace
from workers.engine.scheduling.request import Request, ScheduledRequest, make_request
from workers.engine.scheduling.scheduler import Scheduler
from workers.engine.scheduling.step_clock import StepClock
from workers.errors import RequestError
from workers.kv_cache.manager import KVCacheManager
from workers.parallel.group import TensorParallel
from workers.protocol import CacheEvents, EngineFacts, FinishReason, GenerateRequest, LoadReport, TokenDelta
from workers.sampling.grammar import Grammars
from workers.sampling.sampler import Sampled
from workers.tracing.engine_spans import EngineSpans
from workers.tracing.log import in_trace

log = logging.getLogger(__name__)

# With nothing to do but compile grammars, the engine thread checks this often whether there is something else.
COMPILING_POLL_S = 0.01
# While every running request waits for the mask of a slow grammar: as often, and with a forward pass as often, as when it is idle.
MASKS_POLL_S = 0.01
HELD_HEARTBEAT_S = 0.5


class EngineCore:
    """`allocate_kv_cache` must have run on every rank before.

    sample_tokens: None samples one token a row from its logits. Another function reads the logits at once, so there is no overlap then.
    spans: makes those of traced requests; None where nothing is traced.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        tp: TensorParallel,
        *,
        sample_tokens: SampleTokens | None = None,
        spans: EngineSpans | None = None,
    ) -> None:
        self.config = config
        self.runner = runner
        self.tp = tp
        self.kv_cache = KVCacheManager(
            num_blocks=runner.num_blocks,
            block_size=config.block_size,
            windows=[group.window for group in config.model.layer_groups],
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.adapters = None if runner.adapters is None else EngineAdapters(runner, tp, runner.adapters)
        self.scheduler = Scheduler(
            self.kv_cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_background_tokens=config.background_tokens,
            # Only where steps with prompts are long, and no bits depend on the chunks.
            pace=PromptPace(stretch=config.prompt_stretch) if tp.device.type == "cpu" else None,
            slots=None if self.adapters is None else self.adapters.slots,
        )
        self.max_model_len = self.kv_cache.longest_sequence(config.max_model_len, config.max_num_batched_tokens)
        if self.max_model_len < config.max_model_len:
            log.warning(
                "The KV cache of %s blocks holds one sequence of %s tokens, not the %s of max_model_len: longer requests "
                "are refused.",
                runner.num_blocks, self.max_model_len, config.max_model_len,
            )  # fmt: skip
        self.grammars = Grammars(
            config.tokenizer_path, vocab_size=config.model.vocab_size, eos_token_ids=config.model.eos_token_ids
        )
        self.clock = StepClock()
        self.overlap = config.overlaps and sample_tokens is None
        self._sampling = make_sampling(config, tp.device, sample_tokens=sample_tokens)
        self._in_flight: LaunchedStep | None = None
        self._requests: dict[str, Request] = {}
        self._spans = spans
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
            adapters=() if self.adapters is None else self.adapters,
        )
        request.prompt_output = make_prompt_output(message)
        if self._spans is not None:
            request.spans = self._spans.begin(message)
        if message.sampling.grammar is None:
            self.scheduler.add(request)
        else:
            # The scheduler does not know the request until its grammar is compiled.
            self.grammars.compile(request.request_id, message.sampling.grammar, message.output_token_ids)
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        """Removes a request at any stage and frees its blocks. Unknown ids are ignored: the request may have ended a moment ago."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        request.has_ended = True
        if request.spans is not None:
            request.spans.end(request)
        self._sampling.forget(request_id)
        if request.constraint is not None:
            request.constraint.abandon()
        if not request.has_left and not self.grammars.forget(request_id):
            self.scheduler.finish(request)

    def has_work(self) -> bool:
        return self._is_busy() or self.grammars.num_compiling > 0

    def step(self) -> list[TokenDelta]:
        """Launches a forward pass for as many requests as fit, and returns what a pass brought: this one, or with overlap the one before
        it, while the device computes this one. Empty without work. Raises GroupError if a rank is gone.
        """
        deltas = self._admit_compiled()
        self._forget_adapters()
        scheduled, failed = self._with_adapters(self._schedule())
        deltas += failed
        if failed and not scheduled:
            return deltas  # what waits may run now
        if not scheduled:
            return deltas + (self._wait() if self._in_flight is None else self._update())
        self._capture_graph(is_idle=False)
        self.clock.start()
        step = LaunchedStep(scheduled, shows_speed=self.scheduler.shows_speed(scheduled))
        batch = self._broadcast(scheduled)
        logits = self._execute(batch, step)
        if step.needs_known_tokens:
            deltas += self._update()
        self._sample(step, logits)
        deltas += self._update()
        self._launched(step)
        return deltas if self.overlap else deltas + self._update()

    def take_cache_events(self) -> CacheEvents | None:
        """How the prefix cache changed since the last call; None without changes."""
        return self.kv_cache.pool.take_events()

    def heartbeat(self) -> None:
        """A forward pass of one dummy token on all ranks: shows that every rank works while the engine is idle."""
        self._forget_adapters()
        self.clock.start()
        batch = dummy_batch(1, 1, self.config.block_size, num_groups=len(self.config.model.layer_groups))
        self.tp.broadcast(batch.pack())
        self.runner.execute(batch)
        self.runner.synchronize()
        self.clock.end()
        self._capture_graph(is_idle=True)

    def shutdown(self) -> None:
        """Stops the followers. The core is not usable afterwards."""
        self.tp.broadcast(STOP)
        self.grammars.close()

    def load(self) -> LoadReport:
        in_flight = self._in_flight  # another thread may replace it
        return load_report(
            self.scheduler,
            self.clock,
            self.tp,
            num_compiling=self.grammars.num_compiling,
            num_leaving=0 if in_flight is None else in_flight.num_leaving,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
        )

    def facts(self, replica_id: str) -> EngineFacts:
        return engine_facts(
            self.config,
            replica_id=replica_id,
            tensor_parallel_size=self.tp.size,
            max_model_len=self.max_model_len,
            num_blocks=self.kv_cache.pool.num_blocks // len(self.kv_cache.windows),
            attention_backend=self.runner.attention_backend,
        )

    def _admit_compiled(self) -> list[TokenDelta]:
        """Gives requests whose grammar is compiled to the scheduler; ends those whose grammar cannot be used."""
        failed = []
        timeout_s = 0.0 if self._is_busy() else COMPILING_POLL_S
        for compiled in self.grammars.take_compiled(timeout_s=timeout_s):
            request = self._requests[compiled.request_id]
            request.constraint = compiled.constraint
            self.scheduler.add(request)
            if compiled.error is not None:
                failed.append(self._fail(request, compiled.error))
        return failed

    def _schedule(self) -> list[ScheduledRequest]:
        # Empty twice means that nothing can run: the first call may have preempted every request, the second starts from there.
        scheduled = self.scheduler.schedule()
        return scheduled if scheduled or self._in_flight is not None else self.scheduler.schedule()

    def unload_adapter(self, revision: str) -> None:
        """No further request may name it. It leaves every rank once no request uses it."""
        if self.adapters is not None:
            self.adapters.unload(revision)
            self._forget_adapters()

    def _forget_adapters(self) -> None:
        if self.adapters is not None and self.adapters.has_unloaded:
            self.adapters.forget_unused({request.adapter for request in self._requests.values()})

    def _with_adapters(self, scheduled: list[ScheduledRequest]) -> tuple[list[ScheduledRequest], list[TokenDelta]]:
        """Those whose adapters are in their slots on all ranks. Ends the others: another replica may have what a rank lacks here."""
        if self.adapters is None or not (lacking := self.adapters.put_new()):
            return scheduled, []
        failed = []
        for request in [r for r in self._requests.values() if r.adapter in lacking]:
            self.abort(request.request_id)
            error = f"A rank of this replica does not have the adapter {request.adapter}."
            failed.append(failure(request.request_id, error, elsewhere=True))
        for adapter in lacking:
            self.adapters.slots.remove(adapter)
        return [s for s in scheduled if not s.request.has_ended], failed

    def _capture_graph(self, *, is_idle: bool) -> None:
        """One CUDA graph on every rank, if there is one to capture."""
        size = self.runner.size_to_capture(is_idle=is_idle)
        if size is not None:
            self.tp.broadcast(capture_message(size))
            self.runner.capture(size)

    def _broadcast(self, scheduled: Sequence[ScheduledRequest]) -> ForwardBatch:
        batch = make_batch(scheduled, self.config.block_size)
        if self.tp.size > 1:
            self.tp.broadcast(batch.pack())
        return batch

    def _execute(self, batch: ForwardBatch, step: LaunchedStep) -> torch.Tensor | None:
        """Logits [len(step.sampling), vocab_size]."""
        if (before := self._in_flight) is None:
            # The masks of grammars, which follow from the tokens so far, are computed in the meantime.
            step.begin_masks(self.grammars)
        sampled = None if before is None else before.token_ids
        return self.runner.execute(batch, PromptReader(step.scheduled), sampled=sampled)

    def _sample(self, step: LaunchedStep, logits: torch.Tensor | None) -> None:
        """Samples for each request that has its mask."""
        if step.needs_known_tokens and step.masks is None:
            step.begin_masks(self.grammars)
        masks, rows = step.take_masks(self.runner.synchronize), step.rows_to_sample()
        if not rows:
            # `forward_age_s` must not run ahead of the device.
            step.tokens = no_tokens(self.runner.mark())
            return
        assert logits is not None, "rank 0 gathers the logits"
        all_sample = len(rows) == len(step.sampling)
        requests = step.sampling if all_sample else [step.sampling[i] for i in rows]
        step.tokens = self._sampling.sample(rows_of(logits, rows), requests, masks)

    def _launched(self, step: LaunchedStep) -> None:
        for request in step.commit(self.kv_cache):
            # Others get its place in the next step already.
            self.scheduler.finish(request)
            request.has_left = True
        self._in_flight = step

    def _update(self) -> list[TokenDelta]:
        """Reads the tokens of the step in flight, if there is one."""
        step = self._in_flight
        if step is None:
            return []
        found = step.read()
        self._in_flight = None
        self.clock.end()
        self.scheduler.took(step.scheduled, self.clock.last_step_s)
        if step.shows_speed:
            self.clock.add_speed(step.num_tokens)
        deltas = []
        eos_token_ids = self.config.model.eos_token_ids
        for request, sampled in found:
            delta = advance_plainly(request, sampled, eos_token_ids)
            if delta is not None:
                deltas.append(delta)
                continue
            if request.num_output_tokens == 0:
                self._prompt_tokens_total += request.num_prompt_tokens
            deltas += self._advance(request, sampled)
        self._generated_tokens_total += sum([len(delta.token_ids) for delta in deltas])
        if self._spans is not None and self._spans.prefilling:
            self._spans.after_step()
        return deltas

    def _is_busy(self) -> bool:
        return self.scheduler.has_work() or self._in_flight is not None

    def _advance(self, request: Request, sampled: Sequence[Sampled]) -> list[TokenDelta]:
        """`sampled` is empty for a request that samples nothing and only reads its prompt."""
        deltas = advance(request, sampled, self.config.model.eos_token_ids)
        if (reason := deltas[-1].finish_reason) is not None:
            if request.spans is not None:
                request.spans.end(request, reason)
            self.abort(request.request_id)
        elif request.constraint is not None:
            self.grammars.prepare_mask(request.constraint)
        return deltas

    def _fail(self, request: Request, error: str) -> TokenDelta:
        """Ends this request alone; `error` is for the user."""
        if request.spans is not None:
            request.spans.end(request, FinishReason.ERROR)
        self.abort(request.request_id)
        return failure(request.request_id, error)

    def _wait(self) -> list[TokenDelta]:
        """Nothing is in flight or can be scheduled. Returns once a held request can go on, or something else may have happened."""
        if not self.scheduler.running:
            return self._fail_first_waiting()
        held = [request.constraint for request in self.scheduler.running if request.constraint is not None]
        self.grammars.wait_for_any([constraint for constraint in held if constraint.is_held], MASKS_POLL_S)
        if (self.clock.forward_age_s() or 0.0) > HELD_HEARTBEAT_S:
            self.heartbeat()
        return []

    def _fail_first_waiting(self) -> list[TokenDelta]:
        """Nothing can be scheduled: either there is no work, or the first request can never run and would block all others."""
        if not self.scheduler.waiting:
            return []
        request = self.scheduler.waiting[0]
        log.error(
            "Request %s cannot be scheduled in an otherwise empty engine and ends.", request.request_id,
            extra=in_trace(None if request.spans is None else request.spans.traceparent),
        )  # fmt: skip
        message = f"The request needs more KV cache than this replica has. Use fewer than {request.num_tokens} tokens."
        return [self._fail(request, message)]
