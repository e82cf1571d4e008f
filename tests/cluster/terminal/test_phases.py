"""Phases, bars and lines: plain lines in a file, redrawn lines on a terminal."""

import io
import re

import pytest

from cluster.terminal.phases import Console

ERASE_LINE = "\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[str]:
    return re.sub(r"\d+\.\d s", "N s", stream.getvalue()).splitlines()


def test_in_a_file_every_phase_is_one_line_when_it_ends():
    stream = io.StringIO()
    console = Console(stream)
    console.line("Tramontane: [a] model, bfloat16")
    with console.phase("Loading the weights") as phase:
        phase.progress(5 << 20, 10 << 20)
        assert "Loading" not in stream.getvalue()
    with console.phase("Starting the engine") as phase:
        phase.remark = "from the cache"
    assert lines(stream) == [
        "Tramontane: [a] model, bfloat16",
        "  Loading the weights            N s",
        "  Starting the engine            N s   from the cache",
    ]


def test_a_phase_that_fails_says_so_and_lets_the_error_through():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Console(stream).phase("Starting Ray"):
        raise KeyboardInterrupt
    assert lines(stream) == ["  Starting Ray                   N s   stopped"]


def test_on_a_terminal_a_phase_redraws_its_line_with_a_bar():
    stream = Terminal()
    console = Console(stream)
    with console.phase("Loading the weights") as phase:
        assert "Loading the weights" in stream.getvalue()
        phase.progress(0, 0)
        assert "MiB" not in stream.getvalue(), "the total is not known yet"
        phase.progress(10 << 20, 10 << 20)
        assert "━" in stream.getvalue() and "10 of 10 MiB" in stream.getvalue()
        console.line("r0 waits for a GPU.")
    drawn = stream.getvalue()
    assert ERASE_LINE in drawn and "r0 waits for a GPU.\n" in drawn
    assert drawn.endswith("s\n"), "the last thing that stands there is the phase with its time"


def test_a_bar_is_redrawn_at_most_ten_times_a_second_and_ends_with_the_latest():
    stream = Terminal()
    bar = Console(stream).bar()
    for done in range(1000):
        bar.show(done=done, total=2000, after=f"{done} of 2000 lines")
    bar.close()
    bar.close()
    drawn = stream.getvalue()
    assert drawn.count("of 2000 lines") < 20
    assert "999 of 2000 lines" in drawn
    bar.show(after="later")
    assert "later" not in stream.getvalue()


def test_a_bar_is_silent_in_a_file():
    stream = io.StringIO()
    console = Console(stream)
    bar = console.bar()
    bar.show(before="a", done=1, total=2, after="b")
    bar.close()
    assert not console.is_terminal and stream.getvalue() == ""


def test_long_lines_are_left_to_the_terminal_to_wrap():
    stream = Terminal()
    command = "curl " + "x" * 300
    Console(stream).line(command)
    assert stream.getvalue() == command + "\n", "a command in the banner can be copied"
