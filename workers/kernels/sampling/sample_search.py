"""What the kernels of sample.py and logprobs.py call: logits in an order, weights, and searches through a row.

Functions of one program, which has a row of logits in memory; no kernels. Truncation does not sort: `search` finds the smallest logit that
stays, in the order of the floats' bits, four parts at a time, with exact sums of whole numbers. Callers launch without fused multiply-add,
which would round differently.
"""

import triton
import triton.language as tl

from workers.kernels.sampling.sample_specification import (
    EXP_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    MIN_EXPONENT,
    WEIGHT_BITS,
)

LOWEST = tl.constexpr(MIN_EXPONENT)
PER_LN2, LN2_1, LN2_2 = tl.constexpr(LOG2_E), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
E0, E1, E2, E3, E4, E5 = (tl.constexpr(c) for c in EXP_COEFFICIENTS)
LOW_31 = tl.constexpr(0x7FFFFFFF)
INT32_MIN, INT32_MAX = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)
TWO_30, SHIFT = tl.constexpr(float(1 << 30)), tl.constexpr(WEIGHT_BITS - 30)


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
