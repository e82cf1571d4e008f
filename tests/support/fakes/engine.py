"""A replica without a model: a fake core with the real loop and the real stream server, wired as in workers.rank.worker."""

from support.fakes.core import FACTS, FakeCore
from workers.engine.loop import EngineLoop
from workers.protocol import EngineFacts, GenerateRequest
from workers.rank.server import StreamServer

TOKEN = "the replica's secret"


class FakeEngine:
    """Listens from the start at `address`. `orphaned`: the server's reasons when no client connected any more."""

    def __init__(self, facts: EngineFacts = FACTS, *, port: int = 0) -> None:
        self.orphaned: list[str] = []
        self.submitted: list[str] = []
        self.core = FakeCore()
        self.loop = EngineLoop(
            self.core,
            lambda deltas, events: self.server.publish(deltas, events),
            on_failure=lambda e: self.server.close(reason=str(e)),
            idle_heartbeat_s=0.05,
        )
        self.server = StreamServer(
            facts,
            TOKEN,
            submit=self._submit,
            abort=self.loop.abort,
            load=self.core.load,
            on_orphaned=self.orphaned.append,
        )
        self.address = self.server.start(port=port)
        self.loop.start()

    def _submit(self, request: GenerateRequest) -> None:
        self.loop.submit(request)
        self.submitted.append(request.request_id)

    def close(self) -> None:
        self.core.gate.set()
        assert self.loop.stop()
        self.server.close()
