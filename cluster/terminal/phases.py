"""What a person sees while the server starts: phases with their times, a bar for the weights, at last the banner.

On a terminal a running phase rewrites its line; elsewhere every phase is one plain line. Everything goes to stderr.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BAR_WIDTH = 24


class Console:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator["Phase"]:
        """Shows `name` while it lasts, then its time; the Phase takes progress and a closing remark."""
        phase = Phase(name, self._stream, tty=self._tty)
        phase.show()
        try:
            yield phase
        except BaseException:
            phase.end("stopped")
            raise
        phase.end("")


class Phase:
    def __init__(self, name: str, stream: TextIO, *, tty: bool) -> None:
        self._name = name
        self._stream = stream
        self._tty = tty
        self._began = time.monotonic()
        self.remark = ""

    def show(self, text: str = "") -> None:
        if self._tty:
            print(f"\r\x1b[K  {self._name} {text}", end="", file=self._stream, flush=True)

    def progress(self, done: int, total: int) -> None:
        """Bytes of weights; a total of 0 is not known yet."""
        if total:
            filled = BAR_WIDTH * done // total
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            self.show(f"{bar} {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

    def end(self, outcome: str) -> None:
        start = "\r\x1b[K" if self._tty else ""
        remark = outcome or self.remark
        took = f"{time.monotonic() - self._began:.1f} s"
        print(f"{start}  {self._name:<28} {took:>7}   {remark}".rstrip(), file=self._stream, flush=True)
