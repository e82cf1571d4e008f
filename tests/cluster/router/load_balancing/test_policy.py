"""Decisions as tables, and properties of all decisions: no hot spot, bounded imbalance, no replica starved or overrun."""

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protocol.routing import ROUTING_POLICIES
from cluster.router.load_balancing.policy import (
    FREE_IMBALANCE,
    MAX_IMBALANCE,
    STREAM_S,
    RequestView,
    Snapshot,
    choose,
    explain,
)


def snapshot(
    count, *, available=True, num_requests=0, pending_tokens=0.0, tokens_per_s=1000.0, kv_usage=0.0, max_num_seqs=64
):
    """A scalar means the same value for every slot."""

    def row(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), count).copy()

    return Snapshot(
        available=row(available, np.bool_),
        num_requests=row(num_requests, np.int64),
        pending_tokens=row(pending_tokens, np.float64),
        tokens_per_s=row(tokens_per_s, np.float64),
        kv_usage=row(kv_usage, np.float64),
        max_num_seqs=row(max_num_seqs, np.int64),
    )


def prompt(count, num_tokens=1000, **cached):
    """cached: for example slot_3=512."""
    tokens = np.zeros(count, np.int64)
    for name, value in cached.items():
        tokens[int(name.removeprefix("slot_"))] = value
    return RequestView(num_tokens, tokens)


def slots(policy, state, request, turns=range(12)):
    """All slots chosen over these turns."""
    return {choose(policy, state, request, turn=t).slot for t in turns}


@pytest.mark.parametrize(
    ("case", "state", "request_view", "expected"),
    [
        ("idle and alike: they take turns", {}, prompt(3), {0, 1, 2}),
        ("the cached prefix wins", {}, prompt(3, slot_1=512), {1}),
        ("the longer one wins", {}, prompt(3, slot_1=512, slot_2=768), {2}),
        (
            "but not if its queue is longer than what it saves",
            {"pending_tokens": [0, 600, 700]},
            prompt(3, slot_1=512),
            {0},
        ),
        ("and it does if its queue is shorter", {"pending_tokens": [0, 400, 700]}, prompt(3, slot_1=512), {1}),
        (
            "pending prompts weigh more than sequences",
            {"pending_tokens": [5000, 0, 5000], "num_requests": [1, 8, 1]},
            prompt(3),
            {1},
        ),
        ("running sequences slow a prompt", {"num_requests": [9, 3, 9]}, prompt(3), {1}),
        ("a full replica makes it wait", {"num_requests": [70, 66, 60], "pending_tokens": [0, 0, 99]}, prompt(3), {2}),
        ("and so does a full KV cache", {"kv_usage": [0.5, 1.0, 1.0]}, prompt(3, slot_1=512), {0}),
        ("a certainly faster one is preferred", {"tokens_per_s": [1000, 1000, 4000]}, prompt(3), {2}),
        (
            "a certainly slower one with work is avoided",
            {"tokens_per_s": [4000, 4000, 500], "pending_tokens": [2000] * 3},
            prompt(3),
            {0, 1},
        ),
        ("an unknown speed counts as the mean", {"tokens_per_s": [0, 1000, 1000]}, prompt(3), {0, 1, 2}),
        ("no speed is known", {"tokens_per_s": 0.0}, prompt(3, slot_0=512), {0}),
        ("only available replicas", {"available": [True, False, True]}, prompt(3, slot_1=512), {0, 2}),
    ],
)
def test_the_default_weighs_prefix_and_load(case, state, request_view, expected):
    assert slots("prefix", snapshot(3, **state), request_view) == expected, case


def test_least_load_compares_requests_then_the_kv_cache():
    state = snapshot(4, num_requests=[3, 1, 1, 1], kv_usage=[0.0, 0.4, 0.2, 0.2])
    assert slots("least_load", state, prompt(4, slot_0=900)) == {2, 3}


def test_round_robin_ignores_the_load():
    state = snapshot(4, available=[True, True, False, True], num_requests=[9, 0, 0, 50])
    assert [choose("round_robin", state, prompt(4), turn=t).slot for t in range(6)] == [0, 1, 3, 0, 1, 3]


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_without_an_available_replica_there_is_no_decision(policy):
    for state in (snapshot(0), snapshot(2, available=False)):
        count = len(state.available)
        assert choose(policy, state, prompt(count), turn=0) is None
        assert not any(row.chosen for row in explain(policy, state, prompt(count), turn=0))


