// What lies between the two products of a feed-forward layer: silu(gate) * up, with silu(gate) rounded to the type first. Knows no matrices; shared
// by the kernel that reads gates and ups, and by the products that have them as their sums.
#pragma once

#include "simd.h"

namespace {

// The nearest numbers that the type has.
INLINE f32x16 rounded_to(const float*, f32x16 x) { return x; }
INLINE f32x16 rounded_to(const bf16*, f32x16 x) {
    bf16 values[16];
    store(values, x);
    return load(values);
}

// 2^x within 3e-6 of it, for x from -126 to 127. Exactly 1 for 0.
INLINE f32x16 exp2_for_halves(f32x16 x) {
    // By minimax on [0, 1).
    const f32x16 part = fraction(x);
    f32x16 p = set1(1.34266838e-2f);
    p = fma(p, part, set1(5.22424728e-2f));
    p = fma(p, part, set1(2.41280198e-1f));
    p = fma(p, part, set1(6.93044841e-1f));
    p = fma(p, part, set1(1.0f));
    return times_exp2_of_floor(p, x);
}

// x / (1 + e^-x). `exp` takes at most 88; beyond it silu is as good as 0. `max` gives its second operand where one is not a number.
INLINE f32x16 silu(const float*, f32x16 x) { return x / (set1(1.0f) + exp(zero() - max(set1(-88.0f), x))); }

// Within 5e-6 of it, where bfloat16 rounds to 2e-3. A division takes as long as everything here together.
INLINE f32x16 silu(const bf16*, f32x16 x) {
    const f32x16 power = max(min(x * set1(-1.44269504f), set1(124.0f)), set1(-126.0f));
    const f32x16 minus = set1(-1.0f) - exp2_for_halves(power);
    // 1 / -minus: its exponent is about the negative one, which is 5 % off, and each step of Newton's squares that. The first one is moved so that
    // it errs to both sides.
    const f32x16 guess = bits_minus(0xfef311c7u, minus);
    const f32x16 closer = guess * fma(minus, guess, set1(2.00128f));
    return x * (closer * fma(minus, closer, set1(2.0f)));
}

template <class T>
INLINE f32x16 silu_times(f32x16 gate, f32x16 up) {
    return rounded_to((const T*)nullptr, silu((const T*)nullptr, gate)) * up;
}

}  // namespace
