"""Paged attention on CUDA by the Triton kernels of `kernels/paged_attention.py`: any block size, any head_dim up to 256, any window.

Knows tiles, splits and launches, not the arithmetic. A query's result has the same bits whatever else is in the batch, however its
prefill is cut and wherever its blocks are. Launches depend on shapes and on the Python numbers of the metadata only, so a step can be
captured in a CUDA graph, with `max_seq_len` as an upper bound.
"""

import functools
from typing import NamedTuple

import torch
import triton

from workers.attention.backend import AttentionMetadata
from workers.kernels.paged_attention import attention_kernel, merge_kernel
from workers.kernels.quantized_kv import Cache
from workers.kernels.triton_kv import kernel_arguments

# Keys per segment. Smaller ones spread one long context over more programs, larger ones are merged less often.
SEGMENT = 512
# A GPU is busy with about this many programs per multiprocessor. More than one split for each sequence also balances their lengths.
PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_SPLITS = 4
# What the sums of segments may take. With more sequences or longer contexts there is enough work without splitting.
MAX_PARTIAL_BYTES = 128 << 20
MERGED_ROWS = 8
LOG2_E = 1.4426950408889634
# Where no GPU is (the interpreter, compilation for another machine): an A100.
DEFAULT_CAPABILITY, DEFAULT_MULTIPROCESSORS = 80, 108


class Tile(NamedTuple):
    rows: int
    keys: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    short: Tile  # sequences whose new tokens fit one tile: decode
    long: Tile


def choose_tiles(capability: int, *, head_dim: int, dtype: torch.dtype, group: int) -> Tiles:
    """Depends on the device and the model only. `capability`: 80 for compute capability 8.0. `group`: query heads per KV head.

    Up to 8.9, and from 12.0, tiles of half precision compile to `mma.sync` of 16 rows, whatever their size. Between, tiles of 64 rows and
    more compile to `wgmma`, whose last bits may differ from those of `mma.sync`, so there decode takes 64 rows too. The sizes are the
    largest that need no more registers and shared memory than there are (benchmarks/results/triton_resources.md).
    """
    rows = max(16, triton.next_power_of_2(group))
    is_wide = head_dim > 128
    if dtype == torch.float32:
        short = long = Tile(rows, 32, num_warps=8, num_stages=2)
    elif 90 <= capability < 120:
        short = long = Tile(max(64, rows), 32 if is_wide else 64, num_warps=8 if is_wide else 4, num_stages=3)
    elif is_wide:
        short = long = Tile(rows, 32, num_warps=4, num_stages=3)
    else:
        short = Tile(rows, 64, num_warps=4, num_stages=3)
        # Loading a block table takes a stage too: with 5, two tiles of keys are on their way, which an 8.0 has room for.
        long = Tile(max(64, rows), 64, num_warps=4, num_stages=5 if capability == 80 else 3)
    return Tiles(short, long)


def choose_num_splits(
    num_programs: int, *, num_segments: int, num_rows: int, head_dim: int, multiprocessors: int
) -> int:
    """Programs that share a tile's context. `num_programs`, `num_rows`: without splits, and the query heads of all tokens.

    On 108 multiprocessors, one sequence with 8 KV heads and 32,768 tokens (64 segments): 432 / 8 = 54 splits. 64 sequences of 4,096
    tokens (8 segments): 512 programs are enough, and 4 splits balance them.
    """
    if num_rows * num_segments * (head_dim + 2) * 4 > MAX_PARTIAL_BYTES:
        return 1
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, num_programs)
    return min(num_segments, max(wanted, MIN_SPLITS))


