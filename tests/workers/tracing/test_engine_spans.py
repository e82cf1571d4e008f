"""The spans of requests in a real engine: their order, times and numbers, whichever way a request ends."""

import dataclasses

import msgspec
import pytest
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_config
from support.servers.trace_collector import Span, TraceCollector

from workers.engine.build import build_runner
from workers.engine.core import EngineCore
from workers.errors import RequestError
from workers.parallel.group import SingleRank
from workers.protocol import GenerateRequest, SamplingParams
from workers.tracing.engine_spans import EngineSpans
from workers.tracing.settings import TracingConfig
from workers.tracing.tracer import Tracer

TRACE, PARENT = "ab" * 16, "cd" * 8


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"), sliding_window=None)
    config = make_config(folder, max_num_batched_tokens=64, max_num_seqs=2, block_size=16)
    runner = build_runner(config, SingleRank())
    runner.allocate_kv_cache()
    return runner


@pytest.fixture
def traced(runner, both_ways):
    """An engine, what takes its requests, and the spans after its tracer is closed, by name."""
    with TraceCollector() as collector:
        tracer = Tracer(TracingConfig(url=f"{collector.url}/v1/traces"), role="replica", instance="r0")
        spans = EngineSpans(tracer)
        runner.config = dataclasses.replace(runner.config, overlap=both_ways)
        core = EngineCore(runner.config, runner, SingleRank(), spans=spans)
        core.scheduler.pace = None

        def close() -> list[Span]:
            tracer.close()
            return sorted(collector.spans, key=lambda s: (s.begin_ns, s.end_ns))

        yield core, spans.noting_arrival(core.add_request), close
        tracer.close()


def request(name: str, num_prompt: int, num_output: int, *, done: int = 0, is_traced: bool = True) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=[3 + (i * 7 + len(name)) % 250 for i in range(num_prompt)],
        output_token_ids=[5] * done,
        sampling=SamplingParams(max_tokens=num_output, seed=1, ignore_eos=True),
        traceparent=f"00-{TRACE}-{PARENT}-01" if is_traced else None,
    )


def run(core: EngineCore) -> None:
    while core.has_work():
        core.step()


def test_a_request_has_queue_prefill_and_decode_in_a_row(traced):
    core, add, close = traced
    add(request("long", 150, 8))
    add(request("untraced", 20, 4, is_traced=False))
    run(core)
    queue, prefill, decode = close()
    assert [s.name for s in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert {(s.trace_id, s.parent_id) for s in (queue, prefill, decode)} == {(TRACE, PARENT)}
    assert queue.end_ns == prefill.begin_ns and prefill.end_ns == decode.begin_ns
    assert queue.begin_ns <= queue.end_ns < prefill.end_ns < decode.end_ns
    assert prefill.attributes == {
        "tramontane.prompt_tokens": 150,
        "tramontane.cached_tokens": 0,
        "tramontane.prefill.chunks": 3,
    }
    assert decode.attributes == {
        "tramontane.output_tokens": 8,
        "tramontane.preemptions": 0,
        "tramontane.finish_reason": "length",
    }


def test_what_was_cached_waited_or_generated_elsewhere_is_told(traced):
    core, add, close = traced
    add(request("first", 64, 20))
    add(renamed(request("first", 64, 20), "other"))
    core.step()
    add(renamed(request("first", 64, 20, done=5), "waits"))  # two are the most that run
    run(core)
    spans = close()
    prefills, decodes = ([s for s in spans if s.name == name] for name in ("prefill", "decode"))
    assert len(prefills) == len(decodes) == 3
    last = prefills[-1].attributes
    assert (last["tramontane.prompt_tokens"], last["tramontane.cached_tokens"]) == (69, 64)
    assert decodes[-1].attributes["tramontane.output_tokens"] == 15, "tokens of another replica count there"
    waited = [s for s in spans if s.name == "queue"][-1]
    assert waited.end_ns > max(p.end_ns for p in prefills[:2]), "it waited while the others ran"


def test_a_request_ends_as_it_ends(traced):
    core, add, close = traced
    for name in ("running", "also"):
        add(request(name, 10, 50))
    add(request("waiting", 10, 50))
    add(request("one token", 10, 1))
    for _ in range(3):
        core.step()
    for name in ("running", "also", "waiting"):
        core.abort(name)
        core.abort(name)
    run(core)
    with pytest.raises(RequestError):
        add(request("refused", 10, 5, done=5))
    spans = close()
    reasons = [
        (s.name, s.attributes["tramontane.finish_reason"]) for s in spans if "tramontane.finish_reason" in s.attributes
    ]
    assert sorted(reasons) == [("decode", "abort"), ("decode", "abort"), ("prefill", "length"), ("queue", "abort")]
    assert len(spans) == 3 + 3 + 1 + 2, "the refused one has none"


def renamed(request: GenerateRequest, name: str) -> GenerateRequest:
    return msgspec.structs.replace(request, request_id=name)
