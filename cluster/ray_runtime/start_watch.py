"""Watches a Ray of our own while it starts: a process of it that dies, or too much time, ends the start with Ray's own reason.

Without it Ray waits for half a minute for a process that is dead, and then says that it waited. Knows Ray's log files and the names of
its two core processes. The reason is a pure function of the logs' text.
"""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.ray_runtime.folder import marked_processes
from workers.errors import ConfigError

START_TIMEOUT_S = 90.0  # Ray's own steps have 30 s each; a normal start takes 3 to 10 s
POLL_EVERY_S = 0.25
CORE = ("gcs_server", "raylet")  # Ray starts each of them once, and cannot do without
LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out", "dashboard.log", "dashboard.err")
MAX_REASON = 300  # characters
RESOLVE_TIMEOUT_S = 2.0
REMEDY = "Run `tramontane doctor`, which checks this machine."
# What the raylet dies of when a process that it started has not told its port in time.
_LATE = "Timed out waiting for file"
SIGNAL = signal.SIGUSR2  # neither Ray nor this project uses it in this process
_TAIL_BYTES = 65_536
# [2026-11-30 06:03:55,834 C 8053 8053] (raylet) node_manager.cc:971: Exiting because ...
_LINE = re.compile(r"\[[-\d]+ [:,\d]+ ([CE]) \d+ \d+\] (?:\(\w+\) )?(?:[\w.]+:\d+: +)?(.+)")
# How Ray begins a message that repeats a whole log file.
_LAST_LINES = re.compile(r"The last \d+ lines of \S*?(\w+)\.\w+ ")
# 2026-11-30 06:03:55,834	ERROR head.py:12 -- No space left on device
_PYTHON_LINE = re.compile(r"[-\d]+ [:,\d]+\s(ERROR|CRITICAL) \S+ -- (.+)")


class RayLateError(ConfigError):
    """The machine was too busy for one of Ray's processes. Another start may do."""


@contextlib.contextmanager
def watched(folder: Path, *, timeout_s: float = START_TIMEOUT_S) -> Iterator[None]:
    """For the code that starts Ray, in the main thread. Raises ConfigError with the reason, from the folder's logs, if it fails."""
    try:
        with _Watch(folder, timeout_s):
            yield
    except _GivenUpError as e:
        raise failure(str(e), read_logs(folder), has_names=names_resolve()) from None
    except Exception as e:  # Ray raises a dozen unrelated types here, all for the same reason
        raise failure(str(e) or type(e).__name__, read_logs(folder), has_names=names_resolve()) from e


def failure(what: str, logs: Mapping[str, str], *, has_names: bool = True) -> ConfigError:
    """what: what was noticed, of which the first line is shown. has_names: whether this machine can resolve its own name."""
    what = what.strip().partition("\n")[0]
    if (found := _LAST_LINES.match(what)) is not None:
        what = f"its process {found[1]} ended"
    what, reason = _one_sentence(what), reason_of(logs)
    says = "" if reason is None or reason in what else f" Ray's log says: {reason}"
    if not has_names:
        return ConfigError(
            f"Ray could not be started, and no name can be resolved on this machine, not even localhost: {what}{says}",
            remedy="Put `127.0.0.1 localhost` into /etc/hosts, and `hosts: files dns` into /etc/nsswitch.conf.",
        )
    if any(_LATE in text for text in logs.values()):
        return RayLateError(
            "Ray could not be started: one of its processes was not up in the time that Ray gives it.",
            remedy=f"Start again when this machine is less busy. {REMEDY}",
        )
    return ConfigError(f"Ray could not be started: {what}{says}", remedy=REMEDY)


def names_resolve() -> bool:
    """Whether localhost has an address; False if that takes too long."""
    found = threading.Event()

    def resolve() -> None:
        with contextlib.suppress(OSError):
            socket.getaddrinfo("localhost", None)
            found.set()

    thread = threading.Thread(target=resolve, name="resolve", daemon=True)
    thread.start()
    thread.join(RESOLVE_TIMEOUT_S)
    return found.is_set()


def reason_of(logs: Mapping[str, str]) -> str | None:
    """The last fatal line of the logs, else their last error; earlier files first. None where there is neither."""
    for levels in (("C", "CRITICAL"), ("E", "ERROR")):
        for name in LOGS:
            for line in reversed(logs.get(name, "").splitlines()):
                found = _LINE.match(line) or _PYTHON_LINE.match(line)
                if found is not None and found[1] in levels:
                    return _one_sentence(found[2])
    return None


def read_logs(folder: Path) -> dict[str, str]:
    """The end of each log of the session in `folder` that there is."""
    logs = {}
    for name in LOGS:
        with contextlib.suppress(OSError), (folder / "session_latest" / "logs" / name).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            logs[name] = file.read().decode(errors="replace")
    return logs


def name_and_parent(stat: str) -> tuple[str, int]:
    """From the text of /proc/PID/stat: `12 (a name) S 3 ...` is ("a name", 3)."""
    head, _, tail = stat.rpartition(")")
    return head.partition("(")[2], int(tail.split()[1])


def _one_sentence(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


class _GivenUpError(BaseException):
    """Raised in the main thread, through whatever it waits in. No Exception: Ray's own handlers must not catch it."""


class _Watch:
    """Interrupts the main thread with a signal, at most once and only inside the `with` statement."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self._folder = folder
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._verdict = ""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._core: dict[int, str] = {}  # pid -> name
        self._handler: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(SIGNAL, self._on_signal)
            threading.Thread(target=self._run, name="ray-start-watch", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._done.set()
        if self._handler is not None:
            signal.signal(SIGNAL, self._handler)

    def _on_signal(self, *_: object) -> None:
        raise _GivenUpError(self._verdict)

    def _run(self) -> None:
        while not self._done.wait(POLL_EVERY_S):
            if (verdict := self._judge()) is not None:
                with self._lock:
                    if not self._done.is_set():
                        self._verdict = verdict
                        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
                return

    def _judge(self) -> str | None:
        """Why the start has failed; None while it goes on."""
        alive = marked_processes(self._folder)
        for pid in alive:
            with contextlib.suppress(OSError):
                name, parent = name_and_parent(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"))
                # The raylet's children have its name until they become what they should be.
                if name in CORE and parent == os.getpid():
                    self._core[pid] = name
        for pid, name in self._core.items():
            if pid not in alive:
                return f"its process {name} ended"
        if time.monotonic() > self._deadline:
            return f"it was not up within {self._timeout_s:g} s"
        return None
