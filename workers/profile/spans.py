"""Records what event loops and named functions of this process do: for gateways, and for rank 0's threads beside the engine's.

Every callback that an asyncio loop runs becomes one event on its thread, so that all of its time is accounted for; named functions lie
inside. A named coroutine that had to wait gets a row of its own, because others ran in the meantime. Knows no torch.
"""

import asyncio
import contextlib
import functools
import inspect
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from workers.profile.recording import MAX_EVENTS, Recording, TraceEvent, make_recording
from workers.profile.targets import Function, Target, replaced

# (name or the callback it comes from, began_ns, ended_ns, thread id, number of the row for what waited)
_Span = tuple[Any, int, int, int, int | None]


class SpanRecorder:
    """`start`, then `stop`. Of more than `max_spans`, the newest are kept: what it waits for may begin late."""

    def __init__(self, targets: Sequence[Target] = (), *, max_spans: int = MAX_EVENTS) -> None:
        self._targets = targets
        self._spans: deque[_Span] = deque(maxlen=max_spans)
        self._num_spans = 0
        self._turn = 0  # grows with every callback of a loop: a coroutine that sees two has waited
        self._rows = itertools.count()
        self._row_of_task: dict[int, int] = {}
        self._open: dict[int, _Span] = {}  # coroutines that have not returned, as if they ended when they began
        self._began_ns = 0
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """From any thread."""
        self._began_ns = time.time_ns()
        self._stack.enter_context(replaced(self._targets, self.wrap))
        # Private, but in every Python since 3.4, and the only place that all callbacks of a loop pass.
        self._stack.enter_context(replaced([Target(asyncio.Handle, "_run", "")], self._wrap_run))

    def stop(self) -> None:
        """Every function is what it was. What is still waited for ends here. Idempotent."""
        self._stack.close()
        now_ns = time.time_ns()
        still = [(name, began_ns, now_ns, thread, row) for name, began_ns, _, thread, row in self._open.values()]
        self._spans.extend(still)
        self._num_spans += len(still)
        self._open = {}

    def recording(self, *, between: tuple[int, int] | None = None, max_events: int = MAX_EVENTS) -> Recording:
        """What was recorded, after `stop`. between: only what ended after the first and began before the second, in nanoseconds of Unix
        time.
        """
        spans = list(self._spans)
        low, high = between or (0, 2**63)
        num_dropped = self._num_spans - len(spans) if spans and spans[0][2] > low else 0
        spans = [span for span in spans if span[2] >= low and span[1] <= high]
        base_ns = min((span[1] for span in spans), default=self._began_ns)
        return make_recording(
            [event for span in spans for event in _events(span, base_ns)],
            base_ns=base_ns,
            began_ns=max(self._began_ns, low),
            ended_ns=max((span[2] for span in spans), default=base_ns),
            threads={thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id is not None},
            max_events=max_events,
            num_left_out=num_dropped,
        )

    def wrap(self, label: str, function: Function) -> Function:
        """The function, with an event for each of its calls."""
        if inspect.iscoroutinefunction(function):
            return self._wrap_coroutine(label, function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began_ns = time.time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(label, began_ns, time.time_ns(), None)

        return run

    def _wrap_coroutine(self, label: str, function: Function) -> Function:
        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            turn, began_ns, number = self._turn, time.time_ns(), next(self._rows)
            # One row for all of a task: what calls and what is called nest in it.
            row = self._row_of_task.setdefault(id(asyncio.current_task()), number)
            self._open[number] = (label, began_ns, began_ns, threading.get_native_id(), row)
            try:
                return await function(*args, **kwargs)
            finally:
                # Else it was stopped in the meantime.
                if self._open.pop(number, None) is not None:
                    self._add(label, began_ns, time.time_ns(), None if self._turn == turn else row)

        return run

    def _wrap_run(self, _: str, run: Function) -> Function:
        def timed(handle: asyncio.Handle) -> None:
            self._turn += 1
            callback = handle._callback  # type: ignore[attr-defined]
            began_ns = time.time_ns()
            try:
                run(handle)
            finally:
                self._add(callback, began_ns, time.time_ns(), None)

        return timed

    def _add(self, name: Any, began_ns: int, ended_ns: int, row: int | None) -> None:
        self._num_spans += 1
        if callable(name):
            name = callback_name(name)
        self._spans.append((name, began_ns, ended_ns, threading.get_native_id(), row))


def callback_name(callback: Callable[..., object]) -> str:
    """The coroutine's name for a step of a task, else the function's."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return getattr(owner.get_coro(), "__qualname__", None) or "task"
    function = callback.func if isinstance(callback, functools.partial) else callback
    return getattr(function, "__qualname__", None) or type(function).__name__


def _events(span: _Span, base_ns: int) -> list[TraceEvent]:
    name, began_ns, ended_ns, thread, row = span
    began, ended = (began_ns - base_ns) / 1000, (ended_ns - base_ns) / 1000
    if row is None:
        return [TraceEvent(ph="X", name=name, cat="python", pid=0, tid=thread, ts=began, dur=ended - began)]
    shared: dict[str, Any] = {"name": name, "cat": "requests", "pid": 0, "tid": thread, "id": row}
    return [TraceEvent(ph="b", ts=began, **shared), TraceEvent(ph="e", ts=ended, **shared)]
