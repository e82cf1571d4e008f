"""A command on a terminal of its own, as a person sees it: everything it draws, with times. For Linux and macOS."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class TerminalCommand:
    """A process whose stderr is a terminal. The caller closes it."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        self.began = time.monotonic()
        self._screen, stderr = pty.openpty()
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                env={**env, "TERM": "xterm", "COLUMNS": "200"},
            )
        finally:
            os.close(stderr)
        self._drawn: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return "".join(text for _, text in self._drawn)

    def first(self, pattern: str) -> float | None:
        """Seconds from the start until text that matches was first drawn; None if it never was."""
        return next((at - self.began for at, text in self._drawn if re.search(pattern, text)), None)

    def close(self) -> None:
        """Ends the process, whatever its state, and waits for it."""
        if self.is_running:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        os.close(self._screen)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end of the terminal is closed
            while data := os.read(self._screen, 65536):
                self._drawn.append((time.monotonic(), _CONTROL.sub("", data.decode(errors="replace"))))
