"""`tramontane batch` from a data engineer's view: a file, a kill -9 in the middle, `resume`, and each line occurs once."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.batch.command import BatchCommand, answers, num_results, ranks_of, wait_until, write_lines

NUM_LINES = 60


@pytest.fixture
def commands() -> Iterator[list[BatchCommand]]:
    started: list[BatchCommand] = []
    yield started
    for command in started:
        command.close()


@pytest.mark.timeout(300)
def test_a_killed_batch_resumes_and_answers_every_line_once(tmp_path: Path, commands: list[BatchCommand]) -> None:
    ids = write_lines(tmp_path / "in.jsonl", NUM_LINES, max_tokens=48, bad_every=20)
    out, errors, log = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl", tmp_path / "log"
    store = tmp_path / "out.jsonl.tramontane" / "batches.db"

    first = BatchCommand("run", tmp_path / "in.jsonl", "-o", out, "--max-num-seqs", "8", log=log)
    commands.append(first)
    wait_until(lambda: num_results(store) > 5 or not first.is_running, timeout_s=120, what="some lines are answered")
    assert first.is_running, first.output
    left_behind = first.descendants()
    first.kill()
    answered = num_results(store)
    assert 5 < answered < NUM_LINES, "the kill came too late to prove anything"
    assert not out.exists() and not errors.exists()
    _, alive = psutil.wait_procs(ranks_of(left_behind), timeout=30)
    assert alive == [], "no rank keeps computing for a dead command"

    second = BatchCommand("resume", out, log=log)
    commands.append(second)
    assert second.wait(120) == 1, second.output  # three lines have no answer
    assert f"{NUM_LINES - 3} of {NUM_LINES} lines answered" in second.output
    assert f"3 of {NUM_LINES} lines have no answer. See {errors}" in second.output
    assert sorted(answers(out, errors)) == sorted(ids)
    assert sorted(answers(errors)) == ["id-0", "id-20", "id-40"]
    assert not store.exists(), "the store is removed after delivery"


@pytest.mark.timeout(300)
def test_ctrl_c_says_how_to_resume(tmp_path: Path, commands: list[BatchCommand]) -> None:
    write_lines(tmp_path / "in.jsonl", 2, max_tokens=4)
    command = BatchCommand("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", log=tmp_path / "log")
    commands.append(command)
    wait_until(lambda: "Starting Ray" in command.output, timeout_s=60, what="it starts")
    command.process.send_signal(signal.SIGINT)
    assert command.wait(60) == 1
    assert (
        f"Stopped. Nothing is lost. Continue with `tramontane batch resume {tmp_path / 'out.jsonl'}`." in command.output
    )
    assert "Traceback" not in command.output
    cancel = BatchCommand("cancel", tmp_path / "out.jsonl", log=tmp_path / "log2")
    commands.append(cancel)
    assert cancel.wait(30) == 0, cancel.output
