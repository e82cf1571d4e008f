// The two products of attention for a tile of 16 rows, in pairs of bfloat16 with sums in float32: with AMX's tiles, or with AVX-512's dot product
// of pairs. Each sum is one chain along its numbers, in the processor's own order, whatever the other rows are; AMX and AVX-512 give other bits.
//
// queries: [chunks][16][32]; keys: [chunks][4][16 pairs][16]; scores: [16][64]; weights: [2 chunks of keys][16][32];
// values: [tiles of 16 numbers][32 pairs][16]; out: [tiles of 16 numbers][16 rows][16].
#pragma once

#include "pair_tile.h"
#ifdef __AMX_BF16__
#include "../amx.h"
#endif

namespace {

#ifdef __AMX_BF16__

// What a thread holds while it multiplies.
class PairUnits {
    const Tiles configured{CHUNK * 2, CHUNK / 2};
};

constexpr bool HAS_KEYS_IN_PLACE = true;

// The number of a tile is part of its instruction.
#define PRODUCT_WITH_KEYS(sum, key, group)                                \
    _tile_loadd(key, keys + (c * 4 + group) * UNIT, 64);                  \
    _tile_dpbf16ps(sum, 4, key);

INLINE void multiply_keys(int, const bf16* queries, const bf16* keys, int64_t chunks, float* scores) {
    stores_are_done();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < chunks; c++) {
        _tile_loadd(4, queries + c * UNIT, 64);
        PRODUCT_WITH_KEYS(0, 6, 0)
        PRODUCT_WITH_KEYS(1, 7, 1)
        PRODUCT_WITH_KEYS(2, 6, 2)
        PRODUCT_WITH_KEYS(3, 7, 3)
    }
    _tile_stored(0, scores, TILE * 4);
    _tile_stored(1, scores + 16, TILE * 4);
    _tile_stored(2, scores + 32, TILE * 4);
    _tile_stored(3, scores + 48, TILE * 4);
    stores_are_done();
}

#define PRODUCT_WITH_VALUES(sum, a, b)                               \
    _tile_loadd(sum, out + (t + sum) * 256, 64);                     \
    _tile_loadd(a, values + (t + sum) * 2 * UNIT, 64);               \
    _tile_dpbf16ps(sum, 4, a);                                       \
    _tile_loadd(b, values + (t + sum) * 2 * UNIT + UNIT, 64);        \
    _tile_dpbf16ps(sum, 5, b);

INLINE void add_values(int, const bf16* weights, const bf16* values, int64_t tiles, float* out) {
    stores_are_done();
    _tile_loadd(4, weights, 64);
    _tile_loadd(5, weights + UNIT, 64);
    for (int64_t t = 0; t < tiles; t += 2) {
        PRODUCT_WITH_VALUES(0, 6, 7)
        PRODUCT_WITH_VALUES(1, 6, 7)
        _tile_stored(0, out + t * 256, 64);
        _tile_stored(1, out + (t + 1) * 256, 64);
    }
    stores_are_done();
}

// The scores of few rows, with keys where they lie in the cache: they are the inputs here, and the queries the weights. So keys need not become columns,
// which takes longer than these products. A sum adds the same products in the same order as above.
// queries: [chunks][16 pairs][16 rows], see pack_queries_in_columns. keys: the first of each 16, `key_stride` numbers apart from the next.
INLINE void multiply_keys_in_place(int num_rows, const bf16* queries, const bf16* const* keys, int64_t num_groups, int64_t key_stride, int64_t chunks,
                                   float* scores) {
    alignas(64) float columns[TILE_OF_ROWS * TILE_OF_ROWS];
    for (int64_t g = 0; g < num_groups; g++) {
        stores_are_done();
        _tile_zero(0);
        for (int64_t c = 0; c < chunks; c++) {
            _tile_loadd(6, queries + c * UNIT, 64);
            _tile_loadd(4, keys[g] + c * CHUNK, key_stride * 2);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, columns, 64);
        stores_are_done();
        for (int r = 0; r < num_rows; r += 4) {
            f32x16 four[4];
            for (int i = 0; i < 4; i++) {
                __m512 part = _mm512_broadcast_f32x4(_mm_load_ps(columns + i * 16 + r));
                part = _mm512_mask_broadcast_f32x4(part, 0x00f0, _mm_load_ps(columns + (4 + i) * 16 + r));
                part = _mm512_mask_broadcast_f32x4(part, 0x0f00, _mm_load_ps(columns + (8 + i) * 16 + r));
                four[i].v = _mm512_mask_broadcast_f32x4(part, 0xf000, _mm_load_ps(columns + (12 + i) * 16 + r));
            }
            transpose_quarters(four);
            for (int i = 0; i < 4; i++) store(scores + (r + i) * TILE + g * 16, four[i]);
        }
    }
}

