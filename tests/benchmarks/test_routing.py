"""The routing simulation is consistent: every request ends, blocks are freed, and reports match the state."""

import sys

import numpy as np
import pytest
from support.paths import ROOT

from cluster.protocol.routing import ROUTING_POLICIES

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def simulation():
    """Makes the benchmarks importable: they are scripts in a folder, not a package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def make_trace(num_requests=300, *, gap_s=0.05, num_stems=10):
    """Requests that each have one of a few long stems and a tail of their own."""
    from simulation.traces import TraceRequest

    requests = []
    for i in range(num_requests):
        stem = [bytes([i % num_stems, block]) for block in range(6)]
        requests.append(TraceRequest(i * gap_s, 512 * 7 + i % 300, 1 + i % 40, (*stem, i.to_bytes(4, "big"))))
    return requests


def ends(sequences):
    return np.array([s.first_token_s - s.submitted_s for s in sequences])


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_every_request_is_answered_and_every_block_is_freed(policy, monkeypatch):
    from simulation import gateway, replica

    made = []
    monkeypatch.setattr(gateway, "Replica", lambda *args: made.append(replica.Replica(*args)) or made[-1])
    outcome = gateway.simulate(make_trace(), policy=policy, num_replicas=4, hardware=replica.Hardware())
    assert len(outcome.sequences) == 300
    assert ends(outcome.sequences).min() > 0
    computed = sum(s.request.num_prompt_tokens - s.num_cached for s in outcome.sequences)
    assert sum(outcome.computed_tokens) == computed
    for r in made:
        assert (r.num_requests, r.num_pending_tokens, r.context) == (0, 0, 0)
        assert (r.cache.num_used, r.cache.num_private) == (0, 0)
        assert 0 < len(r.cache.idle) <= r.cache.num_blocks


def test_a_single_prompt_takes_as_long_as_its_steps():
    from simulation.replica import Hardware, Replica, Sequence
    from simulation.traces import TraceRequest

    hardware = Hardware()
    replica = Replica(0, hardware)
    sequence = Sequence(TraceRequest(0.0, 1500, 3, (b"a", b"b")), 0.0)
    end, stored = replica.submit(sequence, 0.0), []
    while end is not None:
        frame, end = replica.end_step(end)
        stored += frame.stored
    first = hardware.step_s([(1024, 0)], 0, 0) + hardware.step_s([(476, 1024)], 0, 0)
    assert sequence.first_token_s == pytest.approx(first)
    assert frame.made_s == pytest.approx(first + 2 * hardware.step_s([], 1, 1501.5))
    assert stored == [b"a", b"b"], "both full blocks can be found later"


def test_a_request_does_not_wait_for_decoding_streams():
    from simulation.replica import Hardware, Replica, Sequence
    from simulation.traces import TraceRequest

    hardware = Hardware()
    replica = Replica(0, hardware)
    long = Sequence(TraceRequest(0.0, 100, 1000, ()), 0.0)
    late = Sequence(TraceRequest(0.0, 100, 2, ()), 1.0)
    end = replica.end_step(replica.submit(long, 0.0))[1]
    assert end > 5, "a thousand steps are computed together"
    end = replica.submit(late, 1.0)
    assert 1.0 < end < 1.05, "the step that runs when a request arrives is the last one before it"
    while late.first_token_s is None:
        _, end = replica.end_step(end)
    assert late.first_token_s < 1.1
    while end is not None:
        frame, end = replica.end_step(end)
    assert long in frame.finished
    undisturbed_s = 1000 * hardware.step_s([], 1, 600)
    assert frame.made_s == pytest.approx(undisturbed_s, rel=0.005), "no step of the long stream was lost or invented"


def test_the_default_policy_finds_prefixes_and_answers_sooner():
    from simulation.gateway import simulate
    from simulation.replica import Hardware

    p99, hits = {}, {}
    for policy in ROUTING_POLICIES:
        # Each of the four replicas can cache little more than two stems: only a policy that keeps stems apart finds them.
        hardware = Hardware(kv_tokens=512 * 60)
        outcome = simulate(make_trace(), policy=policy, num_replicas=4, hardware=hardware, num_gateways=2)
        p99[policy] = np.percentile(ends(outcome.sequences), 99)
        hits[policy] = sum(s.num_cached for s in outcome.sequences)
    assert hits["prefix"] > 1.1 * max(hits["least_load"], hits["round_robin"]), hits
    assert p99["prefix"] < min(p99["least_load"], p99["round_robin"]), p99
