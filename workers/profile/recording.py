"""What one process recorded, on its way to the file that joins all of them: events in Chrome's trace format.

Knows the format; no torch, and nothing of who records what.
Source: Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

# Of one process. The earliest are kept: a file that a browser cannot open helps no one.
MAX_EVENTS = 150_000
NO_EVENTS = zlib.compress(b"[]")
_encoder = msgspec.json.Encoder()


class TraceEvent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Chrome's fields. ph: "X" complete, "b" and "e" the ends of an asynchronous one, "s" and "f" the ends of an arrow, "M" a name.

    ts, dur: microseconds.
    """

    ph: str
    name: str = ""
    cat: str | None = None
    ts: float | None = None
    dur: float | None = None
    pid: int | str | None = None
    tid: int | str | None = None
    id: int | str | None = None
    bp: str | None = None
    args: dict[str, Any] | None = None


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """The events of one process.

    events: a JSON array of TraceEvents, compressed with zlib. `ts` counts from `base_ns`, nanoseconds of Unix time. `pid` is an index of
    `lanes`: "" for the process itself, "GPU 0" for what its GPU computed.
    began_ns, ended_ns: Unix time on the clock of that machine.
    num_steps: engine steps in it. num_left_out: events beyond the limit.
    """

    base_ns: int
    began_ns: int
    ended_ns: int
    events: bytes
    lanes: tuple[str, ...] = ("",)
    num_steps: int = 0
    num_left_out: int = 0

    def decoded(self) -> list[TraceEvent]:
        return msgspec.json.decode(zlib.decompress(self.events), type=list[TraceEvent])


def make_recording(
    events: Sequence[TraceEvent],
    *,
    base_ns: int,
    began_ns: int,
    ended_ns: int,
    threads: Mapping[int, str],
    lanes: tuple[str, ...] = ("",),
    num_steps: int = 0,
    max_events: int = MAX_EVENTS,
    num_left_out: int = 0,
) -> Recording:
    """Keeps the `max_events` events that began first. threads: thread id -> name, of the process itself. num_left_out: before this."""
    kept = sorted(events, key=lambda event: event.ts or 0.0)[:max_events]
    names = [
        TraceEvent(ph="M", name="thread_name", pid=0, tid=tid, args={"name": name}) for tid, name in threads.items()
    ]
    return Recording(
        base_ns=base_ns,
        began_ns=began_ns,
        ended_ns=ended_ns,
        # Level 1: a third of the time of the default, for a tenth more bytes.
        events=zlib.compress(_encoder.encode([*names, *kept]), 1),
        lanes=lanes,
        num_steps=num_steps,
        num_left_out=num_left_out + len(events) - len(kept),
    )
