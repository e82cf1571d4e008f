"""A profile of a tiny engine: what it holds, when it ends, and that nothing of it stays."""

from collections import Counter

import pytest
import torch
from support.checkpoints.tiny import write_tiny_checkpoint
from support.fakes.engines import make_engine, make_request

from workers.engine.llm_engine import stream_requests
from workers.profile.engine_targets import VERBS, lead_targets
from workers.profile.recording import Recording
from workers.profile.steps import ProfiledCore, Steps
from workers.profile.torch_recorder import TorchRecorder

NUM_STEPS = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return make_engine(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def profiled(engine, **options) -> ProfiledCore:
    steps = Steps(TorchRecorder(torch.device("cpu"), lead_targets(engine.core)))
    steps.prepare()
    return ProfiledCore(engine.core, steps, **options)


def tokens(core) -> list[int]:
    return [
        token for delta in stream_requests(core, [make_request("a", [5, 6, 7], seed=3)]) for token in delta.token_ids
    ]


def events_of(core: ProfiledCore) -> Recording:
    recording = core.steps.recording(0.0)
    assert recording is not None, "the recording has not ended"
    return recording


def test_a_profile_has_the_verbs_of_every_step_and_the_operators_in_them(engine):
    undisturbed = tokens(engine.core)
    ended = []
    core = profiled(engine, num_steps=NUM_STEPS, on_end=lambda: ended.append(True))
    assert core.steps.recording(0.0) is None
    assert tokens(core) == undisturbed, "a profile changes no token"
    assert ended == [True]
    recording = events_of(core)
    assert recording.num_steps == NUM_STEPS
    assert recording.num_left_out == 0
    events = [event for event in recording.decoded() if event.ph == "X"]
    counts = Counter(event.name for event in events)
    # `update` also looks, before the step's own, whether an older step is in flight.
    assert {verb: counts[verb] for verb in VERBS} == dict.fromkeys(VERBS, NUM_STEPS) | {"update": 2 * NUM_STEPS}
    assert counts["layers.1"] == counts["layers.0"] == NUM_STEPS
    assert counts["attention"] == 2 * NUM_STEPS
    execute = next(event for event in events if event.name == "execute")
    inside = [e.name for e in events if execute.ts < e.ts and e.ts + e.dur < execute.ts + execute.dur]
    assert {"inputs", "qkv_proj", "logits", "rotary_kv"} <= set(inside)
    assert any(name.startswith("aten::") for name in inside)
    began_us, ended_us = (t / 1000 - recording.base_ns / 1000 for t in (recording.began_ns, recording.ended_ns))
    assert all(began_us - 1000 < event.ts < ended_us + 1000 for event in events), "the clock is the machine's"


def test_the_functions_are_themselves_again_afterwards(engine):
    def own():
        modules = [*engine.core.runner.model.modules()]
        return [sorted(vars(owner)) for owner in (engine.core, engine.core.runner, *modules)]

    before = own()
    core = profiled(engine, num_steps=2)
    core.add_request(make_request("a", [5, 6, 7]))
    core.step()
    assert own() != before
    core.end()
    assert own() == before
    core.abort("a")


def test_only_as_many_events_as_asked_for(engine):
    core = profiled(engine, num_steps=2)
    tokens(core)
    recording = core.steps.recording(0.0, max_events=10)
    assert len([event for event in recording.decoded() if event.ph == "X"]) == 10
    assert recording.num_left_out > 50


def test_it_ends_once_there_is_no_work_for_a_while(engine):
    core = profiled(engine, num_steps=1000, idle_ends_s=0.0)
    core.heartbeat()
    assert not core.steps.is_recording, "heartbeats are not recorded before the first request"
    tokens(core)
    assert core.steps.recording(0.0) is None
    core.heartbeat()
    assert events_of(core).num_steps == len(tokens(engine.core))


def test_a_profile_that_is_ended_before_the_first_request_is_empty(engine):
    core = profiled(engine, num_steps=3)
    core.end()
    assert events_of(core).decoded() == []
    assert tokens(core), "the engine goes on"


def test_a_recorder_that_fails_does_not_stop_the_engine(engine):
    class Broken(TorchRecorder):
        def start(self) -> None:
            raise RuntimeError("no profiler")

    steps = Steps(Broken(torch.device("cpu"), ()))
    core = ProfiledCore(engine.core, steps, num_steps=2)
    assert tokens(core) == tokens(engine.core)
    with pytest.raises(Exception, match="no profiler"):
        steps.recording(0.0)
