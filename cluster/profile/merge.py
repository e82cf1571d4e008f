"""Joins the recordings of several processes into one Chrome trace. Pure: values in, bytes out.

Source: Trace Event Format, see `workers.profile.recording`.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from workers.profile.recording import Recording, TraceEvent


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process recorded. clock_ahead_ns: by how much its clock is ahead of the clock that the trace shows."""

    process: str
    recording: Recording
    clock_ahead_ns: int = 0


def merge(parts: Sequence[Part], *, compress: bool = False) -> bytes:
    """One JSON object with the events of all parts on one clock. Processes are numbered from 1, in the order of `parts`.

    `otherData` says what was recorded. `baseTimeNanoseconds` is the Unix time from which `ts` counts.
    """
    # Not the earliest of their own: torch's begin months ago, and numbers that large are hard to read.
    began = [part.recording.began_ns - part.clock_ahead_ns for part in parts if part.recording.began_ns]
    base_ns = min(began, default=0)
    events: list[TraceEvent] = []
    pid = 0
    for number, part in enumerate(parts):
        recording = part.recording
        shift_us = (recording.base_ns - part.clock_ahead_ns - base_ns) / 1000
        for event in recording.decoded():
            event.pid = 1 + pid + int(event.pid or 0)
            if event.ts is not None:
                # Nanoseconds; more digits are noise of the addition.
                event.ts = round(event.ts + shift_us, 3)
            if event.id is not None:
                # Numbers of one process mean nothing in another.
                event.id = f"{number}.{event.id}"
            events.append(event)
        for lane in recording.lanes:
            pid += 1
            events += _names(pid, f"{part.process} {lane}".strip())
    trace: dict[str, Any] = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base_ns,
        "otherData": {
            "steps": {part.process: part.recording.num_steps for part in parts if part.recording.num_steps},
            "events left out": {part.process: part.recording.num_left_out for part in parts},
        },
    }
    data = msgspec.json.encode(trace)
    return gzip.compress(data, compresslevel=3, mtime=0) if compress else data


def _names(pid: int, process: str) -> list[TraceEvent]:
    """The process's name, and its place in the order of processes."""
    return [
        TraceEvent(ph="M", name="process_name", pid=pid, tid=0, args={"name": process}),
        TraceEvent(ph="M", name="process_sort_index", pid=pid, tid=0, args={"sort_index": pid}),
    ]
