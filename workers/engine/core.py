"""The engine on rank 0: schedule, broadcast, execute, sample, update.

Owns the requests between `add_request` and their last delta. Knows no sockets and no text. All methods belong to one
thread, except `load`, which may be called from any.
"""

import itertools
import logging
import time

import numpy as np
import torch

from workers.config import EngineConfig
from workers.engine.batch import STOP, dummy_batch, make_batch
from workers.engine.model_runner import ModelRunner
from workers.engine.prompt_outputs import MeanEmbedding, PromptLogprobs, PromptReader, make_prompt_output
from workers.engine.request import Request, make_request
from workers.engine.scheduler import ScheduledRequest, Scheduler
from workers.errors import RequestError
from workers.kv_cache.manager import KVCacheManager
from workers.parallel.group import TensorParallel
from workers.protocol import (
    CacheEvents,
    EngineFacts,
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenDelta,
    TokenLogprob,
)
from workers.sampling.grammar import Grammars
from workers.sampling.sampler import Sampled, SamplingRow, sample

log = logging.getLogger(__name__)

# A step that runs this long is suspicious: the load report then names the ranks it waits for.
SLOW_STEP_S = 1.0
# How much of the speed known before a step with prompts survives it.
SPEED_DECAY = 0.9
# With nothing to do but compile grammars, the engine thread looks this often whether there is something else.
COMPILING_POLL_S = 0.01


