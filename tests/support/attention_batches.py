"""Batches for attention: sequences with random keys and values, laid out in blocks in a random order, with NaN wherever no key is."""

import torch

from workers.attention.backend import AttentionMetadata


def make_metadata(
    parts: list[tuple[int, int]], block_size: int, *, generator: torch.Generator | None = None, max_seq_len: int = 0
) -> AttentionMetadata:
    """parts: (tokens computed before, new tokens) of each sequence. `max_seq_len`: a bound above the longest, as in a CUDA graph."""
    query_lens = [new for _, new in parts]
    seq_lens = [before + new for before, new in parts]
    num_blocks = [-(-n // block_size) for n in seq_lens]
    free = (1 + torch.randperm(sum(num_blocks), generator=generator)).tolist()
    width = max(*num_blocks, 1, -(-max_seq_len // block_size))
    tables = [[free.pop() for _ in range(n)] + [0] * (width - n) for n in num_blocks]
    slots = [
        table[p // block_size] * block_size + p % block_size
        for table, (before, new) in zip(tables, parts, strict=True)
        for p in range(before, before + new)
    ]
    return AttentionMetadata(
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor(tables, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32),
        query_lens=query_lens,
        context_lens=seq_lens,
        max_query_len=max(query_lens),
        max_seq_len=max(max_seq_len, *seq_lens),
    )


def fill_cache(
    sequences: list[torch.Tensor], metadata: AttentionMetadata, block_size: int, *, sliding_window: int | None = None
) -> torch.Tensor:
    """The cache [num_blocks, block_size, num_kv_heads, head_dim] with the tokens [num_tokens, num_kv_heads, head_dim] of each sequence that
    a query of this batch sees, and NaN elsewhere.
    """
    num_blocks = 1 + int(metadata.block_table.max())
    cache = torch.full((num_blocks, block_size, *sequences[0].shape[1:]), torch.nan, dtype=sequences[0].dtype)
    for i, (tokens, table) in enumerate(zip(sequences, metadata.block_table.long(), strict=True)):
        length = metadata.context_lens[i]
        first_query = length - metadata.query_lens[i]
        oldest = 0 if sliding_window is None else max(0, first_query - sliding_window + 1)
        positions = torch.arange(oldest, length)
        cache[table[positions // block_size], positions % block_size] = tokens[oldest:length]
    return cache


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes k, v [num_tokens, num_kv_heads, head_dim] to their slots (block * block_size + offset) of the caches."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)
