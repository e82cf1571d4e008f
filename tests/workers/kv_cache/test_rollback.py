"""Appending, computing and rolling back leaves a sequence as if nothing had been appended, and every cached block true."""

import copy
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv_cache.block_pool import NULL_BLOCK
from workers.kv_cache.manager import KVCacheManager
from workers.kv_cache.sequence import BlockSequence
from workers.protocol import hash_block

BLOCK_SIZE = 4


def make_manager(*, windows=(None,), caching=True, num_blocks=64):
    return KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, windows=windows, enable_prefix_caching=caching)


def start(manager, tokens):
    """A sequence whose tokens are all computed but the last, as between two steps."""
    sequence = BlockSequence(list(tokens))
    prefix = manager.find_prefix(sequence, sequence.num_tokens - 1)
    num_new = sequence.num_tokens - 1 - prefix.num_blocks * BLOCK_SIZE
    assert manager.start(sequence, prefix, num_new)
    manager.commit(sequence, num_new)
    return sequence


def append_and_compute(manager, sequence, tokens):
    """One step that computes the last token and, speculatively, all of `tokens` but the last."""
    sequence.token_ids += tokens
    num_new = sequence.num_pending_tokens - 1
    assert manager.grow(sequence, num_new)
    manager.commit(sequence, num_new)


def state(sequence):
    return {f.name: copy.deepcopy(getattr(sequence, f.name)) for f in fields(sequence)}


def test_the_worked_example():
    manager = make_manager()
    sequence = BlockSequence(list(range(10)))
    assert manager.start(sequence, manager.find_prefix(sequence, 0), 10)
    manager.commit(sequence, 10)
    first, second, third = sequence.block_ids
    manager.truncate(sequence, 6)
    assert (sequence.token_ids, sequence.num_computed_tokens) == ([0, 1, 2, 3, 4, 5], 6)
    assert (list(sequence.block_ids), sequence.num_cached_blocks) == ([first, second], 1)
    assert manager.pool.is_free(third)
    assert [manager.pool.find(h) for h in hashes_of(range(8))] == [first, None]


def test_a_shared_block_is_given_back_and_its_tokens_are_computed_again():
    manager = make_manager()
    sequence = BlockSequence(list(range(10)))
    assert manager.start(sequence, manager.find_prefix(sequence, 0), 10)
    manager.commit(sequence, 10)
    other = start(manager, range(9))
    assert other.block_ids[1] == sequence.block_ids[1]
    manager.truncate(sequence, 6)
    assert (sequence.num_tokens, sequence.num_computed_tokens) == (6, 4)
    assert sequence.block_ids == other.block_ids[:1]
    assert manager.pool.find(hashes_of(range(8))[1]) == other.block_ids[1], (
        "the other sequence still holds this content"
    )
    append_and_compute(manager, sequence, [90, 91, 92])
    assert sequence.block_ids[1] != other.block_ids[1]


def test_a_window_that_has_passed_a_block_does_not_come_back():
    manager = make_manager(windows=(6,))
    sequence = start(manager, range(12))
    append_and_compute(manager, sequence, [50])
    assert sequence.block_ids[0] == NULL_BLOCK
    before = state(sequence)
    with pytest.raises(ValueError, match="sliding window has released"):
        manager.truncate(sequence, 8)
    assert state(sequence) == before, "a refused rollback changes nothing"
    manager.truncate(sequence, 11)


TOKENS = st.integers(0, 2)  # few, so that contents repeat


