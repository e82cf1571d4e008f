"""The kernels' threads, threads.cpp: right products while others compute too, and in the child of a fork."""

import os
import threading

import pytest
import torch
from support.native import native_library

from workers.native.matrices import PackedMatrix, pack_dense

NUM_ROUNDS = 200


@pytest.fixture
def matrix():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    weight = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    yield pack_dense(native_library("avx2"), weight)
    torch.set_num_threads(before)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(3, 256, generator=torch.Generator().manual_seed(seed))


def alone(matrix: PackedMatrix, seed: int) -> torch.Tensor:
    """Without other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return matrix.multiply(rows(seed))
    finally:
        torch.set_num_threads(before)


def test_callers_at_the_same_time_get_their_own_products(matrix):
    expected = [alone(matrix, seed) for seed in range(4)]
    wrong: list[int] = []

    def call(seed: int) -> None:
        torch.set_num_threads(3)
        x = rows(seed)
        wrong.extend(seed for _ in range(NUM_ROUNDS) if not torch.equal(matrix.multiply(x), expected[seed]))

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_child_of_a_fork_computes_without_its_parents_threads(matrix):
    expected = alone(matrix, 0)
    assert torch.equal(matrix.multiply(rows(0)), expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(matrix.multiply(rows(0)), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(matrix.multiply(rows(0)), expected)
