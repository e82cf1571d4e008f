// Queries, keys and values as products of bfloat16 read them: in units of 16 rows of 64 bytes, which are tiles of AMX and vectors of AVX-512. What
// a cache holds in 8 bits, bfloat16 holds exactly; scales stay outside. Knows no attention.
#pragma once

#include "kv_tile.h"
#include "paged_cache.h"

namespace {

// Of a tile of rows, and the numbers of which a product adds up at once.
constexpr int TILE_OF_ROWS = 16, CHUNK = 32;
constexpr int64_t UNIT = TILE_OF_ROWS * CHUNK;

// The first n of 32 numbers, and zeros after them.
INLINE __m512i load_chunk(const bf16* p, int64_t n) {
    return n >= CHUNK ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}
template <class KV>
INLINE __m512i load_chunk(const KV* p, int64_t n) {
    const f32x16 low = load_some(p, n), high = n > 16 ? load_some(p + 16, n - 16) : zero();
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
}

// 64 keys, or their first num_groups * 16 -> [chunks of the head][4 groups of keys][16 pairs of numbers][16 keys]. A null is a key of zeros.
template <class KV>
void pack_keys(const KV* const* keys, int64_t num_groups, int64_t head_dim, bf16* out) {
    for (int64_t d = 0; d < head_dim; d += CHUNK)
        for (int64_t g = 0; g < num_groups; g++) {
            f32x16 square[16];
            for (int i = 0; i < 16; i++) {
                const KV* const key = keys[g * 16 + i];
                square[i] = key ? f32x16{_mm512_castsi512_ps(load_chunk(key + d, head_dim - d))} : zero();
            }
            transpose(square);
            float* const unit = (float*)(out + (d / CHUNK * 4 + g) * UNIT);
            for (int i = 0; i < 16; i++) store(unit + i * 16, square[i]);
        }
}

// 64 values -> [head_dim / 16][32 pairs of keys][16 numbers]. A null is a value of zeros.
template <class KV>
void pack_values(const KV* const* values, int64_t head_dim, bf16* out) {
    // Quarters of 8 bytes, so that the halves of all 128 bits, interleaved, come out in order.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t d = 0; d < head_dim; d += CHUNK)
        for (int64_t pair = 0; pair < TILE / 2; pair++) {
            const KV *const even = values[2 * pair], *const odd = values[2 * pair + 1];
            const __m512i a = even ? _mm512_permutexvar_epi64(order, load_chunk(even + d, head_dim - d)) : _mm512_setzero_si512();
            const __m512i b = odd ? _mm512_permutexvar_epi64(order, load_chunk(odd + d, head_dim - d)) : _mm512_setzero_si512();
            bf16* const target = out + d / 16 * 2 * UNIT + pair * 32;
            _mm512_store_si512(target, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(target + 2 * UNIT, _mm512_unpackhi_epi16(a, b));
        }
}

// In each quarter of 4 vectors, 4 rows of 4 numbers become columns.
INLINE void transpose_quarters(f32x16 (&r)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0].v, r[1].v)), b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0].v, r[1].v));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2].v, r[3].v)), d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2].v, r[3].v));
    r[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), r[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), r[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// num queries, which lie next to each other -> columns of [chunks of the head][16 pairs of numbers][16 queries]. Columns after them, which no sum of theirs
// reads, stay as they are. head_dim: a multiple of 32.
INLINE void pack_queries_in_columns(const bf16* q, int64_t num, int64_t head_dim, bf16* out) {
    for (int64_t d = 0; d < head_dim; d += CHUNK)
        for (int64_t r = 0; r < num; r += 4) {
            f32x16 four[4];
            for (int i = 0; i < 4; i++) four[i] = r + i < num ? f32x16{_mm512_castsi512_ps(load_chunk(q + (r + i) * head_dim + d, CHUNK))} : zero();
            transpose_quarters(four);
            float* const target = (float*)(out + d / CHUNK * UNIT) + r;
            for (int i = 0; i < 4; i++) {
                _mm_store_ps(target + i * 16, _mm512_castps512_ps128(four[i].v));
                _mm_store_ps(target + (4 + i) * 16, _mm512_extractf32x4_ps(four[i].v, 1));
                _mm_store_ps(target + (8 + i) * 16, _mm512_extractf32x4_ps(four[i].v, 2));
                _mm_store_ps(target + (12 + i) * 16, _mm512_extractf32x4_ps(four[i].v, 3));
            }
        }
}

// A query -> row r of [chunks of the head][16 rows][32 numbers].
INLINE void pack_query(const bf16* q, int64_t r, int64_t head_dim, bf16* out) {
    for (int64_t d = 0; d < head_dim; d += CHUNK) _mm512_store_si512(out + d / CHUNK * UNIT + r * CHUNK, load_chunk(q + d, head_dim - d));
}

}  // namespace
