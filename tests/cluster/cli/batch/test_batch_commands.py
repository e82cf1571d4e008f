"""The batch command against a server in this process: its output, its errors, and that a death between two steps costs nothing."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.servers.command_beside_server import KEY, PROMPTS, Command, DiedError, command_beside_server

from cluster.cli.batch import locations, remote
from cluster.cli.batch.job import JobFolder, find_job
from cluster.cli.options.parser import make_parser
from workers.errors import ConfigError


@pytest.fixture
async def command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Command]:
    async with command_beside_server(tmp_path, capfd, monkeypatch) as command:
        yield command


async def test_plain_lines_are_answered(command: Command) -> None:
    code, out, err = await command.run(
        command.write("in.jsonl", *PROMPTS), "--max-tokens", "2", "--max-replicas", "3", "--deadline", "2h"
    )
    assert (code, out) == (0, ""), err
    assert "2 of 2 lines answered" in err
    assert {k: v["status_code"] for k, v in command.answers().items()} == {"line-1": 200, "mine": 200}
    assert not (command.folder / "out.errors.jsonl").exists()
    assert KEY not in "".join(p.read_text() for p in command.folder.rglob("*") if p.is_file())
    (batch,) = await command.on_the_server("batches")
    assert (batch["metadata"]["max_replicas"], batch["completion_window"]) == ("3", "2h")


async def test_a_second_run_is_refused_and_overwrite_starts_over(command: Command) -> None:
    source = command.write("in.jsonl", *PROMPTS)
    assert (await command.run(source))[0] == 0
    code, _, err = await command.run(source)
    assert code == 2 and "--overwrite" in err
    code, _, err = await command("resume", str(command.output))
    assert code == 0 and "2 of 2 lines answered" in err
    assert len(await command.on_the_server("batches")) == 1
    assert (await command.run(source, "--overwrite"))[0] == 0
    assert len(await command.on_the_server("batches")) == 2


async def test_an_existing_output_is_not_replaced(command: Command) -> None:
    command.output.write_text("precious")
    code, _, err = await command.run(command.write("in.jsonl", *PROMPTS))
    assert code == 2 and "already exists" in err
    assert command.output.read_text() == "precious"
    assert await command.on_the_server("files") == []


@pytest.mark.parametrize("dies_at", range(15))
async def test_a_death_between_any_two_steps_does_nothing_twice(
    command: Command, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """It dies just before or after an upload, a creation, a write to the job's folder, or a delivery."""
    source = command.write("in.jsonl", *PROMPTS)
    steps = 0

    def mortal(method: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == dies_at:
                raise DiedError
            result = method(*args, **kwargs)
            steps += 1
            if steps == dies_at:
                raise DiedError
            return result

        return step

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteBatches, "upload", mortal(remote.RemoteBatches.upload))
        patch.setattr(remote.RemoteBatches, "create", mortal(remote.RemoteBatches.create))
        patch.setattr(JobFolder, "write", mortal(JobFolder.write))
        patch.setattr(locations, "deliver", mortal(locations.deliver))
        if dies_at:
            with pytest.raises(DiedError):
                await command.run(source)
        else:
            assert (await command.run(source))[0] == 0
            assert steps == 14
    if dies_at in (1, 4, 7, 10, 13):  # 1: before the first write to the folder there is nothing to resume
        code, _, err = await command.run(source)
    else:
        code, _, err = await command("resume", str(command.output), "--api-key", KEY)
    assert code == 0, err
    assert sorted(command.answers()) == ["line-1", "mine"]
    assert len(await command.on_the_server("batches")) == 1
    assert len(await command.on_the_server("files?purpose=batch")) == 1


async def test_failed_lines_are_an_exit_code_and_a_file(command: Command) -> None:
    source = command.write("in.jsonl", {"prompt": "a"}, {"prompt": "word " * 5000})
    code, _, err = await command.run(source)
    assert code == 1
    assert f"1 of 2 lines have no answer. See {command.folder / 'out.errors.jsonl'}" in err
    assert list(command.answers()) == ["line-1"]
    assert command.answers(command.folder / "out.errors.jsonl")["line-2"]["status_code"] == 400
    code, _, err = await command("resume", str(command.output))
    assert code == 1, "the same when run again"
    command.write("in.jsonl", {"prompt": "a"})
    assert (await command.run(source, "--overwrite"))[0] == 0
    assert not (command.folder / "out.errors.jsonl").exists(), "it would be from the batch before"


async def test_invalid_lines_are_named_and_leave_nothing(command: Command) -> None:
    source = command.write("in.jsonl", {"prompt": "a"}, {"prompt": "b", "temperature": 99})
    code, _, err = await command.run(source)
    assert code == 1 and "line 2: " in err and "temperature" in err
    assert [p.name for p in command.folder.iterdir()] == ["in.jsonl"]
    command.write("in.jsonl", *PROMPTS)
    assert (await command.run(source))[0] == 0


async def test_a_changed_input_and_other_options_are_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = command.write("in.jsonl", *PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteBatches, "upload", lambda *_, **__: (_ for _ in ()).throw(DiedError))
        with pytest.raises(DiedError):
            await command.run(source)
    code, _, err = await command.run(source, "--max-tokens", "3")
    assert code == 2 and "started with other options" in err
    command.write("in.jsonl", *PROMPTS, *PROMPTS)
    code, _, err = await command.run(source)
    assert code == 2 and "has changed since" in err
    code, _, _ = await command("resume", str(command.output), "--api-key", KEY)
    assert code == 0 and len(command.answers()) == 2, "it continues with the old contents"


async def test_csv_columns_make_prompts(command: Command) -> None:
    source = command.write("in.csv", "key,question", "q1,who?", "q2,why?")
    code, _, err = await command.run(source, "--column", "prompt=Answer: {question}", "--column", "custom_id=key")
    assert code == 0, err
    assert sorted(command.answers()) == ["q1", "q2"]


