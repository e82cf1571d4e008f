"""The engine's state as messages for the gateway. Reads the core's parts and changes nothing.

`load_report` may be called from any thread.
"""

from workers.config import EngineConfig
from workers.engine.scheduling.scheduler import Scheduler
from workers.engine.scheduling.step_clock import StepClock
from workers.parallel.group import TensorParallel
from workers.protocol import BATCH_PRIORITY, EngineFacts, LoadReport

# A step that runs this long is suspicious: the report then names the ranks it waits for.
SLOW_STEP_S = 1.0


def load_report(
    scheduler: Scheduler,
    clock: StepClock,
    tp: TensorParallel,
    *,
    num_compiling: int,
    num_leaving: int,
    prompt_tokens_total: int,
    generated_tokens_total: int,
) -> LoadReport:
    """What the scheduler does not know: `num_compiling` requests wait for their grammar, `num_leaving` for their last token.

    Blocks are counted as if each held all layers: where layers have different windows, it takes a block of each group.
    """
    pool, prefix_counts = scheduler.kv_cache.pool, scheduler.prefix_counts
    num_groups = len(scheduler.kv_cache.windows)
    # Copies: the engine thread changes the lists.
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    requests = running + waiting
    background = [r for r in requests if r.priority >= BATCH_PRIORITY]
    num_background_blocks = 0
    if background:
        num_foreground_blocks = sum(r.sequence.num_held_blocks for r in running if not r.is_background)
        num_background_blocks = -(-max(0, pool.num_used - num_foreground_blocks) // num_groups)
    step_age_s = clock.step_age_s()
    return LoadReport(
        num_running=len(running) + num_leaving,
        num_waiting=len(waiting) + num_compiling,
        num_pending_tokens=sum(
            [len(r.sequence.token_ids) - r.sequence.num_computed_tokens + (r.unread_row is not None) for r in requests]
        ),
        num_background=len(background),
        num_background_pending_tokens=sum(r.num_pending_tokens for r in background),
        num_background_blocks=num_background_blocks,
        tokens_per_s=clock.tokens_per_s,
        num_blocks=pool.num_blocks // num_groups,
        num_used_blocks=min(pool.num_blocks // num_groups, -(-pool.num_used // num_groups)),
        num_steps_total=clock.num_steps_total,
        num_preemptions_total=scheduler.num_preemptions_total,
        prompt_tokens_total=prompt_tokens_total,
        generated_tokens_total=generated_tokens_total,
        prefix_queries_total=prefix_counts.queries_total,
        prefix_hits_total=prefix_counts.hits_total,
        background_prefix_queries_total=prefix_counts.background_queries_total,
        background_prefix_hits_total=prefix_counts.background_hits_total,
        last_step_s=clock.last_step_s,
        step_s_total=clock.step_s_total,
        step_age_s=step_age_s,
        forward_age_s=clock.forward_age_s(),
        stuck_ranks=tp.waiting_for() if step_age_s is not None and step_age_s > SLOW_STEP_S else (),
    )


def engine_facts(
    config: EngineConfig,
    *,
    replica_id: str,
    tensor_parallel_size: int,
    max_model_len: int,
    num_blocks: int,
    attention_backend: str,
) -> EngineFacts:
    """`max_model_len` and `num_blocks` as start-up found them, which may be less than the configuration asks for."""
    return EngineFacts(
        replica_id=replica_id,
        tensor_parallel_size=tensor_parallel_size,
        vocab_size=config.model.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        num_blocks=num_blocks,
        sliding_window=config.model.widest_window,
        enable_prefix_caching=config.enable_prefix_caching,
        bos_token_id=config.model.bos_token_id,
        eos_token_ids=config.model.eos_token_ids,
        attention_backend=attention_backend,
        hidden_size=config.model.hidden_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_background_tokens=config.background_tokens,
        dtype=config.dtype,
        quantization=config.weight_form,
        kv_cache_dtype=config.kv_cache_dtype,
        kv_token_bytes=config.kv_token_bytes,
    )
