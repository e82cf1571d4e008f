// Attention over a paged KV cache. One query's result depends on its own keys only, in tiles of 64 positions counted from position 0, so its
// bits are the same however its context was cut into chunks and whatever else the step computes. Tiles are joined by the online softmax of
// FlashAttention (Dao et al., 2022). A tile in which a query sees no key changes nothing for it.
//
// Models in bfloat16 are computed in products of bfloat16 where the processor has them, everything else in float32.
#include <cmath>

#include "attend_float.h"
#ifdef __AVX512BF16__
#include "attend_pairs.h"
#endif

namespace {

struct Nothing {
    Nothing() {}
};

template <class T, class KV>
void attention(T* out, const T* q, const Cache<KV>& keys, const Cache<KV>& values, const Sequences& sequences, const Shape& s, int64_t q_stride,
               int64_t out_stride) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, bf16>)
        return for_each_item<PairUnits>(sequences, s, pairs_query_tile(s), [&](const Item& item) { attend_pairs(out, q, keys, values, item, s, q_stride, out_stride); });
#endif
    for_each_item<Nothing>(sequences, s, FLOAT_QUERY_TILE, [&](const Item& item) { attend_float(out, q, keys, values, item, s, q_stride, out_stride); });
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
        const Sequences sequences{block_table, cu_seqlens, seq_lens, num_seqs, max_blocks};                                                           \
        attention<T, KV>((T*)out, (const T*)q, keys, values, sequences, shape, q_stride, out_stride);                                                 \
    }
EXPORT(float32, float, float)
EXPORT(bfloat16, bf16, bf16)
EXPORT(float32_int8, float, int8_t)
EXPORT(bfloat16_int8, bf16, int8_t)
EXPORT(float32_fp8, float, e4m3)
EXPORT(bfloat16_fp8, bf16, e4m3)
