"""The sampler on the device gives the tokens and log-probabilities of `sample`, whatever the parameters, and never waits for the device."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from workers.protocol import SamplingParams
from workers.sampling.device_sampler import DeviceSampler
from workers.sampling.pending import DeviceRow, reads_history
from workers.sampling.sampler import SamplingRow, sample

VOCAB = 37
EOS = (2,)
TOKENS = st.integers(0, VOCAB - 1)
PARAMS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**64), 2**64)},
    optional={
        "temperature": st.sampled_from([0.0, 1e-4, 0.3, 1.0, 2.0, 100.0]),
        "top_p": st.sampled_from([1e-9, 0.3, 0.5, 0.9, 0.999]),
        "top_k": st.sampled_from([1, 2, 5, VOCAB - 1, VOCAB, 2**31 - 1]),
        "min_p": st.sampled_from([1e-6, 0.1, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([0.01, 0.7, 1.3, 100.0]),
        "presence_penalty": st.sampled_from([-1.7, 0.3, 100.0]),
        "frequency_penalty": st.sampled_from([-0.1, 0.3]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, -0.5, 3.0, 100.0]), max_size=4),
        "min_tokens": st.integers(1, 4),
        "stop_token_ids": st.lists(TOKENS, max_size=3).map(tuple),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 5),
        "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=9).map(tuple),
        "bad_words": st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
    },
)


def new_sampler(max_num_seqs=8, vocab_size=VOCAB):
    return DeviceSampler(vocab_size=vocab_size, max_num_seqs=max_num_seqs, device="cpu", eos_token_ids=EOS)


def logits_of(num_rows, seed, vocab_size=VOCAB):
    """With many equal ones, some infinite, and sometimes a row without any that is finite."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 4).round() / 2
    logits[torch.rand(num_rows, vocab_size, generator=generator) < 0.1] = -torch.inf
    if seed % 5 == 0:
        logits[-1] = -torch.inf
    return logits


