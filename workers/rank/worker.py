"""What one Ray actor runs: one rank of a replica, from joining the group to its end.

A plain class without Ray, so that tests and other launchers can drive it. Imports torch late: whoever starts actors imports this
module without it. The phases are join, load, start, called in this order on all ranks at the same time; rank 0 then leads and
serves the socket, the others follow. A rank that breaks, or learns over the lifeline that another did, ends its process: half a
replica must not look alive.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from workers.config import EngineConfig
from workers.engine.loop import EngineLoop
from workers.errors import GroupError, TramontaneError
from workers.protocol import EngineFacts
from workers.rank.lifeline import DIED, Lifeline
from workers.rank.server import StreamServer

if TYPE_CHECKING:
    from workers.engine.core import EngineCore
    from workers.engine.model_runner import ModelRunner
    from workers.parallel.group import TensorParallel
    from workers.parallel.timed import TimedGroup

log = logging.getLogger(__name__)

BROKEN_EXIT_CODE = 70  # EX_SOFTWARE
LAST_WORDS_S = 0.2  # for `wait` to carry the failure out before the process ends
ECHO_S = 0.3  # a failing collective is most likely the echo of a lost rank, which the lifeline names within this time


class Rendezvous(NamedTuple):
    """Rank 0's answer to `address`, and what `join` is called with on all ranks."""

    host: str
    port: int
    lifeline_port: int


class Started(NamedTuple):
    """Rank 0's answer to `start`: where the gateway connects, and what start-up learned."""

    host: str
    port: int
    facts: EngineFacts


