"""A replica's RankWorkers, each in a process of its own as under Ray, but without Ray: what a signal to one does to the others."""

import multiprocessing
import os
import secrets
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Self

from support.ranks.forked import forking
from workers.config import EngineConfig
from workers.rank.reports import Started
from workers.rank.worker import RankWorker

TOKEN = "secret"
TIMEOUT_S = 100.0


class RankProcesses:
    """`with RankProcesses(config) as ranks`: joined, loaded and started, unless `until` names an earlier phase. environ: the ranks' own,
    in addition; they set it before torch is imported.
    """

    def __init__(
        self, config: EngineConfig, *, until: str = "start", environ: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        context = multiprocessing.get_context("spawn") if environ else forking()
        size = config.tensor_parallel_size
        incarnation = secrets.token_hex(4)
        pipes = [context.Pipe() for _ in range(size)]
        self.started: Started | None = None
        self._until = until
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_run, args=(theirs, config, rank, incarnation, dict(environ)))
            for rank, (_, theirs) in enumerate(pipes)
        ]

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        try:
            rendezvous = self.call(0, "address", "127.0.0.1")
            self.on_all("join", rendezvous, same_host=True)
            if self._until in ("load", "start"):
                self.on_all("load")
            if self._until == "start":
                self.started = self.on_all("start")[0]
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def on_all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((method, args, kwargs))
        return [self._result(rank) for rank in range(len(self._pipes))]

    def call(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        self._pipes[rank].send((method, args, kwargs))
        return self._result(rank)

    def exit_codes(self, timeout_s: float = 20.0) -> list[int | None]:
        for process in self.processes:
            process.join(timeout_s)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _result(self, rank: int) -> Any:
        assert self._pipes[rank].poll(TIMEOUT_S), f"rank {rank} does not answer"
        outcome = self._pipes[rank].recv()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _run(pipe: Connection, config: EngineConfig, rank: int, incarnation: str, environ: Mapping[str, str]) -> None:
    assert not environ or "torch" not in sys.modules, "torch has read the environment already"
    os.environ.update(environ)
    worker = RankWorker(config, rank, replica_id="r0", incarnation=incarnation, token=TOKEN)
    while True:
        method, args, kwargs = pipe.recv()
        try:
            outcome = getattr(worker, method)(*args, **kwargs)
        except Exception as e:
            outcome = e
        pipe.send(outcome)