def widest_split(num_tokens: int, *, num_heads: int, head_dim: int) -> tuple[int, int]:
    """(num_tokens, seq_len) of the step, of at most so many tokens, whose segments' sums take the most memory. num_heads: of this rank.

    With 32 heads of 128 there is room for 8,065 sums of a token: 512 tokens with 15 segments of 512 keys, or 4,032 with 2.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    most = MAX_PARTIAL_BYTES // (4 * (block_d + 2) * num_heads)
    num_tokens = max(1, min(num_tokens, most // 2))
    return num_tokens, most // num_tokens * SEGMENT


class TritonBackend:
    """See `AttentionBackend`."""

    name = "triton"

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_d = max(16, triton.next_power_of_2(head_dim))
        self.window = sliding_window or 0

    def forward(self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata) -> torch.Tensor:
        # q: [num_tokens, num_heads, head_dim], heads adjacent or not
        assert q.stride(2) == 1, "a head's elements must be adjacent"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = self.num_heads // self.num_kv_heads
        tiles = choose_tiles(device_capability(), head_dim=self.head_dim, dtype=q.dtype, group=group)
        short_queries = tiles.short.rows // group
        if min(metadata.query_lens) <= short_queries:
            self._launch(q, k_cache, v_cache, out, metadata, tiles.short, short_queries, is_short=True)
        if metadata.max_query_len > short_queries:
            self._launch(q, k_cache, v_cache, out, metadata, tiles.long, short_queries, is_short=False)
        return out

    def _launch(
        self,
        q: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        out: torch.Tensor,
        metadata: AttentionMetadata,
        tile: Tile,
        short_queries: int,
        *,
        is_short: bool,
    ) -> None:
        """Sequences of at most `short_queries` new tokens, or those of more."""
        (k_values, k_scales, form), (v_values, v_scales, _) = kernel_arguments(k_cache), kernel_arguments(v_cache)
        num_tokens, num_seqs = q.shape[0], metadata.seq_lens.shape[0]
        queries = tile.rows // (self.num_heads // self.num_kv_heads)
        num_tiles = num_seqs if is_short else num_tokens // queries + num_seqs
        num_segments = self.max_segments(queries, metadata.max_seq_len)
        num_splits = choose_num_splits(
            num_tiles * self.num_kv_heads,
            num_segments=num_segments,
            num_rows=num_tokens * self.num_heads,
            head_dim=self.block_d,
            multiprocessors=num_multiprocessors(q.device),
        )
        is_split = num_splits > 1
        partial = partial_max = out
        if is_split:
            rows = (num_tokens, self.num_heads, num_segments)
            partial = torch.empty((*rows, self.block_d), dtype=torch.float32, device=q.device)
            partial_max = torch.empty((*rows, 2), dtype=torch.float32, device=q.device)
        shared_constants = {
            "NUM_HEADS": self.num_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "WINDOW": self.window,
            "GROUP": self.num_heads // self.num_kv_heads,
            "SEGMENT": SEGMENT,
            "BLOCK_M": tile.rows,
            "IS_SHORT": is_short,
            "SHORT_QUERIES": short_queries,
            # Without it the compiler decides which products and sums are rounded once, tile by tile.
            "enable_fp_fusion": False,
        }
        attention_kernel[num_tiles, self.num_kv_heads, num_splits](
            q,
            k_values,
            v_values,
            k_scales,
            v_scales,
            out,
            partial,
            partial_max,
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            self.head_dim**-0.5 * LOG2_E,
            num_seqs,
            metadata.block_table.stride(0),
            num_segments,
            q.stride(0),
            q.stride(1),
            k_values.stride(0),
            k_values.stride(1),
            k_values.stride(2),
            BLOCK_SIZE=k_values.shape[1],
            BLOCK_N=tile.keys,
            IS_SPLIT=is_split,
            FORM=form,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **shared_constants,
        )
        if is_split:
            merge_kernel[num_tiles, self.num_kv_heads, triton.cdiv(tile.rows, MERGED_ROWS)](
                partial,
                partial_max,
                out,
                metadata.seq_lens,
                metadata.cu_seqlens_q,
                num_seqs,
                num_segments,
                MERGED_ROWS=MERGED_ROWS,
                **shared_constants,
            )

    def max_segments(self, queries: int, max_seq_len: int) -> int:
        """The most segments that a tile's queries see. W=4096 and 4 queries: 4,099 keys touch up to 10 segments of 512."""
        most = triton.cdiv(max_seq_len, SEGMENT)
        if self.window:
            most = min(most, triton.cdiv(self.window + queries - 2, SEGMENT) + 1)
        return most


def device_capability() -> int:
    """Of the device that kernels are compiled for: 90 for compute capability 9.0."""
    if triton.knobs.runtime.interpret:
        return DEFAULT_CAPABILITY
    return int(triton.runtime.driver.active.get_current_target().arch)


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
