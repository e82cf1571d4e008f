// The form of weights in groups of 32 inputs, and how inputs are rounded for them: what the products of gemm_int.cpp share. That file describes
// both.
#pragma once

#include <cmath>

#include "panels.h"

namespace {

constexpr int GROUP = 32, QUADS = GROUP / 4;

// 16 whole numbers.
#ifdef __AVX512F__
struct i32x16 {
    __m512i v;
};
using Bytes = __m512i;  // 16 columns of 4 unsigned bytes
INLINE i32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Bytes low_halves(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
INLINE i32x16 dot(i32x16 sum, Bytes w, int32_t x) { return {_mm512_dpbusd_epi32(sum.v, w, _mm512_set1_epi32(x))}; }
INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
#else
struct i32x16 {
    __m256i lo, hi;
};
struct Bytes {
    __m256i lo, hi;
};
INLINE i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
INLINE Bytes low_halves(Bytes b) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
INLINE Bytes high_halves(Bytes b) { return low_halves({_mm256_srli_epi16(b.lo, 4), _mm256_srli_epi16(b.hi, 4)}); }
// Even and odd bytes apart: the one instruction for both saturates.
INLINE __m256i dot(__m256i sum, __m256i w, int32_t x) {
    const __m256i inputs = _mm256_set1_epi32(x), even = _mm256_set1_epi16(0xff);
    __m256i w0 = _mm256_and_si256(w, even), w1 = _mm256_srli_epi16(w, 8);
    __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8), x1 = _mm256_srai_epi16(inputs, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(w0, x0), _mm256_madd_epi16(w1, x1)));
}
INLINE i32x16 dot(i32x16 sum, Bytes w, int32_t x) { return {dot(sum.lo, w.lo, x), dot(sum.hi, w.hi, x)}; }
INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
#endif

// Whole numbers from -127 to 127, or what is not a number, which becomes any.
#ifdef __AVX512F__
INLINE void store_bytes(int8_t* p, f32x16 low, f32x16 high) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(low.v)));
    _mm_storeu_si128((__m128i*)(p + 16), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(high.v)));
}
#else
INLINE void store_bytes(int8_t* p, f32x16 low, f32x16 high) {
    const __m256i halves[2] = {_mm256_packs_epi32(_mm256_cvtps_epi32(low.lo), _mm256_cvtps_epi32(low.hi)),
                               _mm256_packs_epi32(_mm256_cvtps_epi32(high.lo), _mm256_cvtps_epi32(high.hi))};
    // Packing keeps both halves of a vector apart: eights of numbers come in the order 0 2 1 3 of fours.
    const __m256i bytes = _mm256_packs_epi16(halves[0], halves[1]);
    _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
#endif

INLINE f32x16 load_scales(const uint16_t* p) { return load_half(p); }
INLINE f32x16 load_scales(const float* p) { return load(p); }

// One of them, as float.
INLINE float one_scale(uint16_t x) { return _cvtsh_ss(x); }
INLINE float one_scale(float x) { return x; }

// What a group has besides a scale.
enum Second { NOTHING, MINIMUM, ZERO_POINT };

// SCALE: the type of scales, minima and zero points, uint16_t for half precision or float.
template <int BITS_, Second SECOND_, class SCALE>
struct Weight {
    using Scale = SCALE;
    static constexpr Second SECOND = SECOND_;
    static constexpr int BITS = BITS_, ZERO = BITS == 8 ? 128 : SECOND == NOTHING ? 8 : 0;
    static constexpr int64_t HEADER_BYTES = PANEL * (SECOND == NOTHING ? 1 : 2) * sizeof(Scale), GROUP_BYTES = HEADER_BYTES + PANEL * GROUP * BITS / 8;
};

// What a packed matrix begins with, for expand_amx.h; 64 bytes, so that groups stay in whole cache lines. shift: weights by 2^shift use the range
// of half precision.
struct alignas(64) Header {
    int32_t shift, is_finite;
};

// largest: the largest weight, or a little more. Scales by 2^(shift - 3) must stay in half precision.
inline Header header_for(float largest) {
    int exponent;
    if (!(largest < 0x1p26f)) return {0, false};
    if (!(largest > 0.0f)) return {0, true};
    std::frexp(largest, &exponent);
    return {std::min(15 - exponent, 18), true};
}

// Rounds 32 inputs to 8 bits: scale = largest / 127. Not-a-number and infinite inputs give a scale that makes the whole row not a number.
template <class T>
INLINE float round_group(const T* x, int8_t* rounded, int32_t* total) {
    const f32x16 a = load(x), b = load(x + 16);
    const float largest = max_of(max(abs(a), abs(b)));
    const float scale = largest / 127.0f;
    const f32x16 inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    const f32x16 low = round_to_even(a * inverse), high = round_to_even(b * inverse);
    store_bytes(rounded, low, high);
    // Whole numbers, so the order changes nothing.
    *total = (int32_t)sum(low + high);
    // 0 * x is not a number where x is not finite; `max` may have passed over it.
    const float poison = sum(a * zero() + b * zero());
    return scale + poison;
}

}  // namespace
