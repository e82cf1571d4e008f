"""Paged attention through `scaled_dot_product_attention`: the specification of every other backend, on any device.

Gathers each sequence's keys and values out of their blocks, masks by position, and lets PyTorch compute. Sequences that
decode one token are gathered together into one padded batch; sequences in prefill go one by one. The gather copies, so
on a GPU this is the reference and `flash.py` the product; on the CPU it is both.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.attention.backend import AttentionMetadata


@dataclass(frozen=True)
class _Decodes:
    rows: torch.Tensor  # [num_decodes] flat token index of each decoding sequence
    blocks: torch.Tensor  # [num_decodes, num_gathered_blocks]
    mask: torch.Tensor  # [num_decodes, 1, 1, num_gathered_blocks * block_size], True where seen


@dataclass(frozen=True)
class _Prefill:
    start: int  # flat index of the first query
    end: int
    blocks: torch.Tensor  # [num_gathered_blocks]
    mask: torch.Tensor  # [query_len, num_gathered_blocks * block_size], True where seen


@dataclass(frozen=True)
class _Plan:
    decodes: _Decodes | None
    prefills: list[_Prefill]


class SdpaBackend:
    """See `AttentionBackend`. `sliding_window` counts the token itself; None is full causal attention."""

    name = "sdpa"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        self._plan: _Plan | None = None
        self._planned_for: AttentionMetadata | None = None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]
        store_kv(k, v, k_cache, v_cache, metadata.slot_mapping)
        # Every layer of a step asks with the same metadata: the index arithmetic is done once.
        if self._plan is None or self._planned_for is not metadata:
            self._plan, self._planned_for = self._make_plan(metadata, k_cache.shape[1]), metadata
        out = torch.empty_like(q)
        if self._plan.decodes is not None:
            out[self._plan.decodes.rows] = self._decode(q, k_cache, v_cache, self._plan.decodes)
        for prefill in self._plan.prefills:
            out[prefill.start : prefill.end] = self._prefill(q, k_cache, v_cache, prefill)
        return out

    def _decode(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: _Decodes) -> torch.Tensor:
        num_seqs = plan.rows.shape[0]
        kv_shape = (num_seqs, -1, self.num_kv_heads, self.head_dim)
        k = k_cache[plan.blocks].view(kv_shape).transpose(1, 2)
        v = v_cache[plan.blocks].view(kv_shape).transpose(1, 2)
        # The query heads of one KV head stand in the place of query positions: they see the same keys.
        q = q[plan.rows].view(num_seqs, self.num_kv_heads, -1, self.head_dim)
        # q: [num_seqs, num_kv_heads, group, head_dim]; k, v: [num_seqs, num_kv_heads, num_keys, head_dim]
        out = scaled_dot_product_attention(q, k, v, attn_mask=plan.mask)
        return out.reshape(num_seqs, self.num_heads, self.head_dim)

    def _prefill(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: _Prefill) -> torch.Tensor:
        kv_shape = (1, -1, self.num_kv_heads, self.head_dim)
        k = k_cache[plan.blocks].view(kv_shape).transpose(1, 2)
        v = v_cache[plan.blocks].view(kv_shape).transpose(1, 2)
        q = q[plan.start : plan.end].transpose(0, 1).unsqueeze(0)
        # q: [1, num_heads, query_len, head_dim]; k, v: [1, num_kv_heads, num_keys, head_dim]
        out = scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    def _make_plan(self, metadata: AttentionMetadata, block_size: int) -> _Plan:
        device = metadata.block_table.device
        prefills, decoding, rows, start = [], [], [], 0
        for i, (query_len, context_len) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
            if query_len == 1:
                decoding.append(i)
                rows.append(start)
            else:
                prefills.append(self._plan_prefill(metadata.block_table[i], start, query_len, context_len, block_size))
            start += query_len
        if not decoding:
            return _Plan(None, prefills)
        lens = torch.tensor([metadata.context_lens[i] for i in decoding], device=device)
        first_blocks = torch.tensor(
            [self._first_block(metadata.context_lens[i] - 1, block_size) for i in decoding], device=device
        )
        num_blocks = int((-(-lens // block_size) - first_blocks).max())
        blocks = first_blocks[:, None] + torch.arange(num_blocks, device=device)
        table = metadata.block_table[decoding].long()
        positions = first_blocks[:, None] * block_size + torch.arange(num_blocks * block_size, device=device)
        mask = self._seen(lens[:, None] - 1, positions)
        return _Plan(
            _Decodes(
                rows=torch.tensor(rows, device=device),
                # Shorter sequences are padded with whatever the clamp finds: the mask hides it.
                blocks=table.gather(1, blocks.clamp(max=table.shape[1] - 1)),
                mask=mask[:, None, None, :],
            ),
            prefills,
        )

    def _plan_prefill(
        self, table: torch.Tensor, start: int, query_len: int, context_len: int, block_size: int
    ) -> _Prefill:
        first_query = context_len - query_len
        first_block = self._first_block(first_query, block_size)
        last_block = -(-context_len // block_size)
        queries = torch.arange(first_query, context_len, device=table.device)
        keys = torch.arange(first_block * block_size, last_block * block_size, device=table.device)
        mask = self._seen(queries[:, None], keys[None, :])
        return _Prefill(start, start + query_len, table[first_block:last_block].long(), mask)

    def _first_block(self, query: int, block_size: int) -> int:
        """The block of the oldest key that the query at this position sees. W=4, block_size=2: query 5 sees 2..5, block
        1.
        """
        if self.sliding_window is None:
            return 0
        return max(0, query - self.sliding_window + 1) // block_size

    def _seen(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        seen = keys <= queries
        if self.sliding_window is not None:
            seen &= queries - keys < self.sliding_window
        return seen


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Writes k, v [num_tokens, num_kv_heads, head_dim] to their slots (block * block_size + offset) of the caches."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)
