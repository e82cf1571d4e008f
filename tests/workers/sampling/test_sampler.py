"""Each sampling parameter does what its definition says, and a row's token depends on nothing but the row."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from workers.protocol import SamplingParams
from workers.sampling.sampler import Sampled, SamplingRow, random_number, sample

VOCAB = 50
EOS = (2,)


def row(prompt=(5,), output=(), **params):
    params = {"max_tokens": 100, "seed": 1} | params
    return SamplingRow(SamplingParams(**params), [*prompt, *output], len(prompt))


def logits_of(probabilities):
    """{token: probability} over VOCAB tokens, the rest impossible."""
    logits = torch.full((1, VOCAB), -1e9)
    for token, p in probabilities.items():
        logits[0, token] = math.log(p)
    return logits


def draw(probabilities, n=400, **params):
    """How often each token is drawn at n different seeds."""
    logits = logits_of(probabilities).repeat(n, 1)
    rows = [row(**(params | {"seed": seed})) for seed in range(n)]
    return Counter(s.token_id for s in sample(logits, rows, eos_token_ids=EOS))


def greedy(logits, **params):
    return sample(logits.clone(), [row(temperature=0.0, **params)], eos_token_ids=EOS)[0].token_id


def test_frequencies_follow_the_distribution():
    counts = draw({3: 0.5, 7: 0.3, 9: 0.2}, n=4000)
    assert set(counts) == {3, 7, 9}
    for token, p in {3: 0.5, 7: 0.3, 9: 0.2}.items():
        assert abs(counts[token] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_temperature_sharpens_and_flattens():
    cold, hot = (draw({3: 0.7, 7: 0.3}, temperature=t)[7] for t in (0.3, 3.0))
    assert cold < 0.15 * 400 < 0.35 * 400 < hot


def test_temperature_zero_is_greedy_and_so_is_nearly_zero():
    for temperature in (0.0, 1e-9, 1e-5):
        assert draw({3: 0.4, 7: 0.6}, temperature=temperature) == {7: 400}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {3, 7}),
        ({"top_p": 0.4}, {3}),
        ({"top_p": 0.499}, {3}),
        ({"top_p": 0.51}, {3, 7}),
        ({"top_p": 0.799}, {3, 7}),
        ({"top_p": 1e-6}, {3}),
        ({"min_p": 0.5}, {3, 7}),
        ({"min_p": 0.7}, {3}),
        ({"min_p": 1.0}, {3}),
        ({"top_k": 3, "top_p": 0.75, "min_p": 0.1}, {3, 7}),
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {3, 7, 9, 11}),
    ],
)
def test_truncation(params, allowed):
    assert set(draw({3: 0.5, 7: 0.3, 9: 0.15, 11: 0.05}, **params)) == allowed


def test_top_p_counts_what_top_k_left():
    """Of 0.5, 0.3 (renormalised 0.625, 0.375) the first alone reaches 0.6."""
    assert set(draw({3: 0.5, 7: 0.3, 9: 0.2}, top_k=2, top_p=0.6)) == {3}


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    assert greedy(logits) == 5
    assert greedy(logits, prompt=(5,), repetition_penalty=1.4) == 6, "prompt tokens count"
    assert greedy(logits, prompt=(9,), output=(5,), repetition_penalty=1.4) == 6, "output tokens count"
    assert greedy(logits, prompt=(5,), repetition_penalty=1.3) == 5
    negative = torch.full((1, VOCAB), -9.0)
    negative[0, 5], negative[0, 6] = -1.0, -1.2
    assert greedy(negative, prompt=(5,), repetition_penalty=1.3) == 6


def test_presence_penalty_counts_output_once():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    assert greedy(logits, prompt=(5, 5, 5), presence_penalty=1.0) == 5, "the prompt does not count"
    assert greedy(logits, output=(5, 5), presence_penalty=0.4) == 5
    assert greedy(logits, output=(5,), presence_penalty=0.6) == 6


def test_frequency_penalty_counts_every_time():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.5
    assert greedy(logits, output=(5,), frequency_penalty=0.3) == 5
    assert greedy(logits, output=(5, 5), frequency_penalty=0.3) == 6


def test_logit_bias():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 2.0
    assert greedy(logits, logit_bias={8: 2.5}) == 8
    assert greedy(logits, logit_bias={5: -100.0, 9: 0.5}) == 9


def test_min_tokens_bans_every_way_to_stop():
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 5], logits[0, 6] = 3.0, 2.0, 1.0
    assert greedy(logits) == 2
    assert greedy(logits, min_tokens=1) == 5
    assert greedy(logits, min_tokens=1, stop_token_ids=(5,)) == 6
    assert greedy(logits, output=(9,), min_tokens=1) == 2, "position 1 is past min_tokens"
    assert greedy(logits, min_tokens=1, ignore_eos=True) == 2, "an ignored eos does not stop"


def test_banning_everything_gives_no_token():
    everything = tuple(range(VOCAB))
    for temperature in (0.0, 1.0):
        params = row(temperature=temperature, min_tokens=1, stop_token_ids=everything, logprobs=1)
        other = row(temperature=temperature)
        banned, free = sample(torch.zeros(2, VOCAB), [params, other], eos_token_ids=EOS)
        assert banned == Sampled(None, None)
        assert free == sample(torch.zeros(1, VOCAB), [other], eos_token_ids=EOS)[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_token_ids(temperature):
    probabilities = {3: 0.6, 7: 0.3, 9: 0.1}
    params = {"allowed_token_ids": (9, 7, 7), "temperature": temperature}
    assert set(draw(probabilities, **params)) == ({7, 9} if temperature else {7})
    assert set(draw(probabilities, **params, logit_bias={3: 100.0})) <= {7, 9}, "a bias allows nothing"
    assert set(draw(probabilities, **params, top_k=1)) == {7}, "truncation counts what is allowed"
    assert set(draw(probabilities, **params, output=(3, 3), frequency_penalty=-50.0)) <= {7, 9}


@pytest.mark.parametrize(
    ("bad_words", "output", "banned"),
    [
        (((5,),), (), True),
        (((5,),), (8, 9), True),
        (((8, 5),), (), False),
        (((8, 5),), (8,), True),
        (((8, 5),), (8, 9), False),
        (((8, 9, 5),), (9,), False),
        (((8, 9, 5),), (8, 9), True),
        (((8, 9, 5),), (7, 8, 9), True),
        (((8, 9, 5), (6,)), (9, 9), False),
        (((8, 5), (6,)), (8,), True),
    ],
)
def test_bad_words(bad_words, output, banned):
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6], logits[0, 4] = 3.0, 2.0, 1.0
    prompt = (8, 9)  # the end of the prompt is not part of the output
    chosen = greedy(logits, bad_words=bad_words, output=output, prompt=prompt, logit_bias={5: 50.0})
    assert chosen == (5 if not banned else 4 if (6,) in bad_words else 6)


def test_a_mask_overrules_everything_else():
    logits = torch.zeros(3, VOCAB)
    logits[:, 5], logits[:, 6] = 3.0, 2.0
    mask = np.packbits(
        np.isin(np.arange(56), [6, 9, 51]), bitorder="little"
    )  # longer than the vocabulary, as masks are
    params = SamplingParams(max_tokens=9, seed=0, temperature=0.0, logprobs=1, logit_bias={5: 100.0})
    only_beyond = np.packbits(np.arange(56) == 51, bitorder="little")
    rows = [SamplingRow(params, [1], 1, mask), SamplingRow(params, [1], 1), SamplingRow(params, [1], 1, only_beyond)]
    masked, free, nothing = sample(logits.clone(), rows, eos_token_ids=EOS)
    assert (masked.token_id, free.token_id, nothing.token_id) == (6, 5, None)
    assert masked.logprob is not None
    assert masked.logprob.top[0][0] == 5, "log-probabilities stay the model's own"
    assert masked.logprob.logprob == pytest.approx(logits.log_softmax(-1)[0, 6].item(), abs=1e-6)


def test_a_token_depends_on_seed_and_position_only():
    probabilities = dict.fromkeys(range(VOCAB), 1 / VOCAB)

    def one(**kwargs):
        return sample(logits_of(probabilities), [row(**kwargs)], eos_token_ids=EOS)[0].token_id

    assert one(seed=3) == one(seed=3)
    assert len({one(seed=s) for s in range(40)}) > 15
    assert len({one(seed=3, output=(1,) * n) for n in range(40)}) > 15
    assert one(seed=3, prompt=(1, 2), output=(9,)) == one(seed=3, prompt=(4,), output=(8,))


def test_a_row_does_not_depend_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, VOCAB, generator=generator) * 3
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.7, "temperature": 0.5},
        {"top_k": 5, "logprobs": 2},
        {"min_p": 0.1, "repetition_penalty": 1.2},
        {"frequency_penalty": 0.5, "output": (3, 3, 4)},
        {"logit_bias": {4: 3.0}, "logprobs": 0},
        {"min_tokens": 3},
        {"allowed_token_ids": (3, 4, 9, 11)},
        {"bad_words": ((7,), (3, 8)), "output": (3,)},
    ]
    rows = [row(**({"seed": i} | kinds[i % len(kinds)])) for i in range(32)]
    together = sample(logits.clone(), rows, eos_token_ids=EOS)
    alone = [sample(logits[i : i + 1].clone(), [rows[i]], eos_token_ids=EOS)[0] for i in range(32)]
    assert [s.token_id for s in together] == [s.token_id for s in alone]
    for a, b in zip(together, alone, strict=True):
        assert (a.logprob is None) == (b.logprob is None)
        if a.logprob is not None and b.logprob is not None:
            assert a.logprob.logprob == pytest.approx(b.logprob.logprob, abs=1e-6)


def test_logprobs_are_the_models_own():
    """Before temperature, penalties and bias."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)[0]
    (sampled,) = sample(logits.clone(), [row(temperature=0.5, logit_bias={7: 100.0}, logprobs=3)], eos_token_ids=EOS)
    assert sampled.token_id == 7
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(expected[7].item(), abs=1e-6)
    assert sampled.logprob.rank == int((expected > expected[7]).sum()) + 1
    top = expected.topk(3)
    assert [t for t, _ in sampled.logprob.top] == top.indices.tolist()
    assert [p for _, p in sampled.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-6)


def test_random_numbers_are_uniform_and_take_any_seed():
    values = [random_number(seed, position) / 2**62 for seed in range(100) for position in range(100)]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    assert len(set(values)) == len(values)
    assert random_number(-1, 0) != random_number(1, 0)
    assert 0 <= random_number(2**64 - 1, 2**31) < 2**62
