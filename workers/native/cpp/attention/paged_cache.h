// Where the keys and values of a sequence lie in a paged cache, and the tiles of keys in which attention passes over them. Computes nothing.
#pragma once

#include "../kv_cache.h"

namespace {

// Keys of a tile, counted from position 0 of the sequence.
constexpr int TILE = 64;

struct Shape {
    int64_t num_heads, num_kv_heads, head_dim, block_size, window;  // window 0: none
    float scale;

    int64_t group() const { return num_heads / num_kv_heads; }
};

// Queries first .. first + num - 1 of one sequence; query 0 is at `token` in the batch and at `position` in the sequence.
struct Work {
    int64_t token, position, num;
    const int32_t* blocks;

    int64_t num_keys() const { return position + num; }
    // Keys before it are out of sight of all queries.
    int64_t oldest(const Shape& s) const { return s.window ? std::max<int64_t>(0, position - s.window + 1) : 0; }
};

// Keys or values of one layer. scales: [num_blocks, num_kv_heads, block_size]; null where KV has none.
template <class KV>
struct Cache {
    const KV* values;
    const float* scales;
};

// A step over the keys: the tile that begins at `start`, and a KV head.
struct Step {
    int64_t start, oldest, num_keys, kv_head;

    int64_t first_key() const { return std::max(start, oldest); }
    int64_t last_key() const { return std::min<int64_t>(start + TILE, num_keys); }
};

// Calls use(key, place, place of the scale) for keys [first_key, last_key) of a sequence and one KV head; places are those in the caches.
template <class Use>
INLINE void for_each_key(int64_t first_key, int64_t last_key, const Work& work, int64_t kv_head, const Shape& s, Use use) {
    int64_t block = first_key / s.block_size, offset = first_key % s.block_size;
    for (int64_t key = first_key; key < last_key; key++) {
        const int64_t number = work.blocks[block];
        use(key, ((number * s.block_size + offset) * s.num_kv_heads + kv_head) * s.head_dim, (number * s.num_kv_heads + kv_head) * s.block_size + offset);
        if (++offset == s.block_size) offset = 0, block++;
    }
}

// The keys and values of a tile lie in short pieces, which the processor does not foresee.
template <class KV>
void prefetch_tile(const KV* k_cache, const KV* v_cache, const Step& step, const Work& work, const Shape& s) {
    for_each_key(step.first_key(), step.last_key(), work, step.kv_head, s, [&](int64_t, int64_t place, int64_t) {
        for (int64_t d = 0; d < s.head_dim; d += 64 / (int64_t)sizeof(KV)) {
            _mm_prefetch((const char*)(k_cache + place + d), _MM_HINT_T0);
            _mm_prefetch((const char*)(v_cache + place + d), _MM_HINT_T0);
        }
    });
}

// Where the keys and values of a tile are, by their places in it; null for those that no query sees. Scales as `Cache` has them.
template <class KV>
struct TilePlaces {
    const KV *keys[TILE] = {}, *values[TILE] = {};
    float key_scales[TILE] = {}, value_scales[TILE] = {};

    TilePlaces(const Cache<KV>& k, const Cache<KV>& v, const Step& step, const Work& work, const Shape& s) {
        for_each_key(step.first_key(), step.last_key(), work, step.kv_head, s, [&](int64_t key, int64_t place, int64_t place_of_scale) {
            const int64_t i = key - step.start;
            keys[i] = k.values + place;
            values[i] = v.values + place;
            if constexpr (is_scaled<KV>) {
                key_scales[i] = k.scales[place_of_scale];
                value_scales[i] = v.scales[place_of_scale];
            }
        });
    }
};

// Calls use(step) for each tile of keys that a query of `work` sees and each of the KV heads, tile by tile; the next one is being read meanwhile.
template <class KV, class Use>
INLINE void for_each_step(const Cache<KV>& k, const Cache<KV>& v, const Work& work, int64_t first_head, int64_t num_heads, const Shape& s, Use use) {
    const int64_t oldest = work.oldest(s), num_keys = work.num_keys();
    Step step{oldest / TILE * TILE, oldest, num_keys, first_head};
    while (step.start < num_keys) {
        const bool is_last_head = step.kv_head + 1 == first_head + num_heads;
        const Step next{step.start + (is_last_head ? TILE : 0), oldest, num_keys, is_last_head ? first_head : step.kv_head + 1};
        if (next.start < num_keys) prefetch_tile(k.values, v.values, next, work, s);
        use(step);
        step = next;
    }
}

}  // namespace
