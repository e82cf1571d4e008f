"""The doctor's actors without Ray: their sockets, and what is made of ranks that fail, hang or die."""

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.doctor import all_reduce as probe_ranks
from cluster.doctor.facts import Failed, Reduced
from cluster.doctor.judge.ranks import Gang
from cluster.doctor.ray_probe import NodeProbe, Probes, RayNode
from workers.errors import GroupError
from workers.rank.probe import Joined, Measured, Where
from workers.rank.worker import Rendezvous


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


class FakeActor:
    """Its methods answer what they are told: a value, an exception, or HANG. `asked` has their names."""

    HANG = object()

    def __init__(self, **answers) -> None:
        self.asked: list[str] = []
        for name, answer in answers.items():
            remote = lambda *a, name=name, answer=answer, **k: self._answer(name, answer)  # noqa: E731
            setattr(self, name, SimpleNamespace(remote=remote))

    def _answer(self, name, answer) -> asyncio.Future:
        self.asked.append(name)
        future = asyncio.get_running_loop().create_future()
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        elif answer is not self.HANG:
            future.set_result(answer)
        return future


class FakeRank(FakeActor):
    def __init__(self, **answers) -> None:
        defaults = {
            "address": Rendezvous("10.0.0.1", 1, 2),
            "join": Joined("Gloo", "eth0"),
            "measure": Measured(0.001, 1e9),
            "where": Where("is joining the group at 10.0.0.1:1", (1,)),
            "close": None,
        }
        super().__init__(**(defaults | answers))


def probes(*actors: FakeActor) -> Probes:
    """On nodes 10.0.0.0, 10.0.0.1 and so on."""
    found = Probes([], timeout_s=0.1)
    for i, actor in enumerate(actors):
        found.nodes.append(RayNode(node_id=f"n{i}", address=f"10.0.0.{i}", num_cpus=1.0, num_gpus=0.0))
        found._actors[f"n{i}"] = actor
    return found


async def test_links_are_every_pair_both_ways():
    cannot_listen = failed(OSError(99, "Cannot assign requested address"))
    found = await probes(
        FakeActor(listen=4000, reach=["refused"]),
        FakeActor(listen=4001, reach=[None]),
        FakeActor(listen=cannot_listen, reach=[None, None]),
    ).links()
    failures = {(link.source[-1], link.target[-1]): link.failure for link in found}
    assert len(found) == 6
    assert failures.pop(("0", "1")) == "refused"
    assert "Cannot assign requested address" in failures.pop(("0", "2"))
    assert "Cannot assign requested address" in failures.pop(("1", "2"))
    assert set(failures.values()) == {None}


async def test_a_node_that_is_silent_is_waited_for_once():
    silent, dead, well = FakeActor(run=FakeActor.HANG), FakeActor(run=RayActorError()), FakeActor(run=b"{}", listen=1)
    trio = probes(silent, dead, well)
    answers = await trio.run(len, [()] * 3)
    assert [a.value for a in answers] == [None, None, b"{}"]
    assert answers[0].failure == "it gave no answer in 0.1 s" and answers[1].failure
    assert await trio.links() == []
    assert (silent.asked, dead.asked) == (["run"], ["run"])


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
    assert outcome.failure == "'measure' did not end in 0.2 s" and outcome.suspects == ()
    assert [(w.rank, w.doing) for w in outcome.waiting] == [
        (0, "does not answer at all"),
        (1, "is joining the group at 10.0.0.1:1"),
    ]


async def test_a_rank_that_dies(run):
    assert (await run(FakeRank(), FakeRank(join=RayActorError()))).failure == "The process of rank 1 died"
