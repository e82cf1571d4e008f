// Attention in products of bfloat16, as FlashAttention has it: scores and sums in float32, weights rounded to bfloat16. A row (a query and a head)
// is computed the same way, tile of keys by tile of keys, in whatever tile of rows it is.
#pragma once

#include <algorithm>
#include <cmath>

#include "../buffer.h"
#include "pair_products.h"
#include "schedule.h"
#include "softmax_rows.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// Queries of one prefill that share each tile of keys, which is packed once for all of them: so many that their results stay in the second cache.
INLINE int64_t pairs_query_tile(const Shape& s) { return std::clamp<int64_t>(256 / s.group(), 16, 64); }

// One thread's memory.
struct PairScratch {
    Buffer<bf16> queries, keys, values;
    Buffer<float> out;
    Buffer<RowStates> states;
    alignas(64) float scores[2][TILE_OF_ROWS * TILE];
    alignas(64) bf16 weights[2 * UNIT];
};

// Tiles of rows of one KV head, rows being (query, head within the group). Sizes of a tile's queries and results, in values.
struct RowTiles {
    int64_t num_rows, num, dim;

    RowTiles(const Work& work, const Shape& s)
        : num_rows(work.num * s.group()), num((num_rows + TILE_OF_ROWS - 1) / TILE_OF_ROWS), dim((s.head_dim + CHUNK - 1) / CHUNK * CHUNK) {}

    int64_t size() const { return TILE_OF_ROWS * dim; }
    int rows_of(int64_t t) const { return (int)std::min<int64_t>(TILE_OF_ROWS, num_rows - t * TILE_OF_ROWS); }
};

// What rows of a tile see of a tile of keys that begins at `start`. Null: everything.
INLINE const Seen* seen_by(Seen& seen, int64_t first_row, int num_rows, int64_t start, const Work& work, const Shape& s) {
    const int64_t group = s.group(), first = work.position + first_row / group, last = work.position + (first_row + num_rows - 1) / group;
    if (first >= start + TILE - 1 && (!s.window || last - s.window + 1 <= start)) return nullptr;
    for (int r = 0; r < num_rows; r++) {
        const int64_t position = work.position + (first_row + r) / group;
        seen.begin[r] = s.window ? (int)std::clamp<int64_t>(position - s.window + 1 - start, 0, TILE - 1) : 0;
        seen.end[r] = (int)std::clamp<int64_t>(position + 1 - start, 0, TILE);
        if (s.window && position - s.window + 1 >= start + TILE) seen.end[r] = 0;
    }
    return &seen;
}

// Multiplies the rows of a tile of results by their factors. Most are 1, once the largest scores have been seen.
INLINE void rescale(float* out, f32x16 factors, int64_t dim) {
    uint32_t rows = _mm512_cmp_ps_mask(factors.v, set1(1.0f).v, _CMP_NEQ_UQ);
    alignas(64) float all[TILE_OF_ROWS];
    store(all, factors);
    for (; rows; rows &= rows - 1) {
        const int r = __builtin_ctz(rows);
        for (int64_t d = 0; d < dim; d += 16) store(out + d * 16 + r * 16, load(out + d * 16 + r * 16) * set1(all[r]));
    }
}

// Whether keys are multiplied where they lie: for one query, whose heads share a tile, and where 16 keys lie in one block.
template <class KV>
INLINE bool takes_keys_in_place(const Work& work, const Shape& s) {
    return HAS_KEYS_IN_PLACE && std::is_same_v<KV, bf16> && work.num == 1 && s.group() <= TILE_OF_ROWS && s.head_dim % CHUNK == 0 &&
           s.block_size % TILE_OF_ROWS == 0;
}

// The first of each 16 keys of a tile, as places in the cache.
INLINE void find_groups(const bf16* cache, const Step& step, const Work& work, const Shape& s, int64_t num_groups, const bf16** groups) {
    for (int64_t g = 0; g < num_groups; g++) {
        const int64_t key = step.start + g * TILE_OF_ROWS, slot = work.blocks[key / s.block_size] * s.block_size + key % s.block_size;
        groups[g] = cache + (slot * s.num_kv_heads + step.kv_head) * s.head_dim;
    }
}

