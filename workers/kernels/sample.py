"""Adjusted logits and one token of each row, in Triton. The specification is sample_specification.py: same signatures, same bits.

`choose` has one program for each row, which reads the row a few dozen times where it truncates. Truncation does not sort: it searches the
smallest logit that stays, in the order of the floats' bits, four parts at a time, with exact sums of whole numbers. Launched without fused
multiply-add, which would round differently.
"""

import torch
import triton
import triton.language as tl

from workers.kernels.sample_specification import (
    EXP_COEFFICIENTS,
    FRACTION_BITS,
    IN_PROMPT,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    MIN_EXPONENT,
    WEIGHT_BITS,
    SamplingTable,
)

# What a program reads at a time, and its warps: eight logits a thread.
BLOCK = 4096
NUM_WARPS = 16
EDIT_BLOCK = 256

IN_PROMPT_BIT = tl.constexpr(IN_PROMPT)
LOWEST = tl.constexpr(MIN_EXPONENT)
PER_LN2, LN2_1, LN2_2 = tl.constexpr(LOG2_E), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
E0, E1, E2, E3, E4, E5 = (tl.constexpr(c) for c in EXP_COEFFICIENTS)
LOW_31 = tl.constexpr(0x7FFFFFFF)
INT32_MIN, INT32_MAX = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)
TWO_30, SHIFT = tl.constexpr(float(1 << 30)), tl.constexpr(WEIGHT_BITS - 30)
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


@triton.jit
def ordered_key(logits):
    """int32 in the order of the floats; both zeros are one number."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ LOW_31)


@triton.jit
def token_weight(logits, best, inverse_temperature):
    """See sample_specification.token_weights."""
    exponent = tl.where(logits == best, 0.0, logits - best) * inverse_temperature
    exponent = tl.maximum(exponent, LOWEST)
    n = tl.floor(exponent * PER_LN2 + 0.5)
    r = exponent - n * LN2_1
    r = r - n * LN2_2
    y = tl.zeros_like(r) + E0
    y = y * r + E1
    y = y * r + E2
    y = y * r + E3
    y = y * r + E4
    y = y * r + E5
    y = y * r * r + r + 1.0
    # y * 2**30 is whole and less than 2**31. A conversion to 64 bits and shifts are much faster than one from float to 64 bits.
    shift = n.to(tl.int32) + SHIFT
    whole = (y * TWO_30).to(tl.int32).to(tl.int64)
    return (whole << tl.maximum(shift, 0)) >> tl.maximum(-shift, 0)


@triton.jit
def fraction_of(fraction, total):
    """See sample_specification.fraction_of."""
    f_high, f_low, t_high, t_low = fraction >> 31, fraction & LOW_31, total >> 31, total & LOW_31
    return f_high * t_high + ((f_high * t_low + f_low * t_high + ((f_low * t_low) >> 31)) >> 31)


@triton.jit
def kept_weight(logits, columns, best, inverse_temperature, min_weight, smallest, last_id):
    """The weight, 0 unless the token's key is above `smallest`, or equal to it and the id at most `last_id`."""
    key = ordered_key(logits)
    weight = token_weight(logits, best, inverse_temperature)
    kept = (weight >= min_weight) & ((key > smallest) | ((key == smallest) & (columns <= last_id)))
    return tl.where(kept, weight, 0)


@triton.jit
def last_tied_id(row_ptr, vocab_size, key, num_kept, BLOCK: tl.constexpr):
    """The id of the token number `num_kept`, from 1, of those with this key; vocab_size if there are fewer."""
    num_before = tl.zeros((), tl.int32)
    found = tl.zeros((), tl.int32) + vocab_size
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        tied = ((ordered_key(logits) == key) & (columns < vocab_size)).to(tl.int32)
        num_tied = tl.sum(tied)
        if (num_before < num_kept) & (num_before + num_tied >= num_kept):
            found = start + tl.sum((num_before + tl.cumsum(tied) < num_kept).to(tl.int32))
        num_before += num_tied
    return found


@triton.jit
def float_of(key):
    """The logit that has this key."""
    return tl.where(key >= 0, key, key ^ LOW_31).to(tl.float32, bitcast=True)


@triton.jit
def search(
    row_ptr,
    vocab_size,
    best,
    inverse_temperature,
    min_weight,
    smallest,
    enough,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(key, above): the largest key, but at least `smallest`, so that the tokens from it on have `enough`, and what those above it have,
    which is less. COUNTS: tokens are counted; otherwise their weights of at least min_weight are added.

    Each pass over the row parts an interval of logits in four, and makes it as small as the tokens in it allow.
    """
    low, high = smallest, ordered_key(best) + 1
    above = tl.zeros((), tl.int32 if COUNTS else tl.int64)
    while high > low + 1:
        low_logit = float_of(low)
        quarter = (float_of(high - 1) - low_logit) * 0.25
        key1 = tl.minimum(tl.maximum(ordered_key(low_logit + quarter), low + 1), high - 1)
        key2 = tl.minimum(tl.maximum(ordered_key(low_logit + 2.0 * quarter), key1), high - 1)
        key3 = tl.minimum(tl.maximum(ordered_key(low_logit + 3.0 * quarter), key2), high - 1)
        sums1 = tl.zeros((BLOCK,), tl.int32 if COUNTS else tl.int64)
        sums2, sums3 = sums1, sums1
        firsts = tl.full((BLOCK,), INT32_MAX, tl.int32)
        lasts = tl.full((BLOCK,), INT32_MIN, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
            key = ordered_key(logits)
            if COUNTS:
                part = tl.full((BLOCK,), 1, tl.int32)
            else:
                part = token_weight(logits, best, inverse_temperature)
                part = tl.where(part >= min_weight, part, 0)
            sums1 += tl.where(key >= key1, part, 0)
            sums2 += tl.where(key >= key2, part, 0)
            sums3 += tl.where(key >= key3, part, 0)
            firsts = tl.minimum(firsts, tl.where(key >= low, key, INT32_MAX))
            lasts = tl.maximum(lasts, tl.where(key < high, key, INT32_MIN))
        first, last = tl.min(firsts), tl.max(lasts)
        sum1, sum2, sum3 = tl.sum(sums1), tl.sum(sums2), tl.sum(sums3)
        if sum3 >= enough:
            low = key3
        elif sum2 >= enough:
            low, high, above = key2, key3, sum3
        elif sum1 >= enough:
            low, high, above = key1, key2, sum2
        else:
            high, above = key1, sum1
        # `first` is the smallest key from the old `low` on, `last` the largest below the old `high`.
        low = tl.maximum(low, tl.minimum(first, high - 1))
        high = tl.minimum(high, tl.maximum(last, low) + 1)
    return low, above


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
