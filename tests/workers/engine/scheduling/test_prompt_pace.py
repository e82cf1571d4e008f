"""How prompts are spread over steps while others decode: the bound alone, in the scheduler, and both against a machine whose steps
take 20 ms and 0.5 ms for each token of a prompt.
"""

import pytest
from support.scheduling import add, make_scheduler, play, run_step

from workers.engine.scheduling.prompt_pace import FIRST_TOKENS, MIN_TOKENS, STRETCH, PromptPace
from workers.protocol import BATCH_PRIORITY

DECODE_S, TOKEN_S = 0.020, 0.0005


def measured_pace(*, decode_s: float = DECODE_S, token_s: float = TOKEN_S) -> PromptPace:
    pace = PromptPace()
    pace.add(num_decoding=8, num_prompt_tokens=0, step_s=decode_s)
    pace.add(num_decoding=8, num_prompt_tokens=100, step_s=decode_s + 100 * token_s)
    return pace


def test_the_worked_example():
    pace = measured_pace()
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == 160
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=16) == 400


def test_tokens_that_attend_to_more_take_longer():
    """Two prompts of 2,000 tokens, each token 0.35 ms and 0.15 us for each before it. Then no step exceeds the bound, and each uses it."""
    pace = PromptPace()
    pace.add(num_decoding=8, num_prompt_tokens=0, step_s=DECODE_S)
    for _ in range(2):
        steps, done = [], 0
        while done < 2000:
            num = min(2000 - done, pace.max_prompt_tokens(num_decoding=8, num_prompts=1, num_before=done))
            num_before = done + num / 2
            steps.append(DECODE_S + num * (0.00035 + 0.15e-6 * num_before))
            pace.add(num_decoding=8, num_prompt_tokens=num, step_s=steps[-1], num_before=num_before)
            done += num
    assert max(steps) <= 1.1 * STRETCH * DECODE_S
    assert min(steps[:-1]) >= 0.8 * STRETCH * DECODE_S


def test_steps_without_requests_that_decode_say_less_than_those_with_some():
    """In parts of thousands a prompt's tokens take half as long as in small ones."""
    pace = measured_pace()
    for _ in range(20):
        pace.add(num_decoding=0, num_prompt_tokens=2000, step_s=DECODE_S + 2000 * TOKEN_S / 2)
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == 160


def test_where_decoding_is_slow_gaps_grow_less():
    """Steps of 0.4 s become 0.8 s, not 2 s; steps of 0.1 s become 0.25 s."""
    pace = measured_pace(decode_s=0.4, token_s=0.01)
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == 40
    pace = measured_pace(decode_s=0.1, token_s=0.01)
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == 15


def test_a_smaller_stretch_makes_shorter_steps():
    for stretch, num_tokens in ((2.0, 40), (1.5, 20)):
        pace = PromptPace(stretch=stretch)
        pace.add(num_decoding=8, num_prompt_tokens=0, step_s=DECODE_S)
        pace.add(num_decoding=8, num_prompt_tokens=100, step_s=DECODE_S + 100 * TOKEN_S)
        assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == num_tokens


def test_before_anything_is_measured_the_bound_is_small_and_grows_with_those_who_wait():
    pace = PromptPace()
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == FIRST_TOKENS
    assert pace.max_prompt_tokens(num_decoding=1, num_prompts=3) == 15 * FIRST_TOKENS


def test_a_prompt_always_makes_progress():
    pace = measured_pace(decode_s=0.001, token_s=10.0)
    assert pace.max_prompt_tokens(num_decoding=8, num_prompts=1) == MIN_TOKENS


def test_one_slow_step_says_little():
    pace = measured_pace()
    pace.add(num_decoding=8, num_prompt_tokens=0, step_s=5.0)
    assert 160 <= pace.max_prompt_tokens(num_decoding=8, num_prompts=1) <= 200
    pace = measured_pace()
    pace.add(num_decoding=8, num_prompt_tokens=160, step_s=5.0)
    assert 120 <= pace.max_prompt_tokens(num_decoding=8, num_prompts=1) <= 160


