"""What the page shows an operator is what Prometheus would be told."""

import time

import pytest
from support.fakes.router import FakeRouter, make_view

from cluster.metrics.gateway import Metrics
from cluster.metrics.operations import operations


@pytest.mark.parametrize("prefix", ["tramontane", "vllm"])
def test_the_numbers_of_a_gateway(prefix):
    metrics = Metrics(FakeRouter(), model_name="m", prefix=prefix, view=make_view)
    sequence = metrics.sequence(num_prompt_tokens=7, arrived=time.monotonic() - 0.03)
    now = time.monotonic()
    for number in range(3):
        sequence.produced(1, now + 0.004 * number)
    sequence.ended("stop")
    for path, status in (("/v1/completions", 200), ("/v1/chat/completions", 200), ("/v1/completions", 429)):
        metrics.answered(path, status)
    metrics.answered("/admin/cluster", 200)
    metrics.used_by_key("small", num_prompt_tokens=1, num_output_tokens=1)
    metrics.used_by_key("large", num_prompt_tokens=7, num_output_tokens=3)
    metrics.used_by_key("large", num_prompt_tokens=7, num_output_tokens=0)
    found = operations(metrics, links={"Grafana": "http://g"})
    assert found.responses == {"200": 2, "429": 1}, "not what the page itself asks for"
    assert [(k.name, k.num_prompt_tokens, k.num_output_tokens) for k in found.keys] == [
        ("large", 14, 3),
        ("small", 1, 1),
    ]
    assert found.first_token.counts[-1] == 1 and found.between_tokens.counts[-1] == 2
    at = found.first_token.bounds.index(0.04)
    assert (found.first_token.counts[at - 2], found.first_token.counts[at]) == (0, 1), "about 30 ms"
    assert len(found.first_token.counts) == len(found.first_token.bounds) + 1
    assert found.links == {"Grafana": "http://g"}


def test_the_waiting_times_of_several_models_count_together():
    first = Metrics(FakeRouter(), model_name="a")
    second = Metrics(FakeRouter(), model_name="b", beside=first)
    now = time.monotonic()
    for metrics in (first, second, second):
        metrics.sequence(num_prompt_tokens=1, arrived=now - 0.03).produced(1, now)
    found = operations(first, links={})
    assert found.first_token.counts[-1] == 3
    assert len(set(found.first_token.bounds)) == len(found.first_token.bounds)
    assert found.num_failovers == 4