@settings(max_examples=300)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=25),
    rounds=st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=11), TOKENS), min_size=1, max_size=5),
    windows=st.sampled_from([(None,), (1,), (5,), (8,), (13,), (None, 5), (13, 1), (None, 8, 8)]),
    caching=st.booleans(),
)
def test_append_and_rollback_is_as_if_never_appended(prompt, rounds, windows, caching):
    manager = make_manager(windows=windows, caching=caching, num_blocks=64 * len(windows))
    sequence = start(manager, prompt)
    for drafted, next_token in rounds:
        # What the step does first: it releases what the window has passed, which rolling back does not undo.
        assert manager.grow(sequence, 0)
        before, num_used = state(sequence), manager.pool.num_used
        append_and_compute(manager, sequence, drafted)
        manager.truncate(sequence, len(before["token_ids"]))
        # The step has also computed the last token, which is kept: roll that back too.
        assert sequence.num_computed_tokens == len(before["token_ids"])
        manager.truncate(sequence, len(before["token_ids"]) - 1)
        sequence.token_ids.append(before["token_ids"][-1])
        after = state(sequence)
        # Hashes are computed lazily, of the same tokens.
        num_hashes = min(len(before["block_hashes"]), len(after["block_hashes"]))
        assert after.pop("block_hashes")[:num_hashes] == before.pop("block_hashes")[:num_hashes]
        assert after == before
        assert manager.pool.num_used == num_used
        append_and_compute(manager, sequence, [next_token])
        manager.truncate(sequence, sequence.num_tokens)
        assert_hashes_fit(sequence, caching=caching)
    manager.free(sequence)
    assert manager.pool.num_used == 0


@settings(max_examples=300)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.lists(TOKENS, min_size=1, max_size=9), st.integers(0, 12)), max_size=25
    ),
    windows=st.sampled_from([(None,), (5,), (8,), (None, 5), (8, 1), (None, 8, 8)]),
)
def test_no_cached_block_is_ever_overwritten(steps, windows):
    """A model of the memory: what a block holds at each slot. Every block found by hash must hold the tokens of that hash, in the layers of
    that group.
    """
    manager = make_manager(windows=windows, num_blocks=40 * len(windows))
    sequences = [start(manager, [i % 2] * 9) for i in range(3)]
    # (block, slot) -> the group that wrote it, and the tokens up to that position
    memory: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
    known: dict[bytes, tuple[int, ...]] = {}  # hash -> the tokens up to the block's end
    for sequence in sequences:
        write(sequence, 0, memory, known)
    for i, drafted, num_dropped in steps:
        sequence = sequences[i]
        first = sequence.num_computed_tokens
        sequence.token_ids += drafted
        if not manager.grow(sequence, sequence.num_pending_tokens):
            del sequence.token_ids[-len(drafted) :]
            continue
        num_new = sequence.num_pending_tokens
        write(sequence, first, memory, known, end=first + num_new)
        manager.commit(sequence, num_new)
        try:
            manager.truncate(sequence, max(1, sequence.num_tokens - num_dropped))
        except ValueError:
            assert windows != (None,)
        # The next step has something to compute.
        sequence.token_ids.append(0)
        for block_hash, tokens in known.items():
            for group in range(len(windows)):
                block_id = manager.pool.find(block_hash, group)
                for slot in range(BLOCK_SIZE) if block_id is not None else ():
                    assert memory[block_id, slot] == (group, tokens[: len(tokens) - BLOCK_SIZE + slot + 1])
        for each in sequences:
            for group, table in enumerate(each.tables):
                for position in range(table.num_released_blocks * BLOCK_SIZE, each.num_computed_tokens):
                    held = memory[table.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE]
                    assert held == (group, tuple(each.token_ids[: position + 1]))
    held = {b for s in sequences for table in s.tables for b in table.block_ids if b != NULL_BLOCK}
    assert manager.pool.num_used == len(held)


def write(sequence, start, memory, known, end=None):
    tokens = tuple(sequence.token_ids)
    for group, table in enumerate(sequence.tables):
        for position in range(start, sequence.num_computed_tokens if end is None else end):
            block_id = table.block_ids[position // BLOCK_SIZE]
            if start or block_id != NULL_BLOCK:
                memory[block_id, position % BLOCK_SIZE] = group, tokens[: position + 1]
    for i, block_hash in enumerate(hashes_of(tokens), start=1):
        known[block_hash] = tokens[: i * BLOCK_SIZE]


def hashes_of(tokens):
    tokens, hashes = list(tokens), []
    for i in range(len(tokens) // BLOCK_SIZE):
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]))
    return hashes


def assert_hashes_fit(sequence, *, caching):
    expected = hashes_of(sequence.token_ids)
    assert sequence.block_hashes == expected[: len(sequence.block_hashes)]
    num_full = sequence.num_computed_tokens // BLOCK_SIZE
    assert sequence.num_cached_blocks == (num_full if caching else 0)
