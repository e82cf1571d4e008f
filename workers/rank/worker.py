"""What one Ray actor runs: one rank of a replica, from joining the group to its end.

A plain class without Ray, so that tests and other launchers can drive it. Imports torch late: the process that starts actors imports
this module without it. The phases are join, load, start, called in this order on all ranks at the same time. Then rank 0 leads and
serves the socket, and the others follow. A rank that breaks, or learns over the lifeline that another did, ends its process: half a
replica must not look alive.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from workers.config import EngineConfig
from workers.device.memory import read_memory
from workers.device.probe import CudaDevice
from workers.device.require import find_gpu, try_gpu
from workers.device.sensors import Sensors, open_sensors
from workers.device.sizes import sized_for
from workers.engine.loop import EngineLoop
from workers.errors import ConfigError, GroupError, TramontaneError
from workers.native.openmp import bound_spinning
from workers.rank.lifeline import DIED, Lifeline
from workers.rank.primitive_caches import bound_primitive_caches
from workers.rank.profile import RankProfile
from workers.rank.reports import LoadProgress, RankDescription, RankEnd, RankStats, Rendezvous, Started
from workers.rank.room import check_room
from workers.rank.server import StreamServer
from workers.tracing.engine_spans import EngineSpans
from workers.tracing.log import TraceFormatter
from workers.tracing.settings import TracingConfig
from workers.tracing.tracer import Tracer

if TYPE_CHECKING:
    from workers.engine.core import EngineCore
    from workers.engine.execution.model_runner import ModelRunner
    from workers.lora.rank_adapters import RankAdapters
    from workers.parallel.group import TensorParallel
    from workers.parallel.timed import TimedGroup

log = logging.getLogger(__name__)

BROKEN_EXIT_CODE = 70  # EX_SOFTWARE
LAST_WORDS_S = 0.2  # for `wait` to report the failure before the process ends
ECHO_S = (
    0.3  # a failing collective is most likely a consequence of a lost rank, which the lifeline names within this time
)


class RankWorker:
    """One rank. Others call its methods; `progress`, `stats`, `describe`, `wait` and `has_ended` also while another call runs.

    incarnation: distinguishes this start of the replica from every other one on the same host. token: the replica's secret, which
    gateways and the other ranks must know. on_broken: ends the process; replaceable for tests. tracing: where rank 0 sends the spans of
    requests; None: it makes none.
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
        tracing: TracingConfig | None = None,
        on_broken: Callable[[], None] = lambda: os._exit(BROKEN_EXIT_CODE),
    ) -> None:
        self.config = config
        self.rank = rank
        self.replica_id = replica_id
        self.phase = "joining"
        self.failure: str | None = None
        self.profile = RankProfile()
        self._incarnation = incarnation
        self._token = token
        self._on_broken = on_broken
        self._tracing = tracing
        self._tracer: Tracer | None = None
        self._progress = LoadProgress()
        self._num_steps_total = 0
        self._step_s_total = 0.0
        self._num_ranks_here = 1
        self._gpu: CudaDevice | None = None
        self._sensors: Sensors | None = None
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
        handler = logging.StreamHandler()
        handler.setFormatter(TraceFormatter(f"%(levelname)s rank {rank} %(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("workers").setLevel(log_level)

    def __repr__(self) -> str:
        # Ray's dashboard and logs read this once, when the actor is made: the phase cannot be part of it.
        return f"Rank({self.replica_id}/{self.rank})"

    def address(self, host: str) -> Rendezvous:
        """Ports of this host for the group's rendezvous and its lifeline, which listens from now on. Called on rank 0 only."""
        lifeline_port = self._lifeline.listen(host) if self.config.tensor_parallel_size > 1 else 0
        with socket.socket() as s:
            s.bind((host, 0))
            return Rendezvous(host=host, port=s.getsockname()[1], lifeline_port=lifeline_port)

    def join(self, at: Rendezvous, *, same_host: bool) -> None:
        """Meets the other ranks at rank 0's rendezvous. Raises GroupError naming the ranks that do not come, ConfigError without the GPU
        that the configuration asks for.
        """
        # Where ranks are on several hosts, each knows only of itself.
        self._num_ranks_here = self.config.tensor_parallel_size if same_host else 1
        if self.config.device == "cuda":
            self._gpu = find_gpu(f"Rank {self.rank} on {self.location()}")
        if self.rank != 0:
            # Before torch is imported: a rank that dies from here on is named.
            self._lifeline.connect((at.host, at.lifeline_port))
        bound_primitive_caches(os.environ)
        bound_spinning(os.environ)
        if self._gpu is not None:
            try_gpu(f"Rank {self.rank} on {self.location()}", self._gpu)
            self._sensors = open_sensors(self._gpu.name)
        from workers.native.exchange import native_exchange
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
            master_address=at.host,
            master_port=at.port,
            same_host=same_host,
            deterministic=self.config.deterministic,
            exchange=native_exchange() if self.config.device == "cpu" else None,
        )
        self._tp = self._timed = TimedGroup(group)

    def load(self) -> None:
        """Reads this rank's weights. Raises CheckpointError, and as `check_room`."""
        from workers.engine.build import build_runner

        assert self._tp is not None, "join comes before load"
        self.phase = "loading"
        self.config = sized_for(self.config, self._gpu, self._tp.min)
        check_room(self.config, num_ranks=self._num_ranks_here, memory=read_memory(), host=self.location())
        self._runner = build_runner(self.config, self._tp, self._set_progress)

    def location(self) -> str:
        """The machine of this rank, as messages name it."""
        return socket.gethostname()

    def progress(self) -> LoadProgress:
        """How much of the weights `load` has read."""
        return self._progress

    def start(self, host: str = "127.0.0.1") -> Started | None:
        """Allocates the KV cache and starts to work. Returns where rank 0 serves; None on the other ranks. Raises ConfigError."""
        from workers.engine.execution.numerics import fingerprint

        assert self._tp is not None and self._runner is not None, "load comes before start"
        self.phase = "starting"
        self._runner.allocate_kv_cache()
        numerics = fingerprint(self._runner)
        if self._timed is not None:
            self._timed.start_over()
        if self.rank == 0:
            self._started = self._lead(host, self._runner, self._tp, numerics=numerics or "")
        else:
            self._follower = threading.Thread(
                target=self._follow, args=(self._runner, self._tp), name="follower", daemon=True
            )
            self._follower.start()
        self.profile.serve(self._runner, self._tp, core=self._core, loop=self._loop, server=self._server)
        self._lifeline.expect_prompt()
        self.phase = "serving"
        return self._started

    def load_adapter(self, revision: str, folder: str) -> None:
        """Reads this rank's part of a PEFT adapter into host memory, while the engine goes on. When all ranks have returned, requests may
        name the revision, "NAME@DIGEST". Idempotent, from any thread, after `load`. Raises CheckpointError for one that does not fit.
        """
        self._adapters.load(revision, folder, beside_engine=self.phase != "loading")

    def unload_adapter(self, revision: str) -> None:
        """No further request may name it. It leaves this rank once no request uses it. Idempotent, from any thread, after `load`."""
        core, loop = self._core, self._loop
        self._adapters.unload(revision, at_once=self.phase == "loading")
        if core is not None and loop is not None:
            loop.call(lambda: core.unload_adapter(revision))

    def adapters(self) -> tuple[str, ...]:
        """The revisions that requests may name on this rank."""
        return self._adapters.revisions()

    @property
    def _adapters(self) -> "RankAdapters":
        assert self._runner is not None, "load comes before adapters"
        if self._runner.adapters is None:
            raise ConfigError(
                f"Replica {self.replica_id} serves no adapters.",
                remedy="Start it with --enable-lora.",
                param="--enable-lora",
            )
        return self._runner.adapters

    def stats(self) -> RankStats:
        """This rank's own counters."""
        core, timed = self._core, self._timed
        return RankStats(
            num_steps_total=self._num_steps_total if core is None else core.clock.num_steps_total,
            step_s_total=self._step_s_total if core is None else core.clock.step_s_total,
            num_all_reduces_total=0 if timed is None else timed.num_all_reduces_total,
            all_reduce_s_total=0.0 if timed is None else timed.all_reduce_s_total,
            gpu=None if self._sensors is None else self._sensors.read(),
        )

    def describe(self) -> RankDescription:
        """Which rank this is and where it runs; on a serving rank 0 also everything needed to connect to the replica."""
        started = self._started
        return RankDescription(
            replica_id=self.replica_id,
            incarnation=self._incarnation,
            rank=self.rank,
            pid=os.getpid(),
            hostname=socket.gethostname(),
            phase=self.phase,
            address=None if started is None else (started.host, started.port),
            token=None if started is None else self._token,
            facts=None if started is None else started.facts,
        )

    def has_ended(self, timeout_s: float) -> RankEnd:
        """Waits up to `timeout_s` for the end of this rank. May be called in any phase."""
        return RankEnd(has_ended=self._ended.wait(timeout_s), reason=self.failure)

    def wait(self) -> str | None:
        """Returns when this rank has ended: None after `close`, else one sentence on what broke. May be called in any phase."""
        self._ended.wait()
        return self.failure

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the work of this rank; rank 0 also stops the followers. Idempotent."""
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
        if self._tracer is not None:
            self._tracer.close()
        self.phase = "ended"
        self._ended.set()

    def _set_progress(self, done: int, total: int) -> None:
        self._progress = LoadProgress(num_bytes_read=done, num_bytes_total=total)

    def _lead(self, host: str, runner: "ModelRunner", tp: "TensorParallel", *, numerics: str) -> Started:
        from workers.engine.core import EngineCore

        spans = None
        if self._tracing is not None:
            self._tracer = Tracer(self._tracing, role="replica", instance=f"{self.replica_id}-{self._incarnation}")
            spans = EngineSpans(self._tracer)
        core = self._core = EngineCore(self.config, runner, tp, spans=spans)
        facts = msgspec.structs.replace(
            core.facts(self.replica_id),
            device="the CPU" if self._gpu is None else self._gpu.describe(),
            numerics=numerics,
        )
        loop = self._loop = EngineLoop(
            core, lambda deltas, events: server.publish(deltas, events), on_failure=self._engine_failed
        )
        submit = loop.submit if spans is None else spans.noting_arrival(loop.submit)
        server = self._server = StreamServer(
            facts, self._token, submit=submit, abort=loop.abort, load=core.load, on_orphaned=self._orphaned
        )
        bound_host, port = server.start(host)
        loop.start()
        return Started(host=bound_host, port=port, facts=facts)

    def _follow(self, runner: "ModelRunner", tp: "TensorParallel") -> None:
        from workers.engine.follower import run_follower

        try:
            run_follower(runner, tp, self._count_step, on_profile=self.profile.follow)
        except Exception as e:  # whatever it is, this rank can no longer take part
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
        reason = f"Replica {self.replica_id} ended itself: {why}."
        threading.Thread(target=self._break, args=(reason, False), name="orphaned", daemon=True).start()

    def _engine_failed(self, failure: Exception) -> None:
        if isinstance(failure, GroupError) and self._breaking.wait(ECHO_S):
            return  # the lifeline knows better and is ending this rank already
        reason = str(failure) if isinstance(failure, TramontaneError) else f"{type(failure).__name__}: {failure}"
        self._break(f"Rank {self.rank} of replica {self.replica_id} stopped: {reason}")

    def _break(self, reason: str, crashed: bool = True) -> None:
        """Reports the reason to the other ranks, to the gateways and to `wait`, then ends the process. The first reason counts.

        crashed: see Ending.
        """
        with self._break_lock:
            if self._closing or self._breaking.is_set():
                return
            self.failure = reason
            self._breaking.set()
        log.error("%s", reason)
        self._lifeline.close(reason)
        if self._server is not None:
            self._server.close(reason=reason, crashed=crashed)
        self.phase = "ended"
        self._ended.set()
        if self._tracer is not None:
            self._tracer.close(LAST_WORDS_S)
        time.sleep(LAST_WORDS_S)
        self._on_broken()