def test_a_slow_start_does_not_last():
    """A replica whose first prompts were tiny measured a low speed; while idle, it gets its share anyway."""
    state = snapshot(4, tokens_per_s=[1000, 1000, 1000, 200])
    assert slots("prefix", state, prompt(4)) == {0, 1, 2, 3}


def test_the_decision_states_its_expectation():
    state = snapshot(2, pending_tokens=[0, 100])
    decision = choose("prefix", state, prompt(2, slot_1=512), turn=0)
    assert (decision.slot, decision.num_cached_tokens) == (1, 512)
    assert decision.estimated_wait_s == pytest.approx((100 + 1000 - 512) / 1000)
    assert "512 tokens cached" in decision.reason
    assert "0.588 s" in decision.reason


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_an_explanation_shows_the_same_decision(policy):
    state = snapshot(3, available=[True, True, False], num_requests=[5, 2, 0])
    request = prompt(3, slot_0=512)
    for turn in range(4):
        rows = explain(policy, state, request, turn=turn)
        chosen = [row.slot for row in rows if row.chosen]
        assert chosen == [choose(policy, state, request, turn=turn).slot]
        assert rows[chosen[0]].score == min(row.score for row in rows if row.score is not None)
        assert rows[2].score is None, "a replica that is not available has no score"
        assert rows[0].num_cached_tokens == 512


def send(state, slot, num_tokens):
    state.num_requests[slot] += 1
    state.pending_tokens[slot] += num_tokens


def test_a_popular_prefix_spreads_as_its_holder_fills():
    """100 requests at once share one long prefix that slot 0 holds: it gets more than the others, but not all."""
    state, request = snapshot(8), prompt(8, num_tokens=1000, slot_0=900)
    chosen = Counter()
    for turn in range(100):
        decision = choose("prefix", state, request, turn=turn)
        send(state, decision.slot, 1000 - decision.num_cached_tokens)
        chosen[decision.slot] += 1
    assert set(chosen) == set(range(8))
    assert chosen[0] == max(chosen.values())
    waits = state.pending_tokens / 1000
    assert waits.max() < 1.5 * waits.mean(), f"queues in seconds: {waits}"


def test_a_fully_cached_prompt_does_not_overrun_its_holder():
    """Cached prompts do not show in its queue of prompts; its share of sequences is the limit."""
    state, request = snapshot(8), prompt(8, num_tokens=1000, slot_0=999)
    for turn in range(8 * 60):
        decision = choose("prefix", state, request, turn=turn)
        state.num_requests[decision.slot] += 1
    assert state.num_requests[0] <= MAX_IMBALANCE * 60 + 1
    queueing_s = (state.num_requests.max() - 64) * STREAM_S / 64
    assert queueing_s <= 2 * 1.0, "no request queues longer than computing the prompt elsewhere takes"


loads = st.lists(
    st.tuples(st.booleans(), st.integers(0, 80), st.integers(0, 20_000), st.integers(0, 1000)), min_size=1, max_size=9
)


@given(loads, st.integers(0, 50), st.sampled_from(ROUTING_POLICIES))
def test_any_load(rows, turn, policy):
    available, num_requests, pending, cached = (list(column) for column in zip(*rows, strict=True))
    state = snapshot(len(rows), available=available, num_requests=num_requests, pending_tokens=pending)
    request = RequestView(1001, np.array(cached, np.int64))
    decision = choose(policy, state, request, turn=turn)
    assert (decision is not None) == any(available)
    if decision is None:
        return
    assert available[decision.slot]
    assert decision == choose(policy, state, request, turn=turn), "a decision depends on its arguments only"
    if policy == "prefix":
        occupancy = state.num_requests / 64
        bound = max(MAX_IMBALANCE * occupancy[state.available].mean(), FREE_IMBALANCE)
        assert occupancy[decision.slot] <= bound


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_a_decision_runs_no_python_per_replica(policy):
    """As many Python calls and lines for 1,000 replicas as for 10: the work is numpy's."""

    def lines_run(count):
        state = snapshot(count, num_requests=np.arange(count) % 7, tokens_per_s=1000.0 + np.arange(count) % 900)
        request = prompt(count, slot_5=512)
        num_lines = 0

        def count_line(frame, event, arg):
            nonlocal num_lines
            num_lines += 1
            return count_line

        before = sys.gettrace()
        sys.settrace(count_line)
        try:
            choose(policy, state, request, turn=3)
        finally:
            sys.settrace(before)
        return num_lines

    assert lines_run(1000) <= lines_run(10) + 20
