"""One step's input as plain arrays: what rank 0 decides and every rank computes, in a form that travels as one message.

`ForwardBatch` has everything a rank needs to compute and nothing a rank could decide from: followers keep no requests and no block
tables. Knows numpy; no torch, no scheduling policy.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from workers.engine.scheduling.request import ScheduledRequest
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.lora.slots import NO_SLOT


def _dims(*names: str) -> dict[str, tuple[str, ...]]:
    """Names the dimensions of a field. A dimension has the same size in every field that names it."""
    return {"dims": names}


@dataclass(frozen=True)
class ForwardBatch:
    """All arrays int32; see AttentionMetadata for the layout, with a worked example. The wire form follows from these fields."""

    token_ids: np.ndarray = field(metadata=_dims("num_tokens"))
    # -1 where `token_ids` has the id. Otherwise the row of the tokens of the step before which is the id, and `token_ids` has 0.
    unread_rows: np.ndarray = field(metadata=_dims("num_tokens"))
    positions: np.ndarray = field(metadata=_dims("num_tokens"))
    slot_mapping: np.ndarray = field(metadata=_dims("num_groups", "num_tokens"))  # for each group of layers
    query_lens: np.ndarray = field(metadata=_dims("num_seqs"))
    seq_lens: np.ndarray = field(metadata=_dims("num_seqs"))
    adapter_slots: np.ndarray = field(metadata=_dims("num_seqs"))  # -1 for the base model
    # Flat indices of the tokens whose logits choose the next one.
    logits_indices: np.ndarray = field(metadata=_dims("num_sampling_seqs"))
    # Flat indices of the tokens whose logits give a prompt's log-probabilities.
    prompt_logits_indices: np.ndarray = field(metadata=_dims("num_prompt_rows"))
    block_table: np.ndarray = field(metadata=_dims("num_groups", "num_seqs", "max_blocks"))

    def pack(self) -> np.ndarray:
        """One 1-D int32 array: the size of each dimension in the order of first mention, then the arrays in the order of their fields.

        Two sequences with 4 tokens in all begin [4 tokens, 2 sequences, ...].
        """
        sizes: dict[str, int] = {}
        for name, dims in _DIMS_OF.items():
            shape = getattr(self, name).shape
            assert len(shape) == len(dims), f"{name} has {len(shape)} dimensions, not {dims}"
            for dim, size in zip(dims, shape, strict=True):
                known = sizes.setdefault(dim, size)
                assert known == size, f"{name} has {size} {dim}, another array {known}"
        header = np.array([sizes[dim] for dim in _DIMS], dtype=np.int32)
        return np.concatenate([header, *(getattr(self, name).ravel() for name in _DIMS_OF)])

    @classmethod
    def unpack(cls, message: np.ndarray) -> "ForwardBatch":
        """Inverts `pack`; the arrays are views of the message."""
        sizes = dict(zip(_DIMS, message[: len(_DIMS)].tolist(), strict=True))
        arrays: dict[str, np.ndarray] = {}
        start = len(_DIMS)
        for name, dims in _DIMS_OF.items():
            shape = [sizes[dim] for dim in dims]
            end = start + math.prod(shape)
            arrays[name] = message[start:end].reshape(shape)
            start = end
        return cls(**arrays)


_DIMS_OF: dict[str, tuple[str, ...]] = {f.name: f.metadata["dims"] for f in fields(ForwardBatch)}
_DIMS = tuple(dict.fromkeys(dim for dims in _DIMS_OF.values() for dim in dims))

# Tells followers to leave their loop: a batch without tokens.
STOP = np.zeros(len(_DIMS), dtype=np.int32)


def is_stop(message: np.ndarray) -> bool:
    return len(message) == len(STOP)


def capture_message(size: int) -> np.ndarray:
    """Tells followers to capture decode steps of `size` sequences as a CUDA graph."""
    return np.append(STOP, np.int32(size))


def size_to_capture(message: np.ndarray) -> int | None:
    """What `capture_message` was made of; None for every other message."""
    return int(message[-1]) if len(message) == len(STOP) + 1 else None


def profile_message(*, begins: bool) -> np.ndarray:
    """Tells followers to begin or to end a recording of their steps. Longer than the message above, shorter than any batch."""
    return np.concatenate([STOP, np.array([0, begins], dtype=np.int32)])


def profile_begins(message: np.ndarray) -> bool | None:
    """What `profile_message` was made of; None for every other message."""
    return bool(message[-1]) if len(message) == len(STOP) + 2 else None


def adapter_message(slot: int, key: tuple[int, int]) -> np.ndarray:
    """Tells followers to put an adapter into a slot; with the slot -1, to forget it."""
    return np.concatenate([STOP, np.array([slot, *key], dtype=np.int32)])


def adapter_to_put(message: np.ndarray) -> tuple[int, tuple[int, int]] | None:
    """What `adapter_message` was made of; None for every other message."""
    if len(message) != len(STOP) + 3:
        return None
    slot, first, second = message[-3:].tolist()
    return slot, (first, second)


def make_batch(scheduled: Sequence[ScheduledRequest], block_size: int) -> ForwardBatch:
    """Lays the scheduled tokens end to end.

    A request with 5 of 6 tokens computed and blocks [7, 2] of size 4 contributes token_ids[5], position 5, slot 2 * 4 + 1 = 9. Where
    the sixth token is in flight, in row 3 of the step before, it contributes 0 instead of token_ids[5], and 3 to `unread_rows`.
    """
    token_ids: list[int] = []
    unread_rows: list[int] = []
    starts, lens, logits_indices, prompt_logits_indices = [], [], [], []
    for s in scheduled:
        request, sequence, num_new_tokens = s.request, s.request.sequence, s.num_new_tokens
        start = sequence.num_computed_tokens
        starts.append(start)
        lens.append(num_new_tokens)
        if (
            num_new_tokens == 1 and request.unread_row is None and request.prompt_output is None
        ):  # most requests in most steps
            if s.samples:
                logits_indices.append(len(token_ids))
            token_ids.append(sequence.token_ids[start])
            unread_rows.append(-1)
            continue
        if request.prompt_output is not None and request.prompt_output.needs_logits:
            prompt_logits_indices += [len(token_ids) + p - start for p in s.prompt_rows]
        known = sequence.token_ids[start : start + num_new_tokens]
        token_ids += known
        unread_rows += [-1] * len(known)
        if len(known) < num_new_tokens:
            assert request.unread_row is not None and len(known) == num_new_tokens - 1, "one token may be in flight"
            token_ids.append(0)
            unread_rows.append(request.unread_row)
        if s.samples:
            logits_indices.append(len(token_ids) - 1)
    num_groups = len(scheduled[0].request.sequence.tables)
    rows_of_groups = [s.request.sequence.tables[group].block_ids for group in range(num_groups) for s in scheduled]
    block_table = _block_table(rows_of_groups, num_seqs=len(scheduled))
    query_lens = np.array(lens, dtype=np.int32)
    first_positions = np.array(starts, dtype=np.int32)
    # Of each token: its sequence, and how many tokens of the batch come before that sequence's.
    rows = np.repeat(np.arange(len(lens)), query_lens)
    begins = np.cumsum(query_lens, dtype=np.int32) - query_lens
    positions = (first_positions - begins)[rows] + np.arange(len(rows), dtype=np.int32)
    return ForwardBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        unread_rows=np.array(unread_rows, dtype=np.int32),
        positions=positions,
        slot_mapping=block_table[:, rows, positions // block_size] * block_size + positions % block_size,
        query_lens=query_lens,
        seq_lens=first_positions + query_lens,
        adapter_slots=np.array([s.request.adapter_slot for s in scheduled], dtype=np.int32),
        logits_indices=np.array(logits_indices, dtype=np.int32),
        prompt_logits_indices=np.array(prompt_logits_indices, dtype=np.int32),
        block_table=block_table,
    )


def _block_table(rows: "Sequence[array[int]]", *, num_seqs: int) -> np.ndarray:
    """[num_groups, num_seqs, max_blocks] int32: the rows, each with null blocks after it. Joined as bytes, which costs least for many."""
    num_bytes = max(map(len, rows)) * np.dtype(np.int32).itemsize
    # All bytes of the null block's number, 0, are equal.
    joined = b"".join([row.tobytes().ljust(num_bytes, bytes([NULL_BLOCK])) for row in rows])
    return np.frombuffer(joined, dtype=np.int32).reshape(len(rows) // num_seqs, num_seqs, -1)


def dummy_batch(
    num_tokens: int,
    max_tokens_per_seq: int,
    block_size: int,
    *,
    num_computed_tokens: int = 0,
    num_prompt_logits: int = 0,
    num_groups: int = 1,
) -> ForwardBatch:
    """A batch that computes `num_tokens` tokens into the null block: for warm-up, memory profiling and heartbeats. num_computed_tokens:
    of each sequence, before these. num_groups: of layers.
    """
    full, rest = divmod(num_tokens, max_tokens_per_seq)
    query_lens = np.array([max_tokens_per_seq] * full + [rest] * (rest > 0), dtype=np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in query_lens])
    zeros = np.zeros(num_tokens, dtype=np.int32)
    max_blocks = -(-(num_computed_tokens + max_tokens_per_seq) // block_size)
    return ForwardBatch(
        token_ids=zeros,
        unread_rows=np.full(num_tokens, -1, dtype=np.int32),
        positions=num_computed_tokens + positions,
        slot_mapping=np.zeros((num_groups, num_tokens), dtype=np.int32),
        query_lens=query_lens,
        seq_lens=num_computed_tokens + query_lens,
        adapter_slots=np.full(len(query_lens), NO_SLOT, dtype=np.int32),
        logits_indices=np.cumsum(query_lens, dtype=np.int32) - 1,
        prompt_logits_indices=np.arange(num_prompt_logits, dtype=np.int32),
        block_table=np.full((num_groups, len(query_lens), max_blocks), NULL_BLOCK, dtype=np.int32),
    )
