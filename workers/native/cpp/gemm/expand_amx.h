// Weights of 8 or 4 bits in groups of 32 inputs as bfloat16, for tiles of AMX. Knows a group's bytes; no products.
//
// A weight is computed in half precision, 32 at a time, and rounded to the 8 bits of bfloat16: half an ulp up, away from zero. It does not
// become a bfloat16 by a change of its exponent, which would take as long as all the rest, but by a shift: the bits of 2^e in half precision, three
// places to the right, are 2^(e - 112) in bfloat16. So that weights use the range of half precision, all of a matrix are multiplied by 2^shift,
// and inputs by 2^(112 - shift). A weight of less than 2^-28 of the largest one, or
// than 2^-32, becomes zero.
//
// The instructions for half precision are written in assembler, because GCC 11 does not know them.
#pragma once

#include <cmath>

#include "grouped_weight.h"

namespace {

INLINE __m512i multiply_halves(__m512i a, __m512i b) {
    __asm__("vmulph %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
}
INLINE __m512i subtract_halves(__m512i a, __m512i b) {
    __asm__("vsubph %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
    return a;
}
// a * b + c, rounded once.
INLINE __m512i fma_halves(__m512i a, __m512i b, __m512i c) {
    __asm__("vfmadd213ph %2, %1, %0" : "+v"(a) : "v"(b), "v"(c));
    return a;
}
INLINE __m512i halves(float x) { return _mm512_set1_epi16((short)_cvtss_sh(x, 0)); }

// Values are multiplied by 2^VALUE_SHIFT and scales by the rest of 2^shift, of which half precision has 2^-14 to 2^15.
constexpr int VALUE_SHIFT = 3;
constexpr int64_t TILE_BYTES = GROUP * 16 * 2;

// What the groups of a matrix are expanded with. shift: see Header.
template <class Form>
class Expansion {
   public:
    explicit Expansion(int shift) : factor(std::ldexp(1.0f, shift - VALUE_SHIFT)) {
        alignas(64) uint16_t values[32];
        for (int i = 0; i < 32; i++) values[i] = _cvtss_sh((float)(i % 16 - Form::ZERO) * (1 << VALUE_SHIFT), 0);
        small_values = _mm512_load_si512(values);
    }

    // Half of the bytes of a group, the first (0) or the second (1). tiles: two, of 16 columns each, whose rows are pairs of inputs. Of 4 inputs these
    // are the first and the third, then the others: see `repack_scaled`. ahead: what is read beside it, as far as this half goes.
    __attribute__((always_inline)) void expand(const char* group, int half, char* tiles, const char* ahead) const {
        constexpr int64_t ROW = PANEL * 4;
        constexpr int LINES = (Form::GROUP_BYTES - Form::HEADER_BYTES) / ROW / 2;
        const auto* const scale = (const typename Form::Scale*)group;
        const __m512i scales[2] = {in_pairs(scale, factor), in_pairs(scale + 16, factor)};
        __m512i seconds[2] = {scales[0], scales[1]};
        for (int c = 0; c < 2; c++) {
            if constexpr (Form::SECOND == MINIMUM) seconds[c] = multiply_halves(in_pairs(scale + PANEL + c * 16, factor), halves(1 << VALUE_SHIFT));
            if constexpr (Form::SECOND == ZERO_POINT) seconds[c] = in_pairs(scale + PANEL + c * 16, 1 << VALUE_SHIFT);
        }
        const auto put = [&](int row, int c, __m512i values) {
            if constexpr (Form::SECOND == MINIMUM) {
                values = fma_halves(values, scales[c], seconds[c]);
            } else {
                if constexpr (Form::SECOND == ZERO_POINT) values = subtract_halves(values, seconds[c]);
                values = multiply_halves(values, scales[c]);
            }
            // Three places to the right, rounded; the sign stays where it is, and its copies go.
            const __m512i shifted = _mm512_mulhrs_epi16(values, _mm512_set1_epi16(1 << 12));
            _mm512_store_si512(tiles + c * TILE_BYTES + row * 64, _mm512_and_si512(shifted, _mm512_set1_epi16((short)0x8fff)));
        };
        if (half == 0)
            for (int64_t i = 0; i < Form::HEADER_BYTES; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
        const char* const bytes = group + Form::HEADER_BYTES;
        // A byte at the end of the mantissa of 2^10 is added to it.
        const __m512i magic = _mm512_set1_epi16(0x6400 + (VALUE_SHIFT << 10)), zero = halves((1024 + Form::ZERO) << VALUE_SHIFT);
#pragma GCC unroll 8
        for (int q = half * LINES; q < (half + 1) * LINES; q++)
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                const int64_t place = q * ROW + c * 64;
                _mm_prefetch(ahead + Form::HEADER_BYTES + place, _MM_HINT_T1);
                const __m512i all = _mm512_loadu_si512(bytes + place);
                if constexpr (Form::BITS == 8) {
                    const __m512i even = _mm512_ternarylogic_epi32(all, _mm512_set1_epi16(0xff), magic, 0xea);  // all & 0xff | magic
                    const __m512i odd = _mm512_or_si512(_mm512_srli_epi16(all, 8), magic);
                    put(2 * q, c, subtract_halves(even, zero));
                    put(2 * q + 1, c, subtract_halves(odd, zero));
                } else {
                    put(2 * q, c, _mm512_permutexvar_epi16(all, small_values));
                    put(2 * q + 1, c, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 8), small_values));
                    put(2 * q + QUADS, c, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 4), small_values));
                    put(2 * q + QUADS + 1, c, _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 12), small_values));
                }
            }
    }

   private:
    // Each of 16 numbers twice, multiplied.
    INLINE __m512i in_pairs(const uint16_t* p, float factor) {
        const __m512i numbers = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return multiply_halves(_mm512_or_si512(numbers, _mm512_slli_epi32(numbers, 16)), halves(factor));
    }
    INLINE __m512i in_pairs(const float* p, float factor) {
        const __m512i numbers = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(factor)), 0));
        return _mm512_or_si512(numbers, _mm512_slli_epi32(numbers, 16));
    }

    const float factor;
    // Of 4 bits, from 0 on. As there are 32, twice: the instruction that looks them up takes 5 bits, and of the fifth nothing is known.
    __m512i small_values;
};

}  // namespace
