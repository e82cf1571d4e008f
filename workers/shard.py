"""What one Ray actor runs: one rank of a replica, from joining the group to its end.

A plain class without Ray, so that tests and other launchers can drive it. Imports torch late: whoever starts actors imports this
module without it. The phases are join, load, start, called in this order on all ranks at the same time; rank 0 then leads and
serves the socket, the others follow. A rank that breaks ends its process: half a replica must not look alive.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from workers.config import EngineConfig
from workers.engine.loop import EngineLoop
from workers.errors import GroupError, TramontaneError
from workers.protocol import EngineFacts
from workers.stream_server import StreamServer

if TYPE_CHECKING:
    from workers.engine.core import EngineCore
    from workers.engine.model_runner import ModelRunner
    from workers.parallel.group import TensorParallel

log = logging.getLogger(__name__)

BROKEN_EXIT_CODE = 70  # EX_SOFTWARE
LAST_WORDS_S = 0.2  # for `wait` to carry the failure out before the process ends


class Started(NamedTuple):
    """Rank 0's answer to `start`: where the gateway connects, and what start-up learned."""

    host: str
    port: int
    facts: EngineFacts


class ShardWorker:
    """One rank. Methods are called from outside, `progress` and `wait` while another is running.

    incarnation: tells this start of the replica from every other one on the same host. token: the replica's secret, which
    gateways must know. on_broken: what ends the process, replaceable for tests.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        *,
        replica_id: str,
        incarnation: str,
        token: str,
        log_level: str = "WARNING",
        on_broken: Callable[[], None] = lambda: os._exit(BROKEN_EXIT_CODE),
    ) -> None:
        self.config = config
        self.rank = rank
        self.replica_id = replica_id
        self._incarnation = incarnation
        self._token = token
        self._on_broken = on_broken
        self._progress = (0, 0)
        self._tp: TensorParallel | None = None
        self._runner: ModelRunner | None = None
        self._core: EngineCore | None = None
        self._loop: EngineLoop | None = None
        self._server: StreamServer | None = None
        self._follower: threading.Thread | None = None
        self._closing = False
        self._ended = threading.Event()
        self.failure: str | None = None
        logging.basicConfig(format=f"%(levelname)s rank {rank} %(name)s: %(message)s")
        logging.getLogger("workers").setLevel(log_level)

    def address(self, host: str) -> tuple[str, int]:
        """A port of this host for the group's rendezvous; asked of rank 0."""
        with socket.socket() as s:
            s.bind((host, 0))
            return host, s.getsockname()[1]

    def join(self, master_address: str, master_port: int, *, same_host: bool) -> None:
        """Meets the other ranks. Raises GroupError naming those that do not come."""
        from workers.parallel.group import SingleRank
        from workers.parallel.join import join_group

        if self.config.tensor_parallel_size == 1:
            self._tp = SingleRank(self.config.device)
            return
        self._tp = join_group(
            rank=self.rank,
            size=self.config.tensor_parallel_size,
            device=self.config.device,
            replica_id=f"{self.replica_id}-{self._incarnation}",
            master_address=master_address,
            master_port=master_port,
            same_host=same_host,
        )

    def load(self) -> None:
        """Reads this rank's weights. Raises CheckpointError."""
        from workers.engine.build import build_runner

        assert self._tp is not None, "join comes before load"
        self._runner = build_runner(self.config, self._tp, self._set_progress)

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read so far, and in total; (0, 0) before the total is known."""
        return self._progress

    def start(self, host: str = "127.0.0.1") -> Started | None:
        """Allocates the KV cache and goes to work. On rank 0 returns where it serves, elsewhere None. Raises ConfigError."""
        from workers.engine.core import EngineCore
        from workers.engine.follower import run_follower

        assert self._tp is not None and self._runner is not None, "load comes before start"
        self._runner.allocate_kv_cache()
        if self.rank != 0:
            self._follower = threading.Thread(
                target=self._follow, args=(run_follower, self._runner, self._tp), name="follower", daemon=True
            )
            self._follower.start()
            return None
        core = EngineCore(self.config, self._runner, self._tp)
        facts = core.facts(self.replica_id)
        self._core = core
        self._loop = EngineLoop(core, lambda deltas: server.publish(deltas), on_failure=self._break)
        server = self._server = StreamServer(
            facts, self._token, submit=self._loop.submit, abort=self._loop.abort, load=core.load
        )
        bound_host, port = server.start(host)
        self._loop.start()
        return Started(bound_host, port, facts)

    def wait(self) -> str | None:
        """Returns when this rank has ended: None after `close`, else a sentence on what broke."""
        self._ended.wait()
        return self.failure

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the work of this rank; rank 0 sends the others home. Idempotent."""
        self._closing = True
        if self._loop is not None:
            self._loop.stop(timeout_s)
        if self._server is not None:
            self._server.close()
        if self._follower is not None:
            self._follower.join(timeout_s)
        if self._tp is not None:
            self._tp.close()
        self._ended.set()

    def _set_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _follow(
        self,
        run_follower: Callable[["ModelRunner", "TensorParallel"], None],
        runner: "ModelRunner",
        tp: "TensorParallel",
    ) -> None:
        try:
            run_follower(runner, tp)
        except Exception as e:  # whatever it was, this rank can no longer take part
            if not isinstance(e, GroupError):
                log.exception("Rank %s stopped: %s", self.rank, e)
            self._break(e)

    def _break(self, failure: Exception) -> None:
        if self._closing:
            return
        sentence = str(failure) if isinstance(failure, TramontaneError) else f"{type(failure).__name__}: {failure}"
        self.failure = f"Rank {self.rank} of replica {self.replica_id} stopped: {sentence}"
        log.error("%s", self.failure)
        if self._server is not None:
            self._server.close(2.0)  # the last deltas go out, and the gateway learns at once
        self._ended.set()
        time.sleep(LAST_WORDS_S)
        self._on_broken()
