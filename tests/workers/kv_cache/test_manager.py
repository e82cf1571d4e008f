"""Growth, release behind the window and prefix reuse, in numbers that can be checked by hand."""

import pytest

from workers.engine.request import Request
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.manager import KVCacheManager
from workers.protocol import SamplingParams


def make_request(token_ids, *, name="r"):
    sampling = SamplingParams(max_tokens=1000, seed=0)
    return Request(
        request_id=name, sampling=sampling, num_prompt_tokens=len(token_ids), token_ids=list(token_ids), arrival=0
    )


def make_manager(num_blocks=64, *, block_size=4, window=None, caching=True):
    return KVCacheManager(
        num_blocks=num_blocks, block_size=block_size, sliding_window=window, enable_prefix_caching=caching
    )


def compute(manager, request, num_tokens):
    """Plays the steps in which `num_tokens` further tokens are computed, one by one."""
    for _ in range(num_tokens):
        assert manager.grow(request, 1)
        request.num_computed_tokens += 1
        manager.commit(request)
        if request.num_computed_tokens == request.num_tokens:
            request.append(7)


def prefill(manager, request):
    prefix = manager.find_prefix(request)
    num_new = request.num_tokens - len(prefix) * manager.block_size
    assert manager.start(request, prefix, num_new)
    request.num_computed_tokens += num_new
    manager.commit(request)
    return len(prefix)


def test_a_sequence_grows_by_whole_blocks():
    manager = make_manager()
    request = make_request(range(6))
    prefill(manager, request)
    request.append(7)
    assert len(request.block_ids) == 2
    compute(manager, request, 2)
    assert len(request.block_ids) == 2
    compute(manager, request, 1)
    assert len(request.block_ids) == 3
    manager.free(request)
    assert manager.pool.num_used == 0


def test_the_worked_example_of_the_window():
    """block_size 4, W = 6: at query 11 block 0 is out of sight, block 1 is not."""
    manager = make_manager(window=6)
    request = make_request(range(11))
    prefill(manager, request)
    request.append(7)
    assert manager.grow(request, 1)
    assert request.block_ids[0] == NULL_BLOCK
    assert request.block_ids[1] != NULL_BLOCK


@pytest.mark.parametrize("window", [1, 4, 6, 9])
def test_held_blocks_stop_growing_at_the_window(window):
    manager = make_manager(window=window)
    request = make_request(range(3))
    prefill(manager, request)
    request.append(7)
    compute(manager, request, 20 * window + 40)
    assert manager.pool.num_used <= -(-(window - 1) // 4) + 1
    manager.free(request)
    assert manager.pool.num_used == 0


def test_max_blocks_held_bounds_what_is_really_held():
    for window in (None, 1, 5, 8, 17):
        for chunk in (1, 3, 8, 30):
            manager = make_manager(window=window)
            request = make_request(range(60))
            assert manager.start(request, [], chunk)
            most = manager.pool.num_used
            for computed in range(chunk, 60, chunk):
                request.num_computed_tokens = computed
                assert manager.grow(request, min(chunk, 60 - computed))
                most = max(most, manager.pool.num_used)
            assert most <= manager.max_blocks_held(60, chunk), (window, chunk)


def test_a_prefix_is_shared_and_one_token_is_left_to_compute():
    manager = make_manager()
    first = make_request(range(8))
    prefill(manager, first)
    again = make_request(range(8), name="again")
    assert prefill(manager, again) == 1, "8 tokens are 2 full blocks, but the last token must be computed"
    assert again.block_ids[0] == first.block_ids[0]
    longer = make_request(range(9), name="longer")
    assert prefill(manager, longer) == 2
    assert longer.num_cached_tokens == 8
    for request in (first, again, longer):
        manager.free(request)
    assert manager.pool.num_used == 0


def test_a_different_beginning_shares_nothing():
    manager = make_manager()
    prefill(manager, make_request(range(8)))
    assert prefill(manager, make_request([9, *range(1, 8)], name="other")) == 0


def test_caching_can_be_off():
    manager = make_manager(caching=False)
    prefill(manager, make_request(range(8)))
    assert prefill(manager, make_request(range(8), name="again")) == 0
    assert manager.prefix_queries_total == 0


def test_with_a_window_only_the_blocks_in_sight_must_be_cached():
    """block_size 4, W = 5: a prefix of 5 blocks needs the block that holds tokens 16-19 only (query 20 sees 16..20)."""
    manager = make_manager(window=5)
    first = make_request(range(20))
    prefill(manager, first)
    manager.free(first)
    # Evict every block but the last of the prefix.
    for h in first.block_hashes[:4]:
        manager.pool._cached.pop(h, None)
    again = make_request(range(24), name="again")
    assert prefill(manager, again) == 5
    assert again.block_ids[:4] == [NULL_BLOCK] * 4
    assert again.block_ids[4] != NULL_BLOCK
    assert again.num_cached_tokens == 20
    manager.free(again)
    assert manager.pool.num_used == 0


def test_start_refuses_without_side_effects_when_blocks_run_out():
    manager = make_manager(num_blocks=3)
    first = make_request(range(8))
    prefill(manager, first)
    second = make_request(range(20, 29), name="second")
    assert not manager.start(second, [], 9)
    assert manager.pool.num_used == 2
    assert second.block_ids == []


def test_cached_but_free_blocks_count_as_taken_when_revived():
    manager = make_manager(num_blocks=3)
    first = make_request(range(8))
    prefill(manager, first)
    manager.free(first)
    longer = make_request(range(16), name="longer")
    prefix = manager.find_prefix(longer)
    assert len(prefix) == 2
    assert not manager.start(longer, prefix, 8), "2 revived and 2 new blocks do not fit into 3"
    assert manager.pool.num_used == 0
