// Attention over a paged KV cache. One query's result depends on its own keys only, in tiles of 64 positions counted from position 0, so its
// bits are the same however its context was cut into chunks and whatever else the step computes.
//
// Within a tile scores are chains of multiply-adds along the head, and values are added key by key; tiles are joined by the online softmax of
// FlashAttention (Dao et al., 2022). Everything is float32 but the cache. A tile in which a query sees no key changes nothing for it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kv_cache.h"

namespace {

constexpr int TILE = 64, TILE_VECTORS = TILE / 16;
// Queries of one prefill that share each tile of keys, which is transposed once for all of them.
constexpr int64_t QUERY_TILE = 32;
constexpr int64_t MANY_WORKS = 16;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 1;
#endif

struct Shape {
    int64_t num_heads, num_kv_heads, head_dim, block_size, window;  // window 0: none
    float scale;
};

// Queries first .. first + num - 1 of one sequence; query 0 is at `token` in the batch and at `position` in the sequence.
struct Work {
    int64_t token, position, num;
    const int32_t* blocks;
};

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

// out[r] = out[r] * factor[r] + weights[r] @ values, 16 columns of a head for ROWS rows. values: [TILE][head_dim].
template <int ROWS>
void add_values(float* out, const float* factors, const float* weights, const float* values, int64_t head_dim, int begin, int end) {
    f32x16 acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = load(out + r * head_dim) * set1(factors[r]);
    for (int key = begin; key < end; key++) {
        const f32x16 value = load(values + key * head_dim);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) acc[r] = fma(set1(weights[r * TILE + key]), value, acc[r]);
    }
    for (int r = 0; r < ROWS; r++) store(out + r * head_dim, acc[r]);
}

template <int ROWS = 6>
void add_values_of(int rows, float* out, const float* factors, const float* weights, const float* values, int64_t head_dim, int begin, int end) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return add_values_of<ROWS - 1>(rows, out, factors, weights, values, head_dim, begin, end);
    }
    for (int64_t d = 0; d < head_dim; d += 16) add_values<ROWS>(out + d, factors, weights, values + d, head_dim, begin, end);
}

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

    void reserve(int64_t rows, int64_t head_dim) {
        if ((int64_t)largest.size() >= rows && (int64_t)keys.size() >= TILE * head_dim && (int64_t)out.size() >= rows * head_dim) return;
        queries.resize(rows * head_dim);
        out.resize(rows * head_dim);
        keys.resize(TILE * head_dim);
        values.resize(TILE * head_dim);
        weights.resize(rows * TILE);
        for (auto* per_row : {&largest, &sums, &factors}) per_row->resize(rows);
    }
};

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

// Where the scale of key `key` of a sequence is, for one KV head.
INLINE int64_t place_of_scale(int64_t key, const Work& work, int64_t kv_head, const Shape& s) {
    return (work.blocks[key / s.block_size] * s.num_kv_heads + kv_head) * s.block_size + key % s.block_size;
}

// Where key `key` of a sequence begins in the caches, for one KV head.
INLINE int64_t place_of(int64_t key, const Work& work, int64_t kv_head, const Shape& s) {
    const int64_t slot = work.blocks[key / s.block_size] * s.block_size + key % s.block_size;
    return (slot * s.num_kv_heads + kv_head) * s.head_dim;
}

// The keys and values of a tile lie in short pieces, which the processor does not foresee.
template <class KV>
void prefetch_tile(const KV* k_cache, const KV* v_cache, int64_t first_key, int64_t last_key, const Work& work, int64_t kv_head, const Shape& s) {
    for (int64_t key = first_key; key < last_key; key++) {
        const int64_t place = place_of(key, work, kv_head, s);
        for (int64_t d = 0; d < s.head_dim; d += 64 / (int64_t)sizeof(KV)) {
            _mm_prefetch((const char*)(k_cache + place + d), _MM_HINT_T0);
            _mm_prefetch((const char*)(v_cache + place + d), _MM_HINT_T0);
        }
    }
}

