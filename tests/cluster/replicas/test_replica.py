"""When a Ray replica counts as lost, and how it is ended; the actors and the client are fakes, Ray is not started."""

import asyncio
from types import SimpleNamespace

import pytest

import cluster.replicas.replica as replica_module
from cluster.replicas.replica import HANG_IS_DEATH_S, LOST_AFTER_S, RayReplica


class FakeClient:
    def __init__(self) -> None:
        self.connected = True
        self.condemned: str | None = None
        self.reason: str | None = None

    def not_ready_reason(self, now: float) -> str | None:
        return self.condemned or self.reason

    def is_ready(self, now: float) -> bool:
        return self.not_ready_reason(now) is None

    async def close(self) -> None:
        self.connected = False


class FakeActor:
    def __init__(self) -> None:
        self.num_asked = 0
        self.close = SimpleNamespace(remote=self._close)

    def _close(self) -> asyncio.Future[None]:
        self.num_asked += 1
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


@pytest.fixture
def given_back(monkeypatch) -> list[list[FakeActor]]:
    seen: list[list[FakeActor]] = []
    monkeypatch.setattr(replica_module, "_give_back", lambda actors, group: seen.append(list(actors)))
    return seen


@pytest.fixture
def replica() -> RayReplica:
    replica = RayReplica("r0", SimpleNamespace(tensor_parallel_size=2), deployment="demo")  # type: ignore[arg-type]
    replica._client = FakeClient()  # type: ignore[assignment]
    replica._actors = [FakeActor(), FakeActor()]
    return replica


def test_what_lasts_a_moment_is_no_loss(replica):
    assert replica.lost_reason(100.0) is None
    replica._client.reason, replica._client.connected = "no connection", False
    assert replica.lost_reason(101.0) is None
    assert replica.lost_reason(101.0 + LOST_AFTER_S / 2) is None
    replica._client.reason = None
    assert replica.lost_reason(102.0) is None
    replica._client.reason = "no connection"
    assert replica.lost_reason(103.0) is None, "the moment begins anew"
    assert replica.lost_reason(103.1 + LOST_AFTER_S) == "no connection"


def test_ranks_that_live_and_do_not_work_are_lost_in_the_end(replica):
    replica._client.reason = "no forward pass"
    assert replica.lost_reason(0.0) is None
    assert replica.lost_reason(HANG_IS_DEATH_S - 0.1) is None
    assert replica.lost_reason(HANG_IS_DEATH_S + 0.1) == "no forward pass"


def test_last_words_need_no_patience(replica):
    replica._client.condemned = "Replica r0 lost rank 1: its process died."
    assert replica.lost_reason(0.0) == "Replica r0 lost rank 1: its process died."


async def test_a_replica_that_works_is_asked_to_end(replica, given_back):
    actors = list(replica._actors)
    await replica.close(None)
    assert [a.num_asked for a in actors] == [1, 1]
    assert given_back == [actors]
    await replica.close(None)
    assert [a.num_asked for a in actors] == [1, 1], "close is idempotent"


@pytest.mark.parametrize("trouble", [{"connected": False}, {"reason": "waits for rank 1"}, {"condemned": "lost"}])
async def test_a_replica_that_does_not_answer_is_not_asked(replica, given_back, trouble):
    """The place it holds is what its successor waits for."""
    actors = list(replica._actors)
    for name, value in trouble.items():
        setattr(replica._client, name, value)
    await replica.close("lost")
    assert [a.num_asked for a in actors] == [0, 0]
    assert given_back == [actors]