#undef PRODUCT_WITH_KEYS
#undef PRODUCT_WITH_VALUES

#else

class PairUnits {
   public:
    PairUnits() {}
};

constexpr bool HAS_KEYS_IN_PLACE = false;

INLINE void multiply_keys_in_place(int, const bf16*, const bf16* const*, int64_t, int64_t, int64_t, float*) {}

// Rows whose sums with four vectors fit into the registers.
constexpr int PAIR_ROWS = 6;

INLINE f32x16 add_pairs(f32x16 sum, const bf16* vector, const bf16* pair) {
    uint32_t both;
    memcpy(&both, pair, 4);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_load_si512(vector), (__m512bh)_mm512_set1_epi32((int)both))};
}

template <int ROWS>
void multiply_keys_of(const bf16* queries, const bf16* keys, int64_t chunks, float* scores) {
    f32x16 acc[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < 4; g++) acc[r][g] = zero();
    for (int64_t c = 0; c < chunks; c++, queries += UNIT, keys += 4 * UNIT)
        for (int pair = 0; pair < 16; pair++) {
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++)
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++) acc[r][g] = add_pairs(acc[r][g], keys + g * UNIT + pair * 32, queries + r * CHUNK + pair * 2);
        }
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < 4; g++) store(scores + r * TILE + g * 16, acc[r][g]);
}

template <int ROWS>
void add_values_of(const bf16* weights, const bf16* values, float* out) {
    f32x16 acc[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < 2; t++) acc[r][t] = load(out + t * 256 + r * 16);
    for (int pair = 0; pair < TILE / 2; pair++) {
        const bf16* const weight = weights + pair / 16 * UNIT + pair % 16 * 2;
#pragma GCC unroll 2
        for (int t = 0; t < 2; t++)
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) acc[r][t] = add_pairs(acc[r][t], values + t * 2 * UNIT + pair * 32, weight + r * CHUNK);
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < 2; t++) store(out + t * 256 + r * 16, acc[r][t]);
}

// Calls use(row, a constant with the number of rows) for blocks of up to PAIR_ROWS rows.
template <int ROWS = PAIR_ROWS, class Use>
INLINE void for_blocks(int num, Use use) {
    int r = 0;
    for (; r + ROWS <= num; r += ROWS) use(r, std::integral_constant<int, ROWS>());
    if constexpr (ROWS > 1)
        if (r < num) for_blocks<ROWS - 1>(num - r, [&](int row, auto rows) { use(r + row, rows); });
}

INLINE void multiply_keys(int num_rows, const bf16* queries, const bf16* keys, int64_t chunks, float* scores) {
    for_blocks(num_rows, [&](int r, auto rows) { multiply_keys_of<rows>(queries + r * CHUNK, keys, chunks, scores + r * TILE); });
}

INLINE void add_values(int num_rows, const bf16* weights, const bf16* values, int64_t tiles, float* out) {
    for (int64_t t = 0; t < tiles; t += 2)
        for_blocks(num_rows, [&](int r, auto rows) { add_values_of<rows>(weights + r * CHUNK, values + t * 2 * UNIT, out + t * 256 + r * 16); });
}

#endif

}  // namespace
