"""Records engine steps on the ranks and the work of this gateway at the same time, and writes all of it to one file.

Knows when to record whom; how a rank records is `ReplicaRecorder`'s and the rank's business. Whatever fails here is said, and the server
goes on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from cluster.gateway.profile_targets import GATEWAY_TARGETS
from cluster.profile.file import ProfileFile
from cluster.profile.merge import Part
from cluster.protocol.view import ClusterView, ReplicaRecord, ReplicaState
from cluster.replicas.recorder import ReplicaRecorder
from cluster.system.tasks import cancel_all
from workers.errors import TramontaneError
from workers.profile.recording import MAX_EVENTS, Recording
from workers.profile.spans import SpanRecorder

log = logging.getLogger(__name__)

POLL_S = 0.2
# Once one replica has recorded its steps, the others have this long to do so.
OTHERS_S = 5.0
END_TIMEOUT_S = 10.0
MAX_EVENTS_IN_ALL = 1_000_000
MARGIN_NS = 50_000_000  # of the gateway's work before the first step and after the last


class Recorder(Protocol):
    """One replica, see ReplicaRecorder."""

    replica_id: str
    num_ranks: int

    async def start(self) -> None: ...
    async def end(self) -> None: ...
    async def recordings(self, max_events: int) -> dict[int, tuple[Recording, int]]: ...


class Profile:
    """`await start()` once replicas serve; the file is written when their steps are recorded, or by `finish`. `close` at the end.

    view: the cluster's newest view. say: shows a line to the user.
    """

    def __init__(
        self,
        file: ProfileFile,
        view: Callable[[], ClusterView | None],
        *,
        say: Callable[[str], None],
        make_recorder: Callable[[ReplicaRecord, int], Recorder] = ReplicaRecorder,
    ) -> None:
        self._file = file
        self._view = view
        self._say = say
        self._make_recorder = make_recorder
        self._spans = SpanRecorder(GATEWAY_TARGETS)
        self._recorders: dict[tuple[str, str], Recorder] = {}  # by replica id and incarnation
        self._results: dict[asyncio.Task[list[Part]], Recorder] = {}
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """The replicas that are ready record from their next request on, and so does this process. Those that become ready before the
        first one has ended join in.
        """
        self._spans.start()
        await self._start_new()
        self._task = asyncio.create_task(self._run(), name="profile")

    async def finish(self, stop_now: asyncio.Event) -> None:
        """Ends the recording and returns once the file is written, with what there is, or `stop_now` is set. Idempotent."""
        self._ending.set()
        written, hurry = asyncio.create_task(self.written()), asyncio.create_task(stop_now.wait())
        try:
            await asyncio.wait([written, hurry], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(written, hurry)

    async def written(self) -> None:
        """Returns once the file is written, or cannot be."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Abandons what is not written. Idempotent."""
        self._spans.stop()
        tasks = [*self._results, *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        try:
            parts = await self._collect()
            self._spans.stop()
            await asyncio.to_thread(self._write, parts)
        except Exception as e:  # the server must go on, whatever it is
            log.exception("Profiling failed: %s", e)
            self._spans.stop()

    async def _start_new(self) -> None:
        view = self._view()
        ready = () if view is None else [r for r in view.replicas if r.state is ReplicaState.READY]
        new = [r for r in ready if (r.replica_id, r.incarnation) not in self._recorders]
        for record in new:
            recorder = self._make_recorder(record, self._file.num_steps)
            self._recorders[record.replica_id, record.incarnation] = recorder
            try:
                await recorder.start()
            except TramontaneError as e:
                log.warning("Replica %s is not profiled: %s", record.replica_id, e)
            else:
                self._results[asyncio.create_task(self._recorded(recorder))] = recorder

    async def _recorded(self, recorder: Recorder) -> list[Part]:
        num_ranks = sum(other.num_ranks for other in self._recorders.values())
        max_events = min(MAX_EVENTS, MAX_EVENTS_IN_ALL // num_ranks)
        try:
            recordings = await recorder.recordings(max_events)
        except TramontaneError as e:
            log.warning("The profile is without replica %s: %s", recorder.replica_id, e)
            return []
        return [
            Part(process=f"replica {recorder.replica_id} rank {rank}", recording=recording, clock_ahead_ns=ahead)
            for rank, (recording, ahead) in recordings.items()
        ]

    async def _collect(self) -> list[Part]:
        while not self._ending.is_set() and not self._parts():
            await self._start_new()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._ending.wait()
        if not self._ending.is_set():
            await self._wait(OTHERS_S)
        late = [recorder for task, recorder in self._results.items() if not task.done()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                for outcome in await asyncio.gather(*(recorder.end() for recorder in late), return_exceptions=True):
                    if isinstance(outcome, Exception):
                        log.debug("A recording could not be ended: %s", outcome)
        await self._wait(END_TIMEOUT_S)
        return self._parts()

    async def _wait(self, timeout_s: float) -> None:
        if self._results:
            await asyncio.wait(self._results, timeout=timeout_s)

    def _parts(self) -> list[Part]:
        return [part for task in self._results if task.done() for part in task.result()]

    def _write(self, ranks: list[Part]) -> None:
        if not ranks:
            self._say(f"No step was recorded, so {self._file.path} is not written.")
            return
        began_ns = min(part.recording.began_ns - part.clock_ahead_ns for part in ranks) - MARGIN_NS
        ended_ns = max(part.recording.ended_ns - part.clock_ahead_ns for part in ranks) + MARGIN_NS
        gateway = Part(process="gateway", recording=self._spans.recording(between=(began_ns, ended_ns)))
        self._say(self._file.write([gateway, *sorted(ranks, key=lambda part: part.process)]))
