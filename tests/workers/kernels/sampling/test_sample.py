"""Sampling: the specification against exact arithmetic, and the Triton kernels against the specification, bit for bit."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kernels.sampling import sample as kernels
from workers.kernels.sampling import sample_specification as specification
from workers.kernels.sampling.sample_specification import (
    FRACTION_BITS,
    IN_PROMPT,
    MAX_VOCAB_SIZE,
    WEIGHT_BITS,
    SamplingTable,
    draw,
    fraction_of,
    token_weights,
    truncate,
)
from workers.kernels.sampling.sampling_kernels import TritonSamplingKernels
from workers.protocol import SamplingParams
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.pending import DeviceRow

ALL = 2**FRACTION_BITS
SIZES = (1, 7, 64, 150)  # of vocabularies: below, at and above one block of the kernels


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "EDIT_BLOCK", 16)


def column(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def some_table(n, vocab_size, rng):
    floats = [
        [rng.choice(kind) for _ in range(n)]
        for kind in ((0, 1, 1.43, 0.5, 0.01, 1e4), (1, 1.3, 0.5), (0, 0.7, -1), (0, 0.3))
    ]
    integers = [
        [rng.choice((0, ALL - 1, rng.randrange(ALL))) for _ in range(n)],
        [rng.choice((ALL, ALL // 2, ALL // 10 * 9, 1)) for _ in range(n)],
        [rng.choice((0, 1, 1 << 40, 1 << WEIGHT_BITS)) for _ in range(n)],
        [rng.choice((vocab_size, 2**31 - 1, 1, 2, 5, 60, max(1, vocab_size - 1))) for _ in range(n)],
        [rng.choice((-1, i)) for i in range(n)],
        [rng.choice((-1, 0, 1)) for _ in range(n)],
    ]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    masks = torch.randint(0, 256, (2, -(-vocab_size // 8)), generator=generator, dtype=torch.uint8)
    return SamplingTable(
        torch.tensor(floats, dtype=torch.float32),
        torch.tensor(integers),
        masks,
        penalizes=True,
        draws=True,
        truncates=True,
    )


def some_logits(n, vocab_size, seed):
    """Rows of several widths, with ties, zeros of both signs, bans; one row with nothing else, one with a NaN, one with infinities."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(n, vocab_size, generator=generator) * torch.tensor([0.0, 0.5, 3.0, 20.0])[torch.arange(n) % 4, None]
    )
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[5:7] = logits[5:7].clamp(-1, 1).round()
    logits[1::4, ::7] *= -0.0
    logits[torch.rand(n, vocab_size, generator=generator) < 0.05] = -torch.inf
    logits[n - 1] = -torch.inf
    logits[n - 2, vocab_size // 2] = torch.nan
    logits[n - 3, ::5] = torch.inf
    return logits


def same(a, b):
    return torch.equal(
        a.nan_to_num(nan=1e30, posinf=1e31, neginf=-1e31), b.nan_to_num(nan=1e30, posinf=1e31, neginf=-1e31)
    )


def some_counts(n, vocab_size, seed):
    counts = torch.randint(0, 3, (n, vocab_size), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    counts[:, ::3] |= IN_PROMPT
    return counts


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # of infinities, in the interpreter
@pytest.mark.parametrize("vocab_size", SIZES)
def test_kernels_give_the_bits_of_the_specification(vocab_size):
    rng, n = random.Random(vocab_size), 14
    logits, counts = some_logits(n, vocab_size, vocab_size), some_counts(n, vocab_size, vocab_size)
    for _ in range(2):
        table = some_table(n, vocab_size, rng)
        adjusted = specification.adjust(logits, counts, table)
        assert same(kernels.adjust(logits, counts, table), adjusted)
        expected_counts = counts.clone()
        expected = specification.choose(adjusted, expected_counts, table)
        assert torch.equal(kernels.choose(adjusted, counts, table), expected)
        assert torch.equal(counts, expected_counts), "the counts"
        assert (expected[1] >= 0).sum() >= n // 2 - 1, "too few rows with a token to show anything"


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 7, 20])
def test_equal_logits_around_top_k(top_k):
    """One token, five equal ones, and the rest so much less likely that they have no weight. The last one that stays is drawn."""
    logits = torch.full((1, 20), -40.0)
    logits[0, 7], logits[0, [3, 9, 11, 12, 19]] = 1.0, 0.0
    floats = column([[1.0], [1.0], [0.0], [0.0]], torch.float32)
    integers = column([[ALL - 1], [ALL], [0], [top_k], [-1], [-1]])
    masks, counts = torch.zeros(0, 3, dtype=torch.uint8), torch.zeros(1, 20, dtype=torch.int32)
    table = SamplingTable(floats, integers, masks, penalizes=False, draws=True, truncates=True)
    expected = {1: 7, 2: 7, 4: 11, 6: 19, 7: 19, 20: 19}[top_k]
    for choose in (specification.choose, kernels.choose):
        assert choose(logits, counts, table)[0].tolist() == [expected]


