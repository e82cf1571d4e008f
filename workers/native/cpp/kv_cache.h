// Keys and values in 8 bits with a scale for each token and head: how a head is written. As workers/kernels/quantized_kv.py specifies, to the
// last bit. Knows no cache; shared by the kernel that writes it and the one that reads it.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"

namespace {

// Whether a cache of this type has scales.
template <class KV>
constexpr bool is_scaled = std::is_same_v<KV, int8_t> || std::is_same_v<KV, e4m3>;

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float limit_of(const int8_t*) { return 127.0f; }
INLINE float limit_of(const e4m3*) { return 448.0f; }

// x is within the limit of the type.
INLINE void store_one(int8_t* p, float x) { *p = (int8_t)(int32_t)std::rint(x); }
INLINE void store_one(e4m3* p, float x) {
    const uint32_t sign = bits_of(x) >> 24 & 0x80, size = bits_of(x) & 0x7fffffff;
    // Below 2^-6 the numbers are multiples of 2^-9, which is the last place of 2^14.
    const uint32_t small = bits_of(from_bits(size) + 16384.0f) - bits_of(16384.0f);
    const uint32_t normal = (size - (120u << 23) + 0x7ffff + (size >> 20 & 1)) >> 20;
    p->bits = (uint8_t)(sign | (size < bits_of(0.015625f) ? small : normal));
}

// Writes the n numbers of a head and returns their scale.
template <class KV, class T>
INLINE float quantize_head(KV* out, const T* x, int64_t n) {
    // As integers, a NaN is larger than all numbers, and so the scale becomes one.
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, bits_of(to_float(x[i])) & 0x7fffffff);
    const float limit = limit_of(out), scale = from_bits(largest) / limit, divisor = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < n; i++) {
        const float value = to_float(x[i]) / divisor;
        store_one(out + i, value > limit ? limit : value >= -limit ? value : -limit);
    }
    return scale;
}

}  // namespace
