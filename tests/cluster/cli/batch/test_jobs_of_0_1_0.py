"""`tramontane batch` on job folders and parts that version 0.1.0 wrote."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from support.batch.version_0_1_0 import BATCH_ID, copy_job, copy_parts, copy_server_job

from cluster.cli.batch.job import JobFolder, find_job
from cluster.cli.batch.job_from_options import existing_job, job_from_options
from cluster.cli.batch.run_here import batch_config
from cluster.cli.main import main
from cluster.cli.options.parser import parse
from cluster.config.checkpoint_location import resolve_model


def options_of(*arguments: str) -> Namespace:
    return parse(["batch", *arguments], environ={})


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_status_shows_the_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy_job(tmp_path)
    assert main(["batch", "status", str(tmp_path / "out.jsonl")]) == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f"{BATCH_ID}: 3 of 12 lines, 1 failed.")
    assert f"Continue with `tramontane batch resume {tmp_path / 'out.jsonl'}`." in shown


def test_run_again_recognises_the_job(tmp_path: Path) -> None:
    """The same options give the same request, so that the batch is continued and not refused."""
    folder = JobFolder(copy_job(tmp_path))
    command = ("run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--seed", "7")
    more = ("--max-num-seqs", "1", "--max-model-len", "64", "--replicas", "1")
    job = existing_job(folder, job_from_options(options_of(*command, *more)), overwrite=False)
    assert job is not None and job.batch_id == BATCH_ID


def test_resume_uses_the_options_of_the_job(tmp_path: Path) -> None:
    copy_job(tmp_path)
    _, job = find_job(str(tmp_path / "out.jsonl"), None)
    given = {k: v for k, v in vars(options_of("resume", job.output)).items() if v is not None}
    config = batch_config(Namespace(**(job.options | given)), job, *resolve_model(None), device="cpu")
    assert (config.engine.max_num_seqs, config.engine.max_model_len) == (1, 64)
    assert (config.min_replicas, config.max_replicas, config.deployment) == (1, 1, "batch-0dd713ca5c3b")


def test_cancel_writes_the_answers_so_far(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy_job(tmp_path)
    assert main(["batch", "cancel", str(tmp_path / "out.jsonl")]) == 0
    assert "The batch is cancelled: 2 of 12 lines answered" in capfd.readouterr().out
    assert ids(tmp_path / "out.jsonl") == ["row-4", "row-6"]
    assert ids(tmp_path / "out.errors.jsonl") == [f"row-{i}" for i in range(12) if i not in (4, 6)]


def test_parts_are_merged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy_parts(tmp_path)
    out = tmp_path / "parts.out.jsonl"
    assert main(["batch", "status", str(out)]) == 0
    assert "All 2 parts are complete, 4 of their 5 lines are answered." in capfd.readouterr().out
    assert main(["batch", "merge", str(out)]) == 1
    assert "1 of 5 lines have no answer." in capfd.readouterr().err
    assert ids(out) == ["line-1", "line-2", "line-3", "line-5"]
    assert ids(tmp_path / "parts.out.errors.jsonl") == ["line-4"]


def test_a_complete_part_is_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy_parts(tmp_path)
    command = ["run", str(tmp_path / "parts.jsonl"), "-o", str(tmp_path / "parts.out.jsonl"), "--part", "0/2"]
    assert main(["batch", *command]) == 0
    assert "3 of 3 lines answered" in capfd.readouterr().err
    assert main(["batch", *command, "--max-tokens", "9"]) == 2
    assert "was computed with other options" in capfd.readouterr().err


def test_a_job_on_a_server_is_known(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy_server_job(tmp_path, url="http://127.0.0.1:9")
    _, job = find_job(str(tmp_path / "remote.jsonl"), None)
    assert (job.batch_id, job.options["deadline"]) == ("batch_00000000000000000000000000000001", "2h")
    assert main(["batch", "status", str(tmp_path / "remote.jsonl")]) == 1
    assert "Nothing answers at http://127.0.0.1:9" in capfd.readouterr().err
