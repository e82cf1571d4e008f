"""Adjusted logits and one token of each row, in Triton. The specification is sample_specification.py: same signatures, same bits.

`choose` has one program for each row, which reads the row a few dozen times where it truncates; sample_search.py says how. Launched without
fused multiply-add, which would round differently.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.sampling.sample_search import (
    LOWEST,
    float_of,
    fraction_of,
    kept_weight,
    last_tied_id,
    ordered_key,
    search,
    token_weight,
)
from workers.kernels.sampling.sample_specification import FRACTION_BITS, IN_PROMPT, SamplingTable

# What a program reads at a time, and its warps: eight logits a thread.
BLOCK = 4096
NUM_WARPS = 16
EDIT_BLOCK = 256

IN_PROMPT_BIT = tl.constexpr(IN_PROMPT)
ALL = tl.constexpr(1 << FRACTION_BITS)


@triton.jit(do_not_specialize=["num_rows"])
def adjust_kernel(
    logits_ptr, counts_ptr, floats_ptr, integers_ptr, masks_ptr, adjusted_ptr, num_rows, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    here = row.to(tl.int64) * vocab_size + columns
    logits = tl.load(logits_ptr + here, mask=inside, other=0.0)
    slot = tl.load(integers_ptr + 4 * num_rows + row)
    mask_index = tl.load(integers_ptr + 5 * num_rows + row)
    repetition = tl.load(floats_ptr + num_rows + row)
    presence = tl.load(floats_ptr + 2 * num_rows + row)
    frequency = tl.load(floats_ptr + 3 * num_rows + row)
    seen = tl.load(counts_ptr + slot * vocab_size + columns, mask=inside & (slot >= 0), other=0)
    times = seen & (IN_PROMPT_BIT - 1)
    repeated = tl.where(logits > 0, tl.div_rn(logits, tl.zeros_like(logits) + repetition), logits * repetition)
    logits = tl.where(seen != 0, repeated, logits)
    lowered = logits - (presence + frequency * times.to(tl.float32))
    logits = tl.where(times > 0, lowered, logits)
    is_masked = inside & (mask_index >= 0)
    bits = tl.load(masks_ptr + mask_index * ((vocab_size + 7) // 8) + columns // 8, mask=is_masked, other=255).to(
        tl.int32
    )
    logits = tl.where((bits >> (columns % 8)) & 1 != 0, logits, float("-inf"))
    tl.store(adjusted_ptr + here, logits, mask=inside)


@triton.jit(do_not_specialize=["num_edits"])
def edit_kernel(logits_ptr, index_ptr, value_ptr, num_edits, BLOCK: tl.constexpr):
    edits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = edits < num_edits
    index = tl.load(index_ptr + edits, mask=inside, other=0)
    value = tl.load(value_ptr + edits, mask=inside, other=0.0)
    logits = tl.load(logits_ptr + index, mask=inside, other=0.0)
    tl.store(logits_ptr + index, tl.where(value == float("-inf"), value, logits + value), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def choose_kernel(
    logits_ptr, counts_ptr, floats_ptr, integers_ptr, chosen_ptr, num_rows, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
    inverse_temperature = tl.load(floats_ptr + row)
    random = tl.load(integers_ptr + row)
    top_p = tl.load(integers_ptr + num_rows + row)
    min_weight = tl.load(integers_ptr + 2 * num_rows + row)
    top_k = tl.load(integers_ptr + 3 * num_rows + row)
    slot = tl.load(integers_ptr + 4 * num_rows + row)

    # Each lane keeps the first of its largest logits.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK,), tl.int32)
    num_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        is_larger = logits > largest
        largest = tl.where(is_larger, logits, largest)
        ids = tl.where(is_larger, columns, ids)
        num_nan += (logits != logits).to(tl.int32)
    best = tl.max(largest)
    token = tl.min(tl.where(largest == best, ids, vocab_size))
    is_possible = (best > float("-inf")) & (tl.sum(num_nan) == 0)

    if is_possible & (inverse_temperature > 0):
        # Less likely tokens have no weight.
        smallest = ordered_key(best + LOWEST / inverse_temperature)
        last_id = vocab_size
        if top_k < vocab_size:
            smallest, above = search(
                row_ptr, vocab_size, best, inverse_temperature, min_weight, smallest, top_k.to(tl.int32), True, BLOCK
            )
            last_id = last_tied_id(row_ptr, vocab_size, smallest, top_k.to(tl.int32) - above, BLOCK)
        sums = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
            sums += kept_weight(logits, columns, best, inverse_temperature, min_weight, smallest, last_id)
        total = tl.sum(sums)
        if top_p < ALL:
            enough = tl.maximum(fraction_of(top_p, total), 1)
            key, total = search(
                row_ptr, vocab_size, best, inverse_temperature, min_weight, smallest, enough, False, BLOCK
            )
            # Tokens with one key have one weight. It is 0 only where all that top_k left is needed.
            weight = token_weight(float_of(key), best, inverse_temperature)
            if (weight >= min_weight) & (weight > 0):
                num_tied = (enough - total + weight - 1) // weight
                total += num_tied * weight
                last_id = last_tied_id(row_ptr, vocab_size, key, num_tied, BLOCK)
            smallest = key
        target = fraction_of(random, total)
        before = tl.zeros((), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
            weight = kept_weight(logits, columns, best, inverse_temperature, min_weight, smallest, last_id)
            here = tl.sum(weight)
            if (before <= target) & (before + here > target):
                token = start + tl.sum((before + tl.cumsum(weight) <= target).to(tl.int32))
            before += here

    tl.store(chosen_ptr + row, tl.where(is_possible, token, 0).to(tl.int64))
    tl.store(chosen_ptr + num_rows + row, tl.where(is_possible, token, -1).to(tl.int64))
    if is_possible & (slot >= 0):
        count_ptr = counts_ptr + slot * vocab_size + token
        tl.store(count_ptr, tl.load(count_ptr) + 1)


def adjust(logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """See sample_specification.adjust. logits: contiguous."""
    num_rows, vocab_size = logits.shape
    adjusted = torch.empty_like(logits)
    adjust_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
        *(logits, counts, table.floats, table.integers, table.masks, adjusted, num_rows, vocab_size),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return adjusted


def edit(logits: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """See sample_specification.edit. logits: contiguous."""
    num_edits = len(index)
    edit_kernel[(triton.cdiv(num_edits, EDIT_BLOCK),)](logits, index, value, num_edits, BLOCK=EDIT_BLOCK)


def choose(logits: torch.Tensor, counts: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """See sample_specification.choose. logits: contiguous."""
    num_rows, vocab_size = logits.shape
    chosen = torch.empty(2, num_rows, dtype=torch.int64, device=logits.device)
    choose_kernel[(num_rows,)](
        *(logits, counts, table.floats, table.integers, chosen, num_rows, vocab_size),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return chosen
