"""Which requests run: budget, chunks, order, preemption. Drives the scheduler without a model."""

import random

import pytest
from support.scheduling import add, make_scheduler, run_step

from workers.protocol import BATCH_PRIORITY


def test_long_prompts_are_prefilled_in_chunks_along_with_decoding():
    scheduler = make_scheduler()
    add(scheduler, 0, 3)
    assert run_step(scheduler) == {"0": 3}
    add(scheduler, 1, 40)
    assert run_step(scheduler) == {"0": 1, "1": 15}
    assert run_step(scheduler) == {"0": 1, "1": 15}
    assert run_step(scheduler) == {"0": 1, "1": 10}
    assert run_step(scheduler) == {"0": 1, "1": 1}


def test_no_more_than_max_num_seqs_run():
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        add(scheduler, i, 2, max_tokens=2)
    assert run_step(scheduler) == {"0": 2, "1": 2}
    assert run_step(scheduler) == {"0": 1, "1": 1}
    assert run_step(scheduler) == {"2": 2}


def test_a_smaller_priority_goes_first():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, 0, 2, priority=5, max_tokens=1)
    add(scheduler, 1, 2, priority=0, max_tokens=1)
    assert run_step(scheduler) == {"1": 2}
    assert run_step(scheduler) == {"0": 2}


def test_the_latest_is_preempted_when_blocks_run_out_and_loses_nothing():
    scheduler = make_scheduler(num_blocks=5)
    first, second = add(scheduler, 0, 7, max_tokens=8), add(scheduler, 1, 7, max_tokens=8)
    run_step(scheduler)
    while not scheduler.num_preemptions_total:
        assert "0" in run_step(scheduler), "the earliest request always advances"
    assert scheduler.waiting == [second]
    tokens_before = list(second.token_ids)
    assert second.num_computed_tokens == 0
    while scheduler.has_work():
        run_step(scheduler)
    assert second.token_ids[: len(tokens_before)] == tokens_before
    assert first.num_output_tokens == second.num_output_tokens == 8
    assert scheduler.kv_cache.pool.num_used == 0


def test_random_loads_always_finish_and_leave_nothing():
    for seed in range(30):
        rng = random.Random(seed)
        window = rng.choice([None, 3, 9])
        # 8 blocks of 4 hold the longest sequence (20 + 10 tokens): every mix must get through.
        scheduler = make_scheduler(
            num_blocks=8, max_num_seqs=5, max_num_batched_tokens=rng.randint(5, 20), window=window
        )
        requests = [add(scheduler, i, rng.randint(1, 20), priority=rng.randint(0, 1)) for i in range(20)]
        aborted = set()
        for _ in range(2000):
            if not scheduler.has_work():
                break
            scheduled = run_step(scheduler)
            assert scheduled, "with work to do, some request advances in every step"
            assert sum(scheduled.values()) <= scheduler.max_num_batched_tokens
            if rng.random() < 0.05:
                victim = rng.choice(scheduler.running + scheduler.waiting) if scheduler.has_work() else None
                if victim is not None:
                    scheduler.finish(victim)
                    aborted.add(victim.request_id)
        assert not scheduler.has_work()
        assert scheduler.kv_cache.pool.num_used == 0
        assert all(r.num_output_tokens == 10 for r in requests if r.request_id not in aborted)


@pytest.mark.parametrize("caching", [True, False])
def test_prefix_lookups_are_counted_once_per_request(caching):
    scheduler = make_scheduler(enable_prefix_caching=caching)
    for arrival, priority in ((0, 0), (1, 0), (2, BATCH_PRIORITY)):
        request = add(scheduler, arrival, 9, priority=priority, max_tokens=1)
        request.sequence.token_ids[:] = range(9)
        run_step(scheduler)
        assert request.num_cached_tokens == (8 if caching and arrival else 0)
    counts = scheduler.prefix_counts
    assert (counts.queries_total, counts.hits_total) == ((27, 16) if caching else (0, 0))
    assert (counts.background_queries_total, counts.background_hits_total) == ((9, 8) if caching else (0, 0))
