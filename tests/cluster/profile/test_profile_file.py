"""One file from several processes: one clock, processes and arrows kept apart, valid JSON."""

import gzip
import json

import msgspec
import pytest

from cluster.cli.options.parser import parse
from cluster.cli.options.rows.profile import profile_file
from cluster.profile.file import MAX_NUM_STEPS, ProfileFile
from cluster.profile.merge import Part, merge
from cluster.replicas.recorder import clock_ahead_ns
from workers.errors import ConfigError
from workers.profile.recording import NO_EVENTS, Recording, TraceEvent, make_recording

SECOND_NS = 10**9
NOW_NS = 1_790_000_000 * SECOND_NS


def recorded(
    *events: TraceEvent, base_ns: int = NOW_NS, lanes: tuple[str, ...] = ("",), max_events: int = 100
) -> Recording:
    return make_recording(
        events,
        base_ns=base_ns,
        began_ns=base_ns,
        ended_ns=base_ns + SECOND_NS,
        threads={7: "engine"},
        lanes=lanes,
        num_steps=5,
        max_events=max_events,
    )


def complete(name: str, ts: float, *, pid: int = 0) -> TraceEvent:
    return TraceEvent(ph="X", name=name, pid=pid, tid=7, ts=ts, dur=10.0)


def merged(*parts: Part) -> tuple[dict, dict[str, dict]]:
    """The trace, and its complete events by name."""
    trace = json.loads(merge(parts))
    return trace, {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}


def process_names(trace: dict) -> dict[int, str]:
    return {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}


def test_events_of_all_processes_are_on_one_clock():
    trace, events = merged(
        Part(process="gateway", recording=recorded(complete("choose", 1_000.0), base_ns=NOW_NS)),
        Part(process="replica r0 rank 0", recording=recorded(complete("execute", 0.5), base_ns=NOW_NS + 2_000_000)),
    )
    assert trace["baseTimeNanoseconds"] == NOW_NS
    assert (events["choose"]["ts"], events["execute"]["ts"]) == (1_000.0, 2_000.5)
    assert events["execute"]["dur"] == 10.0


def test_times_count_from_the_beginning_of_the_first_recording():
    late = msgspec.structs.replace(
        recorded(complete("execute", 6_000_000.0)), began_ns=NOW_NS + 5 * SECOND_NS, ended_ns=NOW_NS + 9 * SECOND_NS
    )
    empty = Recording(base_ns=0, began_ns=0, ended_ns=0, events=NO_EVENTS)
    trace, events = merged(Part(process="rank", recording=late), Part(process="gateway", recording=empty))
    assert events["execute"]["ts"] == 1_000_000.0
    assert trace["baseTimeNanoseconds"] == NOW_NS + 5 * SECOND_NS


def test_a_clock_that_is_ahead_is_set_back():
    _, events = merged(
        Part(process="gateway", recording=recorded(complete("choose", 0.0))),
        Part(
            process="replica r0 rank 0",
            recording=recorded(complete("execute", 0.0), base_ns=NOW_NS + 3 * SECOND_NS),
            clock_ahead_ns=3 * SECOND_NS - 5_000,
        ),
    )
    assert events["execute"]["ts"] - events["choose"]["ts"] == 5.0


@pytest.mark.parametrize(("answer", "ahead"), [(125, 0), (100, 0), (140, 0), (520, 400), (20, -100)])
def test_how_far_a_clock_is_ahead(answer, ahead):
    assert clock_ahead_ns(100, answer, 140) == ahead


def test_processes_and_their_gpus_have_names_of_their_own():
    with_gpu = recorded(complete("execute", 0.0), complete("kernel", 1.0, pid=1), lanes=("", "GPU 0"))
    trace, events = merged(
        Part(process="gateway", recording=recorded(complete("choose", 0.0))),
        Part(process="replica r0 rank 0", recording=with_gpu),
        Part(process="replica r0 rank 1", recording=recorded(complete("follow", 0.0))),
    )
    names = process_names(trace)
    assert names == {1: "gateway", 2: "replica r0 rank 0", 3: "replica r0 rank 0 GPU 0", 4: "replica r0 rank 1"}
    assert {name: names[event["pid"]] for name, event in events.items()} == {
        "choose": "gateway",
        "execute": "replica r0 rank 0",
        "kernel": "replica r0 rank 0 GPU 0",
        "follow": "replica r0 rank 1",
    }
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {(1, 7): "engine", (2, 7): "engine", (4, 7): "engine"}


def test_arrows_of_different_processes_do_not_meet():
    arrows = [TraceEvent(ph=ph, name="ac2g", cat="ac2g", pid=0, tid=7, ts=1.0, id=3) for ph in "sf"]
    trace, _ = merged(*(Part(process=f"rank {rank}", recording=recorded(*arrows)) for rank in (0, 1)))
    ids = [(e["pid"], e["id"]) for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert ids == [(1, "0.3"), (1, "0.3"), (2, "1.3"), (2, "1.3")]


def test_the_earliest_events_are_kept_and_the_rest_is_counted():
    recording = recorded(*(complete(f"op {i}", float(-i)) for i in range(5)), max_events=2)
    trace, events = merged(Part(process="rank", recording=recording))
    assert sorted(events) == ["op 3", "op 4"]
    assert trace["otherData"] == {"steps": {"rank": 5}, "events left out": {"rank": 3}}


def test_a_process_without_events_is_in_it_too():
    trace, events = merged(
        Part(process="gateway", recording=Recording(base_ns=NOW_NS, began_ns=0, ended_ns=0, events=NO_EVENTS))
    )
    assert (process_names(trace), events) == ({1: "gateway"}, {})


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "none" / "trace.json", "no such file or directory")):
        with pytest.raises(ConfigError, match=words) as refused:
            ProfileFile(path=path)
        assert refused.value.param == "--profile"
    for num_steps in (0, MAX_NUM_STEPS + 1):
        with pytest.raises(ConfigError, match="out of range"):
            ProfileFile(path=tmp_path / "trace.json", num_steps=num_steps)
    assert list(tmp_path.iterdir()) == [], "the check leaves nothing"


def test_the_file_is_replaced_as_a_whole_and_its_name_can_ask_for_gzip(tmp_path):
    part = Part(process="rank", recording=recorded(complete("execute", 0.0)))
    plain, compressed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    plain.write_text("old")
    told = ProfileFile(path=plain).write([part])
    assert "5 steps" in told
    assert str(plain) in told
    ProfileFile(path=compressed).write([part])
    assert json.loads(plain.read_bytes()) == json.loads(gzip.decompress(compressed.read_bytes()))
    assert sorted(tmp_path.iterdir()) == [plain, compressed]


def test_a_failed_write_is_said_and_leaves_nothing(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = ProfileFile(path=folder / "trace.json")
    folder.rmdir()
    assert "could not be written" in file.write([])


def test_the_options_of_serve_and_generate(tmp_path):
    for command in ("serve", "generate"):
        assert profile_file(parse([command])) is None
        file = profile_file(parse([command, "--profile", str(tmp_path / "trace.json"), "--profile-steps", "7"]))
        assert file == ProfileFile(path=tmp_path / "trace.json", num_steps=7)
        with pytest.raises(ConfigError, match="no effect without --profile"):
            profile_file(parse([command, "--profile-steps", "7"]))
