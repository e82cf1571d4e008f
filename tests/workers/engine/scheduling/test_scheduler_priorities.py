"""Which requests are preempted for which: priorities across running and waiting, and the budget of background requests."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_engine, make_request
from support.scheduling import add, make_scheduler, play, run_step

from workers.engine.scheduling.scheduler import FOREGROUND_IS_NEAR_STEPS
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.protocol import BATCH_PRIORITY, GenerateRequest

BATCH = BATCH_PRIORITY


def names(requests):
    return [r.request_id for r in requests]


def test_a_full_engine_makes_room_in_the_same_step():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, 0, 3, priority=BATCH)
    add(scheduler, 1, 3, priority=BATCH)
    run_step(scheduler)
    add(scheduler, 2, 3)
    assert run_step(scheduler) == {"2": 3, "0": 1}
    assert names(scheduler.waiting) == ["1"], "the last of the worst is preempted"


def test_equal_priorities_do_not_preempt_each_other():
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, 5, 3)
    add(scheduler, 6, 3)
    run_step(scheduler)
    add(scheduler, 1, 3)  # arrived earlier, like a request whose grammar took long to compile
    assert run_step(scheduler) == {"5": 1, "6": 1}
    assert scheduler.num_preemptions_total == 0


def test_a_batch_lines_prefill_leaves_the_budget_to_new_requests():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, 0, 60, priority=BATCH)
    assert run_step(scheduler) == {"0": 16}
    add(scheduler, 1, 30)
    assert run_step(scheduler) == {"1": 16}, "skipped: it keeps its place and its blocks"
    assert run_step(scheduler) == {"1": 14, "0": 2}
    assert scheduler.num_preemptions_total == 0


def test_blocks_are_taken_from_the_worst_and_from_no_more_of_them_than_needed():
    scheduler = make_scheduler(num_blocks=6)
    for i, priority in enumerate([BATCH, 7, BATCH + 1]):
        add(scheduler, i, 5, priority=priority)
    run_step(scheduler)
    assert scheduler.kv_cache.pool.num_free == 0
    add(scheduler, 3, 6)
    assert run_step(scheduler) == {"3": 6, "1": 1, "0": 1}
    assert names(scheduler.waiting) == ["2"]


def test_background_requests_keep_to_their_budget_while_others_are_near():
    scheduler = make_scheduler(max_num_seqs=20, max_num_batched_tokens=64, num_blocks=400)
    scheduler.max_background_tokens = 6
    for i in range(10):
        add(scheduler, i, 4, priority=BATCH, max_tokens=2000)
    assert sum(run_step(scheduler).values()) == 40, "alone they take what there is"
    assert run_step(scheduler) == {str(i): 1 for i in range(10)}
    add(scheduler, 10, 3, max_tokens=2)
    assert run_step(scheduler) == {"10": 3}, "nothing is added to the step that a first token waits for"
    assert run_step(scheduler) == {"10": 1} | {str(i): 1 for i in range(6)}
    add(scheduler, 11, 40, priority=BATCH)
    for _ in range(FOREGROUND_IS_NEAR_STEPS - 1):
        assert len(run_step(scheduler)) == 6, "the next foreground request must not find a long step under way"
    assert run_step(scheduler) == {str(i): 1 for i in range(10)} | {"11": 40}


@dataclass(frozen=True)
class Arrival:
    step: int
    num_tokens: int
    priority: int
    max_tokens: int
    prefix: int  # requests of one prefix share their tokens


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        num_tokens=st.integers(1, 20),
        priority=st.sampled_from([0, 0, 1, BATCH, BATCH, BATCH + 3]),
        max_tokens=st.integers(1, 10),
        prefix=st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150)
@given(
    arrivals=ARRIVALS,
    num_blocks=st.integers(8, 24),  # 8 of 4 tokens hold the longest sequence
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 24),
    background=st.one_of(st.none(), st.integers(1, 5)),
    window=st.sampled_from([None, 3, 9, (None, 3)]),
)
def test_no_order_of_arrivals_breaks_the_rule(arrivals, num_blocks, max_num_seqs, budget, background, window):
    num_blocks *= len(window) if isinstance(window, tuple) else 1
    scheduler = make_scheduler(
        num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, window=window
    )
    scheduler.max_background_tokens = background
    requests = []
    for step in range(5000):
        for arrival in (a for a in arrivals if a.step == step):
            request = add(
                scheduler, len(requests), arrival.num_tokens, priority=arrival.priority, max_tokens=arrival.max_tokens
            )
            request.sequence.token_ids[:] = [arrival.prefix * 1000 + i for i in range(arrival.num_tokens)]
            requests.append(request)
        if not scheduler.has_work():
            if len(requests) == len(arrivals):
                break
            continue
        heads = [queue[0] for queue in (scheduler.running, scheduler.waiting) if queue]
        first = min(heads, key=lambda r: r.priority)  # of two equal ones the running one
        ran = run_step_checked(scheduler, budget=budget, background=background)
        assert first.request_id in ran, (
            "the first in order advances in every step: so no request starves within a class"
        )
    assert [r.num_output_tokens for r in requests] == [r.sampling.max_tokens for r in requests]
    assert scheduler.kv_cache.pool.num_used == 0


def run_step_checked(scheduler, *, budget, background):
    """One step, with what must hold between schedule and update."""
    scheduled = scheduler.schedule()
    worst = max(s.request.priority for s in scheduled)
    assert all(w.priority >= worst for w in scheduler.waiting), "no request waits while a worse one is served"
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert sum(s.num_new_tokens for s in scheduled) <= budget
    if background is not None and scheduler.foreground_is_near:
        assert sum(s.num_new_tokens for s in scheduled if s.request.is_background) <= background
    tables = [table for r in scheduler.running for table in r.sequence.tables]
    held = {b for table in tables for b in table.block_ids if b != NULL_BLOCK}
    assert scheduler.kv_cache.pool.num_used == len(held), "every used block has a holder"
    assert all(not w.sequence.tables for w in scheduler.waiting)
    return play(scheduler, scheduled)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("window", [None, 16])
def test_lines_preempted_again_and_again_get_the_same_tokens(tmp_path, window):
    folder = write_tiny_checkpoint(tmp_path, sliding_window=window)
    lines = [batch_line(i) for i in range(12)]
    expected = dict(
        zip([r.request_id for r in lines], make_engine(folder, num_kv_blocks=2000).generate(lines), strict=True)
    )
    core = make_engine(folder, num_kv_blocks=40, max_num_seqs=4, max_background_tokens=10).core
    for line in lines:
        core.add_request(line)
    outputs: dict[str, list[int]] = {}
    for step in range(2000):
        if step % 15 < 3 and step < 140:
            core.add_request(make_request(f"online{step}", [step + 3] * (5 + step % 30), max_tokens=9))
        for delta in core.step():
            outputs.setdefault(delta.request_id, []).extend(delta.token_ids)
        if not core.has_work() and step >= 140:
            break
    assert core.load().num_preemptions_total > 10, "the test is about preemptions"
    assert {name: outputs[name] for name in expected} == expected
    assert all(len(outputs[f"online{step}"]) == 9 for step in range(140) if step % 15 < 3)
    assert core.load().num_used_blocks == core.load().num_background == 0


def batch_line(i: int) -> GenerateRequest:
    request = make_request(f"line{i}", list(range(3, 20 + 2 * i)), seed=i, max_tokens=20 + i)
    return GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        priority=BATCH + i % 2,
    )
