"""Ranks without a model: what they measure, and how they name the ranks that are missing. Threads of this process; the sums are real."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.ranks.rank_threads import unique_name

import workers.parallel.join
from workers.errors import GroupError
from workers.rank.probe import Joined, Measured, ProbeRank
from workers.rank.reports import Rendezvous


def ranks(size: int, timeout_s: float = 20.0) -> list[ProbeRank]:
    name = unique_name()
    return [ProbeRank(r, size=size, device="cpu", name=name, token="t", timeout_s=timeout_s) for r in range(size)]


@pytest.mark.group
def test_two_ranks_meet_and_measure():
    both = ranks(2)
    meeting = both[0].address("127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        joined = list(pool.map(lambda rank: rank.join(meeting, same_host=True), both))
        assert [j.collectives for j in joined] == ["shared memory"] * 2
        assert both[1].where().doing == "has joined the group"
        for measured in pool.map(ProbeRank.measure, both):
            assert 0 < measured.latency_s < 1 and measured.bus_bytes_per_s > 1e6
        list(pool.map(ProbeRank.close, both))
    assert both[0].where().doing == "has measured"


@pytest.mark.group
def test_a_rank_that_stays_away_is_named_while_and_after_waiting():
    lonely = ranks(2, timeout_s=0.5)[0]
    meeting = lonely.address("127.0.0.1")
    seen = []

    def poll() -> None:
        deadline = time.monotonic() + 10
        while not lonely.where().doing.startswith("is joining") and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(lonely.where().doing)

    polling = threading.Thread(target=poll)
    polling.start()
    with pytest.raises(GroupError, match="Rank 1 did not answer") as caught:
        lonely.join(meeting, same_host=True)
    polling.join()
    assert caught.value.ranks == (1,)
    assert seen == [f"is joining the group at {meeting.host}:{meeting.port}"]
    lonely.close()


def test_a_rank_that_does_not_reach_rank_0_says_so():
    far = ranks(2)[1]
    with pytest.raises(GroupError, match=r"could not reach rank 0.s lifeline at 127\.0\.0\.1:1:") as caught:
        far.join(Rendezvous(host="127.0.0.1", port=1, lifeline_port=1), same_host=True)
    assert caught.value.ranks == (0,)
    assert far.where().doing == "is connecting to rank 0's lifeline at 127.0.0.1:1"
    far.close()


def test_one_rank_computes_alone():
    (alone,) = ranks(1)
    meeting = alone.address("127.0.0.1")
    assert alone.join(meeting, same_host=True) == Joined(collectives="none")
    assert alone.measure() == Measured(latency_s=pytest.approx(0, abs=1), bus_bytes_per_s=0.0)
    alone.close()


class WrongGroup:
    """Its sums lack one element."""

    size = 2
    device = torch.device("cpu")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x.fill_(3.0)
        x[7] = 2.0
        return x

    def close(self) -> None:
        pass


def test_a_wrong_sum_is_an_error(monkeypatch):
    monkeypatch.setattr(workers.parallel.join, "join_group", lambda **options: WrongGroup())
    rank = ranks(2)[0]
    rank.join(rank.address("127.0.0.1"), same_host=True)
    with pytest.raises(GroupError, match="gave 2 instead of 3 in 1 of 2048 elements"):
        rank.measure()
    rank.close()
