"""Rates and the line of text, as tables of cases; the bar and the plain lines as they reach a stream."""

import io

import pytest

from cluster.cli.batch.progress import Display, Meter, Snapshot, describe, duration
from cluster.terminal.phases import Console


def snapshot(num_completed: int = 0, *, tokens: int = 0, **changed: object) -> Snapshot:
    fields = {"status": "in_progress", "num_lines": 100, "num_failed": 0, "num_tokens": tokens}
    return Snapshot(**{**fields, "num_completed": num_completed, **changed})


def described(*seen: tuple[float, Snapshot]) -> str:
    meter = Meter()
    for at, each in seen:
        meter.add(each, at)
    return describe(seen[-1][1], meter)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(0, snapshot())], "0 of 100 lines"),
        (
            [(0, snapshot()), (10, snapshot(20, tokens=5000))],
            "20 of 100 lines, 500 tokens/s, about 40 s left",
        ),
        (
            [(0, snapshot(remaining=1.0)), (10, snapshot(20, tokens=500, remaining=0.5))],
            "20 of 100 lines, 50 tokens/s, about 10 s left",
        ),
        (
            [(0, snapshot()), (1, snapshot(0, num_failed=3, replicas=(1, 2)))],
            "3 of 100 lines, 3 failed, 0 tokens/s, about 32 s left, 1 of 2 replicas ready",
        ),
        (  # two huge lines are rejected at once, then 2% of the work is done in 4 s
            [
                (0, snapshot(remaining=1.0)),
                (1, snapshot(0, num_failed=2, remaining=0.22)),
                (5, snapshot(10, num_failed=2, tokens=500, remaining=0.2)),
            ],
            "12 of 100 lines, 2 failed, 100 tokens/s, about 40 s left",
        ),
        (  # all fail, one after the other
            [(0, snapshot(remaining=1.0)), (2, snapshot(num_failed=20, remaining=0.1))],
            "20 of 100 lines, 20 failed, 0 tokens/s, about 8 s left",
        ),
        ([(0, snapshot(num_lines=0, status="validating", replicas=(0, 0)))], "validating, no replicas"),
        ([(0, snapshot(100, status="finalizing"))], "100 of 100 lines, finalizing"),
    ],
)
def test_describe(seen, expected):
    assert described(*seen) == expected


def test_rates_ignore_old_snapshots():
    meter = Meter()
    for at in range(0, 200, 10):
        meter.add(snapshot(tokens=1000 if at > 100 else 0), at)
    assert meter.tokens_per_s == 0


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_without_a_terminal_a_line_is_printed_every_ten_seconds_and_trouble_once():
    stream = io.StringIO()
    display = Display(Console(stream))
    for at in range(25):
        display.show(snapshot(at), float(at))
    display.trouble("Nothing answers.")
    display.trouble("Nothing answers.")
    display.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" of")[0] for line in lines] == ["0", "10", "20", "Nothing answers."]


def test_on_a_terminal_there_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = Display(Console(stream))
    display.show(snapshot(), 0.0)
    display.show(snapshot(50, tokens=100), 1.0)
    display.close()
    assert "━" in stream.getvalue() and "50 of 100 lines, 100 tokens/s" in stream.getvalue()
