"""The doctor's actors without Ray: their sockets, and the outcome when ranks fail, hang or die."""

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.doctor import all_reduce
from cluster.doctor.facts import AllReduceFailure, AllReduceResult
from cluster.doctor.judge.ranks import TrialGang
from cluster.doctor.ray_probe import NodeProbe, Probes, RayNode
from workers.errors import GroupError
from workers.rank.probe import Joined, Measured, Where
from workers.rank.reports import Rendezvous


def test_only_the_echo_server_counts_as_reached():
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
    """Each method gives the answer set for it: a value, an exception, or HANG. `asked` lists the methods called."""

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
            "address": Rendezvous(host="10.0.0.1", port=1, lifeline_port=2),
            "join": Joined(collectives="Gloo", gloo_interface="eth0"),
            "measure": Measured(latency_s=0.001, bus_bytes_per_s=1e9),
            "where": Where(doing="is joining the group at 10.0.0.1:1", waiting_for=(1,)),
            "close": None,
        }
        super().__init__(**(defaults | answers))


def probes(*actors: FakeActor) -> Probes:
    """On nodes 10.0.0.0, 10.0.0.1 and so on."""
    nodes = [RayNode(node_id=f"n{i}", address=f"10.0.0.{i}", num_cpus=1.0, num_gpus=0.0) for i in range(len(actors))]
    return Probes(nodes, timeout_s=0.1, start=lambda node: actors[nodes.index(node)])


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


async def test_a_node_that_does_not_answer_is_asked_once():
    silent, dead, well = FakeActor(run=FakeActor.HANG), FakeActor(run=RayActorError()), FakeActor(run=b"{}", listen=1)
    trio = probes(silent, dead, well)
    answers = await trio.run(len, [()] * 3)
    assert [a.value for a in answers] == [None, None, b"{}"]
    assert answers[0].failure == "it did not answer within 0.1 s" and answers[1].failure
    assert await trio.links() == []
    assert (silent.asked, dead.asked) == (["run"], ["run"])


@pytest.fixture
def run(monkeypatch):
    """Runs a trial with these actors as ranks, each on a node of its own."""
    ended = []

    async def trial(*actors: FakeRank) -> AllReduceResult | AllReduceFailure:
        async def place(*args, on_group, **options):
            assert options["detached"] is False, "a killed doctor would leave its resources reserved"
            on_group("group")
            return {rank: f"node{rank}" for rank in range(len(actors))}

        monkeypatch.setattr(all_reduce, "place", place)
        monkeypatch.setattr(all_reduce, "missing_for", lambda gang, spread: None)
        monkeypatch.setattr(all_reduce, "node_ip", lambda node: f"10.0.0.{node[-1]}")
        monkeypatch.setattr(all_reduce, "start_ranks", lambda gang, **options: list(actors))
        monkeypatch.setattr(all_reduce.ray, "kill", ended.append)
        monkeypatch.setattr(all_reduce, "remove_placement_group", ended.append)
        monkeypatch.setattr(all_reduce, "START_S", 0.2)
        monkeypatch.setattr(all_reduce, "ECHO_S", 0.1)
        monkeypatch.setattr(all_reduce, "ASK_S", 0.1)
        gang = TrialGang(device="cpu", tensor_parallel_size=len(actors), spread=True)
        outcome = await all_reduce.try_all_reduce(gang, spread=True, timeout_s=0.1)
        assert ended == [*actors, "group"], "something is left over in Ray"
        return outcome

    return trial


def failed(error: Exception) -> RayTaskError:
    return RayTaskError("join", "traceback", error)


async def test_the_slowest_rank_counts(run):
    assert await run(FakeRank(), FakeRank(measure=Measured(latency_s=0.002, bus_bytes_per_s=5e8))) == AllReduceResult(
        ranks=("10.0.0.0", "10.0.0.1"), collectives="Gloo", interface="eth0", latency_s=0.002, bus_bytes_per_s=5e8
    )


async def test_both_the_failed_rank_and_the_waiting_one_are_reported(run):
    unreachable = failed(GroupError("Rank 1 could not reach rank 0.", ranks=(0,)))
    outcome = await run(FakeRank(join=FakeRank.HANG), FakeRank(join=unreachable))
    assert (outcome.failure, outcome.suspects) == ("Rank 1 could not reach rank 0.", (0,))
    ((rank, doing, waiting_for),) = [(w.rank, w.doing, w.waiting_for) for w in outcome.waiting]
    assert (rank, doing, waiting_for) == (0, "is joining the group at 10.0.0.1:1", (1,))


async def test_of_several_failures_the_one_that_names_ranks_is_reported(run):
    first, second = failed(RuntimeError("broken")), failed(GroupError("Rank 0 is missing.", ranks=(0,)))
    assert (await run(FakeRank(measure=first), FakeRank(measure=second))).failure == "Rank 0 is missing."


async def test_a_rank_that_hangs_silently(run):
    outcome = await run(FakeRank(measure=FakeRank.HANG, where=FakeRank.HANG), FakeRank(measure=FakeRank.HANG))
    assert outcome.failure == "'measure' did not finish within 0.2 s" and outcome.suspects == ()
    assert [(w.rank, w.doing) for w in outcome.waiting] == [
        (0, "does not answer at all"),
        (1, "is joining the group at 10.0.0.1:1"),
    ]


async def test_a_rank_that_dies(run):
    assert (await run(FakeRank(), FakeRank(join=RayActorError()))).failure == "The process of rank 1 died"