@pytest.mark.filterwarnings("ignore:invalid value encountered in add")  # as above
def test_edit():
    logits, copy = (some_logits(4, 50, 0) for _ in range(2))
    index = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:41]
    value = torch.where(torch.arange(41) % 3 == 0, -torch.inf, torch.arange(41) - 20.5)
    kernels.edit(logits, index, value)
    specification.edit(copy, index, value)
    assert same(logits, copy)


def test_the_sampler_runs_with_the_kernels():
    """As on CUDA: mixed rows, over several steps."""
    settings = {"vocab_size": 150, "max_num_seqs": 8, "device": "cpu", "eos_token_ids": (2,)}
    sampler, with_kernels = DeviceSampler(**settings), DeviceSampler(**settings, kernels=TritonSamplingKernels())
    kinds = (
        {"temperature": 0.0, "logprobs": 2},
        {"top_p": 0.9, "frequency_penalty": 0.5, "logit_bias": {3: 4.0}},
        {"top_k": 7, "repetition_penalty": 1.3, "allowed_token_ids": tuple(range(3, 90))},
        {"min_p": 0.05, "temperature": 0.5, "min_tokens": 5},
    )
    params = [SamplingParams(max_tokens=100, seed=i, **kind) for i, kind in enumerate(kinds)]
    outputs = [[] for _ in params]
    for step in range(3):
        logits = torch.randn(4, 150, generator=torch.Generator().manual_seed(step)) * 3
        rows = [DeviceRow(str(i), p, [5, 6, *outputs[i]], 2) for i, p in enumerate(params[: 4 - step])]
        expected = sampler.sample(logits[: len(rows)].clone(), rows).read()
        found = with_kernels.sample(logits[: len(rows)].clone(), rows).read()
        assert [one.token_id for one in found] == [one.token_id for one in expected]
        assert [one.logprob and one.logprob.rank for one in found] == [
            one.logprob and one.logprob.rank for one in expected
        ]
        for output, one in zip(outputs, expected, strict=False):
            output.append(one.token_id)


def test_weights_are_exponentials():
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(40, 200, generator=generator) * -40 + 7
    logits[:, 0] = 7.0
    inverse = torch.linspace(0.01, 3.0, 40)
    weights = token_weights(logits, logits.amax(-1), inverse_temperature=inverse)
    exact = ((logits.double() - 7) * inverse.double()[:, None]).exp() * 2.0**WEIGHT_BITS
    assert (weights[:, 0] == 2**WEIGHT_BITS).all()
    assert ((weights.double() - exact).abs() <= 1 + 6e-6 * exact).all()
    extremes = torch.tensor([[7.0, 7.0 - 30.4, 7.0 - 30.6, -torch.inf, -3e38]])
    assert token_weights(extremes, column([7.0], torch.float32), inverse_temperature=torch.ones(1))[0, 1:].tolist() == [
        1,
        0,
        0,
        0,
    ]


@given(st.integers(0, ALL), st.integers(0, MAX_VOCAB_SIZE << WEIGHT_BITS))
def test_fraction_of(fraction, total):
    assert fraction_of(column([fraction]), column([total])).item() == fraction * total >> FRACTION_BITS


@settings(max_examples=60)
@given(
    # Few different logits, so that many are equal; larger ones weigh more.
    logits=st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    top_k=st.integers(1, 31),
    top_p=st.sampled_from([1, Fraction(1, 2), Fraction(9, 10), Fraction(1, 10**6)]),
    random_number=st.integers(0, ALL - 1),
)
def test_truncate_and_draw_in_exact_arithmetic(logits, min_p, top_k, top_p, random_number):
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    rows = torch.tensor([logits], dtype=torch.float32)
    weights = token_weights(rows, rows.amax(-1), inverse_temperature=torch.ones(1))
    w = weights[0].tolist()
    best = 2**WEIGHT_BITS
    left = [i for i in order if w[i] >= Fraction(min_p) * best][:top_k]
    total, kept, before = sum(w[i] for i in left), [], 0
    fraction = int(top_p * ALL)
    for i in left:
        if before < max(1, fraction * total // ALL):
            kept.append(i)
        before += w[i]
    cut = truncate(
        weights, rows, min_weight=column([math.ceil(min_p * best)]), top_k=column([top_k]), top_p=column([fraction])
    )
    assert cut[0].tolist() == [w[i] if i in kept else 0 for i in range(len(w))]
    target, seen = Fraction(random_number, ALL) * sum(w[i] for i in kept), 0
    for i in sorted(kept):
        seen += w[i]
        if seen > math.floor(target):
            break
    assert draw(cut, column([random_number])).item() == i
