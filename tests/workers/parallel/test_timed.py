"""Counting all-reduces: every one, with the seconds it took, for next to nothing."""

import time
import timeit

import numpy as np
import torch

import workers.parallel.timed
from workers.parallel.group import SingleRank
from workers.parallel.timed import SLOW_COLLECTIVE_S, TimedGroup


class SlowGroup(SingleRank):
    def all_reduce(self, x):
        time.sleep(0.01)
        return x + 1


def test_all_reduces_are_counted_and_timed():
    timed = TimedGroup(SlowGroup())
    x = torch.zeros(3)
    for _ in range(5):
        assert timed.all_reduce(x).tolist() == [1.0, 1.0, 1.0]
    assert timed.num_all_reduces_total == 5
    assert 0.05 <= timed.all_reduce_s_total < 20.0
    timed.start_over()
    assert (timed.num_all_reduces_total, timed.all_reduce_s_total) == (0, 0.0)


def test_on_cuda_they_are_counted_only():
    group = SlowGroup()
    group.device = torch.device("cuda", 0)
    timed = TimedGroup(group)
    timed.all_reduce(torch.zeros(1))
    assert (timed.num_all_reduces_total, timed.all_reduce_s_total) == (1, None)


def test_the_rest_is_the_groups():
    timed = TimedGroup(SingleRank())
    assert (timed.rank, timed.size, timed.device, timed.waiting_for()) == (0, 1, torch.device("cpu"), ())
    assert timed.broadcast(np.array([3], np.int32)).tolist() == [3]
    assert timed.min(7) == 7
    assert timed.gather(torch.ones(2)).tolist() == [1.0, 1.0]
    assert timed.broadcast_tensor(torch.ones(2)).tolist() == [1.0, 1.0]
    timed.close()
    assert timed.num_all_reduces_total == 0


def test_a_rank_is_waited_for_only_when_one_collective_takes_long(monkeypatch):
    now = 0.0
    monkeypatch.setattr(workers.parallel.timed, "perf_counter", lambda: now)
    group = SingleRank()
    group.waiting_for = lambda: (1,)  # at every moment: rank 1 is slower
    timed = TimedGroup(group)
    for _ in range(5):  # longer in all, but each one ends
        timed.all_reduce(torch.zeros(1))
        now += 0.6 * SLOW_COLLECTIVE_S
        assert timed.waiting_for() == ()
    now += 0.6 * SLOW_COLLECTIVE_S  # as if the last one had not ended
    assert timed.waiting_for() == (1,)


def test_it_costs_less_than_a_microsecond():
    group = SingleRank()
    timed, x = TimedGroup(group), torch.zeros(1)

    def seconds(all_reduce):
        return min(timeit.repeat(lambda: all_reduce(x), number=2000, repeat=20)) / 2000

    overhead = seconds(timed.all_reduce) - seconds(group.all_reduce)
    assert overhead < 1e-6, f"{overhead * 1e9:.0f} ns"
