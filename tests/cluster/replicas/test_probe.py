"""The doctor's actors without Ray: their sockets, and what is made of ranks that fail, hang or die."""

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.cloud.doctor.facts import Failed, Reduced
from cluster.cloud.doctor.judge.ranks import Gang
from cluster.replicas import probe_ranks
from cluster.replicas.probe import NodeProbe
from workers.errors import GroupError
from workers.probe import Joined, Measured, Where
from workers.shard import Rendezvous


def test_a_listener_is_reached_and_told_from_others():
    port = NodeProbe().listen("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        closed_port = closed.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"[:16])

        answering = threading.Thread(target=answer)
        answering.start()
        targets = [("127.0.0.1", p) for p in (port, closed_port, other.getsockname()[1])]
        assert NodeProbe().reach(targets) == [None, "Connection refused", "something else answers at 127.0.0.1"]
        answering.join()


class FakeRank:
    """An actor whose methods answer what they are told: a value, an exception, or HANG."""

    HANG = object()

    def __init__(self, **answers) -> None:
        defaults = {
            "address": Rendezvous("10.0.0.1", 1, 2),
            "join": Joined("Gloo", "eth0"),
            "measure": Measured(0.001, 1e9),
            "where": Where("is joining the group at 10.0.0.1:1", (1,)),
            "close": None,
        }
        for name, answer in (defaults | answers).items():
            setattr(self, name, SimpleNamespace(remote=lambda *a, answer=answer, **k: self._answer(answer)))

    def _answer(self, answer) -> asyncio.Future:
        future = asyncio.get_running_loop().create_future()
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        elif answer is not self.HANG:
            future.set_result(answer)
        return future


@pytest.fixture
def run(monkeypatch):
    """Runs a trial of these actors, each on a node of its own."""
    ended = []

    async def trial(*actors: FakeRank) -> Reduced | Failed:
        async def place(*args, on_group, **options):
            assert options["detached"] is False, "a doctor that is killed would leave its place taken"
            on_group("group")
            return {rank: f"node{rank}" for rank in range(len(actors))}

        monkeypatch.setattr(probe_ranks, "place", place)
        monkeypatch.setattr(probe_ranks, "missing_for", lambda gang, spread: None)
        monkeypatch.setattr(probe_ranks, "node_ip", lambda node: f"10.0.0.{node[-1]}")
        monkeypatch.setattr(probe_ranks._Trial, "_start_actors", lambda self, size: self._actors.extend(actors))
        monkeypatch.setattr(probe_ranks.ray, "kill", ended.append)
        monkeypatch.setattr(probe_ranks, "remove_placement_group", ended.append)
        monkeypatch.setattr(probe_ranks, "START_S", 0.2)
        monkeypatch.setattr(probe_ranks, "ECHO_S", 0.1)
        monkeypatch.setattr(probe_ranks, "ASK_S", 0.1)
        gang = Gang(device="cpu", tensor_parallel_size=len(actors), spread=True)
        outcome = await probe_ranks.try_all_reduce(gang, spread=True, timeout_s=0.1)
        assert ended == [*actors, "group"], "something is left in Ray"
        return outcome

    return trial


def failed(error: Exception) -> RayTaskError:
    return RayTaskError("join", "traceback", error)


async def test_the_slowest_rank_counts(run):
    assert await run(FakeRank(), FakeRank(measure=Measured(0.002, 5e8))) == Reduced(
        ranks=("10.0.0.0", "10.0.0.1"), collectives="Gloo", interface="eth0", latency_s=0.002, bus_bytes_per_s=5e8
    )


async def test_the_rank_that_fails_and_the_one_that_waits_are_both_told(run):
    unreachable = failed(GroupError("Rank 1 could not reach rank 0.", ranks=(0,)))
    outcome = await run(FakeRank(join=FakeRank.HANG), FakeRank(join=unreachable))
    assert (outcome.failure, outcome.suspects) == ("Rank 1 could not reach rank 0.", (0,))
    ((rank, doing, waiting_for),) = [(w.rank, w.doing, w.waiting_for) for w in outcome.waiting]
    assert (rank, doing, waiting_for) == (0, "is joining the group at 10.0.0.1:1", (1,))


async def test_of_several_failures_the_one_that_names_ranks_is_told(run):
    first, second = failed(RuntimeError("broken")), failed(GroupError("Rank 0 is missing.", ranks=(0,)))
    assert (await run(FakeRank(measure=first), FakeRank(measure=second))).failure == "Rank 0 is missing."


async def test_a_rank_that_hangs_without_a_word(run):
    outcome = await run(FakeRank(measure=FakeRank.HANG, where=FakeRank.HANG), FakeRank(measure=FakeRank.HANG))
    assert outcome.failure == "'measure' did not end in 0.2 s" and outcome.suspects == (0, 1)
    assert [(w.rank, w.doing) for w in outcome.waiting] == [
        (0, "does not answer at all"),
        (1, "is joining the group at 10.0.0.1:1"),
    ]


async def test_a_rank_that_dies(run):
    assert (await run(FakeRank(), FakeRank(join=RayActorError()))).failure == "The process of rank 1 died"
