"""Gloo between processes: the results, a rank that hangs, and how `join_group` chooses."""

import socket

import pytest
import torch
from support.ranks import group_ranks
from support.ranks.forked import forking
from support.ranks.rank_threads import unique_name

from workers.errors import ConfigError, GroupError
from workers.parallel import join, shared_file
from workers.parallel.distributed import DistributedGroup
from workers.parallel.group import SingleRank
from workers.parallel.interface import addresses, interface_towards
from workers.parallel.join import join_group

SIZE = 3


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.group
def test_collectives_and_a_rank_that_hangs():
    port, context = free_port(), forking()
    pipes = [context.Pipe(duplex=False) for _ in range(SIZE)]
    processes = [
        context.Process(target=group_ranks.main, args=(rank, SIZE, port, pipes[rank][1])) for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    try:
        assert all(ours.poll(100) for ours, _ in pipes), "a rank said nothing"
        seen = [ours.recv() for ours, _ in pipes]
        for process in processes[:-1]:
            process.join(20)
        assert [process.exitcode for process in processes[:-1]] == [0] * (SIZE - 1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, saw in enumerate(seen):
        assert saw["all_reduce"] == [[3.0 * i + 30 for i in row] for row in ([0, 1, 2], [3, 4, 5])]
        assert not saw["rows depend on others"], "the order of a row's sum depends on where it is in the batch"
        assert saw["gather"] == ([[0, 0, 1, 1, 2, 2]] * 2 if rank == 0 else None)
        assert saw["broadcast_tensor"] == [[7, 7]] * 2
        assert saw["min"] == (1 << 40) - (SIZE - 1)
        assert saw["broadcast"] is True
        assert saw["after idling"] == [5]
    for saw in seen[:-1]:
        assert saw["missing"] == (SIZE - 1,)
        assert saw["waiting_for"] == (SIZE - 1,)
        assert "closed" in saw["afterwards"]


def test_joining_alone_fails_and_leaves_no_group():
    with pytest.raises(GroupError, match="Rank 0 of 2 could not join its group at 127"):
        DistributedGroup(
            rank=0, size=2, device="cpu", master_address="127.0.0.1", master_port=free_port(), join_timeout_s=0.3
        )
    assert not torch.distributed.is_initialized()


def test_the_interface_towards_an_address():
    assert interface_towards("127.0.0.1") == socket.if_indextoname(1) == "lo"
    assert interface_towards("no.such.host.invalid") is None
    assert addresses()["lo"] == "127.0.0.1"


def settings(**changes):
    return {
        "rank": 0,
        "size": 2,
        "device": "cpu",
        "replica_id": unique_name(),
        "master_address": "127.0.0.1",
        "master_port": free_port(),
        "same_host": True,
        "join_timeout_s": 0.1,
        **changes,
    }


def test_one_rank_needs_no_group():
    assert isinstance(join_group(**settings(size=1)), SingleRank)


@pytest.mark.parametrize(
    ("changes", "available", "chosen"),
    [
        ({}, True, "SharedMemoryGroup"),
        ({}, False, "DistributedGroup"),
        ({"same_host": False}, True, "DistributedGroup"),
        ({"backend": "gloo"}, True, "DistributedGroup"),
        ({"backend": "shm"}, False, "SharedMemoryGroup"),
        ({"device": "cuda"}, True, "DistributedGroup"),
    ],
)
def test_the_choice(monkeypatch, changes, available, chosen):
    monkeypatch.setattr(shared_file, "available", lambda: available)
    for name in ("SharedMemoryGroup", "DistributedGroup"):
        monkeypatch.setattr(join, name, lambda *args, name=name, **kwargs: name)
    assert join_group(**settings(**changes)) == chosen


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "nccl"}, "'nccl' do not work on cpu"),
        ({"backend": "gloo", "device": "cuda"}, "'gloo' do not work on cuda"),
        ({"backend": "shm", "same_host": False}, "all ranks on one host"),
    ],
)
def test_what_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        join_group(**settings(**changes))