class ShardWorker:
    """One rank. Methods are called from outside, `progress`, `stats`, `describe` and `wait` while another is running.

    incarnation: tells this start of the replica from every other one on the same host. token: the replica's secret, which
    gateways and the other ranks must know. on_broken: what ends the process, replaceable for tests.
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
        self.phase = "joining"
        self.failure: str | None = None
        self._incarnation = incarnation
        self._token = token
        self._on_broken = on_broken
        self._progress = (0, 0)
        self._num_steps_total = 0
        self._step_s_total = 0.0
        self._tp: TensorParallel | None = None
        self._timed: TimedGroup | None = None  # the same group, where there is more than one rank
        self._runner: ModelRunner | None = None
        self._core: EngineCore | None = None
        self._loop: EngineLoop | None = None
        self._server: StreamServer | None = None
        self._started: Started | None = None
        self._follower: threading.Thread | None = None
        self._closing = False
        self._breaking = threading.Event()
        self._break_lock = threading.Lock()
        self._ended = threading.Event()
        self._lifeline = Lifeline(rank, token=token, on_lost=self._lost, on_failed=self._break)
        logging.basicConfig(format=f"%(levelname)s rank {rank} %(name)s: %(message)s")
        logging.getLogger("workers").setLevel(log_level)

    def __repr__(self) -> str:
        # Ray's dashboard and logs show what this is when the actor is made and never ask again: the phase cannot be part of it.
        return f"Rank({self.replica_id}/{self.rank})"

    def address(self, host: str) -> Rendezvous:
        """Ports of this host for the group's rendezvous and its lifeline, which listens from now on; asked of rank 0."""
        lifeline_port = self._lifeline.listen(host) if self.config.tensor_parallel_size > 1 else 0
        with socket.socket() as s:
            s.bind((host, 0))
            return Rendezvous(host, s.getsockname()[1], lifeline_port)

    def join(self, host: str, port: int, lifeline_port: int, *, same_host: bool) -> None:
        """Meets the other ranks at rank 0's Rendezvous. Raises GroupError naming those that do not come."""
        if self.rank != 0:
            self._lifeline.connect((host, lifeline_port))  # before torch is imported: who dies from here on is named
        from workers.parallel.group import SingleRank
        from workers.parallel.join import join_group
        from workers.parallel.timed import TimedGroup

        if self.config.tensor_parallel_size == 1:
            self._tp = SingleRank(self.config.device)
            return
        group = join_group(
            rank=self.rank,
            size=self.config.tensor_parallel_size,
            device=self.config.device,
            replica_id=f"{self.replica_id}-{self._incarnation}",
            master_address=host,
            master_port=port,
            same_host=same_host,
        )
        self._tp = self._timed = TimedGroup(group)

    def load(self) -> None:
        """Reads this rank's weights. Raises CheckpointError."""
        from workers.engine.build import build_runner

        assert self._tp is not None, "join comes before load"
        self.phase = "loading"
        self._runner = build_runner(self.config, self._tp, self._set_progress)

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read so far, and in total; (0, 0) before the total is known."""
        return self._progress

    def start(self, host: str = "127.0.0.1") -> Started | None:
        """Allocates the KV cache and goes to work. On rank 0 returns where it serves, elsewhere None. Raises ConfigError."""
        assert self._tp is not None and self._runner is not None, "load comes before start"
        self.phase = "starting"
        self._runner.allocate_kv_cache()
        if self.rank == 0:
            self._started = self._lead(host, self._runner, self._tp)
        else:
            self._follower = threading.Thread(
                target=self._follow, args=(self._runner, self._tp), name="follower", daemon=True
            )
            self._follower.start()
        self._lifeline.expect_prompt()
        self.phase = "serving"
        return self._started

    def stats(self) -> dict[str, float | int | None]:
        """This rank's own counters, under the names of `cluster.protocol.view.RankStats`."""
        core, timed = self._core, self._timed
        return {
            "num_steps_total": self._num_steps_total if core is None else core.num_steps_total,
            "step_s_total": self._step_s_total if core is None else core.step_s_total,
            "num_all_reduces_total": 0 if timed is None else timed.num_all_reduces_total,
            "all_reduce_s_total": 0.0 if timed is None else timed.all_reduce_s_total,
        }

    def describe(self) -> dict[str, Any]:
        """Who and where this rank is; on a serving rank 0 also all that it takes to connect to the replica."""
        started = self._started
        return {
            "replica_id": self.replica_id,
            "incarnation": self._incarnation,
            "rank": self.rank,
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "phase": self.phase,
            "address": None if started is None else (started.host, started.port),
            "token": None if started is None else self._token,
            "facts": None if started is None else started.facts,
        }

    def wait(self) -> str | None:
        """Returns when this rank has ended: None after `close`, else a sentence on what broke. May be called in any phase."""
        self._ended.wait()
        return self.failure

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the work of this rank; rank 0 sends the others home. Idempotent."""
        self._closing = True
        if self._loop is not None:
            self._loop.stop(timeout_s)
        if self._server is not None:
            self._server.close(reason=f"Replica {self.replica_id} was stopped.", crashed=False)
        if self._follower is not None:
            self._follower.join(timeout_s)
        self._lifeline.close()
        if self._tp is not None:
            self._tp.close()
        self.phase = "ended"
        self._ended.set()

    def _set_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _lead(self, host: str, runner: "ModelRunner", tp: "TensorParallel") -> Started:
        from workers.engine.core import EngineCore

        core = self._core = EngineCore(self.config, runner, tp)
        facts = core.facts(self.replica_id)
        loop = self._loop = EngineLoop(
            core, lambda deltas, events: server.publish(deltas, events), on_failure=self._engine_failed
        )
        server = self._server = StreamServer(
            facts, self._token, submit=loop.submit, abort=loop.abort, load=core.load, on_orphaned=self._orphaned
        )
        bound_host, port = server.start(host)
        loop.start()
        return Started(bound_host, port, facts)

    def _follow(self, runner: "ModelRunner", tp: "TensorParallel") -> None:
        from workers.engine.follower import run_follower

        try:
            run_follower(runner, tp, self._count_step)
        except Exception as e:  # whatever it was, this rank can no longer take part
            if not isinstance(e, GroupError):
                log.exception("Rank %s stopped: %s", self.rank, e)
            self._engine_failed(e)

    def _count_step(self, seconds: float) -> None:
        self._num_steps_total += 1
        self._step_s_total += seconds

    def _lost(self, rank: int, how: str) -> None:
        self._break(f"Replica {self.replica_id} lost rank {rank}: {how}.", crashed=how == DIED)

    def _orphaned(self, why: str) -> None:
        # Not on the server's own thread, which `_break` waits for.
        sentence = f"Replica {self.replica_id} ended itself: {why}."
        threading.Thread(target=self._break, args=(sentence, False), name="orphaned", daemon=True).start()

    def _engine_failed(self, failure: Exception) -> None:
        if isinstance(failure, GroupError) and self._breaking.wait(ECHO_S):
            return  # somebody with better knowledge is ending this rank already
        sentence = str(failure) if isinstance(failure, TramontaneError) else f"{type(failure).__name__}: {failure}"
        self._break(f"Rank {self.rank} of replica {self.replica_id} stopped: {sentence}")

    def _break(self, sentence: str, crashed: bool = True) -> None:
        """Says why to the other ranks, to the gateways and to `wait`, then ends the process. The first reason counts.

        crashed: see Ending.
        """
        with self._break_lock:
            if self._closing or self._breaking.is_set():
                return
            self.failure = sentence
            self._breaking.set()
        log.error("%s", sentence)
        self._lifeline.close(sentence)
        if self._server is not None:
            self._server.close(reason=sentence, crashed=crashed)
        self.phase = "ended"
        self._ended.set()
        time.sleep(LAST_WORDS_S)
        self._on_broken()
