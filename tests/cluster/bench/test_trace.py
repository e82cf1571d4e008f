"""Traces: Azure's CSV and Mooncake's JSONL, and files that are neither."""

from pathlib import Path

import pytest

from cluster.bench.trace import TraceRow, read_trace
from workers.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9311690,396,109
2023-11-16 18:15:48.1805900,20,0
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 700, "output_length": 6, "hash_ids": [4, 9]}

{"timestamp": 1040, "input_length": 30, "output_length": 3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_azure_s_rows_are_sorted_and_begin_at_zero(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, AZURE))
    assert [(r.num_prompt, r.num_output) for r in rows] == [(374, 44), (20, 1), (396, 109)]
    assert [r.at_s for r in rows] == pytest.approx([0, 1.5, 4.250579], abs=1e-5)


def test_mooncake_s_times_are_milliseconds(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, MOONCAKE))
    assert rows == [TraceRow(0.0, 700, 6, (4, 9)), TraceRow(pytest.approx(0.04), 30, 3, ())]


def test_a_limit_keeps_the_first(tmp_path: Path) -> None:
    assert [r.num_prompt for r in read_trace(write(tmp_path, AZURE), limit=2)] == [374, 20]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no requests"),
        ("hello\n", "line 1"),
        ('{"timestamp": 1, "input_length": 2}\n', "output_length"),
        (
            '{"timestamp": 1, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}\n',
            "more hash_ids than blocks of 512 tokens",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "is not a trace"),
        ("TIMESTAMP,Tokens\n2023-11-16 18:15:46,1\n", "ContextTokens"),
    ],
)
def test_what_is_not_a_trace_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as e:
        read_trace(write(tmp_path, text))
    assert e.value.param == "--trace"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none")
