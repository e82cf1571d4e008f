"""What the engine reports about its prefix cache and its load matches its pool and its queues, after every step."""

import itertools
import random
from types import SimpleNamespace

import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_engine, make_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "model",
    [
        {"sliding_window": None},
        {"sliding_window": 16},
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ],
    ids=["full", "window", "both"],
)
def test_events_follow_the_pool_exactly_through_a_random_run(tmp_path, model):
    folder = write_tiny_checkpoint(tmp_path, **model)
    # 24 blocks of 4 tokens for up to 4 requests of up to 60: blocks are shared, evicted, and stored again all the time.
    num_blocks = 36 if "layer_types" in model else 24
    core = make_engine(
        folder, num_kv_blocks=num_blocks, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32
    ).core
    pool, rng = core.kv_cache.pool, random.Random(1)
    known: set[bytes] = set()
    num_reports = num_evicted = 0
    heads = [[rng.randrange(3, 200) for _ in range(12)] for _ in range(4)]
    for i in range(40):
        tail = [rng.randrange(3, 200) for _ in range(rng.randrange(1, 20))]
        core.add_request(make_request(f"r{i}", rng.choice(heads) + tail, max_tokens=rng.randrange(1, 20)))
        for _ in range(rng.randrange(1, 12)):
            core.step()
            if rng.random() < 0.2:
                core.abort(f"r{rng.randrange(i + 1)}")
            if rng.random() < 0.3:
                continue  # the next events cover both steps
            events = core.take_cache_events()
            if events is not None:
                assert not events.reset
                assert set(events.evicted) <= known, "evicted what was never stored"
                assert not set(events.stored) & known, "stored what was known already"
                known = known - set(events.evicted) | set(events.stored)
                num_reports += 1
                num_evicted += len(events.evicted)
            assert known == set(pool.cached_hashes)
    assert num_reports > 50
    assert num_evicted > 50, "the pool was meant to be too small"


@pytest.mark.usefixtures("both_ways")
def test_without_prefix_caching_there_are_no_events(folder):
    core = make_engine(folder, enable_prefix_caching=False).core
    core.add_request(make_request("r", list(range(5, 45)), max_tokens=8))
    while core.has_work():
        core.step()
        assert core.take_cache_events() is None


def test_pending_tokens_are_what_is_left_to_compute(folder):
    core = make_engine(folder, max_num_seqs=1, max_num_batched_tokens=16).core
    assert core.load().num_pending_tokens == 0
    core.add_request(make_request("a", list(range(5, 45)), max_tokens=3))
    core.add_request(make_request("b", list(range(50, 60)), max_tokens=3))
    # a's 40 prompt tokens in chunks of 16, then one token a step, and the 10 that b waits with
    pending = [core.load().num_pending_tokens]
    while core.has_work():
        core.step()
        pending.append(core.load().num_pending_tokens)
    assert pending == [50, 34, 18, 11, 11, 10, 1, 1, 0]


def test_the_speed_is_that_of_steps_with_prompts(folder, monkeypatch):
    core = make_engine(folder, max_num_seqs=8, max_num_batched_tokens=16).core
    clock = itertools.count()
    every_step_takes_1_s = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("workers.engine.scheduling.step_clock.time", every_step_takes_1_s)
    core.heartbeat()
    assert core.load().tokens_per_s == 0.0, "a heartbeat computes no token of a request"
    core.add_request(make_request("r", list(range(5, 37)), max_tokens=6))
    core.step()
    core.step()
    assert core.load().tokens_per_s == 16.0
    while core.has_work():
        core.step()
    load = core.load()
    assert load.tokens_per_s == 16.0, "a decoding step says nothing about prompts"
    assert load.step_s_total == load.num_steps_total == 8
