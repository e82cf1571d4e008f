// Attention in float32, whatever the cache holds: for models in float32, and where the processor has no products of bfloat16. Scores are chains
// of multiply-adds along the head, and values are added key by key.
#pragma once

#include <cmath>
#include <vector>

#include "attention_tile.h"
#include "schedule.h"

namespace {

// Queries of one prefill that share each tile of keys, which is transposed once for all of them.
constexpr int64_t FLOAT_QUERY_TILE = 32;

// One thread's memory.
struct FloatScratch {
    std::vector<float> queries, keys, values, out, weights, largest, sums, factors;

    // dim: of a head, filled up to whole vectors.
    void reserve(int64_t rows, int64_t dim) {
        if ((int64_t)largest.size() >= rows && (int64_t)values.size() >= TILE * dim && (int64_t)out.size() >= rows * dim) return;
        queries.resize(rows * dim);
        out.resize(rows * dim);
        keys.resize(TILE * ((dim + 63) / 64 * 64));
        values.resize(TILE * dim);
        weights.resize(rows * TILE);
        for (auto* per_row : {&largest, &sums, &factors}) per_row->resize(rows);
    }
};

// queries, out: [rows][dim]; largest, sums: [rows]; of one KV head.
template <class KV>
void attend_tile(const Cache<KV>& k, const Cache<KV>& v, const Work& work, const Step& step, const Shape& s, const float* queries, float* out,
                 float* largest, float* sums, FloatScratch& scratch) {
    const int64_t group = s.group(), rows = work.num * group, head_dim = s.head_dim, dim = (head_dim + 15) / 16 * 16;
    const int64_t start = step.start, first_key = step.first_key(), last_key = step.last_key();
    const TilePlaces<KV> places(k, v, step, work, s);
    for (int64_t i = 0; i < last_key - start; i += 16) transpose_keys(places.keys + i, head_dim, scratch.keys.data() + i, TILE);
    for (int64_t r = 0; r < rows; r += MAX_ROWS)
        scores_of((int)std::min<int64_t>(MAX_ROWS, rows - r), queries + r * dim, dim, scratch.keys.data(), scratch.weights.data() + r * TILE);
    int64_t first_row = rows, end_row = 0;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t position = work.position + r / group;
        const int64_t begin = std::max(start, s.window ? position - s.window + 1 : 0) - start, end = std::min<int64_t>(start + TILE, position + 1) - start;
        if (begin >= end) {
            scratch.factors[r] = 1.0f;
            continue;
        }
        float* const row = scratch.weights.data() + r * TILE;
        if constexpr (is_scaled<KV>) scale_tile(row, places.key_scales);
        scratch.factors[r] = softmax_tile(row, (int)begin, (int)end, largest + r, sums + r);
        if constexpr (is_scaled<KV>) scale_tile(row, places.value_scales);
        first_row = std::min(first_row, r);
        end_row = r + 1;
    }
    // Rows that see something lie together. Keys that only other rows see have a weight of 0, which adds nothing.
    const auto add = [&](const auto* const* values, int64_t width) {
        for (int64_t r = first_row; r < end_row; r += 6)
            add_values_of((int)std::min<int64_t>(6, end_row - r), out + r * dim, dim, scratch.factors.data() + r, scratch.weights.data() + r * TILE, values,
                          width, (int)(first_key - start), (int)(last_key - start));
    };
    if (rows <= 6 && (VALUE_VECTORS > 1 || sizeof(KV) == 1)) return add(places.values, head_dim);
    // Read again for every 6 rows or every vector, so they are converted once and put next to each other.
    const float* copies[TILE];
    for (int64_t i = first_key - start; i < last_key - start; i++) {
        float* const copy = scratch.values.data() + i * dim;
        for (int64_t d = 0; d < dim; d += 16) store(copy + d, load_some(places.values[i] + d, head_dim - d));
        copies[i] = copy;
    }
    add(copies, dim);
}

// The query heads of an item's KV heads for its queries. Rows are (KV head, query, head within the group).
template <class T, class KV>
void attend_float(T* out, const T* q, const Cache<KV>& k, const Cache<KV>& v, const Item& item, const Shape& s, int64_t q_stride, int64_t out_stride) {
    static thread_local FloatScratch scratch;
    const Work& work = *item.work;
    // Heads are filled up with zeros to whole vectors.
    const int64_t group = s.group(), rows = work.num * group, all_rows = item.num_heads * rows, head_dim = s.head_dim, dim = (head_dim + 15) / 16 * 16;
    scratch.reserve(all_rows, dim);
    float *const queries = scratch.queries.data(), *const acc = scratch.out.data();
    const auto place_of_row = [&](int64_t i, int64_t stride) {
        const int64_t r = i % rows;
        return (work.token + r / group) * stride + ((item.first_head + i / rows) * group + r % group) * head_dim;
    };
    for (int64_t i = 0; i < all_rows; i++) {
        const T* row = q + place_of_row(i, q_stride);
        for (int64_t d = 0; d < dim; d += 16) store(queries + i * dim + d, load_some(row + d, head_dim - d) * set1(s.scale));
    }
    std::fill(acc, acc + all_rows * dim, 0.0f);
    std::fill(scratch.largest.begin(), scratch.largest.begin() + all_rows, -INFINITY);
    std::fill(scratch.sums.begin(), scratch.sums.begin() + all_rows, 0.0f);
    for_each_step(k, v, work, item.first_head, item.num_heads, s, [&](const Step& step) {
        const int64_t row = (step.kv_head - item.first_head) * rows;
        attend_tile(k, v, work, step, s, queries + row * dim, acc + row * dim, scratch.largest.data() + row, scratch.sums.data() + row, scratch);
    });
    for (int64_t i = 0; i < all_rows; i++) {
        T* target = out + place_of_row(i, out_stride);
        for (int64_t d = 0; d < dim; d += 16) store_some(target + d, load(acc + i * dim + d) / set1(scratch.sums[i]), head_dim - d);
    }
}

}  // namespace
