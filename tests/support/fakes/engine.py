"""A fake core behind the real loop and the real stream server, wired as workers.rank.worker does it: a replica without a model."""

from support.fakes.core import FACTS, FakeCore
from workers.engine.loop import EngineLoop
from workers.protocol import EngineFacts
from workers.rank.server import StreamServer

TOKEN = "the replica's secret"


class FakeEngine:
    """Listens from the start at `address`. `orphaned`: what the server said when nobody came any more."""

    def __init__(self, facts: EngineFacts = FACTS, *, port: int = 0) -> None:
        self.orphaned: list[str] = []
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
            submit=self.loop.submit,
            abort=self.loop.abort,
            load=self.core.load,
            on_orphaned=self.orphaned.append,
        )
        self.address = self.server.start(port=port)
        self.loop.start()

    def close(self) -> None:
        self.core.gate.set()
        assert self.loop.stop()
        self.server.close()
