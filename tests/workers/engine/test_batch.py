"""A batch as one message: every field arrives as it was, whatever the sizes."""

import dataclasses
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scheduling import add, make_scheduler

from workers.engine.batch import STOP, ForwardBatch, dummy_batch, is_stop, make_batch
from workers.kv_cache.sequence import BlockTable

INT32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def batches(draw):
    sizes = {}

    def array(f):
        shape = [sizes.setdefault(dim, draw(st.integers(0, 7))) for dim in f.metadata["dims"]]
        values = draw(st.lists(INT32, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        return np.array(values, dtype=np.int32).reshape(shape)

    return ForwardBatch(**{f.name: array(f) for f in dataclasses.fields(ForwardBatch)})


@given(batches())
def test_unpack_inverts_pack(batch):
    message = batch.pack()
    assert (message.dtype, message.ndim) == (np.int32, 1)
    unpacked = ForwardBatch.unpack(message)
    for f in dataclasses.fields(ForwardBatch):
        found, expected = getattr(unpacked, f.name), getattr(batch, f.name)
        assert found.dtype == np.int32
        assert found.shape == expected.shape, f.name
        assert np.array_equal(found, expected), f.name


def test_arrays_that_contradict_each_other_fail_an_assertion():
    batch = dummy_batch(3, 3, 4)
    with pytest.raises(AssertionError, match="positions has 2 num_tokens, another array 3"):
        dataclasses.replace(batch, positions=batch.positions[:2]).pack()
    with pytest.raises(AssertionError, match="block_table has 2 dimensions"):
        dataclasses.replace(batch, block_table=batch.block_table[0]).pack()


def test_stop_differs_from_every_batch():
    assert is_stop(STOP)
    assert not is_stop(dummy_batch(1, 1, 4).pack())


def test_the_worked_example():
    """5 of 6 tokens computed, blocks [7, 2] of size 4: token 5, position 5, slot 9."""
    scheduler = make_scheduler(block_size=4)
    request = add(scheduler, 0, 6)
    (scheduled,) = scheduler.schedule()
    request.sequence.num_computed_tokens, request.sequence.tables = 5, [BlockTable(array("i", [7, 2]))]
    batch = make_batch([dataclasses.replace(scheduled, num_new_tokens=1)], 4)
    assert (batch.token_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist()) == ([5], [5], [[9]])
    assert (batch.query_lens.tolist(), batch.seq_lens.tolist(), batch.logits_indices.tolist()) == ([1], [6], [0])
    assert batch.block_table.tolist() == [[[7, 2]]]
    assert batch.unread_rows.tolist() == [-1]

    del request.token_ids[5]
    request.unread_row = 3
    batch = make_batch([dataclasses.replace(scheduled, num_new_tokens=1)], 4)
    assert (batch.token_ids.tolist(), batch.unread_rows.tolist()) == ([0], [3])
    assert (batch.positions.tolist(), batch.slot_mapping.tolist(), batch.logits_indices.tolist()) == ([5], [[9]], [0])


def test_a_dummy_batch_may_have_a_context():
    batch = dummy_batch(5, 3, 4, num_computed_tokens=6)
    assert (batch.positions.tolist(), batch.seq_lens.tolist()) == ([6, 7, 8, 6, 7], [9, 8])
    assert batch.block_table.tolist() == [[[0, 0, 0]] * 2]
    assert batch.pack().dtype == np.int32
