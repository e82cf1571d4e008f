"""Records what torch computes on one rank, with torch.profiler: operators, kernels of the GPU, and ranges around named functions.

Knows how torch writes its traces and which parts of them this project keeps. Knows no steps and no other rank.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from workers.profile.recording import MAX_EVENTS, Recording, TraceEvent, make_recording
from workers.profile.spans import SpanRecorder
from workers.profile.targets import Function, Target, replaced

KINETO_SILENT = 99  # above every level
# Said where a profile begins on another thread than the one that imported torch. It concerns profiles that another program starts.
WRONG_THREAD = b"External init callback must run in same thread"
# Of what a kernel's event says, the part that a reader of a timeline uses. What operators say is left out: it is half of the file.
KEPT_ARGS = ("stream", "grid", "block", "registers per thread", "shared memory", "bytes", "memory bandwidth (GB/s)")


class _TorchTrace(msgspec.Struct):
    """The part of torch's file that is read. Times are microseconds from `baseTimeNanoseconds`, nanoseconds of Unix time."""

    traceEvents: list[TraceEvent]  # noqa: N815  # torch's name
    baseTimeNanoseconds: int = 0  # noqa: N815


class TorchRecorder:
    """`start` and `stop` on the thread that computes, then `recording` on any. torch allows one at a time in a process.

    targets: the functions of that thread to name. spans: records the other threads meanwhile.
    """

    def __init__(self, device: torch.device, targets: Sequence[Target], *, spans: SpanRecorder | None = None) -> None:
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(activities=self._activities)
        self._targets = targets
        self._spans = spans
        self._thread: tuple[int, str] = (0, "")
        self._began_ns = self._ended_ns = 0
        self._stack = contextlib.ExitStack()

    def prepare(self) -> None:
        """The first profile of a process takes seconds to begin. This is one, of nothing."""
        # It reads this when it begins for the first time. Without, it writes to stderr that it does.
        os.environ.setdefault("KINETO_LOG_LEVEL", str(KINETO_SILENT))
        with _stderr_without(WRONG_THREAD), profile(activities=self._activities):
            pass

    def start(self) -> None:
        thread = threading.current_thread()
        self._thread = (threading.get_native_id(), thread.name)
        self._began_ns = time.time_ns()
        with contextlib.ExitStack() as stack:
            self._profile.start()
            stack.enter_context(replaced(self._targets, _with_range))
            if self._spans is not None:
                self._spans.start()
                stack.callback(self._spans.stop)
            # Only now: what fails half-way leaves every function as it was.
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Waits for what the GPU still computes. Every function is what it was."""
        self._ended_ns = time.time_ns()
        self._stack.close()
        self._profile.stop()

    def recording(self, *, num_steps: int, max_events: int = MAX_EVENTS) -> Recording:
        """What was recorded, after `stop`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = msgspec.json.decode(path.read_bytes(), type=_TorchTrace)
        lanes: dict[int, str] = {}
        events = [event for event in trace.traceEvents if _keep(event, lanes)]
        threads = dict([self._thread])
        if self._spans is not None:
            others = self._spans.recording()
            shift = (others.base_ns - trace.baseTimeNanoseconds) / 1000
            for event in others.decoded():
                if event.ph == "M":
                    threads.setdefault(int(event.tid or 0), str((event.args or {})["name"]))
                elif event.tid != self._thread[0]:
                    event.ts = (event.ts or 0.0) + shift
                    events.append(event)
        return make_recording(
            events,
            base_ns=trace.baseTimeNanoseconds,
            began_ns=self._began_ns,
            ended_ns=self._ended_ns,
            threads=threads,
            lanes=("", *lanes.values()),
            num_steps=num_steps,
            max_events=max_events,
        )


@contextlib.contextmanager
def _stderr_without(words: bytes) -> Iterator[None]:
    """Lines with these words do not reach stderr; all others do, at the end of the block."""
    with tempfile.TemporaryFile() as kept:
        original = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(original, 2)
            kept.seek(0)
            os.write(original, b"".join(line for line in kept if words not in line))
            os.close(original)


def _with_range(label: str, function: Function) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return run


def _keep(event: TraceEvent, lanes: dict[int, str]) -> bool:
    """Whether the event goes into the recording; changes it to the recording's form. lanes: the GPUs seen so far, by their numbers."""
    if event.ph not in ("X", "s", "f") or not isinstance(event.pid, int) or event.cat == "Trace":
        return False
    if event.pid == os.getpid():
        event.pid, event.args = 0, None
        return True
    lanes.setdefault(event.pid, f"GPU {event.pid}")
    event.pid = 1 + list(lanes).index(event.pid)
    if event.args is not None:
        event.args = {name: event.args[name] for name in KEPT_ARGS if name in event.args}
    return True