// One KV head and one tile of keys for all rows. queries, out: [tiles.num][tiles.size()].
template <class KV>
void attend_tile_in_pairs(const Cache<KV>& k, const TilePlaces<KV>& places, const Step& step, const Work& work, const Shape& s, const RowTiles& tiles, const bf16* queries,
                          float* out, RowStates* states, PairScratch& scratch) {
    const int64_t chunks = tiles.dim / CHUNK, start = step.start;
    const int64_t num_groups = (step.last_key() - start + 15) / 16;
    const bool in_place = takes_keys_in_place<KV>(work, s);
    bf16 *const keys = scratch.keys.reserve(4 * chunks * UNIT), *const values = scratch.values.reserve(4 * chunks * UNIT);
    if (!in_place) pack_keys(places.keys, num_groups, s.head_dim, keys);
    pack_values(places.values, s.head_dim, values);
    // Rows are in the order of their queries, so those that see something of this tile lie together.
    const auto query_of = [&](int64_t row) { return work.position + row / s.group(); };
    int64_t t = 0, end = tiles.num;
    while (t < end && query_of(t * TILE_OF_ROWS + tiles.rows_of(t) - 1) < start) t++;
    while (t < end && s.window && query_of((end - 1) * TILE_OF_ROWS) - s.window + 1 >= start + TILE) end--;
    const auto multiply = [&](int64_t t) {
        if constexpr (std::is_same_v<KV, bf16>) {
            if (in_place) {
                const bf16* groups[TILE / TILE_OF_ROWS];
                find_groups(k.values, step, work, s, num_groups, groups);
                return multiply_keys_in_place(tiles.rows_of(t), queries, groups, num_groups, s.num_kv_heads * s.head_dim, chunks, scratch.scores[t % 2]);
            }
        }
        multiply_keys(tiles.rows_of(t), queries + t * tiles.size(), keys, chunks, scratch.scores[t % 2]);
    };
    if (t < end) multiply(t);
    for (; t < end; t++) {
        // Computed beside the softmax of this one.
        if (t + 1 < end) multiply(t + 1);
        const int num_rows = tiles.rows_of(t);
        Seen room;
        const Seen* const seen = seen_by(room, t * TILE_OF_ROWS, num_rows, start, work, s);
        float* const target = out + t * tiles.size();
        const f32x16 factors = softmax_rows<is_scaled<KV>>(scratch.scores[t % 2], num_rows, seen, s.scale * LOG2_E, places.key_scales, places.value_scales,
                                                           states[t], scratch.weights);
        rescale(target, factors, tiles.dim);
        add_values(num_rows, scratch.weights, values, tiles.dim / 16, target);
    }
}

// The query heads of an item's KV heads for its queries.
template <class KV>
void attend_pairs(bf16* out, const bf16* q, const Cache<KV>& k, const Cache<KV>& v, const Item& item, const Shape& s, int64_t q_stride, int64_t out_stride) {
    static thread_local PairScratch scratch;
    const Work& work = *item.work;
    const RowTiles tiles(work, s);
    const int64_t group = s.group(), all_tiles = item.num_heads * tiles.num;
    bf16* const queries = scratch.queries.reserve(all_tiles * tiles.size());
    float* const acc = scratch.out.reserve(all_tiles * tiles.size());
    RowStates* const states = scratch.states.reserve(all_tiles);
    // Calls use(place of the row in q or out, its tile, its row there) for all rows.
    const auto for_each_row = [&](int64_t stride, auto use) {
        for (int64_t head = 0; head < item.num_heads; head++)
            for (int64_t r = 0; r < tiles.num_rows; r++)
                use((work.token + r / group) * stride + ((item.first_head + head) * group + r % group) * s.head_dim, head * tiles.num + r / TILE_OF_ROWS,
                    r % TILE_OF_ROWS);
    };
    if (takes_keys_in_place<KV>(work, s)) {
        for (int64_t head = 0; head < item.num_heads; head++)
            pack_queries_in_columns(q + work.token * q_stride + (item.first_head + head) * group * s.head_dim, group, s.head_dim, queries + head * tiles.size());
    } else {
        for_each_row(q_stride, [&](int64_t place, int64_t tile, int64_t r) { pack_query(q + place, r, s.head_dim, queries + tile * tiles.size()); });
    }
    std::fill(acc, acc + all_tiles * tiles.size(), 0.0f);
    for (int64_t i = 0; i < all_tiles; i++) {
        std::fill_n(states[i].largest, TILE_OF_ROWS, LOWEST);
        std::fill_n(states[i].sums, TILE_OF_ROWS, 0.0f);
    }
    for_each_step(k, v, work, item.first_head, item.num_heads, s, [&](const Step& step) {
        const TilePlaces<KV> places(k, v, step, work, s);
        const int64_t first = (step.kv_head - item.first_head) * tiles.num;
        attend_tile_in_pairs(k, places, step, work, s, tiles, queries + first * tiles.size(), acc + first * tiles.size(), states + first, scratch);
    });
    for_each_row(out_stride, [&](int64_t place, int64_t tile, int64_t r) {
        const f32x16 sum = set1(states[tile].sums[r]);
        for (int64_t d = 0; d < s.head_dim; d += 16) store_some(out + place + d, load(acc + tile * tiles.size() + d * 16 + r * 16) / sum, s.head_dim - d);
    });
}

}  // namespace