class EngineCore:
    """`allocate_kv_cache` must have run on every rank before."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, tp: TensorParallel) -> None:
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
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self.num_steps_total = 0
        self.step_s_total = 0.0
        self._prompt_tokens_total = 0
        self._generated_tokens_total = 0
        self._last_step_s = 0.0
        # Decaying sums, so that a short prompt, whose step is mostly fixed cost, does not weigh like a long one.
        self._recent_tokens = self._recent_s = 0.0
        self._last_forward: float | None = None
        self._step_began: float | None = None

    def add_request(self, message: GenerateRequest) -> None:
        """Raises RequestError for a request that can never be served; nothing is kept of it then."""
        if message.request_id in self._requests:
            raise RequestError(f"Request id {message.request_id!r} is already in use.", param="request_id")
        request = make_request(
            message,
            arrival=next(self._arrivals),
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.max_model_len,
        )
        request.prompt_output = make_prompt_output(message)
        if request.sampling.grammar is None:
            self.scheduler.add(request)
        else:
            self.grammars.compile(request)  # until that is done, the scheduler does not know of it
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        """Forgets a request at any stage and frees its blocks. Unknown ids are ignored: it may have ended a
        moment ago.
        """
        request = self._requests.pop(request_id, None)
        if request is not None and not self.grammars.forget(request):
            self.scheduler.finish(request)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or self.grammars.num_compiling > 0

    def step(self) -> list[TokenDelta]:
        """One forward pass for as many requests as fit; empty when there is no work. Raises GroupError if a rank is
        gone.
        """
        failed = self._admit_compiled()
        # Empty twice means empty for good: the first call may have preempted everyone, the second starts from there.
        scheduled = self.scheduler.schedule() or self.scheduler.schedule()
        if not scheduled:
            return failed + self._fail_head_of_line()
        began = self._step_began = time.monotonic()
        batch = make_batch(scheduled, self.config.block_size)
        self.tp.broadcast(batch.pack())
        sampling = [s.request for s in scheduled if s.samples]
        masks = self.grammars.begin_masks(sampling)  # computed while the model computes
        logits = self.runner.execute(batch, PromptReader(scheduled))
        sampled = self._sample(sampling, logits, masks.result() if masks is not None else {})
        deltas = self._update(scheduled, sampled)
        self._step_ended(began)
        self._measure_speed(scheduled)
        return failed + deltas

    def take_cache_events(self) -> CacheEvents | None:
        """What the prefix cache gained and lost since the last call; None when nothing."""
        return self.kv_cache.pool.take_events()

    def heartbeat(self) -> None:
        """A forward pass of one dummy token on all ranks: proof of life while idle."""
        began = self._step_began = time.monotonic()
        batch = dummy_batch(1, 1, self.config.block_size)
        self.tp.broadcast(batch.pack())
        self.runner.execute(batch)
        self.runner.synchronize()
        self._step_ended(began)

    def shutdown(self) -> None:
        """Sends the followers home. The core is not usable afterwards."""
        self.tp.broadcast(STOP)
        self.grammars.close()

    def load(self) -> LoadReport:
        now, began = time.monotonic(), self._step_began
        pool = self.kv_cache.pool
        running, waiting = (
            list(self.scheduler.running),
            list(self.scheduler.waiting),
        )  # the engine thread changes the lists
        requests = running + waiting
        background = [r for r in requests if r.is_background]
        num_foreground_blocks = sum(r.num_blocks_held for r in running if not r.is_background)
        return LoadReport(
            num_running=len(running),
            num_waiting=len(waiting) + self.grammars.num_compiling,
            num_pending_tokens=sum(r.num_tokens - r.num_computed_tokens for r in requests),
            num_background=len(background),
            num_background_pending_tokens=sum(r.num_tokens - r.num_computed_tokens for r in background),
            num_background_blocks=max(0, pool.num_used - num_foreground_blocks),
            tokens_per_s=self._recent_tokens / self._recent_s if self._recent_s else 0.0,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_steps_total=self.num_steps_total,
            num_preemptions_total=self.scheduler.num_preemptions_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
            prefix_queries_total=self.kv_cache.prefix_queries_total,
            prefix_hits_total=self.kv_cache.prefix_hits_total,
            background_prefix_queries_total=self.kv_cache.background_prefix_queries_total,
            background_prefix_hits_total=self.kv_cache.background_prefix_hits_total,
            last_step_s=self._last_step_s,
            step_s_total=self.step_s_total,
            step_age_s=None if began is None else now - began,
            forward_age_s=None if self._last_forward is None else now - self._last_forward,
            stuck_ranks=self.tp.waiting_for() if began is not None and now - began > SLOW_STEP_S else (),
        )

    def facts(self, replica_id: str) -> EngineFacts:
        return EngineFacts(
            replica_id=replica_id,
            tensor_parallel_size=self.tp.size,
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            block_size=self.config.block_size,
            num_blocks=self.kv_cache.pool.num_blocks,
            sliding_window=self.config.model.sliding_window,
            enable_prefix_caching=self.config.enable_prefix_caching,
            bos_token_id=self.config.model.bos_token_id,
            eos_token_ids=self.config.model.eos_token_ids,
            attention_backend=self.runner.attention_backend,
            hidden_size=self.config.model.hidden_size,
        )

    def _admit_compiled(self) -> list[TokenDelta]:
        """Hands requests whose grammar is compiled to the scheduler; ends those whose grammar cannot be used."""
        failed = []
        timeout_s = 0.0 if self.scheduler.has_work() else COMPILING_POLL_S
        for request, error in self.grammars.take_compiled(timeout_s=timeout_s):
            self.scheduler.add(request)
            if error is not None:
                failed.append(self._fail(request, error))
        return failed

    def _sample(
        self, requests: list[Request], logits: torch.Tensor | None, masks: dict[str, np.ndarray]
    ) -> dict[str, Sampled]:
        if not requests:
            self.runner.synchronize()  # sampling waits for the device by itself; `forward_age_s` must not run ahead of it
            return {}
        assert logits is not None, "rank 0 gathers the logits"
        rows = [SamplingRow(r.sampling, r.token_ids, r.num_prompt_tokens, masks.get(r.request_id)) for r in requests]
        sampled = sample(logits, rows, eos_token_ids=self.config.model.eos_token_ids)
        return dict(zip((r.request_id for r in requests), sampled, strict=True))

    def _update(self, scheduled: list[ScheduledRequest], sampled: dict[str, Sampled]) -> list[TokenDelta]:
        deltas = []
        for s in scheduled:
            request, completes = s.request, s.completes
            request.num_computed_tokens += s.num_new_tokens
            self.kv_cache.commit(request)
            if not completes:
                continue
            if request.num_output_tokens == 0:
                self._prompt_tokens_total += request.num_prompt_tokens
            deltas.append(self._advance(request, sampled.get(request.request_id)))
        return deltas

    def _advance(self, request: Request, chosen: Sampled | None) -> TokenDelta:
        """`chosen` None: the request wants no token, only what its prompt gives."""
        if chosen is None:
            return self._delta(request, [], None)
        if chosen.token_id is not None:
            request.append(chosen.token_id)
        if request.constraint is not None and request.constraint.error is not None:
            return self._fail(request, request.constraint.error)
        if chosen.token_id is None:
            return self._fail(request, "Every token is banned here; allow more tokens, or ban fewer.")
        self._generated_tokens_total += 1
        return self._delta(request, [chosen.token_id], chosen.logprob)

    def _delta(self, request: Request, token_ids: list[int], logprob: TokenLogprob | None) -> TokenDelta:
        eos_token_ids = self.config.model.eos_token_ids
        reason = request.finish_reason(eos_token_ids=eos_token_ids, max_model_len=self.max_model_len)
        if reason is not None:
            self.abort(request.request_id)
        num_cached_tokens, request.num_cached_tokens = request.num_cached_tokens, None
        output, request.prompt_output = request.prompt_output, None
        return TokenDelta(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=None if logprob is None else [logprob],
            finish_reason=reason,
            stop_token_id=token_ids[-1] if reason is FinishReason.STOP and request.stops(eos_token_ids) else None,
            num_cached_tokens=num_cached_tokens,
            prompt_logprobs=output.logprobs if isinstance(output, PromptLogprobs) else None,
            embedding=output.to_bytes() if isinstance(output, MeanEmbedding) else None,
        )

    def _fail(self, request: Request, sentence: str) -> TokenDelta:
        """Ends this request alone, by its own doing."""
        self.abort(request.request_id)
        return TokenDelta(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=sentence, refused=True)

    def _fail_head_of_line(self) -> list[TokenDelta]:
        """Nothing can be scheduled: either there is no work, or the first request can never run and would block all
        others.
        """
        if not self.scheduler.waiting:
            return []
        request = self.scheduler.waiting[0]
        log.error("request %s cannot be scheduled in an otherwise empty engine; it is ended", request.request_id)
        return [
            self._fail(
                request,
                f"The request needs more KV cache than this replica has; use fewer than {request.num_tokens} tokens.",
            )
        ]

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

    def _step_ended(self, began: float) -> None:
        self._last_forward = time.monotonic()
        self._last_step_s = self._last_forward - began
        self._step_began = None
        self.num_steps_total += 1
        self.step_s_total += self._last_step_s

    def _measure_speed(self, scheduled: list[ScheduledRequest]) -> None:
        """Steps in which somebody catches up count: what they show is how fast waiting tokens are worked off. Background requests
        that keep to a budget catch up slowly, and show nothing.
        """
        held_back = self.scheduler.foreground_is_near
        if any(s.num_new_tokens > 1 and not (held_back and s.request.is_background) for s in scheduled):
            self._recent_s = SPEED_DECAY * self._recent_s + self._last_step_s
            self._recent_tokens = SPEED_DECAY * self._recent_tokens + sum(s.num_new_tokens for s in scheduled)
