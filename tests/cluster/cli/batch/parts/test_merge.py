"""Parts of one file, each run by a command of its own, and `merge`: every line once and in order, or a clear error."""

import json
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.servers.command_beside_server import KEY, PROMPTS, Command, DiedError, command_beside_server

from cluster.batch.records import line_id
from cluster.cli.batch import locations
from cluster.cli.batch.job import JobFolder, Outcome
from cluster.cli.batch.parts import lines as part_lines
from cluster.cli.batch.parts.merge import merge
from cluster.cli.batch.parts.records import Part, PartRecord

# Line 4 is empty, line 6 is rejected by the model.
ROWS = [
    {"prompt": "a"},
    {"prompt": "b", "id": "x"},
    {"prompt": "c"},
    "",
    {"prompt": "d"},
    {"prompt": "word " * 5000},
    {"prompt": "e"},
]
ANSWERED = ["line-1", "x", "line-3", "line-5", "line-7"]


@pytest.fixture
async def command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Command]:
    async with command_beside_server(tmp_path, capfd, monkeypatch) as command:
        yield command


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


async def run_parts(
    command: Command, count: int, *rows: Any, which: Callable[[int], bool] = lambda index: True
) -> Path:
    """Runs each wanted part with its own command."""
    source = command.write("in.jsonl", *(rows or ROWS))
    for index in filter(which, range(count)):
        code, _, err = await command.run(source, "--part", f"{index}/{count}")
        assert code in (0, 1) and "lines answered" in err, err
    return source


@pytest.mark.parametrize("count", [1, 3])
async def test_merged_parts_are_in_line_order(command: Command, count: int) -> None:
    source = await run_parts(command, count)
    assert not command.output.exists()
    code, out, err = await command("merge", str(command.output))
    assert (code, out) == (1, ""), "a line has no answer"
    assert "5 of 6 lines answered" in err and f"See {command.folder / 'out.errors.jsonl'}" in err
    assert ids(command.output) == ANSWERED
    assert ids(command.folder / "out.errors.jsonl") == ["line-6"]
    # Without parts, each line has the same answer.
    merged = command.answers()
    code, _, _ = await command.run(source, "--overwrite")
    assert {k: v["body"]["choices"] for k, v in merged.items()} == {
        k: v["body"]["choices"] for k, v in command.answers().items()
    }


