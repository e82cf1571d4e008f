// Vectors of 16 floats with one meaning on every instruction set: the AVX-512 and the AVX2 form of a kernel give the same bits, because every
// operation here rounds once, as IEEE 754 says (to bfloat16 without numbers below 2^-126), and sums are added in the same order. Knows no kernel.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define TRAMONTANE_JOIN3(a, b, c) a##_##b##_##c
#define TRAMONTANE_NAME(isa, name) TRAMONTANE_JOIN3(tramontane, isa, name)
// The exported name of a kernel: tramontane_avx512_gemm_float32.
#define TRAMONTANE_FUNCTION(type, name) extern "C" __attribute__((visibility("default"))) type TRAMONTANE_NAME(TRAMONTANE_ISA, name)
#define TRAMONTANE_KERNEL(name) TRAMONTANE_FUNCTION(void, name)
#define INLINE static inline __attribute__((always_inline))

namespace {

struct bf16 {
    uint16_t bits;
};
// 8 bits: a sign, 4 of exponent, 3 of mantissa. The largest is 448; there is no infinity.
struct e4m3 {
    uint8_t bits;
};

#ifdef __AVX512F__

struct f32x16 {
    __m512 v;
};

INLINE f32x16 zero() { return {_mm512_setzero_ps()}; }
INLINE f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// Of two of which one is not a number, the second.
INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// a * b + c, rounded once.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE f32x16 round_to_even(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
// 2^n for whole n from -126 to 127.
INLINE f32x16 exp2_of_integer(f32x16 n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
// a less the whole number below it, and b times 2 to that whole number, which is from -126 to 127.
INLINE f32x16 fraction(f32x16 a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
INLINE f32x16 times_exp2_of_floor(f32x16 b, f32x16 a) { return {_mm512_scalef_ps(b.v, a.v)}; }
// 0 where x < limit, and `a` elsewhere, also where x is not a number.
INLINE f32x16 where_not_below(f32x16 x, f32x16 limit, f32x16 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
INLINE f32x16 load(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
// To the nearest, of two to the even one; what is smaller than 2^-126 becomes 0.
INLINE void store(bf16* p, f32x16 a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
INLINE f32x16 load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// Of the bits of each number.
INLINE f32x16 bits_left(f32x16 a, int n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), n))}; }
INLINE f32x16 bits_right(f32x16 a, int n) { return {_mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(a.v), n))}; }
INLINE f32x16 bits_minus(uint32_t bits, f32x16 a) { return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32((int)bits), _mm512_castps_si512(a.v)))}; }
INLINE f32x16 bits_and(f32x16 a, uint32_t mask) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32((int)mask)))}; }
INLINE f32x16 bits_xor(f32x16 a, f32x16 b) { return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))}; }
INLINE f32x16 load(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
// With the bits in a half's places, its exponent is 8 too small.
INLINE f32x16 load(const e4m3* p) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7));
    return f32x16{_mm512_cvtph_ps(half)} * set1(256.0f);
}
// Rows become columns.
INLINE void transpose(f32x16 (&rows)[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    // b[4 j + c]: column c of each quarter, of rows 4 j .. 4 j + 3.
    for (int j = 0; j < 16; j += 4) {
        b[j] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[j]), _mm512_castps_pd(a[j + 2])));
        b[j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[j]), _mm512_castps_pd(a[j + 2])));
        b[j + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[j + 1]), _mm512_castps_pd(a[j + 3])));
        b[j + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[j + 1]), _mm512_castps_pd(a[j + 3])));
    }
    for (int c = 0; c < 4; c++) {
        const __m512 even0 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88), odd0 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
        const __m512 even1 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88), odd1 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
        rows[c].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
        rows[c + 8].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
        rows[c + 4].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        rows[c + 12].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
}
// ((0 + 8) + (4 + 12)) and so on: halves are added until one number is left.
INLINE __m256 fold(f32x16 a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
INLINE __m256 fold_max(f32x16 a) { return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }

#else

struct f32x16 {
    __m256 lo, hi;
};

INLINE f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, f32x16 a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
INLINE f32x16 round_to_even(f32x16 a) {
    return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE f32x16 abs(f32x16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
INLINE __m256 exp2_of_integer(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE f32x16 exp2_of_integer(f32x16 n) { return {exp2_of_integer(n.lo), exp2_of_integer(n.hi)}; }
INLINE f32x16 floor(f32x16 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
INLINE f32x16 fraction(f32x16 a) { return a - floor(a); }
INLINE f32x16 times_exp2_of_floor(f32x16 b, f32x16 a) { return b * exp2_of_integer(floor(a)); }
INLINE f32x16 where_not_below(f32x16 x, f32x16 limit, f32x16 a) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ), a.lo), _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ), a.hi)};
}
INLINE __m256 load_bf16(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE f32x16 load(const bf16* p) { return {load_bf16(p), load_bf16(p + 8)}; }
INLINE __m256i rounded_to_bf16(__m256 a) {
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    // As AVX-512 does it: of what is smaller than 2^-126, only the sign is left.
    __m256i is_tiny = _mm256_cmpeq_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7f800000)), _mm256_setzero_si256());
    return _mm256_andnot_si256(_mm256_and_si256(is_tiny, _mm256_set1_epi32(0x7fff)), rounded);
}
INLINE void store(bf16* p, f32x16 a) {
    __m256i packed = _mm256_packus_epi32(rounded_to_bf16(a.lo), rounded_to_bf16(a.hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE f32x16 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE f32x16 load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// With the bits in a half's places, its exponent is 8 too small.
INLINE f32x16 load(const e4m3* p) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7));
    return f32x16{_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))} * set1(256.0f);
}
// Of the bits of each number.
INLINE __m256 bits_left(__m256 a, int n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), n)); }
INLINE __m256 bits_right(__m256 a, int n) { return _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(a), n)); }
INLINE f32x16 bits_left(f32x16 a, int n) { return {bits_left(a.lo, n), bits_left(a.hi, n)}; }
INLINE f32x16 bits_right(f32x16 a, int n) { return {bits_right(a.lo, n), bits_right(a.hi, n)}; }
INLINE __m256 bits_minus(uint32_t bits, __m256 a) { return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32((int)bits), _mm256_castps_si256(a))); }
INLINE f32x16 bits_minus(uint32_t bits, f32x16 a) { return {bits_minus(bits, a.lo), bits_minus(bits, a.hi)}; }
INLINE f32x16 bits_and(f32x16 a, uint32_t mask) {
    const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32((int)mask));
    return {_mm256_and_ps(a.lo, all), _mm256_and_ps(a.hi, all)};
}
INLINE f32x16 bits_xor(f32x16 a, f32x16 b) { return {_mm256_xor_ps(a.lo, b.lo), _mm256_xor_ps(a.hi, b.hi)}; }
INLINE void transpose(__m256& r0, __m256& r1, __m256& r2, __m256& r3, __m256& r4, __m256& r5, __m256& r6, __m256& r7) {
    __m256* const rows[8] = {&r0, &r1, &r2, &r3, &r4, &r5, &r6, &r7};
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(*rows[i], *rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(*rows[i], *rows[i + 1]);
    }
    for (int j = 0; j < 8; j += 4) {
        b[j] = _mm256_shuffle_ps(a[j], a[j + 2], 0x44);
        b[j + 1] = _mm256_shuffle_ps(a[j], a[j + 2], 0xee);
        b[j + 2] = _mm256_shuffle_ps(a[j + 1], a[j + 3], 0x44);
        b[j + 3] = _mm256_shuffle_ps(a[j + 1], a[j + 3], 0xee);
    }
    for (int c = 0; c < 4; c++) {
        *rows[c] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        *rows[c + 4] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
}
// Rows become columns.
INLINE void transpose(f32x16 (&r)[16]) {
    transpose(r[0].lo, r[1].lo, r[2].lo, r[3].lo, r[4].lo, r[5].lo, r[6].lo, r[7].lo);
    transpose(r[0].hi, r[1].hi, r[2].hi, r[3].hi, r[4].hi, r[5].hi, r[6].hi, r[7].hi);
    transpose(r[8].lo, r[9].lo, r[10].lo, r[11].lo, r[12].lo, r[13].lo, r[14].lo, r[15].lo);
    transpose(r[8].hi, r[9].hi, r[10].hi, r[11].hi, r[12].hi, r[13].hi, r[14].hi, r[15].hi);
    for (int i = 0; i < 8; i++) {
        const __m256 upper = r[i].hi;
        r[i].hi = r[i + 8].lo;
        r[i + 8].lo = upper;
    }
}
INLINE __m256 fold(f32x16 a) { return _mm256_add_ps(a.lo, a.hi); }
INLINE __m256 fold_max(f32x16 a) { return _mm256_max_ps(a.lo, a.hi); }

#endif

INLINE float sum(f32x16 a) {
    __m256 b = fold(a);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

INLINE float max_of(f32x16 a) {
    __m256 b = fold_max(a);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

// Loads and stores of the first n of 16 values, for the end of a row; the others are 0.
template <class T>
INLINE f32x16 load_some(const T* p, int64_t n) {
    if (n >= 16) return load(p);
    T all[16] = {};
    memcpy(all, p, n * sizeof(T));
    return load(all);
}
template <class T>
INLINE void store_some(T* p, f32x16 a, int64_t n) {
    if (n >= 16) return store(p, a);
    T all[16];
    store(all, a);
    memcpy(p, all, n * sizeof(T));
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87.3, where the result would be subnormal.
// n = round(x / ln 2), and e^(x - n ln 2) by a polynomial of degree 6, see Cephes' expf.
INLINE f32x16 exp(f32x16 x) {
    f32x16 n = round_to_even(x * set1(1.44269504f));
    f32x16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return where_not_below(x, set1(-87.3f), p * exp2_of_integer(n));
}

}  // namespace
