"""Records the next steps of an engine on all of its ranks, between two steps of the engine thread.

`ProfiledCore` stands in for the core of rank 0 while it records, and decides when that begins and ends; the other ranks hear of it
where they hear of batches, so that all of them record the same steps.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from workers.engine.batch import profile_message
from workers.engine.core import EngineCore
from workers.errors import EngineError
from workers.profile.engine_targets import lead_targets
from workers.profile.recording import MAX_EVENTS, NO_EVENTS, Recording
from workers.profile.targets import Target
from workers.profile.torch_recorder import TorchRecorder
from workers.protocol import CacheEvents, GenerateRequest, TokenDelta

log = logging.getLogger(__name__)

# Without work for this long, a recording that has begun ends, so that a few short requests are enough for a file.
IDLE_ENDS_S = 3.0


class Steps:
    """One rank's recording. `begin` and `end` on the thread that computes; the other methods on any other one.

    A recorder that fails is logged, and the engine goes on.
    """

    def __init__(self, recorder: TorchRecorder) -> None:
        self.is_recording = False
        self._recorder = recorder
        self._has_begun = False
        self._num_steps = 0
        self._failure: Exception | None = None
        self._ended = threading.Event()

    def prepare(self) -> None:
        """Makes torch load its profiler, so that no step waits for that."""
        self._guard(self._recorder.prepare)

    def begin(self) -> None:
        self._guard(self._recorder.start)
        self.is_recording = self._has_begun = True

    def end(self, *, num_steps: int = 0) -> None:
        """num_steps: how many were recorded, where that is known. Idempotent."""
        if self.is_recording:
            self.is_recording = False
            self._num_steps = num_steps
            self._guard(self._recorder.stop)
        self._ended.set()

    def follow(self, begins: bool) -> None:
        """What rank 0 tells the others. An end without a beginning is the end of an older recording."""
        if begins:
            self.begin()
        elif self.is_recording:
            self.end()

    def recording(self, timeout_s: float, *, max_events: int = MAX_EVENTS) -> Recording | None:
        """What was recorded; None while it has not ended, after `timeout_s`. Without a step it has no events. Raises EngineError."""
        if not self._ended.wait(timeout_s):
            return None
        if self._failure is not None:
            raise EngineError(f"This rank could not be profiled: {self._failure!r}.")
        if not self._has_begun:
            return Recording(base_ns=0, began_ns=0, ended_ns=0, events=NO_EVENTS)
        return self._recorder.recording(num_steps=self._num_steps, max_events=max_events)

    def _guard(self, work: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                work()
            except Exception as e:  # whatever it is, requests must not notice
                log.exception("Profiling failed: %s", e)
                self._failure = e


class ProfiledCore:
    """The core of rank 0, recording: see `workers.engine.loop.Core`. All methods on the engine thread.

    Recording begins with the first step and ends after `num_steps` of them, once there has been no work for IDLE_ENDS_S, or with `end`.
    on_end: called once then; the core itself goes on as before.
    """

    def __init__(
        self,
        core: EngineCore,
        steps: Steps,
        *,
        num_steps: int,
        on_end: Callable[[], None] = lambda: None,
        idle_ends_s: float = IDLE_ENDS_S,
    ) -> None:
        self.core = core
        self.steps = steps
        self._num_left = num_steps
        self._num_steps = 0
        self._on_end = on_end
        self._idle_ends_s = idle_ends_s
        self._last_step = 0.0
        self._has_ended = False

    def add_request(self, request: GenerateRequest) -> None:
        self.core.add_request(request)

    def abort(self, request_id: str) -> None:
        self.core.abort(request_id)

    def has_work(self) -> bool:
        return self.core.has_work()

    def take_cache_events(self) -> CacheEvents | None:
        return self.core.take_cache_events()

    def step(self) -> list[TokenDelta]:
        if not self.steps.is_recording and not self._has_ended:
            self.core.tp.broadcast(profile_message(begins=True))
            self.steps.begin()
        # With overlap, a call ends the step before its own; while grammars compile, it ends none.
        num_before = self.core.clock.num_steps_total
        deltas = self.core.step()
        self._num_steps += self.core.clock.num_steps_total - num_before
        self._last_step = time.monotonic()
        if self._num_steps >= self._num_left:
            self.end()
        return deltas

    def heartbeat(self) -> None:
        self.core.heartbeat()
        if self.steps.is_recording and time.monotonic() - self._last_step > self._idle_ends_s:
            self.end()

    def shutdown(self) -> None:
        self.end()
        self.core.shutdown()

    def end(self) -> None:
        """Ends the recording on all ranks, also one that has not begun. Idempotent."""
        if self._has_ended:
            return
        self._has_ended = True
        if self.steps.is_recording:
            self.core.tp.broadcast(profile_message(begins=False))
        self.steps.end(num_steps=self._num_steps)
        self._on_end()

    def finish(self) -> Recording:
        """`end`, and what was recorded. Raises EngineError if it failed."""
        self.end()
        recording = self.steps.recording(0.0)
        assert recording is not None, "it has ended"
        return recording


def profile_core(core: EngineCore, *, num_steps: int, also: Sequence[Target] = ()) -> ProfiledCore:
    """For an engine in this process: run requests on what this returns, then call `finish`. also: more functions of this thread."""
    steps = Steps(TorchRecorder(core.tp.device, [*lead_targets(core), *also]))
    steps.prepare()
    return ProfiledCore(core, steps, num_steps=num_steps)
