"""What a person sees while a command works: phases with their times, bars, and lines of text. Everything goes to stderr.

On a terminal a running phase or bar redraws its line; elsewhere every phase is one plain line when it ends, and bars are not shown.
Knows nothing about what the phases and bars stand for.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 24
REDRAW_EVERY_S = 0.1


class Console:
    """A stream (stderr by default) and the time since the console was made. Shows one phase or bar at a time."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        # Brackets in a model's name are not markup.
        self._rich = RichConsole(file=self._stream, markup=False, highlight=False)
        self._began = time.monotonic()

    @property
    def is_terminal(self) -> bool:
        """Whether bars are shown."""
        return self._stream.isatty()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def line(self, text: str) -> None:
        """Text of one or more lines, above the phase or bar that is shown. The terminal wraps it, so that commands can be copied."""
        self._rich.print(text, soft_wrap=True)
        self._stream.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator["Phase"]:
        """Shows `name` while it lasts, then its time; the Phase takes progress and a closing remark."""
        phase = Phase(name, self)
        try:
            yield phase
        except BaseException:
            phase.end("stopped")
            raise
        phase.end()

    def bar(self) -> "Bar":
        """A bar with texts around it. The caller closes it."""
        return Bar(self._rich if self.is_terminal else None)


class Phase:
    """Made by `Console.phase`. `remark` is printed after the phase's time."""

    def __init__(self, name: str, console: Console) -> None:
        self.remark = ""
        self._name = name
        self._console = console
        self._began = time.monotonic()
        self._bar = console.bar()
        self._bar.show(before=f"  {name}")

    def progress(self, done: int, total: int) -> None:
        """Bytes of weights. Shows nothing while the total is not known yet, and 0."""
        if total:
            after = f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
            self._bar.show(before=f"  {self._name}", done=done, total=total, after=after)

    def end(self, outcome: str = "") -> None:
        """outcome: replaces the remark."""
        self._bar.close()
        took = f"{time.monotonic() - self._began:.1f} s"
        self._console.line(f"  {self._name:<28} {took:>7}   {outcome or self.remark}".rstrip())


class Bar:
    """One line that is drawn again with every `show`, at most ten times a second; `close` removes it. Silent without a terminal."""

    def __init__(self, console: RichConsole | None) -> None:
        self._live: Live | None = None
        self._drawn_at = float("-inf")
        if console is not None:
            # Redrawn by `show` alone: a thread that redraws would write between the lines of Ray's log.
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()

    def show(self, *, before: str = "", done: float = 0, total: float | None = None, after: str = "") -> None:
        """The texts before and after the bar. Without a total there is no bar between them."""
        if self._live is None:
            return
        bar = None if total is None else ProgressBar(total=total, completed=done, width=BAR_WIDTH)
        cells = [cell for cell in (_text(before), bar, _text(after)) if cell is not None]
        line = Table.grid(padding=(0, 1))
        line.add_row(*cells)
        now = time.monotonic()
        is_due = now - self._drawn_at >= REDRAW_EVERY_S or (total is not None and done >= total)
        self._live.update(line, refresh=is_due)
        if is_due:
            self._drawn_at = now

    def close(self) -> None:
        """Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _text(text: str) -> Text | None:
    return Text(text, no_wrap=True, overflow="ellipsis") if text else None
