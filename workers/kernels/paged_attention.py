"""Paged attention in Triton: decode, chunked prefill and prefill by one kernel. `attention/sdpa.py` is the specification.

The query heads of one KV head share a tile's rows. Keys are read in tiles of BLOCK_N and segments of SEGMENT positions, both counted from
position 0. Each segment is summed by itself, and the sums are merged in the order of their positions: by the program that made them, or by
`merge_kernel` where several programs share a long context. Both run the same instructions on a row, so the division changes no bit.

A query's result has the same bits alone, in any batch and chunk, and wherever its blocks are. For each row, the source fixes that
- sums over head_dim and keys are chains of matrix instructions in order, also the sum of the weights (a product with ones). The only
  reductions over a row are maxima, which are exact. No multiply and add is fused except by `tl.fma`: launch without fp fusion;
- a key that the query does not see has the weight 0 and is not read where no query of the tile sees it, so it adds nothing;
- tiles of a few and of many rows have the same BLOCK_N and one kind of matrix instruction: see `attention/triton_paged.py`.
Two properties are the hardware's: a matrix instruction computes all rows of a tile alike, and adding zeros leaves a sum as it is.
"""

import triton
import triton.language as tl

from workers.kernels.triton_kv import decode


@triton.jit
def _find_tile(cu_seqlens_q_ptr, num_seqs, QUERIES: tl.constexpr, IS_SHORT: tl.constexpr, SHORT_QUERIES: tl.constexpr):
    """This program's sequence and tile of queries: (sequence, first query of the tile, num_queries of the sequence).

    num_queries is 0 where the other launch computes the sequence, or the tile is past its end. Short sequences have one tile each.
    Otherwise sequence i begins at tile cu_seqlens_q[i] // QUERIES + i, which needs no more than num_tokens // QUERIES + num_seqs tiles:
    with QUERIES 16, sequences of 40 and 5 tokens begin at tiles 0 and 3, and the 2 + 2 tiles hold 16 + 16 + 8 and 5 queries.
    """
    if IS_SHORT:
        sequence = tl.program_id(0)
        first = 0
    else:
        # The last tiles see the most keys, so they start first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        num_begun = 0
        for start in range(0, num_seqs, 128):
            i = start + tl.arange(0, 128)
            begin = tl.load(cu_seqlens_q_ptr + i, mask=i < num_seqs, other=0) // QUERIES + i
            num_begun += tl.sum(((begin <= tile) & (i < num_seqs)).to(tl.int32))
        sequence = num_begun - 1
        first = (tile - tl.load(cu_seqlens_q_ptr + sequence) // QUERIES - sequence) * QUERIES
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1) - tl.load(cu_seqlens_q_ptr + sequence)
    if IS_SHORT:
        is_mine = num_queries <= SHORT_QUERIES
    else:
        is_mine = (num_queries > SHORT_QUERIES) & (first < num_queries)
    return sequence, first, tl.where(is_mine, num_queries, 0)


