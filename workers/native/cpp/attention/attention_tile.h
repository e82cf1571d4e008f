// The arithmetic of attention on one tile of keys: scores, softmax, and the sum of values, for rows of queries. Scores are chains of
// multiply-adds along the head, and values are added key by key, so a row's bits depend on nothing but its own numbers and keys.
#pragma once

#include <algorithm>
#include <cmath>

#include "kv_tile.h"
#include "paged_cache.h"

namespace {

constexpr int TILE_VECTORS = TILE / 16;
// What the registers hold: rows of scores with a tile's keys, and 6 rows of results with so many vectors.
#ifdef __AVX512F__
constexpr int MAX_ROWS = 6, VALUE_VECTORS = 4;
#else
constexpr int MAX_ROWS = 1, VALUE_VECTORS = 1;
#endif

template <int ROWS>
void scores(const float* q, int64_t head_dim, const float* keys, float* out) {
    f32x16 acc[ROWS][TILE_VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < TILE_VECTORS; v++) acc[r][v] = zero();
    for (int64_t d = 0; d < head_dim; d++) {
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
            const f32x16 key = load(keys + d * TILE + v * 16);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) acc[r][v] = fma(set1(q[r * head_dim + d]), key, acc[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < TILE_VECTORS; v++) store(out + r * TILE + v * 16, acc[r][v]);
}

template <int ROWS = MAX_ROWS>
void scores_of(int rows, const float* q, int64_t head_dim, const float* keys, float* out) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return scores_of<ROWS - 1>(rows, q, head_dim, keys, out);
    }
    scores<ROWS>(q, head_dim, keys, out);
}

// out[r] = out[r] * factor[r] + weights[r] @ values for ROWS rows of out, which are `stride` apart, in VECTORS vectors from column d on.
// values: of each key of the tile, the numbers of the head. num: how many of these there are in the vector; 0 for whole vectors.
template <int ROWS, int VECTORS, class KV>
INLINE void add_values(float* out, int64_t stride, const float* factors, const float* weights, const KV* const* values, int64_t d, int64_t num, int begin,
                int end) {
    f32x16 acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = load(out + r * stride + d + v * 16) * set1(factors[r]);
    for (int key = begin; key < end; key++) {
        f32x16 value[VECTORS];
        for (int v = 0; v < VECTORS; v++) value[v] = num ? load_some(values[key] + d, num) : load(values[key] + d + v * 16);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const f32x16 weight = set1(weights[r * TILE + key]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) acc[r][v] = fma(weight, value[v], acc[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * stride + d + v * 16, acc[r][v]);
}

template <int ROWS = 6, class KV>
void add_values_of(int rows, float* out, int64_t stride, const float* factors, const float* weights, const KV* const* values, int64_t head_dim,
                   int begin, int end) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return add_values_of<ROWS - 1>(rows, out, stride, factors, weights, values, head_dim, begin, end);
    }
    int64_t d = 0;
    for (; d + 16 * VALUE_VECTORS <= head_dim; d += 16 * VALUE_VECTORS)
        add_values<ROWS, VALUE_VECTORS>(out, stride, factors, weights, values, d, 0, begin, end);
    for (; d + 16 <= head_dim; d += 16) add_values<ROWS, 1>(out, stride, factors, weights, values, d, 0, begin, end);
    if (d < head_dim) add_values<ROWS, 1>(out, stride, factors, weights, values, d, head_dim - d, begin, end);
}

// A number is its value times the scale of its key, so scores and weights take the scale instead of every number.
INLINE void scale_tile(float* row, const float* scales) {
    for (int i = 0; i < TILE_VECTORS; i++) store(row + i * 16, load(row + i * 16) * load(scales + i * 16));
}

// Softmax weights of a tile for one query that sees keys [begin, end) of it, from scores in place. Returns the factor of what came before.
INLINE float softmax_tile(float* row, int begin, int end, float* largest, float* total) {
    for (int i = 0; i < begin; i++) row[i] = -INFINITY;
    for (int i = end; i < TILE; i++) row[i] = -INFINITY;
    f32x16 v[TILE_VECTORS];
    for (int i = 0; i < TILE_VECTORS; i++) v[i] = load(row + i * 16);
    const float now = std::max(*largest, max_of(max(max(v[0], v[1]), max(v[2], v[3]))));
    for (int i = 0; i < TILE_VECTORS; i++) {
        v[i] = exp(v[i] - set1(now));
        store(row + i * 16, v[i]);
    }
    // exp of the vector, so that it is the same function.
    float before[16];
    store(before, exp(set1(*largest - now)));
    *largest = now;
    *total = *total * before[0] + sum((v[0] + v[1]) + (v[2] + v[3]));
    return before[0];
}

}  // namespace
