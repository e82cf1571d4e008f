"""Growth, release of blocks that the window has passed, prefix reuse and rollback, in numbers that can be checked by hand."""

import pytest

from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sequence import BlockSequence
from workers.protocol import root_hash


def sequence_of(token_ids, *, adapter=None):
    return BlockSequence(list(token_ids), root_hash(adapter))


def make_manager(num_blocks=64, *, block_size=4, window=None, caching=True):
    """window: a tuple has one for each group of layers."""
    return KVCacheManager(
        num_blocks=num_blocks,
        block_size=block_size,
        windows=window if isinstance(window, tuple) else (window,),
        enable_prefix_caching=caching,
    )


def compute(manager, sequence, num_tokens):
    """Plays the steps in which `num_tokens` further tokens are computed, one by one."""
    for _ in range(num_tokens):
        assert manager.grow(sequence, 1)
        manager.commit(sequence, 1)
        if sequence.num_computed_tokens == sequence.num_tokens:
            sequence.token_ids.append(7)


def prefill(manager, sequence):
    prefix = manager.find_prefix(sequence, sequence.num_tokens - 1)
    num_new = sequence.num_tokens - prefix.num_blocks * manager.block_size
    assert manager.start(sequence, prefix, num_new)
    manager.commit(sequence, num_new)
    return prefix.num_blocks


def test_a_sequence_grows_by_whole_blocks():
    manager = make_manager()
    sequence = sequence_of(range(6))
    prefill(manager, sequence)
    sequence.token_ids.append(7)
    assert len(sequence.block_ids) == 2
    compute(manager, sequence, 2)
    assert len(sequence.block_ids) == 2
    compute(manager, sequence, 1)
    assert len(sequence.block_ids) == 3
    manager.free(sequence)
    assert manager.pool.num_used == 0


def test_the_worked_example_of_the_window():
    """block_size 4, W = 6: at query 11 block 0 is out of sight, block 1 is not."""
    manager = make_manager(window=6)
    sequence = sequence_of(range(11))
    prefill(manager, sequence)
    sequence.token_ids.append(7)
    assert manager.grow(sequence, 1)
    assert sequence.block_ids[0] == NULL_BLOCK
    assert sequence.block_ids[1] != NULL_BLOCK


@pytest.mark.parametrize("window", [1, 4, 6, 9])
def test_held_blocks_stop_growing_at_the_window(window):
    manager = make_manager(window=window)
    sequence = sequence_of(range(3))
    prefill(manager, sequence)
    sequence.token_ids.append(7)
    compute(manager, sequence, 20 * window + 40)
    assert manager.pool.num_used <= -(-(window - 1) // 4) + 1
    manager.free(sequence)
    assert manager.pool.num_used == 0


def test_max_blocks_held_bounds_what_is_really_held():
    for window in (None, 1, 5, 8, 17, (None, 5), (8, 1), (None, 17, 17)):
        for chunk in (1, 3, 8, 30):
            manager = make_manager(window=window)
            sequence = sequence_of(range(60))
            assert manager.start(sequence, manager.find_prefix(sequence, 0), chunk)
            most = manager.pool.num_used
            for computed in range(chunk, 60, chunk):
                manager.commit(sequence, chunk)
                assert manager.grow(sequence, min(chunk, 60 - computed))
                most = max(most, manager.pool.num_used)
            assert most <= manager.max_blocks_held(60, chunk), (window, chunk)


def test_a_prefix_is_shared_and_one_token_is_left_to_compute():
    manager = make_manager()
    first = sequence_of(range(8))
    prefill(manager, first)
    again = sequence_of(range(8))
    assert prefill(manager, again) == 1, "8 tokens are 2 full blocks, but the last token must be computed"
    assert again.block_ids[0] == first.block_ids[0]
    longer = sequence_of(range(9))
    assert prefill(manager, longer) == 2
    for sequence in (first, again, longer):
        manager.free(sequence)
    assert manager.pool.num_used == 0


def test_a_different_beginning_shares_nothing():
    manager = make_manager()
    prefill(manager, sequence_of(range(8)))
    assert prefill(manager, sequence_of([9, *range(1, 8)])) == 0


def test_caching_can_be_off():
    manager = make_manager(caching=False)
    prefill(manager, sequence_of(range(8)))
    assert prefill(manager, sequence_of(range(8))) == 0
    assert not manager.pool.cached_hashes


def test_with_a_window_only_the_blocks_in_sight_must_be_cached():
    """block_size 4, W = 5: a prefix of 5 blocks needs the block that holds tokens 16-19 only (query 20 sees 16..20)."""
    manager = make_manager(window=5)
    first = sequence_of(range(20))
    prefill(manager, first)
    manager.free(first)
    # Evict every block but the last of the prefix.
    for block_hash in first.block_hashes[:4]:
        if (block_id := manager.pool.find(block_hash)) is not None:
            manager.pool.uncache(block_id)
    again = sequence_of(range(24))
    assert prefill(manager, again) == 5
    assert list(again.block_ids[:4]) == [NULL_BLOCK] * 4
    assert again.block_ids[4] != NULL_BLOCK
    manager.free(again)
    assert manager.pool.num_used == 0


def test_start_refuses_without_side_effects_when_blocks_run_out():
    manager = make_manager(num_blocks=3)
    first = sequence_of(range(8))
    prefill(manager, first)
    second = sequence_of(range(20, 29))
    assert not manager.start(second, manager.find_prefix(second, 0), 9)
    assert manager.pool.num_used == 2
    assert not second.block_ids


def test_cached_but_free_blocks_count_as_taken_when_revived():
    manager = make_manager(num_blocks=3)
    first = sequence_of(range(8))
    prefill(manager, first)
    manager.free(first)
    longer = sequence_of(range(16))
    prefix = manager.find_prefix(longer, longer.num_tokens - 1)
    assert prefix.num_blocks == 2
    assert not manager.start(longer, prefix, 8), "2 revived and 2 new blocks do not fit into 3"
    assert manager.pool.num_used == 0


def test_two_adapters_never_share_a_block():
    manager = make_manager()
    for adapter in (None, "law", "medicine"):
        assert prefill(manager, sequence_of(range(9), adapter=adapter)) == 0
    for adapter in (None, "law", "medicine"):
        assert prefill(manager, sequence_of(range(9), adapter=adapter)) == 2
    assert len(manager.pool.cached_hashes) == 6
