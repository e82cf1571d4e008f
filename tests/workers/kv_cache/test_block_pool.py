"""Allocation, sharing and eviction of block numbers."""

import random

import pytest

from workers.kv_cache.block_pool import NULL_BLOCK, BlockPool
from workers.protocol import hash_block


def test_the_null_block_is_never_allocated_and_never_counted():
    pool = BlockPool(3)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    pool.touch([NULL_BLOCK])
    pool.release([NULL_BLOCK])
    assert pool.num_free == 0


def test_released_content_is_found_until_the_block_is_used_again():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.cache(first, b"first")
    pool.cache(second, b"second")
    pool.release([first, second])
    assert pool.num_free == 2
    assert pool.find(b"first") == first
    pool.touch([first])
    assert pool.num_free == 1
    assert pool.allocate(1) == [second], "the only free block"
    assert pool.find(b"second") is None
    assert pool.find(b"first") == first


def test_eviction_takes_uncached_blocks_first_then_the_least_recently_released():
    pool = BlockPool(4)
    a, b, c, d = pool.allocate(4)
    for block, block_hash in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.cache(block, block_hash)
    pool.release([b])
    pool.release([d])
    pool.release([a])
    pool.release([c])
    assert pool.allocate(4) == [d, b, a, c]


def test_a_shared_block_is_free_only_when_its_last_reference_is_released():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    assert not pool.is_shared(block)
    pool.touch([block])
    assert pool.is_shared(block)
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([block])


def test_of_two_blocks_with_one_content_the_first_is_found():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.cache(a, b"x")
    pool.cache(b, b"x")
    pool.release([b])
    assert pool.allocate(1) == [b]
    assert pool.find(b"x") == a, "evicting the other must not forget the first"


def test_an_uncached_block_is_not_found_and_stays_used():
    pool = BlockPool(2)
    block, other = pool.allocate(2)
    pool.cache(block, b"x")
    pool.uncache(block)
    pool.uncache(block)
    assert pool.find(b"x") is None
    assert pool.num_free == 0
    pool.cache(other, b"x")
    pool.uncache(block)
    assert pool.find(b"x") == other, "another block with this content stays cached"


def test_a_hash_stands_for_the_whole_prefix():
    tokens = list(range(8))
    first = hash_block(b"", tokens[:4])
    assert hash_block(first, tokens[4:]) != hash_block(b"", tokens[4:])
    assert hash_block(b"", tokens[:4]) == first
    assert hash_block(b"", [0, 1, 2, 4]) != first


def test_random_use_never_loses_a_block():
    rng = random.Random(0)
    pool = BlockPool(20)
    held = []
    for step in range(2000):
        if held and rng.random() < 0.5:
            pool.release([held.pop(rng.randrange(len(held)))])
        elif pool.num_free:
            held += pool.allocate(1)
            pool.cache(held[-1], str(step % 37).encode())
        found = pool.find(str(rng.randrange(37)).encode())
        if found is not None:
            pool.touch([found])
            held.append(found)
        assert pool.num_used == len(set(held))
    pool.release(held)
    assert pool.num_free == 20
