"""Which lines a part contains, the names of its files, and that the id of an answer identifies its line."""

import io
import json

import pytest

from cluster.batch.records import BatchRecord, Line, line_id
from cluster.batch.run.output import render
from cluster.cli.batch.convert import LineTemplate, convert
from cluster.cli.batch.parts.records import Part, find_parts, parse_part


def test_every_line_is_in_one_part():
    assert [n for n in range(1, 10) if Part(1, 3).contains(n)] == [2, 5, 8]
    for count in (1, 2, 7, 100):
        held = [n for index in range(count) for n in range(1, 60) if Part(index, count).contains(n)]
        assert sorted(held) == list(range(1, 60))


@pytest.mark.parametrize(("text", "part"), [("0/1", Part(0, 1)), ("3/10", Part(3, 10)), ("09/10", Part(9, 10))])
def test_a_part_is_parsed(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10/10", "the last of 10 is 9"),
        ("0/0", "counts from 0"),
        ("-1/3", "such as 0/10"),
        ("1", "such as 0/10"),
        ("/", "such as 0/10"),
        ("", "such as 0/10"),
        ("1/3/5", "such as 0/10"),
        ("a/b", "such as 0/10"),
        ("0/99999", "10,000 parts at most"),
    ],
)
def test_text_that_is_not_a_part_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_part(text)


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("out.jsonl", "out.part-00003-of-00010.jsonl"),
        ("a.b/out", "a.b/out.part-00003-of-00010"),
        ("s3://b/x/out.errors.jsonl", "s3://b/x/out.errors.part-00003-of-00010.jsonl"),
    ],
)
def test_names(target, part):
    assert Part(3, 10).location(target) == part


def test_parts_are_found_by_their_names(tmp_path):
    for name in (
        "out.part-00000-of-00002.jsonl",
        "out.part-00000-of-00002.jsonl.done",
        "out.part-00001-of-00002.jsonl",
        "out.part-00001-of-00002.jsonl.tramontane",  # its job folder
        "out.errors.part-00001-of-00002.jsonl",
        "other.part-00000-of-00003.jsonl.done",
        "out.part-00000-of-00004.csv",
    ):
        (tmp_path / name).touch()
    assert find_parts(str(tmp_path / "out.jsonl")) == {Part(0, 2): True, Part(1, 2): False}
    assert find_parts(str(tmp_path / "none" / "out.jsonl")) == {}


def test_the_id_of_an_answer_identifies_its_line():
    batch = BatchRecord(
        id="batch_1", endpoint="/v1/completions", input_file_id="f", completion_window="1h", created_at=0, expires_at=1
    )
    rendered = json.loads(render(batch, Line(number=7, custom_id="x", offset=0, num_bytes=0), None))
    assert rendered["id"] == line_id("batch_1", 7) != line_id("batch_1", 8)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_lines_of_a_part_keep_their_numbers(kind):
    rows = [f'{{"prompt": "p{n}"}}' for n in range(1, 8)] if kind == "jsonl" else ["prompt", *"abcdefg"]
    if kind == "jsonl":
        rows[3] = ""
        rows[5] = "not even JSON"
    lines = b"".join(
        convert(
            io.BytesIO("\n".join(rows).encode()),
            format=kind,
            template=LineTemplate(model="demo"),
            is_wanted=Part(0, 2).contains,
        )
    )
    numbered = {n: json.loads(line) for n, line in enumerate(lines.split(b"\n"), start=1) if line}
    assert {n: line["custom_id"] for n, line in numbered.items()} == {n: f"line-{n}" for n in (1, 3, 5, 7)}
