"""The index compared with its naive definition, and with the cache manager whose decisions it predicts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.load_balancing.prefix_index import PrefixIndex, window_blocks
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sequence import BlockSequence
from workers.protocol import CacheEvents, hash_block

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
    """block_size 4, W = 6: two blocks before the query suffice, so block 0 may be evicted."""
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
    assert index.match(NAMES[:4], window_blocks=None).tolist() == [1], "a reset forgets earlier blocks"
    assert index.num_held(0) == index.num_blocks == 1


def test_events_for_known_or_unknown_blocks_change_nothing():
    index = index_of(NAMES[:2], NAMES[:1])
    index.apply(0, CacheEvents(stored=NAMES[:2], evicted=[NAMES[7]]))
    index.apply(1, CacheEvents(evicted=[NAMES[1]]))
    assert index.match(NAMES[:2], window_blocks=None).tolist() == [2, 1]


def test_a_removed_slot_leaves_nothing_and_can_be_added_again():
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


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(None,), (1,), (2,), (5,), (6,), (9,), (17,), (None, 5), (17, 6, 6)]),
    st.sampled_from([1, 2, 4]),
)
def test_it_predicts_what_the_cache_manager_finds(seed, windows, block_size):
    """Real managers with few blocks run prompts that share prefixes, and report what they store and evict.

    Where layers have different windows, they report of those with the widest one; the others may have lost more.
    """
    rng = random.Random(seed)
    index, managers = PrefixIndex(), []
    for slot in range(3):
        index.add(slot)
        managers.append(
            KVCacheManager(
                num_blocks=24 * len(windows), block_size=block_size, windows=windows, enable_prefix_caching=True
            )
        )
    for number in range(25):
        stem = [rng.randrange(2)] * rng.randrange(1, 16)
        tokens = stem + [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
        hashes: list[bytes] = []
        for i in range((len(tokens) - 1) // block_size):
            hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[i * block_size : (i + 1) * block_size]))
        matched = index.match(hashes, window_blocks=window_blocks(windows[0], block_size))
        found = [m.find_prefix(BlockSequence(tokens), len(tokens) - 1).num_blocks for m in managers]
        same = matched.tolist() == found if len(windows) == 1 else all(matched >= found)
        assert same, f"prompt {number} of {len(tokens)} tokens: {matched} predicted, {found} found"
        slot = rng.randrange(3)
        play(managers[slot], BlockSequence(tokens), chunk=rng.randrange(1, 9))
        changes = managers[slot].pool.take_events()
        if changes is not None:
            index.apply(slot, changes)


def play(manager, sequence, *, chunk):
    """A prompt computed in chunks, then freed."""
    prefix = manager.find_prefix(sequence, sequence.num_tokens - 1)
    num_new = min(chunk, sequence.num_tokens - prefix.num_blocks * manager.block_size)
    assert manager.start(sequence, prefix, num_new)
    while True:
        manager.commit(sequence, num_new)
        num_new = min(chunk, sequence.num_pending_tokens)
        if num_new == 0:
            break
        assert manager.grow(sequence, num_new)
    manager.free(sequence)