@triton.jit
def _seen_keys(first, num_queries, seq_len, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
    """[oldest, end) of the keys that a tile's queries see. W=100, seq_len 300, 20 new: the queries 280..299 see [181, 300)."""
    first_position = seq_len - num_queries + first
    end = tl.minimum(first_position + QUERIES, seq_len)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(first_position - WINDOW + 1, 0)
    return oldest, end


@triton.jit
def _merge(total, total_weight, total_max, summed, weight, maximum):
    """Adds a segment to the segments before it: values [rows, BLOCK_D], sums of weights [rows], maxima [rows]."""
    new_max = tl.maximum(total_max, maximum)
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    old_scale = tl.exp2(total_max - finite_max)
    scale = tl.exp2(maximum - finite_max)
    total = tl.fma(summed, scale[:, None], total * old_scale[:, None])
    total_weight = tl.fma(weight, scale, total_weight * old_scale)
    return total, total_weight, new_max


@triton.jit
def _write(out_ptr, total, total_weight, offsets, mask):
    # A padded sequence of length 0 sees no key.
    out = total / tl.where(total_weight > 0.0, total_weight, 1.0)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


# What changes from step to step must not lead to another compilation in the middle of serving.
@triton.jit(
    do_not_specialize=["num_seqs", "table_stride", "num_segments"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "cu_seqlens_q_ptr"],
)
def attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE], where FORM has scales
    v_scales_ptr,
    out_ptr,
    partial_ptr,  # [num_tokens, num_heads, num_segments, BLOCK_D]
    partial_max_ptr,  # [num_tokens, num_heads, num_segments, 2]: a segment's maximum and sum of weights
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    scale,
    num_seqs,
    table_stride,
    num_segments,
    q_token_stride,
    q_head_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SHORT: tl.constexpr,
    SHORT_QUERIES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    FORM: tl.constexpr,
):
    """Grid: (tiles of queries, KV heads, splits of the context). `scale` includes log2(e). FORM: of the caches, see `triton_kv`."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    sequence, first, num_queries = _find_tile(cu_seqlens_q_ptr, num_seqs, QUERIES, IS_SHORT, SHORT_QUERIES)
    if num_queries == 0:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    oldest, end = _seen_keys(first, num_queries, seq_len, QUERIES, WINDOW)
    first_key = oldest // BLOCK_N * BLOCK_N
    first_segment = oldest // SEGMENT
    if IS_SPLIT:
        # Whole segments, the same number for each split.
        per_split = tl.cdiv(tl.cdiv(end, SEGMENT) - first_segment, tl.num_programs(2)) * SEGMENT
        split_start = first_segment * SEGMENT + tl.program_id(2) * per_split
        first_key = tl.maximum(first_key, split_start)
        end = tl.minimum(end, split_start + per_split)
        if first_key >= end:
            return

    kv_head = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (query < num_queries) & (row < QUERIES * GROUP)
    token = (tl.load(cu_seqlens_q_ptr + sequence) + query).to(tl.int64)
    position = seq_len - num_queries + query
    d = tl.arange(0, BLOCK_D)
    is_d = d < HEAD_DIM
    q_offsets = token[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=is_row[:, None] & is_d[None, :], other=0.0)

    table = block_table_ptr + sequence.to(tl.int64) * table_stride
    # Any column of the product is the sum. With fewer than 32, all four warps of a small tile would compute the same.
    SUM_COLUMNS: tl.constexpr = 8 if BLOCK_M >= 64 else 32
    ones = tl.full((BLOCK_N, SUM_COLUMNS), 1.0, dtype=tl.float32).to(dtype)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    total_weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    summed, maximum = total, total_max
    weight = tl.zeros((BLOCK_M, SUM_COLUMNS), dtype=tl.float32)
    for start in range(first_key, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # Slots that no query of the tile sees may hold anything, even NaN, so they are not read.
        is_key = (key >= oldest) & (key < end)
        block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slots = block * cache_block_stride + (key % BLOCK_SIZE) * cache_slot_stride + kv_head * cache_head_stride
        kv_offsets = slots[:, None] + d[None, :]
        kv_mask = is_key[:, None] & is_d[None, :]
        k = tl.load(k_cache_ptr + kv_offsets, mask=kv_mask, other=0)
        if FORM != "auto":
            k = decode(k, FORM, dtype)
            scales = (block * tl.num_programs(1) + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
        # ieee: fp32 is not cut to tf32.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if FORM != "auto":
            k_scales = tl.load(k_scales_ptr + scales, mask=is_key, other=0.0)
            scores = scores * k_scales[None, :]
        is_seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (position[:, None] - key[None, :] < WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_max = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(tl.fma(scores, scale, -finite_max[:, None])).to(dtype)
        old_scale = tl.exp2(maximum - finite_max)[:, None]
        v = tl.load(v_cache_ptr + kv_offsets, mask=kv_mask, other=0)
        if FORM != "auto":
            # Not the weights: a product with a small scale may be too small for float16.
            v_scales = tl.load(v_scales_ptr + scales, mask=is_key, other=0.0)
            v = (decode(v, FORM, tl.float32) * v_scales[:, None]).to(dtype)
        summed = tl.dot(weights, v, summed * old_scale, input_precision="ieee")
        weight = tl.dot(weights, ones, weight * old_scale, input_precision="ieee")
        maximum = new_max
        next_key = start + BLOCK_N
        if (next_key % SEGMENT == 0) | (next_key >= end):
            segment_weight = tl.max(weight, axis=1)
            if IS_SPLIT:
                partial = (token * NUM_HEADS + head) * num_segments + (start // SEGMENT - first_segment)
                tl.store(partial_ptr + partial[:, None] * BLOCK_D + d[None, :], summed, mask=is_row[:, None])
                tl.store(partial_max_ptr + partial * 2, maximum, mask=is_row)
                tl.store(partial_max_ptr + partial * 2 + 1, segment_weight, mask=is_row)
            else:
                total, total_weight, total_max = _merge(total, total_weight, total_max, summed, segment_weight, maximum)
            summed = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            weight = tl.zeros((BLOCK_M, SUM_COLUMNS), dtype=tl.float32)
            maximum = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    if not IS_SPLIT:
        out_offsets = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        _write(out_ptr, total, total_weight, out_offsets, is_row[:, None] & is_d[None, :])


@triton.jit(
    do_not_specialize=["num_seqs", "num_segments"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "cu_seqlens_q_ptr"],
)
def merge_kernel(
    partial_ptr,
    partial_max_ptr,
    out_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    num_seqs,
    num_segments,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    IS_SHORT: tl.constexpr,
    SHORT_QUERIES: tl.constexpr,
):
    """Merges what `attention_kernel` with IS_SPLIT wrote, MERGED_ROWS of a tile each. Grid: (tiles of queries, KV heads, their parts)."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    sequence, first, num_queries = _find_tile(cu_seqlens_q_ptr, num_seqs, QUERIES, IS_SHORT, SHORT_QUERIES)
    if first + tl.program_id(2) * MERGED_ROWS // GROUP >= num_queries:
        return
    oldest, end = _seen_keys(first, num_queries, tl.load(seq_lens_ptr + sequence), QUERIES, WINDOW)
    row = tl.program_id(2) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    query = first + row // GROUP
    is_row = (query < num_queries) & (row < QUERIES * GROUP)
    token = (tl.load(cu_seqlens_q_ptr + sequence) + query).to(tl.int64)
    row_index = token * NUM_HEADS + tl.program_id(1) * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((MERGED_ROWS, BLOCK_D), dtype=tl.float32)
    total_weight = tl.zeros((MERGED_ROWS,), dtype=tl.float32)
    total_max = tl.full((MERGED_ROWS,), float("-inf"), dtype=tl.float32)
    for segment in tl.range(0, tl.cdiv(end, SEGMENT) - oldest // SEGMENT, num_stages=4):
        partial = row_index * num_segments + segment
        summed = tl.load(partial_ptr + partial[:, None] * BLOCK_D + d[None, :], mask=is_row[:, None], other=0.0)
        maximum = tl.load(partial_max_ptr + partial * 2, mask=is_row, other=0.0)
        weight = tl.load(partial_max_ptr + partial * 2 + 1, mask=is_row, other=0.0)
        total, total_weight, total_max = _merge(total, total_weight, total_max, summed, weight, maximum)
    out_offsets = row_index[:, None] * HEAD_DIM + d[None, :]
    _write(out_ptr, total, total_weight, out_offsets, is_row[:, None] & (d < HEAD_DIM)[None, :])
