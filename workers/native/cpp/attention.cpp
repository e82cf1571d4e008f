// Attention over a paged KV cache. One query's result depends on its own keys only, in tiles of 64 positions counted from position 0, so its
// bits are the same however its context was cut into chunks and whatever else the step computes.
//
// Within a tile scores are chains of multiply-adds along the head, and values are added key by key; tiles are joined by the online softmax of
// FlashAttention (Dao et al., 2022). Everything is float32 but the cache. A tile in which a query sees no key changes nothing for it.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_tile.h"

namespace {

// Queries of one prefill that share each tile of keys, which is transposed once for all of them.
constexpr int64_t QUERY_TILE = 32;

struct Shape {
    int64_t num_heads, num_kv_heads, head_dim, block_size, window;  // window 0: none
    float scale;
};

// Queries first .. first + num - 1 of one sequence; query 0 is at `token` in the batch and at `position` in the sequence.
struct Work {
    int64_t token, position, num;
    const int32_t* blocks;
};

// Keys or values of one layer. scales: [num_blocks, num_kv_heads, block_size]; null where KV has none.
template <class KV>
struct Cache {
    const KV* values;
    const float* scales;
};

// One thread's memory. The scales are those of a tile's keys.
struct Scratch {
    std::vector<float> queries, keys, values, out, weights, largest, sums, factors;
    float key_scales[TILE] = {}, value_scales[TILE] = {};

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
void prefetch_tile(const KV* k_cache, const KV* v_cache, int64_t first_key, int64_t last_key, const Work& work, int64_t kv_head, const Shape& s) {
    for_each_key(first_key, last_key, work, kv_head, s, [&](int64_t, int64_t place, int64_t) {
        for (int64_t d = 0; d < s.head_dim; d += 64 / (int64_t)sizeof(KV)) {
            _mm_prefetch((const char*)(k_cache + place + d), _MM_HINT_T0);
            _mm_prefetch((const char*)(v_cache + place + d), _MM_HINT_T0);
        }
    });
}

// A step of `attend`: the tile of keys that begins at `start`, and a KV head. Keys before `oldest` are out of sight of all queries.
struct Step {
    int64_t start, oldest, num_keys, kv_head;

