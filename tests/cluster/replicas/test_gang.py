"""A replica's actors, faked: whose failure is raised, which ends are reported, and how they are ended. Ray is not started."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

import cluster.replicas.gang as gang_module
from cluster.replicas.gang import RankGang
from workers.errors import CheckpointError, GroupError, ReplicaUnavailableError
from workers.rank.reports import RankEnd

HANG = object()


class FakeActor:
    """Each method gives the answer set for it: a value, an exception, or HANG. `asked` lists the methods called."""

    def __init__(self, **answers: object) -> None:
        self.asked: list[str] = []
        for name, answer in ({"has_ended": HANG, "close": None} | answers).items():
            remote = lambda *a, name=name, answer=answer, **k: self._answer(name, answer)  # noqa: E731
            setattr(self, name, SimpleNamespace(remote=remote))

    def _answer(self, name: str, answer: object) -> asyncio.Future:
        self.asked.append(name)
        future = asyncio.get_running_loop().create_future()
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        elif answer is not HANG:
            future.set_result(answer)
        return future


class World:
    def __init__(self) -> None:
        self.ends: list[str] = []
        self.killed: list[object] = []
        self.removed: list[object] = []

    def gang(self, *actors: FakeActor) -> RankGang:
        self.actors = {f"demo-r0-abc-rank{rank}": actor for rank, actor in enumerate(actors)}
        gang = RankGang("r0", "demo-r0-abc", on_end=self.ends.append)
        gang.find(len(actors))
        return gang


@pytest.fixture
def world(monkeypatch) -> World:
    world = World()
    monkeypatch.setattr(gang_module, "LAST_WORDS_S", 0.01)
    monkeypatch.setattr(gang_module, "ECHO_S", 0.05)
    monkeypatch.setattr(gang_module.ray, "get_actor", lambda name: world.actors[name])
    monkeypatch.setattr(gang_module.ray, "kill", world.killed.append)
    monkeypatch.setattr(gang_module, "remove_placement_group", world.removed.append)
    return world


def failed(error: Exception) -> RayTaskError:
    return RayTaskError("load", "traceback", error)


async def test_results_come_by_rank(world):
    gang = world.gang(FakeActor(load="a"), FakeActor(load="b"))
    assert await gang.call_all("load") == ["a", "b"]
    assert await gang.call(1, "load") == "b"
    await gang.close(None, answers=True)


async def test_a_failure_that_says_why_beats_its_consequence(world):
    """Rank 0 notices only that rank 1 did not come."""
    echo, cause = failed(GroupError("Rank 1 did not come.")), failed(CheckpointError("A tensor is missing."))
    gang = world.gang(FakeActor(load=echo), FakeActor(load=cause), FakeActor(load=HANG))
    with pytest.raises(CheckpointError, match="A tensor is missing"):
        await gang.call_all("load")
    await gang.close(None, answers=True)
    gang = world.gang(FakeActor(load=echo), FakeActor(load=HANG))
    with pytest.raises(GroupError, match="Rank 1 did not come"):
        await gang.call_all("load")
    await gang.close(None, answers=True)


async def test_other_failures_name_the_rank(world):
    gang = world.gang(FakeActor(load=failed(MemoryError("no room"))), FakeActor(load=RayActorError()))
    with pytest.raises(ReplicaUnavailableError, match=r"Rank 0 of replica r0 failed: MemoryError\('no room'\)"):
        await gang.call(0, "load")
    with pytest.raises(ReplicaUnavailableError, match="Replica r0 lost rank 1: its process died"):
        await gang.call(1, "load")
    await gang.close(None, answers=True)


async def test_a_rank_that_ends_unasked_is_reported(world):
    ended = RankEnd(has_ended=True, reason="Rank 0 of replica r0 stopped: boom")
    gang = world.gang(FakeActor(has_ended=ended), FakeActor(has_ended=RayActorError()), FakeActor())
    async with asyncio.timeout(5):
        while len(world.ends) < 2:
            await asyncio.sleep(0.005)
    assert world.ends == ["Rank 0 of replica r0 stopped: boom", "Replica r0 lost rank 1: its process died."]
    await gang.close(None, answers=False)


async def test_an_orderly_end_is_not_reported(world):
    gang = world.gang(FakeActor(has_ended=RankEnd(has_ended=True)))
    await asyncio.sleep(0.05)
    await gang.close(None, answers=True)
    assert world.ends == []


@pytest.mark.parametrize("answers", [True, False])
async def test_ranks_that_answer_are_closed_before_they_are_killed(world, answers):
    actors = [FakeActor(), FakeActor()]
    gang = world.gang(*actors)
    await gang.close("group", answers=answers)
    assert [a.asked.count("close") for a in actors] == [int(answers)] * 2
    assert (world.killed, world.removed) == (actors, ["group"])
    await gang.close(None, answers=answers)
    assert (world.killed, world.removed) == (actors, ["group"]), "close is idempotent"