async def test_compressed_input_and_standard_output(command: Command) -> None:
    source = command.folder / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b"".join(json.dumps(p).encode() + b"\n" for p in PROMPTS)))
    code, out, err = await command("run", str(source), "-o", "-", "--url", command.url, "--api-key", KEY)
    assert code == 0, err
    assert sorted(json.loads(line)["custom_id"] for line in out.splitlines()) == ["line-1", "mine"]


async def test_storage_addresses(command: Command) -> None:
    import fsspec

    with fsspec.open("memory://bucket/in.jsonl", "wb") as file:
        file.write(b'{"prompt": "a"}\n')
    out = "memory://bucket/out.jsonl"
    code, _, err = await command("run", "memory://bucket/in.jsonl", "-o", out, "--url", command.url, "--api-key", KEY)
    assert code == 0, err
    with locations.reading(out) as source:
        assert json.loads(source.read())["custom_id"] == "line-1"
    code, shown, _ = await command("status", out)
    assert code == 0 and "1 of 1 lines answered" in shown


async def test_a_server_that_stops_for_a_while_is_waited_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls, stopped = 0, remote.RemoteBatches("http://127.0.0.1:9")

    def flaky(method: Any) -> Any:
        def call(server: remote.RemoteBatches, *args: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return method(stopped if num_calls % 3 == 1 else server, *args)

        return call

    monkeypatch.setattr(remote.RemoteBatches, "get", flaky(remote.RemoteBatches.get))
    monkeypatch.setattr(remote.RemoteBatches, "download", flaky(remote.RemoteBatches.download))
    code, _, err = await command.run(command.write("in.jsonl", *PROMPTS))
    assert code == 0, err
    assert "the batch is safe on the server" in err
    assert len(command.answers()) == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--api-key", "wrong"), 2, "--api-key"),
        (("--url", "http://127.0.0.1:9"), 1, "Nothing answers at http://127.0.0.1:9"),
        (("--url", "nonsense"), 2, "is not the address of a server"),
        (("--ray-address", "127.0.0.1:1"), 2, "both say where the batch runs"),
        (("--chat-template", "v3"), 2, "--chat-template has no effect with --url: the server has its own."),
        (("--generation-config", "none"), 2, "--generation-config has no effect with --url"),
        (("--gguf-file", "x.gguf"), 2, "--gguf-file has no effect with --url"),
        (("--column", "prompt"), 2, "--column prompt=NAME"),
        (("--column", "prompt=a", "--column", "input=b"), 2, "Leave the others out"),
        (("--column", "prompt=a b"), 2, "Rename the column"),
        (("-o", "/proc/x/out.jsonl"), 1, "--state-dir"),
        (("--state-dir", "STATE", "-o", "/proc/x/out.jsonl"), 1, "cannot be written"),
        (("-o", "nonsense://x/y"), 2, "not a supported storage"),
    ],
)
async def test_options_that_cannot_work_are_clear_errors(
    command: Command, options: tuple[str, ...], code: int, message: str
) -> None:
    options = tuple(str(command.folder / "state") if o == "STATE" else o for o in options)
    found, _, err = await command.run(command.write("in.jsonl", *PROMPTS), *options)
    assert found == code and message in err, err
    assert err.startswith("tramontane: ") and "Traceback" not in err


async def test_a_missing_input(command: Command) -> None:
    code, _, err = await command.run(command.folder / "no.jsonl")
    assert code == 2 and "does not exist" in err
    code, _, err = await command("resume", "no.jsonl")
    assert code == 2 and "tramontane batch run" in err


async def test_status_and_cancel(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = command.write("in.jsonl", *PROMPTS)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteBatches, "get", stop)
        code, _, err = await command.run(source)
    assert code == 1, "Ctrl-C is not a success"
    assert (
        f"Stopped. Nothing is lost, and the server at {command.url} continues the batch. Fetch its answers with "
        f"`tramontane batch resume {command.output}`." in err
    )
    batch_id = (await command.on_the_server("batches"))[0]["id"]
    code, shown, _ = await command("status", str(command.output), "--api-key", KEY)
    assert code == 0 and shown.startswith(f"{batch_id}: ")
    code, shown, _ = await command("status", batch_id, "--url", command.url, "--api-key", KEY, "--json")
    assert json.loads(shown)["id"] == batch_id
    deadline = time.monotonic() + 10
    while (await command.on_the_server("batches"))[0]["status"] != "completed":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    code, _, err = await command("cancel", str(command.output), "--api-key", KEY)
    assert code == 1 and "completed" in err
    assert (await command("resume", str(command.output), "--api-key", KEY))[0] == 0


async def test_one_command_at_a_time(command: Command) -> None:
    source = command.write("in.jsonl", *PROMPTS)
    folder = JobFolder(Path(f"{command.output}.tramontane"))
    with folder.lock():
        code, _, err = await command.run(source)
    assert code == 1 and "Another process" in err
    assert (await command.run(source))[0] == 0


def test_resume_replaces_only_what_is_given_again() -> None:
    given = vars(make_parser().parse_args(["batch", "resume", "out", "--replicas", "0:3"]))
    assert given["replicas"] == (0, 3)
    assert not {"tensor_parallel_size", "max_num_seqs", "ray_address", "max_replicas"} & given.keys()


def test_a_job_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.tramontane"
    folder.mkdir()
    (folder / "batch.json").write_text("{}")
    with pytest.raises(Exception, match="release"):
        find_job(str(tmp_path / "out"), None)
    with pytest.raises(ConfigError, match="batch run"):
        find_job(str(tmp_path / "other"), None)