def test_decode_steps_of_about_as_many_requests_count():
    pace = measured_pace()
    pace.add(num_decoding=64, num_prompt_tokens=0, step_s=0.04)
    assert pace.max_prompt_tokens(num_decoding=100, num_prompts=1) == 320
    assert pace.max_prompt_tokens(num_decoding=9, num_prompts=1) == 160
    assert pace.max_prompt_tokens(num_decoding=4, num_prompts=1) == 160, "the nearest that is known"


@pytest.fixture
def scheduler():
    """Eight requests decode; steps of more than 160 prompt tokens would take more than five times as long."""
    scheduler = make_scheduler(num_blocks=1000, max_num_batched_tokens=512, max_num_seqs=16)
    for i in range(8):
        add(scheduler, i, 3, max_tokens=1000)
    run_step(scheduler)
    scheduler.pace = measured_pace()
    return scheduler


DECODED = {str(i): 1 for i in range(8)}


def test_prompts_share_the_bound_in_their_order_and_those_who_decode_go_on(scheduler):
    add(scheduler, 11, 150)
    add(scheduler, 12, 30)
    add(scheduler, 13, 100)
    # Three wait for eight: not enough for more than five times.
    assert run_step(scheduler) == {**DECODED, "11": 150, "12": 10}
    # The first prompt is computed, and its request decodes with the others.
    assert run_step(scheduler) == {**DECODED, "11": 1, "12": 20, "13": 100}


def test_a_prompt_without_tokens_in_a_step_holds_up_nobody_after_it(scheduler):
    add(scheduler, 11, 400)
    assert run_step(scheduler) == {**DECODED, "11": 160}
    add(scheduler, 12, 400, priority=-1)
    add(scheduler, 13, 2, priority=BATCH_PRIORITY)
    # Number 11 runs and gets nothing; the eight decode all the same.
    assert run_step(scheduler) == {"12": 160, **DECODED}


def test_background_requests_that_decode_bound_no_prompt():
    scheduler = make_scheduler(num_blocks=1000, max_num_batched_tokens=256)
    scheduler.pace = measured_pace()
    add(scheduler, 0, 3, priority=BATCH_PRIORITY, max_tokens=1000)
    run_step(scheduler)
    add(scheduler, 1, 200)
    assert run_step(scheduler) == {"1": 200, "0": 1}


def test_nobody_decodes_so_a_step_is_as_large_as_it_may_be():
    scheduler = make_scheduler(num_blocks=1000, max_num_batched_tokens=256)
    scheduler.pace = measured_pace()
    add(scheduler, 0, 300)
    assert run_step(scheduler) == {"0": 256}


def test_steps_stay_short_while_a_long_prompt_is_computed():
    """From nothing known: the first step with a prompt is a guess, all others keep to the bound, and use it."""
    scheduler = make_scheduler(num_blocks=3000, max_num_batched_tokens=1024, max_num_seqs=16)
    scheduler.pace = PromptPace()
    for i in range(8):
        add(scheduler, i, 4, max_tokens=10_000)

    def step() -> tuple[float, dict[str, int]]:
        scheduled = scheduler.schedule()
        tokens = [s.num_new_tokens for s in scheduled]
        step_s = DECODE_S + TOKEN_S * sum(n for n in tokens if n > 1)
        counts = play(scheduler, scheduled)
        scheduler.took(scheduled, step_s)
        return step_s, counts

    for _ in range(5):
        step()
    long = add(scheduler, 100, 2000)
    steps = []
    while not long.num_output_tokens:
        steps.append(step())
    assert all(counts[str(i)] == 1 for _, counts in steps for i in range(8)), "every stream gets a token in every step"
    assert len(steps) >= 12, "not in two steps, as without a bound"
    bound = STRETCH * DECODE_S
    assert max(step_s for step_s, _ in steps[1:]) <= bound * 1.001
    assert steps[-2][0] >= bound * 0.95