    int64_t first_key() const { return std::max(start, oldest); }
    int64_t last_key() const { return std::min<int64_t>(start + TILE, num_keys); }
};

// queries, out: [rows][dim]; largest, sums: [rows]; of one KV head.
template <class KV>
void attend_tile(const Cache<KV>& k, const Cache<KV>& v, const Work& work, const Step& step, const Shape& s, const float* queries, float* out,
                 float* largest, float* sums, Scratch& scratch) {
    const int64_t group = s.num_heads / s.num_kv_heads, rows = work.num * group, head_dim = s.head_dim, dim = (head_dim + 15) / 16 * 16;
    const int64_t start = step.start, first_key = step.first_key(), last_key = step.last_key();
    const KV *keys[TILE_VECTORS][16] = {}, *values[TILE];
    for_each_key(first_key, last_key, work, step.kv_head, s, [&](int64_t key, int64_t place, int64_t place_of_scale) {
        const int64_t i = key - start;
        keys[i / 16][i % 16] = k.values + place;
        values[i] = v.values + place;
        if constexpr (is_scaled<KV>) {
            scratch.key_scales[i] = k.scales[place_of_scale];
            scratch.value_scales[i] = v.scales[place_of_scale];
        }
    });
    for (int64_t i = 0; i < last_key - start; i += 16) transpose_keys(keys[i / 16], head_dim, scratch.keys.data() + i, TILE);
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
        if constexpr (is_scaled<KV>) scale_tile(row, scratch.key_scales);
        scratch.factors[r] = softmax_tile(row, (int)begin, (int)end, largest + r, sums + r);
        if constexpr (is_scaled<KV>) scale_tile(row, scratch.value_scales);
        first_row = std::min(first_row, r);
        end_row = r + 1;
    }
    // Rows that see something lie together. Keys that only other rows see have a weight of 0, which adds nothing.
    const auto add = [&](const auto* const* values, int64_t width) {
        for (int64_t r = first_row; r < end_row; r += 6)
            add_values_of((int)std::min<int64_t>(6, end_row - r), out + r * dim, dim, scratch.factors.data() + r, scratch.weights.data() + r * TILE, values,
                          width, (int)(first_key - start), (int)(last_key - start));
    };
    if (rows <= 6 && (VALUE_VECTORS > 1 || sizeof(KV) == 1)) return add(values, head_dim);
    // Read again for every 6 rows or every vector, so they are converted once and put next to each other.
    const float* copies[TILE];
    for (int64_t i = first_key - start; i < last_key - start; i++) {
        float* const copy = scratch.values.data() + i * dim;
        for (int64_t d = 0; d < dim; d += 16) store(copy + d, load_some(values[i] + d, head_dim - d));
        copies[i] = copy;
    }
    add(copies, dim);
}

// The query heads of num_heads KV heads for the queries of `work`. Rows are (KV head, query, head within the group).
template <class T, class KV>
void attend(T* out, const T* q, const Cache<KV>& k, const Cache<KV>& v, const Work& work, int64_t first_head, int64_t num_heads, const Shape& s,
            int64_t q_stride, int64_t out_stride, Scratch& scratch) {
    // Heads are filled up with zeros to whole vectors.
    const int64_t group = s.num_heads / s.num_kv_heads, rows = work.num * group, head_dim = s.head_dim, dim = (head_dim + 15) / 16 * 16;
    scratch.reserve(num_heads * rows, dim);
    float *const queries = scratch.queries.data(), *const acc = scratch.out.data();
    const auto place_of_row = [&](int64_t i, int64_t stride) {
        const int64_t r = i % rows;
        return (work.token + r / group) * stride + ((first_head + i / rows) * group + r % group) * head_dim;
    };
    for (int64_t i = 0; i < num_heads * rows; i++) {
        const T* row = q + place_of_row(i, q_stride);
        for (int64_t d = 0; d < dim; d += 16) store(queries + i * dim + d, load_some(row + d, head_dim - d) * set1(s.scale));
    }
    std::fill(acc, acc + num_heads * rows * dim, 0.0f);
    std::fill(scratch.largest.begin(), scratch.largest.begin() + num_heads * rows, -INFINITY);
    std::fill(scratch.sums.begin(), scratch.sums.begin() + num_heads * rows, 0.0f);
    const int64_t oldest = s.window ? std::max<int64_t>(0, work.position - s.window + 1) : 0, num_keys = work.position + work.num;
    Step step{oldest / TILE * TILE, oldest, num_keys, first_head};
    while (step.start < num_keys) {
        const bool is_last_head = step.kv_head + 1 == first_head + num_heads;
        const Step next{step.start + (is_last_head ? TILE : 0), oldest, num_keys, is_last_head ? first_head : step.kv_head + 1};
        if (next.start < num_keys) prefetch_tile(k.values, v.values, next.first_key(), next.last_key(), work, next.kv_head, s);
        const int64_t row = (step.kv_head - first_head) * rows;
        attend_tile(k, v, work, step, s, queries + row * dim, acc + row * dim, scratch.largest.data() + row, scratch.sums.data() + row, scratch);
        step = next;
    }
    for (int64_t i = 0; i < num_heads * rows; i++) {
        T* target = out + place_of_row(i, out_stride);
        for (int64_t d = 0; d < dim; d += 16) store_some(target + d, load(acc + i * dim + d) / set1(scratch.sums[i]), head_dim - d);
    }
}

// KV heads that a thread computes together.
struct Item {
    const Work* work;
    int64_t first_head, num_heads;
};

// Into how many items a query is divided. Few: the heads of a key lie next to each other, and are read fastest together. One sequence on two
// threads: 2; three sequences: 2, which is three items for each thread; from 8 sequences on: 1.
int64_t parts_of_a_decode(int64_t num_works, int64_t num_kv_heads, int64_t num_threads) {
    for (int64_t parts = 1; parts < num_kv_heads; parts++)
        if (num_works * parts % num_threads == 0 || num_works * parts >= 4 * num_threads) return parts;
    return num_kv_heads;
}

template <class T, class KV>
void attention(T* out, const T* q, const Cache<KV>& keys, const Cache<KV>& values, const int32_t* block_table, const int32_t* cu_seqlens,
               const int32_t* seq_lens, int64_t num_seqs, int64_t max_blocks, const Shape& s, int64_t q_stride, int64_t out_stride) {
    std::vector<Work> works;
    int64_t num_pairs = 0;
    for (int64_t i = 0; i < num_seqs; i++) {
        const int64_t token = cu_seqlens[i], query_len = cu_seqlens[i + 1] - token;
        for (int64_t first = 0; first < query_len; first += QUERY_TILE) {
            const int64_t position = seq_lens[i] - query_len + first, num = std::min(QUERY_TILE, query_len - first);
            works.push_back({token + first, position, num, block_table + i * max_blocks});
            num_pairs += num * (position + num);
        }
    }
    // Below this much, waking other threads takes longer.
    const bool alone = num_pairs * s.num_heads * s.head_dim < (1 << 16);
    const int64_t decode_parts = parts_of_a_decode((int64_t)works.size(), s.num_kv_heads, alone ? 1 : omp_get_max_threads());
    std::vector<Item> items;
    for (const Work& work : works) {
        // Where rows share the keys, these are read rarely, and all heads' rows would not fit in the caches.
        const int64_t parts = work.num == 1 ? decode_parts : s.num_kv_heads;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t begin = p * s.num_kv_heads / parts;
            items.push_back({&work, begin, (p + 1) * s.num_kv_heads / parts - begin});
        }
    }
#pragma omp parallel if (!alone && items.size() > 1)
    {
        static thread_local Scratch scratch;
        // The last queries see the most keys, so they come first.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = (int64_t)items.size() - 1; i >= 0; i--)
            attend(out, q, keys, values, *items[i].work, items[i].first_head, items[i].num_heads, s, q_stride, out_stride, scratch);
    }
}

}  // namespace