def some_mask(seed):
    return np.random.default_rng(seed).integers(0, 256, VOCAB // 8 + 3, dtype=np.uint8)


@st.composite
def requests(draw):
    params = SamplingParams(max_tokens=100, **draw(PARAMS))
    return params, draw(st.lists(TOKENS, min_size=1, max_size=6)), draw(st.one_of(st.none(), st.integers(0, 9)))


@settings(max_examples=150)
@given(st.lists(requests(), min_size=1, max_size=6), st.integers(0, 1000), st.lists(st.integers(0, 63), max_size=3))
def test_same_tokens_as_on_the_host(wanted, seed, parts):
    """Several steps in which requests come, pause and go on, one step read after the next one is launched."""
    sampler = new_sampler(max_num_seqs=6)
    outputs = [[] for _ in wanted]
    ended = set()
    launched = None  # (indices of requests, pending tokens, expected)
    for step, part in enumerate([63, *parts, 0]):
        unread = set() if launched is None else set(launched[0])
        device_rows, host_rows, here = [], [], []
        for i, (params, prompt, mask_seed) in enumerate(wanted):
            if not part >> i & 1 or i in ended or (i in unread and reads_history(params)):
                continue
            mask = None if mask_seed is None else some_mask(mask_seed + step)
            known = outputs[i][:-1] if i in unread else outputs[i]
            here.append(i)
            device_rows.append(DeviceRow(str(i), params, [*prompt, *known], len(prompt), int(i in unread), mask))
            host_rows.append(SamplingRow(params, [*prompt, *outputs[i]], len(prompt), mask))
        now = None
        if here:
            logits = logits_of(len(here), seed + step)
            expected = sample(logits.clone(), host_rows, eos_token_ids=EOS)
            now = here, sampler.sample(logits, device_rows), expected
            ended |= {i for i, one in zip(here, expected, strict=True) if one.token_id is None}
            for i, one in zip(here, expected, strict=True):
                outputs[i].append(one.token_id)
        if launched is not None:
            _, pending, expected = launched
            assert pending.read() == expected
            assert pending.token_ids.tolist() == [one.token_id or 0 for one in expected]
        launched = now


def test_more_requests_than_slots():
    """A request whose slot went to another one uploads its history again; one of the same step never loses its slot."""
    sampler = new_sampler(max_num_seqs=2)
    # Each next token is the smallest id that the output lacks.
    params = SamplingParams(max_tokens=100, seed=1, temperature=0.0, presence_penalty=100.0)
    outputs = {name: [] for name in "abcd"}
    rng = random.Random(0)
    for _ in range(60):
        names = rng.sample("abcd", rng.choice([1, 2, 2]))
        rows = [DeviceRow(n, params, [3, 4, *outputs[n]], 2) for n in names]
        sampled = sampler.sample(torch.zeros(len(names), VOCAB), rows).read()
        for name, one in zip(names, sampled, strict=True):
            assert one.token_id == len(outputs[name])
            outputs[name].append(one.token_id)
        if len(outputs[name]) > 20 or rng.random() < 0.1:
            outputs[name] = []
            sampler.forget(name)


def test_a_token_that_the_host_dropped_counts_no_longer():
    sampler = new_sampler()
    params = SamplingParams(max_tokens=100, seed=1, temperature=0.0, presence_penalty=5.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.0

    def next_token(output):
        return sampler.sample(logits.clone(), [DeviceRow("r", params, [3, *output], 1)]).read()[0].token_id

    assert next_token([]) == 5
    assert next_token([]) == 5, "the first 5 was dropped"
    assert next_token([5]) == 6


class Operators(TorchDispatchMode):
    """Notes what torch launches, and fails on what would wait for the device."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "tolist")
    # Python's values as tensors, and boolean masks as indices, which are `nonzero` in disguise.
    WAITS += ("lift_fresh", "index", "index_put", "index_put_", "_index_put_impl_")
    FREE = ("view", "slice", "select", "alias", "detach", "to", "resolve_conj", "resolve_neg", "unsqueeze", "squeeze")
    FREE += ("expand", "permute", "transpose", "reshape", "contiguous", "flatten", "numpy_T", "size", "is_pinned")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{func} waits for the device"
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("new_requests", [False, True])
def test_the_number_of_operators_does_not_grow_with_the_rows(new_requests):
    everything = [
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 0},
        {"top_k": 5, "presence_penalty": 0.5, "logit_bias": {3: 1.0, 4: 2.0}},
        {"min_p": 0.1, "min_tokens": 9, "bad_words": ((7,), (3, 8)), "allowed_token_ids": (3, 4, 9)},
    ]

    def operators(num_rows):
        sampler = new_sampler(max_num_seqs=64)
        params = [SamplingParams(max_tokens=100, seed=i, **everything[i % 4]) for i in range(num_rows)]
        rows = [
            DeviceRow(str(i), p, [3] * (i + 1), i + 1, 0, some_mask(i) if i % 8 == 0 else None)
            for i, p in enumerate(params)
        ]
        if not new_requests:
            sampler.sample(logits_of(num_rows, 1), rows).read()
            rows = [DeviceRow(r.request_id, r.params, [*r.token_ids, 5], r.num_prompt_tokens, 0, r.mask) for r in rows]
        logits = logits_of(num_rows, 2)
        with Operators() as counted:
            sampler.sample(logits, rows)
        return counted.names

    few, many = operators(8), operators(64)
    assert few == many, "an operator for each row"
    assert len(few) < 140, few


def test_greedy_rows_need_few_operators():
    sampler, params = new_sampler(), SamplingParams(max_tokens=9, seed=0, temperature=0.0)
    logits = logits_of(2, 1)
    with Operators() as counted:
        sampler.sample(logits, [DeviceRow(n, params, [3], 1) for n in "ab"])
    assert len(counted.names) <= 8, counted.names


def test_read_twice():
    pending = new_sampler().sample(
        logits_of(1, 1), [DeviceRow("r", SamplingParams(max_tokens=9, seed=0, logprobs=1), [3], 1)]
    )
    assert pending.read() == pending.read()
