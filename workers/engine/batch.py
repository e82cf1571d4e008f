"""One step's input as plain arrays: what rank 0 decides and every rank computes, in a form that crosses a wire in one
piece.

`ForwardBatch` holds everything a rank needs and nothing a rank could decide from: followers keep no requests and no
block tables. Knows numpy; no torch, no scheduler policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.engine.scheduler import ScheduledRequest
from workers.kv_cache.block_pool import NULL_BLOCK

_HEADER_INTS = 5


@dataclass(frozen=True)
class ForwardBatch:
    """All arrays int32; see AttentionMetadata for the layout, with a worked example."""

    token_ids: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    slot_mapping: np.ndarray  # [num_tokens]
    query_lens: np.ndarray  # [num_seqs]
    seq_lens: np.ndarray  # [num_seqs]
    logits_indices: np.ndarray  # [num_sampling_seqs] flat indices of the tokens whose logits choose the next one
    prompt_logits_indices: np.ndarray  # [num_prompt_rows] those whose logits a prompt's log-probabilities are made of
    block_table: np.ndarray  # [num_seqs, max_blocks]

    def pack(self) -> np.ndarray:
        """One 1-D int32 array: five lengths, then the arrays in the order of their declaration."""
        num_logits, num_prompt_logits = len(self.logits_indices), len(self.prompt_logits_indices)
        header = [len(self.token_ids), len(self.query_lens), num_logits, num_prompt_logits, self.block_table.shape[1]]
        parts = [np.array(header, dtype=np.int32), self.token_ids, self.positions, self.slot_mapping]
        parts += [self.query_lens, self.seq_lens, self.logits_indices, self.prompt_logits_indices]
        return np.concatenate([*parts, self.block_table.ravel()])

    @classmethod
    def unpack(cls, message: np.ndarray) -> "ForwardBatch":
        num_tokens, num_seqs, num_logits, num_prompt_logits, max_blocks = (int(n) for n in message[:_HEADER_INTS])
        sizes = [num_tokens] * 3 + [num_seqs] * 2 + [num_logits, num_prompt_logits, num_seqs * max_blocks]
        token_ids, positions, slot_mapping, query_lens, seq_lens, logits_indices, prompt_logits_indices, block_table = (
            np.split(message[_HEADER_INTS:], np.cumsum(sizes)[:-1])
        )
        return cls(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_lens=query_lens,
            seq_lens=seq_lens,
            logits_indices=logits_indices,
            prompt_logits_indices=prompt_logits_indices,
            block_table=block_table.reshape(num_seqs, max_blocks),
        )


# Tells followers to leave their loop: a batch without tokens.
STOP = np.zeros(_HEADER_INTS, dtype=np.int32)


def is_stop(message: np.ndarray) -> bool:
    return len(message) == _HEADER_INTS


def make_batch(scheduled: Sequence[ScheduledRequest], block_size: int) -> ForwardBatch:
    """Lays the scheduled tokens end to end.

    A request with 5 of 6 tokens computed and blocks [7, 2] of size 4 contributes token_ids[5], position 5, slot 2 * 4 +
    1 = 9.
    """
    token_ids: list[int] = []
    positions, slots, query_lens, seq_lens, logits_indices, prompt_logits_indices = [], [], [], [], [], []
    max_blocks = max(len(s.request.block_ids) for s in scheduled)
    block_table = np.full((len(scheduled), max_blocks), NULL_BLOCK, dtype=np.int32)
    for row, s in enumerate(scheduled):
        request, start = s.request, s.request.num_computed_tokens
        end = start + s.num_new_tokens
        block_table[row, : len(request.block_ids)] = request.block_ids
        if request.prompt_output is not None and request.prompt_output.needs_logits:
            prompt_logits_indices += [len(token_ids) + p - start for p in s.prompt_rows]
        token_ids += request.token_ids[start:end]
        position = np.arange(start, end, dtype=np.int32)
        positions.append(position)
        slots.append(block_table[row, position // block_size] * block_size + position % block_size)
        query_lens.append(s.num_new_tokens)
        seq_lens.append(end)
        if s.samples:
            logits_indices.append(len(token_ids) - 1)
    return ForwardBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        query_lens=np.array(query_lens, dtype=np.int32),
        seq_lens=np.array(seq_lens, dtype=np.int32),
        logits_indices=np.array(logits_indices, dtype=np.int32),
        prompt_logits_indices=np.array(prompt_logits_indices, dtype=np.int32),
        block_table=block_table,
    )


def dummy_batch(
    num_tokens: int, max_tokens_per_seq: int, block_size: int, *, num_prompt_logits: int = 0
) -> ForwardBatch:
    """A batch that computes `num_tokens` tokens into the null block: for warm-up, memory profiling and heartbeats."""
    full, rest = divmod(num_tokens, max_tokens_per_seq)
    query_lens = np.array([max_tokens_per_seq] * full + [rest] * (rest > 0), dtype=np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in query_lens])
    zeros = np.zeros(num_tokens, dtype=np.int32)
    return ForwardBatch(
        token_ids=zeros,
        positions=positions,
        slot_mapping=zeros,
        query_lens=query_lens,
        seq_lens=query_lens,
        logits_indices=np.cumsum(query_lens, dtype=np.int32) - 1,
        prompt_logits_indices=np.arange(num_prompt_logits, dtype=np.int32),
        block_table=np.full((len(query_lens), -(-max_tokens_per_seq // block_size)), NULL_BLOCK, dtype=np.int32),
    )
