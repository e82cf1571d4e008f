"""One rank's profile between the calls of the replica's owner and the thread that computes. Imports torch late."""

import threading
from typing import TYPE_CHECKING

from workers.engine.loop import Core, EngineLoop
from workers.profile.recording import Recording
from workers.profile.spans import SpanRecorder

if TYPE_CHECKING:
    from workers.engine.core import EngineCore
    from workers.engine.model_runner import ModelRunner
    from workers.parallel.group import TensorParallel
    from workers.profile.steps import Steps

END_TIMEOUT_S = 10.0


class RankProfile:
    """`prepare` on every rank, then `lead` on rank 0, then `recording` on every rank. Each `prepare` forgets what was recorded before."""

    def __init__(self) -> None:
        self._steps: Steps | None = None

    def prepare(self, runner: "ModelRunner", tp: "TensorParallel", core: "EngineCore | None") -> None:
        """core: of rank 0."""
        from workers.profile.engine_targets import follower_targets, lead_targets
        from workers.profile.steps import Steps
        from workers.profile.torch_recorder import TorchRecorder

        if core is None:
            recorder = TorchRecorder(tp.device, follower_targets(runner, tp))
        else:
            recorder = TorchRecorder(tp.device, lead_targets(core), spans=SpanRecorder())
        steps = Steps(recorder)
        steps.prepare()
        self._steps = steps

    def lead(self, core: "EngineCore", loop: EngineLoop, *, num_steps: int) -> None:
        """Records the next steps, on all ranks. Returns at once."""
        from workers.profile.steps import ProfiledCore

        steps = self._prepared()

        def stand_in() -> Core:
            return ProfiledCore(core, steps, num_steps=num_steps, on_end=lambda: loop.use(lambda: core))

        loop.use(stand_in)

    def end(self, core: "EngineCore", loop: EngineLoop) -> None:
        """Ends the recording on all ranks, whatever it has. Returns when it has ended, and at once where there is none."""
        from workers.profile.steps import ProfiledCore

        done = threading.Event()

        def end() -> Core:
            if isinstance(loop.core, ProfiledCore):
                loop.core.end()
            done.set()
            return core

        loop.use(end)
        done.wait(END_TIMEOUT_S)

    def follow(self, begins: bool) -> None:
        """On the thread of a follower: what rank 0 says."""
        self._prepared().follow(begins)

    def recording(self, timeout_s: float, max_events: int) -> Recording | None:
        """See `Steps.recording`."""
        return self._prepared().recording(timeout_s, max_events=max_events)

    def _prepared(self) -> "Steps":
        assert self._steps is not None, "prepare comes first"
        return self._steps
