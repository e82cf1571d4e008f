"""Which sizes decode steps come in where there are graphs of them, and how a batch is padded to one of them.

A CUDA graph replays with the shapes that it was captured with, so decode steps run with few numbers of sequences. They do so without a
graph too: a matrix library chooses its way by the number of rows, and the same step must give the same bits either way. Knows the batch;
no torch, no device.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from workers.engine.batch import ForwardBatch
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.lora.slots import NO_SLOT


@dataclass(frozen=True, kw_only=True)
class CapturePolicy:
    """For which sizes graphs are captured, and when.

    every_size: no batch is padded. num_steps_before: how many steps of a size show that a graph of it pays. when_idle: also sizes that
    nothing has needed so far.
    """

    every_size: bool = False
    num_steps_before: int = 1
    when_idle: bool = True

    def sizes(self, max_num_seqs: int) -> tuple[int, ...]:
        return tuple(range(1, max_num_seqs + 1)) if self.every_size else decode_sizes(max_num_seqs)


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Powers of two up to 16, where a step costs as much as reading the weights. Then closer, because rows begin to cost something:
    multiples of 16 up to 64, of 32 from there.

    A maximum of 100 gives 1, 2, 4, 8, 16, 32, 48, 64, 96, 100.
    """
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, max_num_seqs, 32)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def is_decode(batch: ForwardBatch) -> bool:
    """Whether each sequence computes one token, and nothing but the next token is read from it."""
    return len(batch.token_ids) == len(batch.query_lens) and not len(batch.prompt_logits_indices)


def padded_size(num_seqs: int, sizes: Sequence[int]) -> int:
    """The smallest size with room for `num_seqs`. 9 sequences run as 16."""
    return next(size for size in sizes if size >= num_seqs)


def pad_decode(batch: ForwardBatch, size: int) -> ForwardBatch:
    """`batch` with `size` sequences. Those added compute token 0 at position 0 of the null block, and see only that.

    They all write the same key and value to the same place, so nobody sees anything else there. `logits_indices` stays: the added rows
    are not sampled.
    """
    n = size - len(batch.query_lens)
    assert n >= 0, f"{len(batch.query_lens)} sequences do not fit in {size}"
    if n == 0:
        return batch

    def padded(values: np.ndarray, value: int, *, axis: int = 0) -> np.ndarray:
        shape = (*values.shape[:axis], n, *values.shape[axis + 1 :])
        return np.concatenate([values, np.full(shape, value, dtype=values.dtype)], axis=axis)

    return ForwardBatch(
        token_ids=padded(batch.token_ids, 0),
        unread_rows=padded(batch.unread_rows, -1),
        positions=padded(batch.positions, 0),
        slot_mapping=padded(batch.slot_mapping, NULL_BLOCK, axis=1),
        query_lens=padded(batch.query_lens, 1),
        seq_lens=padded(batch.seq_lens, 1),
        adapter_slots=padded(batch.adapter_slots, NO_SLOT),
        logits_indices=batch.logits_indices,
        prompt_logits_indices=batch.prompt_logits_indices,
        block_table=padded(batch.block_table, NULL_BLOCK, axis=1),
    )


def next_to_capture(sizes: Sequence[int], captured: Collection[int], *, wanted: int | None) -> int | None:
    """The size to capture next, None if there is none.

    wanted: the size of the last step. With work to do, only that is worth a pause. None: the engine is idle, and the smallest is next.
    """
    if wanted is not None:
        return None if wanted in captured else wanted
    return next((size for size in sizes if size not in captured), None)
