"""Shared-memory collectives, compiled and not: the results, many rounds at odd speeds, and every way in which a rank can be absent."""

import multiprocessing
import os
import random
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from support.native import native_library
from support.ranks import rank_threads
from support.ranks.rank_threads import unique_name

from workers.errors import GroupError
from workers.native.exchange import native_exchange
from workers.parallel import shared_file
from workers.parallel.shared_memory import SharedMemoryGroup

pytestmark = pytest.mark.skipif(not shared_file.available(), reason="needs /dev/shm and x86-64")


def part(rank, *shape, dtype=torch.float32):
    """What a rank brings to a collective: every rank can work out every other's."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype)


@pytest.fixture(params=["python", "compiled"])
def exchange(request):
    if request.param == "python":
        return None
    native_library("avx2")  # builds all that are outdated, or skips
    return native_exchange()


@pytest.fixture
def run_ranks(exchange):
    return partial(rank_threads.run_ranks, exchange=exchange)


@pytest.fixture(autouse=True)
def no_file_is_left():
    yield
    assert not list(shared_file.FOLDER.glob(f"tramontane-test-{os.getpid()}-*"))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_all_reduce_is_the_sum_in_rank_order_on_every_rank(run_ranks, size, dtype):
    shapes = [(1,), (3, 5), (2, 3, 4), (7, 129), (0, 4)]  # up to several rounds of the small buffer below

    def program(tp):
        tensors = [part(tp.rank, *shape, dtype=dtype) for shape in shapes]
        for x in tensors:
            assert tp.all_reduce(x) is x
        return tensors

    results = run_ranks(size, program, capacity_bytes=512)
    for i, shape in enumerate(shapes):
        exact = dtype if dtype == torch.int64 else torch.float32
        expected = part(0, *shape, dtype=dtype).to(exact)
        for rank in range(1, size):
            expected = expected + part(rank, *shape, dtype=dtype)
        for rank in range(size):
            assert torch.equal(results[rank][i], expected.to(dtype)), f"rank {rank}, shape {shape}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [(2, 3), (5,), (40, 10), (0, 7)])
def test_gather_concatenates_the_last_dimension_on_rank_0(run_ranks, size, shape):
    results = run_ranks(size, lambda tp: tp.gather(part(tp.rank, *shape)), capacity_bytes=256)
    assert torch.equal(results[0], torch.cat([part(r, *shape) for r in range(size)], dim=-1))
    assert results[1:] == [None] * (size - 1)


def test_broadcast_and_min(run_ranks):
    lengths = [0, 1, 63, 64, 65, 1000]  # a buffer holds 64

    def program(tp):
        messages = [np.arange(n, dtype=np.int32) * 3 for n in lengths]
        received = [tp.broadcast(m if tp.rank == 0 else None) for m in messages]
        return received, tp.min(10 - tp.rank), tp.min(-(1 << 40) * tp.rank)

    for received, smallest, smallest_large in run_ranks(3, program, capacity_bytes=256):
        assert [m.tolist() for m in received] == [[3 * i for i in range(n)] for n in lengths]
        assert all(m.dtype == np.int32 for m in received)
        assert (smallest, smallest_large) == (8, -(1 << 41))


def test_mixed_rounds_at_odd_speeds(run_ranks):
    """Ranks run ahead of each other as far as the two buffers allow; no rank may see an earlier or later round."""
    plan = random.Random(0).choices(("all_reduce", "gather", "broadcast", "broadcast_tensor", "min"), k=400)

    def program(tp):
        pause = random.Random(tp.rank)
        for i, operation in enumerate(plan):
            if pause.random() < 0.05:
                time.sleep(pause.random() * 0.003)
            if operation == "all_reduce":
                assert tp.all_reduce(torch.full((40,), float(i + tp.rank))).tolist() == [4 * i + 6.0] * 40
            elif operation == "gather":
                gathered = tp.gather(torch.full((1, 20), i * 4 + tp.rank))
                assert gathered is None or gathered.tolist() == [[i * 4 + r for r in range(4) for _ in range(20)]]
            elif operation == "broadcast":
                message = np.full(40, i, np.int32) if tp.rank == 0 else None
                assert tp.broadcast(message).tolist() == [i] * 40
            elif operation == "broadcast_tensor":
                x = torch.full((3, 13), i + tp.rank)  # more than one round
                assert tp.broadcast_tensor(x) is x
                assert x.tolist() == [[i] * 13] * 3
            else:
                assert tp.min(i + tp.rank) == i

    run_ranks(4, program, capacity_bytes=128)


def test_a_rank_that_stays_away_is_named_while_and_after_waiting(run_ranks):
    seen = []
    all_here = threading.Barrier(3)
    given_up = threading.Barrier(3)

    def program(tp):
        all_here.wait()
        if tp.rank == 2:
            given_up.wait(20)
            return
        if tp.rank == 0:

            def watch():
                while not (waiting := tp.waiting_for()):
                    time.sleep(0.001)
                seen.append(waiting)

            watcher = threading.Thread(target=watch)
            watcher.start()
        with pytest.raises(GroupError, match=r"rank [01]: Rank 2 did not answer within 0\.3 s") as e:
            tp.all_reduce(torch.ones(4))
        assert e.value.ranks == (2,)
        given_up.wait(20)
        assert tp.waiting_for() == ()
        with pytest.raises(GroupError, match="closed"):
            tp.all_reduce(torch.ones(4))
        if tp.rank == 0:
            watcher.join()

    run_ranks(3, program, timeout_s=0.3)
    assert 2 in seen[0]


def test_different_collectives_are_distinguished(run_ranks):
    def program(tp):
        with pytest.raises(GroupError, match=r"every rank must run the same program|left the group"):
            tp.all_reduce(torch.ones(4)) if tp.rank == 0 else tp.min(3)

    run_ranks(2, program)


def test_an_idle_follower_outlasts_the_timeout_but_not_the_leader(run_ranks):
    def program(tp):
        if tp.rank == 0:
            time.sleep(0.5)
            tp.broadcast(np.array([7], np.int32))
            return
        assert tp.broadcast(None).tolist() == [7]  # waited longer than timeout_s
        with pytest.raises(GroupError, match="Rank 0 left the group") as e:
            tp.broadcast(None)
        assert e.value.ranks == (0,)

    run_ranks(2, program, timeout_s=0.1)


def test_close_from_another_thread_ends_the_wait(run_ranks):
    ended = threading.Event()

    def program(tp):
        if tp.rank == 1:
            threading.Timer(0.2, tp.close).start()
            with pytest.raises(GroupError, match="was closed on rank 1"):
                tp.broadcast(None)
            ended.set()
        assert ended.wait(20)

    run_ranks(2, program)


def test_a_rank_that_left_is_noticed_at_once(run_ranks):
    def program(tp):
        if tp.rank == 0:
            with pytest.raises(GroupError, match="Rank 1 left the group") as e:
                tp.all_reduce(torch.ones(1))
            assert e.value.ranks == (1,)

    run_ranks(2, program)


def be_in_two_groups(follows, leads, exchange, joined):
    follower = SharedMemoryGroup(follows, rank=1, size=2, exchange=exchange)
    leader = SharedMemoryGroup(leads, rank=0, size=2, exchange=exchange)
    leader.all_reduce(torch.ones(1))
    joined.set()
    time.sleep(600)  # until it is killed
    follower.close()


def test_a_killed_process_is_noticed_at_once(exchange):
    a, b = unique_name(), unique_name()
    context = multiprocessing.get_context("fork")  # a new interpreter would import torch, for seconds
    joined = context.Event()
    victim = context.Process(target=be_in_two_groups, args=(a, b, exchange, joined))
    victim.start()
    try:
        leader = SharedMemoryGroup(a, rank=0, size=2, timeout_s=600.0, exchange=exchange)
        follower = SharedMemoryGroup(b, rank=1, size=2, timeout_s=600.0, exchange=exchange)
        follower.all_reduce(torch.ones(1))
        assert joined.wait(60)
        victim.kill()  # not waited for: a zombie is dead too
        with pytest.raises(GroupError, match="Rank 1 died") as e:
            leader.all_reduce(torch.ones(1))
        assert e.value.ranks == (1,)
        with pytest.raises(GroupError, match="Rank 0 died") as e:
            follower.broadcast(None)
        assert e.value.ranks == (0,)
        leader.close()
        leader.close()
        follower.close()
    finally:
        victim.kill()
        victim.join()


def test_joining_alone_names_the_others_and_leaves_no_file():
    with pytest.raises(GroupError, match=r"Ranks 1, 2 did not answer within 0\.2 s") as e:
        SharedMemoryGroup(unique_name(), rank=0, size=3, join_timeout_s=0.2)
    assert e.value.ranks == (1, 2)
    with pytest.raises(GroupError, match="Rank 0 did not make") as e:
        SharedMemoryGroup(unique_name(), rank=1, size=3, join_timeout_s=0.2)
    assert e.value.ranks == (0,)


def test_a_crashed_groups_file_is_replaced():
    name = unique_name()
    path = shared_file.FOLDER / f"tramontane-{name}"
    facts = (shared_file.MAGIC, 2, 1024)
    leftover = shared_file.create(path, 8192, facts)
    # The leader that made it is dead: its pid belongs to a process that started at another time.
    memoryview(leftover).cast("q")[shared_file.line(0) + shared_file.BORN] -= 1
    results = [None, None]

    def join(rank):
        group = SharedMemoryGroup(name, rank=rank, size=2, join_timeout_s=20.0, capacity_bytes=1024)
        results[rank] = group.all_reduce(torch.ones(3)).tolist()
        group.close()

    follower = threading.Thread(target=join, args=(1,))
    follower.start()  # meets the leftover first
    time.sleep(0.05)
    join(0)
    follower.join()
    assert results == [[2.0] * 3] * 2


def test_another_size_is_refused():
    name = unique_name()
    path = shared_file.FOLDER / f"tramontane-{name}"
    shared_file.create(path, 8192, (shared_file.MAGIC, 4, 1024))
    try:
        with pytest.raises(GroupError, match="another size or version"):
            SharedMemoryGroup(name, rank=1, size=2, capacity_bytes=1024)
    finally:
        path.unlink()


def test_compiled_collectives_need_all_ranks():
    """A rank without compiled kernels takes part, and nobody waits to be woken by it."""
    native_library("avx2")
    name, sums = unique_name(), [None, None]

    def join(rank):
        exchange = native_exchange() if rank == 0 else None
        group = SharedMemoryGroup(name, rank=rank, size=2, join_timeout_s=20.0, exchange=exchange)
        assert not group.is_compiled
        sums[rank] = group.all_reduce(torch.ones(3)).tolist()
        group.close()

    follower = threading.Thread(target=join, args=(1,))
    follower.start()
    join(0)
    follower.join()
    assert sums == [[2.0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_sums_have_the_bits_of_the_specification(dtype):
    """Where an order or a rounding differed, some of these values would show it; odd counts end within a vector."""
    native_library("avx2")
    num_ranks, num_values = 3, 4099

    def parts():
        made = [part(rank, num_values, dtype=dtype) * 10.0 ** (rank - 1) for rank in range(num_ranks)]
        made[1][:4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
        return made

    results = [
        rank_threads.run_ranks(
            num_ranks, lambda tp: tp.all_reduce(parts()[tp.rank]), capacity_bytes=4096, exchange=exchange
        )
        for exchange in (None, native_exchange())
    ]
    specified, compiled = ([x.view(torch.uint8).tolist() for x in result] for result in results)
    assert compiled == specified
    assert compiled[1:] == compiled[:1] * (num_ranks - 1)


def test_a_sleeping_rank_is_woken():
    """It sleeps until another arrives. Were nobody to wake it, each round would take a slice of 50 ms."""
    native_library("avx2")

    def program(tp):
        waits = []
        for _ in range(20):
            if tp.rank == 0:
                time.sleep(0.003)  # long enough for the other one to sleep
            began = time.monotonic()
            tp.all_reduce(torch.ones(8))
            waits.append(time.monotonic() - began)
        return waits

    _, waits = rank_threads.run_ranks(2, program)
    # Not all: on a busy machine one may not have slept yet, and another may wait for a core.
    assert sum(0.002 < wait_s < 0.03 for wait_s in waits) >= 3, waits


def test_all_reduces_are_counted_with_the_seconds_they_take(run_ranks):
    def program(tp):
        if tp.rank == 0:
            time.sleep(0.05)
        for _ in range(3):
            tp.all_reduce(torch.ones(4))
        return tp.state.num_all_reduces, tp.state.all_reduces_ns / 1e9

    _, (num, seconds) = run_ranks(2, program)
    assert num == 3
    assert 0.04 < seconds < 5.0
