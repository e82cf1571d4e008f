"""Layers with different windows: each group has its own blocks, from one pool, and a prefix must be there for all of them."""

import random

import pytest

from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sequence import BlockSequence

SIZE = 4
WINDOWS = [(None, 6), (None, 6, 6), (9, 1), (17, 6, 3), (None,), (5,)]


def make_manager(windows, num_blocks=64):
    return KVCacheManager(num_blocks=num_blocks, block_size=SIZE, windows=windows, enable_prefix_caching=True)


def play(manager, tokens, *, chunk):
    """A prompt computed in chunks, then freed. False if it does not fit."""
    sequence = BlockSequence(list(tokens))
    prefix = manager.find_prefix(sequence, sequence.num_tokens - 1)
    num_new = min(chunk, sequence.num_tokens - prefix.num_blocks * SIZE)
    if not manager.start(sequence, prefix, num_new):
        return False
    manager.commit(sequence, num_new)
    while sequence.num_pending_tokens:
        num_new = min(chunk, sequence.num_pending_tokens)
        if not manager.grow(sequence, num_new):
            break
        manager.commit(sequence, num_new)
    manager.free(sequence)
    return True


def test_only_the_blocks_of_layers_without_a_window_grow():
    """By hand: of 40 tokens, 10 blocks in the first group. Query 40 sees keys 35..40 with W = 6: blocks 8, 9 and the next one, 10."""
    manager = make_manager((None, 6))
    sequence = BlockSequence(list(range(3)))
    assert manager.start(sequence, manager.find_prefix(sequence, 0), 3)
    manager.commit(sequence, 3)
    while sequence.num_computed_tokens < 40:
        sequence.token_ids.append(7)
        assert manager.grow(sequence, 1)
        manager.commit(sequence, 1)
    sequence.token_ids.append(7)
    assert manager.grow(sequence, 1)
    full, windowed = sequence.tables
    assert len(full.block_ids) == len(windowed.block_ids) == 11
    assert NULL_BLOCK not in full.block_ids
    assert [i for i, block_id in enumerate(windowed.block_ids) if block_id != NULL_BLOCK] == [8, 9, 10]
    assert sequence.num_held_blocks == manager.pool.num_used == 11 + 3
    manager.free(sequence)
    assert manager.pool.num_used == 0


def test_groups_share_no_block():
    manager = make_manager((None, 6, 6))
    for first in (0, 50):
        sequence = BlockSequence(list(range(first, first + 9)))
        assert manager.start(sequence, manager.find_prefix(sequence, 8), 9)
        manager.commit(sequence, 9)
    assert manager.pool.num_used == 2 * 3 * 3
    again = BlockSequence(list(range(9)))
    prefix = manager.find_prefix(again, 8)
    # Query 8 sees 3..8 with W = 6: all of block 0 but its last token is out of sight, so it is still needed.
    assert prefix.num_blocks == 2
    assert len({block_id for block_ids in prefix.block_ids for block_id in block_ids}) == 6


def test_a_prefix_that_one_group_lost_is_shorter_for_all():
    manager = make_manager((None, 6))
    assert play(manager, range(40), chunk=40)
    again = BlockSequence(list(range(40)))
    assert manager.find_prefix(again, 39).num_blocks == 9
    # A prefix of 9 blocks needs blocks 7 and 8 of the group with the window: query 36 sees 31..36. One of 7 blocks needs 5 and 6.
    block_id = manager.pool.find(again.block_hashes[7], 1)
    manager.pool.uncache(block_id)
    prefix = manager.find_prefix(again, 39)
    assert prefix.num_blocks == 7
    assert [b != NULL_BLOCK for b in prefix.block_ids[1]] == [False] * 5 + [True] * 2
    manager.pool.uncache(manager.pool.find(again.block_hashes[3]))
    assert manager.find_prefix(again, 39).num_blocks == 3


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_the_longest_prefix_is_found(windows, seed):
    """Against its definition, in a small cache from which prompts evict each other's blocks."""
    rng = random.Random(seed)
    manager = make_manager(windows, num_blocks=14 * len(windows))
    num_found = 0
    for _ in range(40):
        tokens = [rng.randrange(2)] * rng.randrange(1, 16) + [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
        sequence = BlockSequence(list(tokens))
        prefix = manager.find_prefix(sequence, len(tokens) - 1)
        lengths = [n for n in range(len(tokens)) if n * SIZE < len(tokens) and is_cached(manager, sequence, n)]
        assert prefix.num_blocks == max(lengths)
        num_found += prefix.num_blocks
        play(manager, tokens, chunk=rng.randrange(1, 20))
        assert manager.pool.num_used == 0
    assert num_found > 20


def is_cached(manager, sequence, num_blocks):
    """Every block that a query after the prefix can see, in every group, and with a window of 1 the last block."""
    for group, window in enumerate(manager.windows):
        for i in range(num_blocks):
            last_token, next_query = (i + 1) * SIZE - 1, num_blocks * SIZE
            is_seen = window is None or next_query - last_token < max(window, 2)
            if is_seen and manager.pool.find(sequence.block_hashes[i], group) is None:
                return False
    return True


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("num_blocks", [1, 5, 12, 40])
def test_the_longest_sequence_fits_and_no_longer_one(windows, num_blocks):
    manager = make_manager(windows, num_blocks)
    longest = manager.longest_sequence(200, 8)
    assert manager.max_blocks_held(longest, 8) <= num_blocks or longest == 0
    assert longest == 200 or manager.max_blocks_held(longest + 1, 8) > num_blocks


def test_start_refuses_without_side_effects():
    manager = make_manager((None, 6), num_blocks=7)
    sequence = BlockSequence(list(range(13)))
    assert not manager.start(sequence, manager.find_prefix(sequence, 12), 13), "4 blocks in each of two groups"
    assert manager.pool.num_used == 0
    assert not sequence.tables
    assert manager.start(sequence, manager.find_prefix(sequence, 12), 12)
    assert manager.pool.num_used == 6
    sequence.token_ids.append(1)
    manager.commit(sequence, 12)
    # It needs two blocks, and one is free. What the window has passed is released first: block 0, as query 12 sees 7..12.
    assert manager.grow(sequence, 1)
    assert manager.pool.num_used == 7
