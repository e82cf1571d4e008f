"""Paged attention in plain matrix products and a softmax: the specification of every other backend, on any device.

On the CPU it is also what runs, and there it promises more than its values: **a query's result is bit for bit the same whatever else is
computed in the step**, however its context was cut into chunks and wherever its blocks are. So when another replica continues a stream
and prefills what this one decoded, its logits are the same to the last bit.

Three rules ensure this; the tests check them against the libraries underneath.
- Keys are read in tiles of KEY_TILE positions counted from position 0, not from the window's or the batch's first key. A masked key's
  weight is an exact zero, so tiles that only another sequence needs, or that the window has passed, add nothing.
- Every product over keys spans one tile, and tiles are added in order. The library would split one product over all keys at a place
  that depends on their number.
- Every product has a multiple of ROW_MULTIPLE rows; the last query is repeated to fill up. With fewer rows, matrix libraries take other
  paths with other rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from workers.attention.backend import AttentionMetadata
from workers.kernels.quantized_kv import Cache, read

KEY_TILE = 64
# Queries of one prefill computed together: limits the scores to num_heads * 64 * num_keys.
QUERY_TILE = 64
ROW_MULTIPLE = 4


@dataclass(frozen=True)
class _Tile:
    """Queries of one sequence in prefill, or one query of each decoding sequence, and the part of the gathered keys they see."""

    rows: torch.Tensor  # [num_seqs * num_heads * num_queries] into q as [num_tokens * num_heads, head_dim]
    keys: slice
    mask: torch.Tensor  # [num_seqs, 1, num_queries, num_keys], 0 where seen and -inf elsewhere


@dataclass(frozen=True)
class _Gather:
    """Sequences whose keys and values are gathered from their blocks together."""

    num_seqs: int
    slots: torch.Tensor  # [num_seqs * num_kv_heads * num_keys] into the cache as [num_slots * num_kv_heads, head_dim]
    tiles: list[_Tile]


class SdpaBackend:
    """See `AttentionBackend`. `sliding_window` counts the token itself; None is full causal attention."""

    name = "sdpa"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        # The query heads of one KV head share its products, so together they fill the rows.
        self.query_multiple = ROW_MULTIPLE // math.gcd(ROW_MULTIPLE, num_heads // num_kv_heads)
        self._plan: list[_Gather] = []
        self._planned_for: AttentionMetadata | None = None

    def forward(self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim]
        # Every layer of a step passes the same metadata, so the index arithmetic is done once.
        if self._planned_for is not metadata:
            self._plan, self._planned_for = list(self._make_plan(metadata, k_cache.shape[1])), metadata
        out = q.new_empty(q.shape)
        queries = (q.float() * self.head_dim**-0.5).reshape(-1, self.head_dim)
        for gather in self._plan:
            keys, values = (
                read(cache, gather.slots).view(gather.num_seqs * self.num_kv_heads, -1, self.head_dim)
                for cache in (k_cache, v_cache)
            )
            for tile in gather.tiles:
                attended = self._attend(queries, keys[:, tile.keys], values[:, tile.keys], tile)
                # A repeated query writes its row again, with the same bits.
                out.view(-1, self.head_dim).index_copy_(0, tile.rows, attended.to(out.dtype))
        return out

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: _Tile) -> torch.Tensor:
        # queries: [num_tokens * num_heads, head_dim], scaled; keys, values: [num_seqs * num_kv_heads, num_keys, head_dim]
        num_seqs, _, num_queries, num_keys = tile.mask.shape
        q = queries.index_select(0, tile.rows).view(num_seqs * self.num_kv_heads, -1, self.head_dim)
        scores = torch.bmm(q, keys.transpose(1, 2))  # [num_seqs * num_kv_heads, group * num_queries, num_keys]
        scores.view(num_seqs, self.num_heads, num_queries, num_keys).add_(tile.mask)
        weights = scores.softmax(dim=-1)
        out = torch.bmm(weights[..., :KEY_TILE], values[:, :KEY_TILE])
        for start in range(KEY_TILE, num_keys, KEY_TILE):
            end = start + KEY_TILE
            out.baddbmm_(weights[..., start:end], values[:, start:end])
        return out.view(-1, self.head_dim)

    def _make_plan(self, metadata: AttentionMetadata, block_size: int) -> Iterator[_Gather]:
        decoding, rows, start = [], [], 0
        for i, (query_len, context_len) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
            if query_len == 1:
                decoding.append(i)
                rows.append(start)
            else:
                table = metadata.block_table[i : i + 1]
                yield self._plan_prefill(table, start, query_len, context_len, block_size)
            start += query_len
        if decoding:
            context_lens = [metadata.context_lens[i] for i in decoding]
            yield self._plan_decodes(metadata.block_table[decoding], rows, context_lens, block_size)

    def _plan_decodes(self, table: torch.Tensor, rows: list[int], context_lens: list[int], block_size: int) -> _Gather:
        """One query of each sequence. Shorter contexts are padded to the longest with keys that the mask hides."""
        device = table.device
        first_keys = [self._first_key(context_len - 1) for context_len in context_lens]
        num_keys = max(_tiled(context_len - first) for context_len, first in zip(context_lens, first_keys, strict=True))
        keys = torch.tensor(first_keys, device=device)[:, None] + torch.arange(num_keys, device=device)
        queries = torch.tensor(context_lens, device=device)[:, None] - 1
        tokens = torch.tensor(rows, device=device)[:, None].expand(-1, self.query_multiple)
        tile = _Tile(self._rows(tokens), slice(None), self._mask(queries, keys).expand(-1, -1, self.query_multiple, -1))
        return _Gather(len(rows), self._slots(table, keys, block_size), [tile])

    def _plan_prefill(
        self, table: torch.Tensor, start: int, query_len: int, context_len: int, block_size: int
    ) -> _Gather:
        """Queries of one sequence, the first at flat index `start`. Each tile reads no more keys than it can see."""
        device = table.device
        first_query = context_len - query_len
        first_key = self._first_key(first_query)
        keys = torch.arange(first_key, first_key + _tiled(context_len - first_key), device=device)[None]
        tiles = []
        for tile_start in range(0, query_len, QUERY_TILE):
            tile_end = min(tile_start + QUERY_TILE, query_len)
            num_queries = -(-(tile_end - tile_start) // self.query_multiple) * self.query_multiple
            offsets = torch.arange(tile_start, tile_start + num_queries, device=device).clamp(max=tile_end - 1)[None]
            seen = slice(
                self._first_key(first_query + tile_start) - first_key, _tiled(first_query + tile_end - first_key)
            )
            mask = self._mask(first_query + offsets, keys[:, seen])
            tiles.append(_Tile(self._rows(start + offsets), seen, mask))
        return _Gather(1, self._slots(table, keys, block_size), tiles)

    def _first_key(self, query: int) -> int:
        """Where the tile with the oldest key seen from this position begins. W=100, tiles of 64: query 170 sees 71..170, the tile begins
        at 64.
        """
        if self.sliding_window is None:
            return 0
        return max(0, query - self.sliding_window + 1) // KEY_TILE * KEY_TILE

    def _mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Positions [num_seqs, num_queries] and [num_seqs, num_keys] -> [num_seqs, 1, num_queries, num_keys]."""
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        hidden = distance < 0
        if self.sliding_window is not None:
            hidden |= distance >= self.sliding_window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Flat token indices [num_seqs, num_queries] -> rows of (sequence, head, query)."""
        heads = torch.arange(self.num_heads, device=tokens.device)[:, None]
        return (tokens[:, None, :] * self.num_heads + heads).flatten()

    def _slots(self, table: torch.Tensor, keys: torch.Tensor, block_size: int) -> torch.Tensor:
        """Block tables [num_seqs, max_blocks], positions [num_seqs, num_keys] -> rows of (sequence, KV head, key)."""
        # The clamp gives positions past the end any block; the mask hides it.
        blocks = table.long().gather(1, (keys // block_size).clamp(max=table.shape[1] - 1))
        slots = blocks * block_size + keys % block_size
        kv_heads = torch.arange(self.num_kv_heads, device=table.device)[:, None]
        return (slots[:, None, :] * self.num_kv_heads + kv_heads).flatten()


def _tiled(num_keys: int) -> int:
    """Rounded up to whole tiles."""
    return -(-num_keys // KEY_TILE) * KEY_TILE
