"""One rank's profile between the calls of the replica's owner and the thread that computes. Imports torch late."""

import threading
from typing import TYPE_CHECKING

from workers.engine.loop import Core, EngineLoop
from workers.profile.recording import Recording
from workers.profile.spans import SpanRecorder
from workers.profile.targets import Target
from workers.rank.server import StreamServer

if TYPE_CHECKING:
    from workers.engine.core import EngineCore
    from workers.engine.execution.model_runner import ModelRunner
    from workers.parallel.group import TensorParallel
    from workers.profile.steps import Steps

END_TIMEOUT_S = 10.0


def server_targets(server: StreamServer | None) -> list[Target]:
    """Of the thread that reads the socket. Under Ray its event loop is uvloop's, which shows nothing of its callbacks."""
    names = {"_submit": "submit", "_abort": "abort", "_report": "load report"}
    return [] if server is None else [Target(server, name, label) for name, label in names.items()]


class RankProfile:
    """`serve` once, then, as often as wanted, `prepare` on every rank, `record` on rank 0, and `recording` on every rank."""

    def __init__(self) -> None:
        self._runner: ModelRunner | None = None
        self._tp: TensorParallel | None = None
        self._core: EngineCore | None = None
        self._loop: EngineLoop | None = None
        self._server: StreamServer | None = None
        self._steps: Steps | None = None

    def serve(
        self,
        runner: "ModelRunner",
        tp: "TensorParallel",
        *,
        core: "EngineCore | None",
        loop: EngineLoop | None,
        server: StreamServer | None,
    ) -> None:
        """What there is to record. core, loop, server: of rank 0."""
        self._runner, self._tp, self._core, self._loop, self._server = runner, tp, core, loop, server

    def prepare(self) -> None:
        """Gets ready to record. What was recorded before is forgotten."""
        from workers.profile.engine_targets import follower_targets, lead_targets, loop_targets
        from workers.profile.steps import Steps
        from workers.profile.torch_recorder import TorchRecorder

        assert self._runner is not None and self._tp is not None, "serve comes first"
        if self._core is None or self._loop is None:
            recorder = TorchRecorder(self._tp.device, follower_targets(self._runner, self._tp))
        else:
            targets = [*lead_targets(self._core), *loop_targets(self._loop)]
            recorder = TorchRecorder(self._tp.device, targets, spans=SpanRecorder(server_targets(self._server)))
        steps = Steps(recorder)
        steps.prepare()
        self._steps = steps

    def record(self, num_steps: int) -> None:
        """Records the next steps with requests, on all ranks. Returns at once. On rank 0 only."""
        from workers.profile.steps import ProfiledCore

        core, loop, steps = self._core, self._loop, self._steps
        assert core is not None and loop is not None, "rank 0 leads"
        assert steps is not None, "prepare comes first"

        def stand_in() -> Core:
            return ProfiledCore(core, steps, num_steps=num_steps, on_end=lambda: loop.use(lambda: core))

        loop.use(stand_in)

    def end(self) -> None:
        """Ends the recording on all ranks, whatever it has; returns when it has ended. Nothing if there is none. On rank 0 only."""
        from workers.profile.steps import ProfiledCore

        core, loop, done = self._core, self._loop, threading.Event()
        assert core is not None and loop is not None, "rank 0 leads"

        def end() -> Core:
            if isinstance(loop.core, ProfiledCore):
                loop.core.end()
            done.set()
            return core

        loop.use(end)
        done.wait(END_TIMEOUT_S)

    def follow(self, begins: bool) -> None:
        """What rank 0 says, on the thread of a follower."""
        if self._steps is not None:
            self._steps.follow(begins)

    def recording(self, timeout_s: float, max_events: int) -> Recording | None:
        """What this rank recorded; None while that has not ended after `timeout_s`. Raises EngineError if it failed."""
        assert self._steps is not None, "prepare comes first"
        return self._steps.recording(timeout_s, max_events=max_events)
