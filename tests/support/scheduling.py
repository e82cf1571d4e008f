"""Drives a scheduler without a model. Knows no torch."""

from workers.engine.scheduling.request import Request
from workers.engine.scheduling.scheduler import Scheduler
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sequence import BlockSequence
from workers.protocol import SamplingParams


def make_scheduler(
    *,
    num_blocks=100,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=16,
    window=None,
    enable_prefix_caching=True,
    slots=None,
):
    kv_cache = KVCacheManager(
        num_blocks=num_blocks,
        block_size=block_size,
        windows=window if isinstance(window, tuple) else (window,),
        enable_prefix_caching=enable_prefix_caching,
    )
    return Scheduler(kv_cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, slots=slots)


def add(scheduler, arrival, num_tokens, *, priority=0, max_tokens=10, adapter=None):
    request = Request(
        request_id=str(arrival),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        num_prompt_tokens=num_tokens,
        sequence=BlockSequence([arrival * 1000 + i for i in range(num_tokens)]),
        arrival=arrival,
        max_num_tokens=num_tokens + max_tokens,
        priority=priority,
        adapter=adapter,
    )
    scheduler.add(request)
    return request


def run_step(scheduler):
    """Plays one step; returns {request id: new tokens}."""
    return play(scheduler, scheduler.schedule())


def play(scheduler, scheduled):
    """Does with the scheduled requests what a core does; every sampled token is 1."""
    for s in scheduled:
        samples = s.samples
        scheduler.kv_cache.commit(s.request.sequence, s.num_new_tokens)
        if samples:
            s.request.append(1)
            if s.request.num_output_tokens >= s.request.sampling.max_tokens:
                scheduler.finish(s.request)
    return {s.request.request_id: s.num_new_tokens for s in scheduled}
