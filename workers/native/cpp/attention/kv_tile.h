// Keys as attention multiplies them: float32, a row for each number of the head and a column for each key. Knows how the types of a cache
// keep their numbers; no cache, no attention.
#pragma once

#include "../kv_cache.h"

namespace {

// Numbers of a cache that are transposed together: 64 bytes of each of 16 keys, as 16 units of 4 bytes.
template <class KV>
constexpr int64_t NUMBERS = 64 / sizeof(KV);

// The first n bytes, and zeros up to 64.
INLINE f32x16 load_bytes(const void* p, int64_t n) {
    if (n >= 64) return load((const float*)p);
    float all[16] = {};
    memcpy(all, p, n);
    return load(all);
}

// Writes the numbers in units of 4 bytes to rows of floats, the first number to the first row.
INLINE void widen(const float*, f32x16 units, float* out, int64_t) { store(out, units); }
INLINE void widen(const bf16*, f32x16 units, float* out, int64_t stride) {
    store(out, bits_left(units, 16));
    store(out + stride, bits_and(units, 0xffff0000));
}
// In the last place of 2^23 an integer is its own bits; with the sign's bit turned, it is the number plus 128.
INLINE f32x16 from_int8(f32x16 byte) { return bits_xor(byte, set1(8388736.0f)) - set1(8388736.0f); }
INLINE void widen(const int8_t*, f32x16 units, float* out, int64_t stride) {
    store(out, from_int8(bits_and(units, 0xff)));
    store(out + stride, from_int8(bits_and(bits_right(units, 8), 0xff)));
    store(out + 2 * stride, from_int8(bits_and(bits_right(units, 16), 0xff)));
    store(out + 3 * stride, from_int8(bits_right(units, 24)));
}
// With its bits in the places of a float32, the exponent is 120 too small. top: in the highest byte.
INLINE f32x16 from_e4m3(f32x16 top) {
    return bits_xor(bits_and(top, 0x80000000), bits_right(bits_and(top, 0x7f000000), 4)) * set1(1.329227995784916e36f);
}
INLINE void widen(const e4m3*, f32x16 units, float* out, int64_t stride) {
    store(out, from_e4m3(bits_left(units, 24)));
    store(out + stride, from_e4m3(bits_left(units, 16)));
    store(out + 2 * stride, from_e4m3(bits_left(units, 8)));
    store(out + 3 * stride, from_e4m3(units));
}

// 16 keys of a head become columns. A null is a key of zeros. Writes rows up to a multiple of NUMBERS, those after the head with zeros.
template <class KV>
INLINE void transpose_keys(const KV* const* keys, int64_t head_dim, float* out, int64_t stride) {
    for (int64_t d = 0; d < head_dim; d += NUMBERS<KV>) {
        f32x16 square[16];
        for (int i = 0; i < 16; i++) square[i] = keys[i] ? load_bytes(keys[i] + d, (head_dim - d) * (int64_t)sizeof(KV)) : zero();
        transpose(square);
        for (int i = 0; i < 16; i++) widen((const KV*)nullptr, square[i], out + (d + i * NUMBERS<KV> / 16) * stride, stride);
    }
}

}  // namespace
