"""The index against its naive definition, and against the cache manager whose decisions it predicts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.prefix_index import PrefixIndex, window_blocks
from workers.engine.request import Request
from workers.kv_cache.manager import KVCacheManager
from workers.protocol import CacheEvents, SamplingParams, hash_block

NAMES = [bytes([i]) for i in range(12)]


def index_of(*held):
    index = PrefixIndex()
    for slot, blocks in enumerate(held):
        index.add(slot)
        index.apply(slot, CacheEvents(stored=list(blocks), reset=True))
    return index


def naive(hashes, held, window):
    """The longest prefix whose last `window` blocks are all held."""
    fits = [n for n in range(1, len(hashes) + 1) if held.issuperset(hashes[max(0, n - (window or n)) : n])]
    return max(fits, default=0) if window else next((i for i, h in enumerate(hashes) if h not in held), len(hashes))


def test_a_match_is_the_leading_run_without_a_window():
    index = index_of(NAMES[:3], NAMES[1:4], [NAMES[0], NAMES[2]], [])
    assert index.match(NAMES[:4], window_blocks=None).tolist() == [3, 0, 1, 0]


def test_the_worked_example_of_the_window():
    """block_size 4, W = 6: two blocks before the query are enough, so block 0 may be gone."""
    assert window_blocks(6, 4) == 2
    index = index_of(NAMES[1:3], [NAMES[0]], [NAMES[0], NAMES[2]], NAMES[:4])
    assert index.match(NAMES[:4], window_blocks=2).tolist() == [3, 1, 1, 4]


@pytest.mark.parametrize(
    ("window", "block_size", "expected"), [(None, 16, None), (4096, 16, 256), (1, 4, 1), (5, 4, 1)]
)
def test_window_blocks(window, block_size, expected):
    assert window_blocks(window, block_size) == expected


def test_events_apply_in_their_order():
    index = index_of(NAMES[:4])
    index.apply(0, CacheEvents(stored=[NAMES[1]], evicted=[NAMES[1], NAMES[3]]))
    assert index.match(NAMES[:4], window_blocks=None).tolist() == [3], "evicted comes before stored"
    index.apply(0, CacheEvents(stored=[NAMES[0]], reset=True))
    assert index.match(NAMES[:4], window_blocks=None).tolist() == [1], "a reset voids what was known"
    assert index.num_held(0) == index.num_blocks == 1


def test_news_of_blocks_already_known_or_never_known_changes_nothing():
    index = index_of(NAMES[:2], NAMES[:1])
    index.apply(0, CacheEvents(stored=NAMES[:2], evicted=[NAMES[7]]))
    index.apply(1, CacheEvents(evicted=[NAMES[1]]))
    assert index.match(NAMES[:2], window_blocks=None).tolist() == [2, 1]


def test_a_removed_slot_leaves_nothing_and_can_be_taken_again():
    index = index_of(NAMES[:3], NAMES[:2])
    index.remove(0)
    assert index.match(NAMES[:3], window_blocks=None).tolist() == [0, 2]
    index.remove(1)
    index.remove(1)
    assert index.num_blocks == 0
    index.add(0)
    assert index.match(NAMES[:3], window_blocks=None).tolist() == [0, 0]


events = st.tuples(
    st.integers(0, 5),
    st.lists(st.sampled_from(NAMES), max_size=8),
    st.lists(st.sampled_from(NAMES), max_size=4),
    st.integers(0, 9).map(lambda n: n == 0),
)


@settings(deadline=None)
@given(
    st.lists(events, max_size=30),
    st.lists(st.sampled_from(NAMES), max_size=12),
    st.sampled_from([None, 1, 2, 3, 5, 20]),
)
def test_matches_are_as_defined_after_any_events(history, hashes, window):
    index, held = index_of(*[[]] * 6), [set() for _ in range(6)]
    for slot, stored, evicted, reset in history:
        index.apply(slot, CacheEvents(stored=stored, evicted=evicted, reset=reset))
        held[slot] = (set() if reset else held[slot] - set(evicted)) | set(stored)
    assert index.match(hashes, window_blocks=window).tolist() == [naive(hashes, h, window) for h in held]
    assert index.num_blocks == len(set().union(*held))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([None, 1, 2, 5, 6, 9, 17]), st.sampled_from([1, 2, 4]))
def test_it_predicts_what_the_cache_manager_finds(seed, window, block_size):
    """Real managers play prompts that share prefixes, short of blocks, and tell what they store and evict."""
    rng = random.Random(seed)
    index, managers = PrefixIndex(), []
    for slot in range(3):
        index.add(slot)
        managers.append(
            KVCacheManager(num_blocks=24, block_size=block_size, sliding_window=window, enable_prefix_caching=True)
        )
    for number in range(25):
        stem = [rng.randrange(2)] * rng.randrange(1, 16)
        tokens = stem + [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
        hashes: list[bytes] = []
        for i in range((len(tokens) - 1) // block_size):
            hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[i * block_size : (i + 1) * block_size]))
        matched = index.match(hashes, window_blocks=window_blocks(window, block_size))
        found = [len(m.find_prefix(make_request(tokens))) for m in managers]
        assert matched.tolist() == found, f"prompt {number} of {len(tokens)} tokens"
        slot = rng.randrange(3)
        play(managers[slot], make_request(tokens), chunk=rng.randrange(1, 9))
        news = managers[slot].pool.take_events()
        if news is not None:
            index.apply(slot, news)


def make_request(tokens):
    return Request(
        request_id="r",
        sampling=SamplingParams(max_tokens=8, seed=0),
        num_prompt_tokens=len(tokens),
        token_ids=list(tokens),
        arrival=0,
    )


def play(manager, request, *, chunk):
    """A prompt computed in chunks, then let go."""
    prefix = manager.find_prefix(request)
    num_new = min(chunk, request.num_tokens - len(prefix) * manager.block_size)
    assert manager.start(request, prefix, num_new)
    while True:
        request.num_computed_tokens += num_new
        manager.commit(request)
        num_new = min(chunk, request.num_tokens - request.num_computed_tokens)
        if num_new == 0:
            break
        assert manager.grow(request, num_new)
    manager.free(request)