// out, q: [num_tokens, num_heads, head_dim] with strides of rows in values; caches: [num_blocks, block_size, num_kv_heads, head_dim];
// block_table: [num_seqs, max_blocks]; cu_seqlens: [num_seqs + 1], seq_lens: [num_seqs], see AttentionMetadata. window counts the query itself;
// 0 is none. name: the type of q, and of the caches where that is another.
#define EXPORT(name, T, KV)                                                                                                                           \
    TRAMONTANE_KERNEL(attention_##name)(void* out, const void* q, const void* k_values, const float* k_scales, const void* v_values,                  \
                                        const float* v_scales, const int32_t* block_table, const int32_t* cu_seqlens, const int32_t* seq_lens,        \
                                        int64_t num_seqs, int64_t max_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,              \
                                        int64_t block_size, int64_t window, int64_t q_stride, int64_t out_stride) {                                   \
        const Shape shape{num_heads, num_kv_heads, head_dim, block_size, window, 1.0f / std::sqrt((float)head_dim)};                                  \
        const Cache<KV> keys{(const KV*)k_values, k_scales}, values{(const KV*)v_values, v_scales};                                                   \
        attention<T, KV>((T*)out, (const T*)q, keys, values, block_table, cu_seqlens, seq_lens, num_seqs, max_blocks, shape, q_stride, out_stride); \
    }
EXPORT(float32, float, float)
EXPORT(bfloat16, bf16, bf16)
EXPORT(float32_int8, float, int8_t)
EXPORT(bfloat16_int8, bf16, int8_t)
EXPORT(float32_fp8, float, e4m3)
EXPORT(bfloat16_fp8, bf16, e4m3)
