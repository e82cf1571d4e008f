"""LoRA in Triton: two launches a layer, the same for every number of adapters, so that CUDA graphs can repeat them.

`shrink` computes A x for tiles of rows of one slot, in parts of at most 1,024 inputs; `expand` adds the parts in their order, multiplies by
B and adds to the output. A slot without rows costs programs that end at once. Tiles and parts depend on the layer alone, so a row has the
same bits in any batch, on one kind of GPU and with one version of Triton.
"""

import torch
import triton
import triton.language as tl

ROWS, RANKS, OUTPUTS, DEPTH = 16, 16, 64, 64
PART = 1024  # inputs


@triton.jit
def shrink_kernel(
    x_ptr,
    values_ptr,
    table_ptr,
    order_ptr,
    starts_ptr,
    h_ptr,
    x_stride,
    slot_size,
    IN_FEATURES: tl.constexpr,
    NUM_SHARDS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    slot, z = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts_ptr + slot) + tl.program_id(0) * ROWS
    end = tl.load(starts_ptr + slot + 1)
    tiles: tl.constexpr = MAX_RANK // RANKS
    tile, shard, part = z % tiles, z // tiles % NUM_SHARDS, z // (tiles * NUM_SHARDS)
    entry = table_ptr + (slot * NUM_SHARDS + shard) * 3
    rank = tl.load(entry + 2)
    if first < end and tile * RANKS < rank:
        places = first + tl.arange(0, ROWS)
        is_row = (places < end)[:, None]
        rows = tl.load(order_ptr + places, mask=places < end, other=0).to(tl.int64)
        ranks = tile * RANKS + tl.arange(0, RANKS)
        inputs = part * PART + tl.arange(0, DEPTH)
        a_ptr = values_ptr + slot.to(tl.int64) * slot_size + tl.load(entry)
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for start in range(0, PART, DEPTH):
            k = inputs + start
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + k[None, :], mask=is_row & (k < IN_FEATURES)[None, :], other=0.0
            )
            a = tl.load(
                a_ptr + ranks[None, :] * IN_FEATURES + k[:, None],
                mask=(k < IN_FEATURES)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            # ieee: fp32 is not cut to tf32.
            total = tl.dot(x, a, total, input_precision="ieee")
        h = h_ptr + ((places * NUM_SHARDS + shard) * NUM_PARTS + part)[:, None].to(tl.int64) * MAX_RANK + ranks[None, :]
        tl.store(h, total, mask=is_row)


@triton.jit
def expand_kernel(
    out_ptr,
    h_ptr,
    values_ptr,
    table_ptr,
    scales_ptr,
    columns_ptr,
    order_ptr,
    starts_ptr,
    out_stride,
    slot_size,
    NUM_SHARDS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    slot, z = tl.program_id(1), tl.program_id(2)
    first = tl.load(starts_ptr + slot) + tl.program_id(0) * ROWS
    end = tl.load(starts_ptr + slot + 1)
    tile, shard = z % NUM_TILES, z // NUM_TILES
    entry = table_ptr + (slot * NUM_SHARDS + shard) * 3
    rank = tl.load(entry + 2)
    begin = tl.load(columns_ptr + shard)
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < tl.load(columns_ptr + shard + 1) - begin
    if first < end and rank > 0:
        places = first + tl.arange(0, ROWS)
        is_row = (places < end)[:, None]
        rows = tl.load(order_ptr + places, mask=places < end, other=0).to(tl.int64)
        b_ptr = values_ptr + slot.to(tl.int64) * slot_size + tl.load(entry + 1)
        h_rows = h_ptr + (places * NUM_SHARDS + shard)[:, None].to(tl.int64) * NUM_PARTS * MAX_RANK
        total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            h = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for part in range(NUM_PARTS):
                h += tl.load(h_rows + part * MAX_RANK + ranks[None, :], mask=is_row, other=0.0)
            b = tl.load(
                b_ptr + outputs[None, :] * rank + ranks[:, None],
                mask=is_output[None, :] & (ranks < rank)[:, None],
                other=0.0,
            )
            total = tl.dot(h, b.to(tl.float32), total, input_precision="ieee")
        out = out_ptr + rows[:, None] * out_stride + (begin + outputs)[None, :]
        is_inside = is_row & is_output[None, :]
        base = tl.load(out, mask=is_inside, other=0.0).to(tl.float32)
        added = base + total * tl.load(scales_ptr + slot * NUM_SHARDS + shard)
        tl.store(out, added.to(out_ptr.dtype.element_ty), mask=is_inside)


def padded_rank(max_rank: int) -> int:
    """What A x takes in memory for each row and shard."""
    return triton.cdiv(max_rank, RANKS) * RANKS


def add_lora(
    out: torch.Tensor,
    x: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    *,
    values: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    columns: torch.Tensor,
    max_outputs: int,
    max_rank: int,
) -> None:
    """order, starts: see AdapterRows. max_outputs: of one shard.

    values: [num_slots, slot_size]. table: [num_slots, num_shards, 3] int32, where a slot's A [rank, in_features] and B [outputs, rank]
    begin, and the rank, 0 for none. scales: [num_slots, num_shards] float32. columns: [num_shards + 1] int32, where those of out begin.
    """
    num_tokens, in_features = x.shape
    num_slots, num_shards, _ = table.shape
    max_rank, num_parts = padded_rank(max_rank), triton.cdiv(in_features, PART)
    num_tiles = triton.cdiv(max_outputs, OUTPUTS)
    h = torch.empty((num_tokens, num_shards, num_parts, max_rank), dtype=torch.float32, device=x.device)
    row_tiles = triton.cdiv(num_tokens, ROWS)
    shrink_kernel[(row_tiles, num_slots, num_parts * num_shards * max_rank // RANKS)](
        x,
        values,
        table,
        order,
        starts,
        h,
        x.stride(0),
        values.stride(0),
        IN_FEATURES=in_features,
        NUM_SHARDS=num_shards,
        MAX_RANK=max_rank,
        NUM_PARTS=num_parts,
        PART=min(PART, triton.cdiv(in_features, DEPTH) * DEPTH),
        ROWS=ROWS,
        RANKS=RANKS,
        DEPTH=DEPTH,
    )
    expand_kernel[(row_tiles, num_slots, num_shards * num_tiles)](
        out,
        h,
        values,
        table,
        scales,
        columns,
        order,
        starts,
        out.stride(0),
        values.stride(0),
        NUM_SHARDS=num_shards,
        MAX_RANK=max_rank,
        NUM_PARTS=num_parts,
        NUM_TILES=num_tiles,
        ROWS=ROWS,
        RANKS=RANKS,
        OUTPUTS=OUTPUTS,
    )