// Query heads of one KV head for the queries of `work`. Rows are (query, head within the group).
template <class T, class KV>
void attend(T* out, const T* q, const Cache<KV>& k, const Cache<KV>& v, const Work& work, int64_t kv_head, const Shape& s, int64_t q_stride,
            int64_t out_stride, Scratch& scratch) {
    const KV *const k_cache = k.values, *const v_cache = v.values;
    // Heads are filled up with zeros to whole vectors.
    const int64_t group = s.num_heads / s.num_kv_heads, rows = work.num * group, head_dim = s.head_dim, dim = (head_dim + 15) / 16 * 16;
    scratch.reserve(rows, dim);
    float *const queries = scratch.queries.data(), *const acc = scratch.out.data();
    for (int64_t r = 0; r < rows; r++) {
        const T* row = q + (work.token + r / group) * q_stride + (kv_head * group + r % group) * head_dim;
        for (int64_t d = 0; d < dim; d += 16) store(queries + r * dim + d, load_some(row + d, head_dim - d) * set1(s.scale));
    }
    std::fill(acc, acc + rows * dim, 0.0f);
    std::fill(scratch.largest.begin(), scratch.largest.begin() + rows, -INFINITY);
    std::fill(scratch.sums.begin(), scratch.sums.begin() + rows, 0.0f);
    const int64_t oldest = s.window ? std::max<int64_t>(0, work.position - s.window + 1) : 0;
    const int64_t num_keys = work.position + work.num;
    for (int64_t start = oldest / TILE * TILE; start < num_keys; start += TILE) {
        const int64_t first_key = std::max(start, oldest), last_key = std::min<int64_t>(start + TILE, num_keys);
        if (last_key < num_keys)
            prefetch_tile(k_cache, v_cache, last_key, std::min(last_key + TILE, num_keys), work, kv_head, s);
        else if (kv_head + 1 < s.num_kv_heads)  // often the next one that this thread computes
            prefetch_tile(k_cache, v_cache, oldest, std::min<int64_t>(oldest / TILE * TILE + TILE, num_keys), work, kv_head + 1, s);
        for (int64_t sixteen = start; sixteen < last_key; sixteen += 16) {
            const KV* keys[16] = {};
            for (int64_t key = std::max(sixteen, first_key); key < std::min(sixteen + 16, last_key); key++) {
                const int64_t place = place_of(key, work, kv_head, s);
                keys[key - sixteen] = k_cache + place;
                if constexpr (is_scaled<KV>) {
                    const int64_t place_of_its_scale = place_of_scale(key, work, kv_head, s);
                    scratch.key_scales[key - start] = k.scales[place_of_its_scale];
                    scratch.value_scales[key - start] = v.scales[place_of_its_scale];
                }
                float* const value = scratch.values.data() + (key - start) * dim;
                for (int64_t d = 0; d < dim; d += 16) store(value + d, load_some(v_cache + place + d, head_dim - d));
            }
            for (int64_t d = 0; d < dim; d += 16) {
                f32x16 square[16];
                for (int i = 0; i < 16; i++) square[i] = keys[i] ? load_some(keys[i] + d, head_dim - d) : zero();
                transpose(square);
                for (int i = 0; i < 16; i++) store(scratch.keys.data() + (d + i) * TILE + (sixteen - start), square[i]);
            }
        }
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
            scratch.factors[r] = softmax_tile(row, (int)begin, (int)end, &scratch.largest[r], &scratch.sums[r]);
            if constexpr (is_scaled<KV>) scale_tile(row, scratch.value_scales);
            first_row = std::min(first_row, r);
            end_row = r + 1;
        }
        // Rows that see something lie together. Keys that only other rows see have a weight of 0, which adds nothing.
        for (int64_t r = first_row; r < end_row; r += 6)
            add_values_of((int)std::min<int64_t>(6, end_row - r), acc + r * dim, scratch.factors.data() + r, scratch.weights.data() + r * TILE,
                          scratch.values.data(), dim, (int)(first_key - start), (int)(last_key - start));
    }
    for (int64_t r = 0; r < rows; r++) {
        T* target = out + (work.token + r / group) * out_stride + (kv_head * group + r % group) * head_dim;
        for (int64_t d = 0; d < dim; d += 16) store_some(target + d, load(acc + r * dim + d) / set1(scratch.sums[r]), head_dim - d);
    }
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
    // With many sequences a thread computes all KV heads of one: their keys lie next to each other.
    const int64_t heads_at_once = (int64_t)works.size() >= MANY_WORKS ? s.num_kv_heads : 1;
    const int64_t parts = s.num_kv_heads / heads_at_once, num_items = (int64_t)works.size() * parts;
    // Below this much, waking other threads takes longer.
    const bool alone = num_items == 1 || num_pairs * s.num_heads * s.head_dim < (1 << 16);
#pragma omp parallel if (!alone)
    {
        static thread_local Scratch scratch;
        // The last queries see the most keys, so they come first.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = num_items - 1; i >= 0; i--)
            for (int64_t h = 0; h < heads_at_once; h++)
                attend(out, q, keys, values, works[i / parts], i % parts * heads_at_once + h, s, q_stride, out_stride, scratch);
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