async def test_a_complete_part_is_left_as_it_is(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    source = await run_parts(command, 2)
    part = command.folder / "out.part-00001-of-00002.jsonl"
    before = part.read_bytes()
    code, _, err = await command.run(source, "--part", "1/2")
    assert (code, part.read_bytes()) == (1, before), "as it ended the first time"
    assert "1 of 2 lines answered" in err
    monkeypatch.setenv("XDG_STATE_HOME", str(command.folder / "another machine"))
    code, _, err = await command.run(source, "--part", "1/2", "--state-dir", str(command.folder / "elsewhere"))
    assert code == 1 and "1 of 2 lines answered" in err
    assert len(await command.on_the_server("batches")) == 2
    code, _, err = await command.run(source, "--part", "1/2", "--max-tokens", "3")
    assert code == 2 and "other options" in err
    command.write("in.jsonl", *ROWS, {"prompt": "f"})
    code, _, err = await command.run(source, "--part", "1/2")
    assert code == 2 and "has changed" in err
    code, _, err = await command.run(source, "--part", "1/2", "--overwrite")
    assert code == 1 and "2 of 3 lines answered" in err
    code, _, err = await command("merge", str(command.output))
    assert code == 1 and "had a different size for part 1/2 than for part 0/2" in err


async def test_a_part_that_died_during_delivery_is_not_complete(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await run_parts(command, 2, which=lambda index: index == 0)
    deliver = locations.deliver

    def dies(source: Path, location: str) -> None:
        if location.endswith(".done"):
            raise DiedError
        deliver(source, location)

    with monkeypatch.context() as patch:
        patch.setattr(locations, "deliver", dies)
        with pytest.raises(DiedError):
            await command.run(source, "--part", "1/2")
    assert (command.folder / "out.part-00001-of-00002.jsonl").exists()
    code, _, err = await command("merge", str(command.output))
    remedy = f"Run or continue it with `tramontane batch run {source} -o {command.output} --part 1/2`."
    assert code == 1 and f"is missing part 1/2. {remedy}" in err
    assert not command.output.exists()
    # Its state is lost with its machine, so it starts over.
    JobFolder(command.folder / "out.part-00001-of-00002.jsonl.tramontane").clear(keep_job=False)
    assert (await command.run(source, "--part", "1/2"))[0] == 1
    assert (await command("merge", str(command.output)))[0] == 1
    assert ids(command.output) == ANSWERED


async def test_storages(command: Command) -> None:
    import fsspec

    with fsspec.open("memory://merge/in.jsonl", "wb") as file:
        file.write("".join((json.dumps(row) if row else "") + "\n" for row in ROWS).encode())
    out = "memory://merge/out.jsonl"
    for index in range(3):
        options = ("--part", f"{index}/3", "--url", command.url, "--api-key", KEY)
        code, _, err = await command("run", "memory://merge/in.jsonl", "-o", out, *options)
        assert code in (0, 1), err
    code, _, err = await command("merge", out, "--remove-parts")
    assert code == 1 and "5 of 6 lines answered" in err
    with locations.reading(out) as source:
        assert [json.loads(line)["custom_id"] for line in source] == ANSWERED
    assert sorted(locations.names_in_folder_of(out)) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    code, shown, _ = await command("status", out)
    assert code == 0 and "5 of 6 lines answered" in shown


async def test_more_parts_than_lines(command: Command) -> None:
    await run_parts(command, 4, *PROMPTS)
    assert (command.folder / "out.part-00003-of-00004.jsonl").read_bytes() == b""
    code, _, err = await command("merge", str(command.output), "--remove-parts")
    assert code == 0, err
    assert ids(command.output) == ["line-1", "mine"]
    assert sorted(p.name for p in command.folder.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.tramontane"]


async def test_an_input_without_lines(command: Command) -> None:
    await run_parts(command, 2, "")
    code, _, err = await command("merge", str(command.output))
    assert code == 1 and "has no lines" in err


async def test_a_custom_id_in_two_parts_is_named_with_its_lines(command: Command) -> None:
    await run_parts(command, 2, {"prompt": "a", "id": "same"}, {"prompt": "b", "id": "same"})
    code, _, err = await command("merge", str(command.output))
    assert code == 1 and "Lines 1 and 2 have the same custom_id, 'same'" in err
    assert not command.output.exists() and not (command.folder / "out.jsonl.tramontane").exists()


async def test_an_invalid_line_is_named_by_its_number_in_the_file(command: Command) -> None:
    source = command.write("in.jsonl", *ROWS, {"prompt": "b", "temperature": 99})
    code, _, err = await command.run(source, "--part", "1/2")
    assert code == 1 and "line 8: " in err


async def test_an_existing_output_and_a_second_merge(command: Command) -> None:
    await run_parts(command, 2)
    command.output.write_text("precious")
    code, _, err = await command("merge", str(command.output))
    assert code == 2 and "--overwrite" in err
    assert command.output.read_text() == "precious"
    assert (await command("merge", str(command.output), "--overwrite"))[0] == 1
    code, _, err = await command("merge", str(command.output))
    assert code == 2 and "5 of 6 lines answered" in err and "--overwrite" in err


async def test_a_part_that_was_tampered_with(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_lines, "MAX_EMPTY_LINES", 100)
    await run_parts(command, 2)
    part = command.folder / "out.part-00000-of-00002.jsonl"
    whole = part.read_bytes()
    for damaged, message in (
        (whole[: whole.index(b"\n") + 1], "it has 1 lines, but 4 were written"),
        (whole[:-20], "has a line that is not an answer"),
        (b"".join(reversed(whole.splitlines(keepends=True))), "or out of order"),
    ):
        part.write_bytes(damaged)
        code, _, err = await command("merge", str(command.output))
        assert code == 1 and "Part 0/2 has changed since its batch wrote it" in err and message in err, err
        assert not command.output.exists()


async def test_parts_that_do_not_match(command: Command) -> None:
    source = await run_parts(command, 2)
    assert (await command.run(source, "--part", "0/2", "--max-tokens", "3", "--overwrite"))[0] == 0
    code, _, err = await command("merge", str(command.output))
    assert code == 1 and "Part 1/2 was run with other options than part 0/2" in err
    await run_parts(command, 3, which=lambda index: index == 2)
    code, _, err = await command("merge", str(command.output))
    assert code == 2 and "parts from more than one split, into 2 and 3 parts. Choose one with --parts N." in err
    code, _, err = await command("merge", str(command.output), "--parts", "3")
    assert code == 1 and "is missing parts 0/3, 1/3." in err


async def test_status_shows_which_parts_are_complete(command: Command) -> None:
    await run_parts(command, 3, which=lambda index: index != 1)
    code, shown, _ = await command("status", str(command.output))
    assert (code, shown) == (0, "2 of 3 parts are complete, 3 of their 4 lines are answered. Missing: 1/3.\n")
    code, shown, _ = await command("status", str(command.output), "--json")
    assert json.loads(shown)[0]["lacking"] == ["1/3"]
    await run_parts(command, 3, which=lambda index: index == 1)
    code, shown, _ = await command("status", str(command.output))
    assert (
        f"All 3 parts are complete, 5 of their 6 lines are answered. Join them with `tramontane batch merge {command.output}`"
        in shown
    )


def test_more_parts_than_the_limit_of_open_files(tmp_path: Path) -> None:
    out, count, num_lines = tmp_path / "out.jsonl", 150, 400
    for index in range(count):
        part, held = Part(index, count), [n for n in range(1, num_lines + 1) if Part(index, count).contains(n)]
        rows = [{"id": line_id(f"batch_{index}", n), "custom_id": f"row-{n}"} for n in held]
        Path(part.location(str(out))).write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = Outcome(status="completed", num_lines=len(held), num_completed=len(held), num_failed=0)
        record = PartRecord(
            part=str(part),
            source="in.jsonl",
            source_bytes=1,
            request={"part": str(part)},
            batch_id=f"batch_{index}",
            created_at=0.0,
            outcome=outcome,
        )
        Path(part.location(str(out)) + ".done").write_bytes(msgspec.json.encode(record))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        merge(JobFolder(tmp_path / "state"), str(out), str(tmp_path / "errors.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ids(out) == [f"row-{n}" for n in range(1, num_lines + 1)]


async def test_options_that_do_not_fit_parts(command: Command) -> None:
    source = command.write("in.jsonl", *PROMPTS)
    code, _, err = await command("run", str(source), "-o", "-", "--part", "0/2", "--url", command.url)
    assert code == 2 and "Give the path of an output" in err
    code, _, err = await command.run(command.folder / "no.jsonl", "--part", "0/2")
    assert code == 2 and "no.jsonl does not exist" in err
    code, _, err = await command("merge", "-")
    assert code == 2 and "Standard output has no parts" in err
    code, _, err = await command("merge", str(command.output))
    assert code == 2 and "There are no parts of" in err and "--part I/N" in err
