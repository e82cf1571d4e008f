// out += scale * B (A x) for the rows that have an adapter, many adapters in one call. Sums are fp32, in an order that depends on the inputs
// and the rank alone: a row has the same bits whatever is beside it and however many threads there are. In float32 it has them on every
// instruction set; in bfloat16 A x is computed as in gemm/gemm.cpp, in pairs.
//
// A is packed as [ceil(rank / 16)][k][16], in bfloat16 as [ceil(rank / 16)][ceil(k / 2)][16][2], and B as [ceil(n / 64)][rank][64], filled up
// with zeros. Rows of one adapter are computed in blocks, so that its matrices are read once for several rows. lora_pack.cpp
// packs them.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t RANKS = 16, COLUMNS = 64;
// The inputs of one sum go to this many partial sums in turn.
constexpr int PARTS = 4;
// Fewer multiplications run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_PRODUCTS = 1 << 18;
constexpr int64_t PREFETCH_BYTES = 2048;
// Panels of B that one task computes.
constexpr int64_t PANELS_AT_ONCE = 4;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 2;
#endif

// As native_table.py writes it. a is null where the adapter leaves this shard alone.
template <class T>
struct Matrices {
    const T *a, *b;
    int64_t rank;
    float scale;
    int32_t padding;
};

struct Block {
    int64_t slot, first, num;
};

// What one thread does in a piece: a panel of A or some panels of B, for one block and one shard.
struct Task {
    int32_t block, shard, panel, num_panels;
};

// One step along the inputs: an input, or a pair of bfloat16, times the weights of 16 ranks.
INLINE f32x16 step_of(const float* a, const float* x, f32x16 sum) { return fma(load(a), set1(*x), sum); }

INLINE f32x16 pair_of(const bf16* a, uint32_t x, f32x16 sum) {
#ifdef __AVX512BF16__
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_set1_epi32((int)x))};
#else
    const __m256 x0 = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x << 16))), x1 = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x & 0xffff0000u)));
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    const __m256i lo = _mm256_loadu_si256((const __m256i*)a), hi = _mm256_loadu_si256((const __m256i*)(a + 16));
    sum.lo = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(lo, high)), x1, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), x0, sum.lo));
    sum.hi = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(hi, high)), x1, _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(hi, 16)), x0, sum.hi));
    return sum;
#endif
}
INLINE f32x16 step_of(const bf16* a, const bf16* x, f32x16 sum) {
    uint32_t pair;  // at any even address
    memcpy(&pair, x, 4);
    return pair_of(a, pair, sum);
}
// An odd last input has a zero beside it.
INLINE f32x16 odd_step_of(const float*, const float*, f32x16 sum) { return sum; }
INLINE f32x16 odd_step_of(const bf16* a, const bf16* x, f32x16 sum) { return pair_of(a, x->bits, sum); }

// h[row][0, 16): the sums of a panel of A for ROWS rows of x.
template <class T, int ROWS>
void shrink_rows(float* const* h, const T* a, const T* const* x, int64_t k) {
    constexpr int64_t VALUES = 4 / sizeof(T), LINE = RANKS * VALUES;  // of a step: inputs, and weights
    f32x16 acc[ROWS][PARTS];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PARTS; p++) acc[r][p] = zero();
    const int64_t steps = k / VALUES;
    int64_t i = 0;
    for (; i + PARTS <= steps; i += PARTS)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const T* const weights = a + (i + p) * LINE;
            _mm_prefetch((const char*)weights + PREFETCH_BYTES, _MM_HINT_T0);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) acc[r][p] = step_of(weights, x[r] + (i + p) * VALUES, acc[r][p]);
        }
#pragma GCC unroll 4
    for (int p = 0; p < PARTS - 1; p++)
        if (i + p < steps)
            for (int r = 0; r < ROWS; r++) acc[r][p] = step_of(a + (i + p) * LINE, x[r] + (i + p) * VALUES, acc[r][p]);
    if (steps * VALUES < k)
        for (int r = 0; r < ROWS; r++) acc[r][PARTS - 1] = odd_step_of(a + steps * LINE, x[r] + k - 1, acc[r][PARTS - 1]);
    for (int r = 0; r < ROWS; r++) store(h[r], (acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

// out[row][0, num) += scale * sums of a panel of B for ROWS rows of h.
template <class T, int ROWS>
void expand_rows(T* const* out, const T* b, const float* const* h, int64_t rank, float scale, int64_t num) {
    constexpr int VECTORS = COLUMNS / 16;
    f32x16 acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = zero();
    for (int64_t i = 0; i < rank; i++, b += COLUMNS) {
        for (int64_t line = 0; line < COLUMNS * (int64_t)sizeof(T); line += 64) _mm_prefetch((const char*)b + PREFETCH_BYTES + line, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const f32x16 weights = load(b + v * 16);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) acc[r][v] = fma(weights, set1(h[r][i]), acc[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS && v * 16 < num; v++) {
            T* const target = out[r] + v * 16;
            const int64_t some = num - v * 16;
            store_some(target, fma(acc[r][v], set1(scale), load_some((const T*)target, some)), some);
        }
}

template <class T, int ROWS = MAX_ROWS>
void shrink(int rows, float* const* h, const T* a, const T* const* x, int64_t k) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return shrink<T, ROWS - 1>(rows, h, a, x, k);
    }
    shrink_rows<T, ROWS>(h, a, x, k);
}

template <class T, int ROWS = MAX_ROWS>
void expand(int rows, T* const* out, const T* b, const float* const* h, int64_t rank, float scale, int64_t num) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return expand<T, ROWS - 1>(rows, out, b, h, rank, scale, num);
    }
    expand_rows<T, ROWS>(out, b, h, rank, scale, num);
}

template <class T>
void lora(T* out, const T* x, const int32_t* order, const int32_t* starts, const Matrices<T>* table, const int64_t* columns, int64_t num_slots,
          int64_t num_shards, int64_t k, int64_t x_stride, int64_t out_stride) {
    const int64_t num_rows = starts[num_slots];
    if (num_rows == 0) return;
    static thread_local std::vector<Block> blocks;
    static thread_local std::vector<Task> shrinks, expands;
    static thread_local std::vector<float> sums;
    blocks.clear(), shrinks.clear(), expands.clear();
    int64_t products = 0, most_ranks = 0;
    for (int64_t slot = 0; slot < num_slots; slot++) {
        const int64_t end = starts[slot + 1];
        for (int64_t first = starts[slot]; first < end; first += MAX_ROWS) {
            const int32_t block = (int32_t)blocks.size();
            blocks.push_back({slot, first, std::min<int64_t>(MAX_ROWS, end - first)});
            for (int32_t shard = 0; shard < num_shards; shard++) {
                const Matrices<T>& m = table[slot * num_shards + shard];
                if (!m.a) continue;
                const int64_t n = columns[shard + 1] - columns[shard], ranks = (m.rank + RANKS - 1) / RANKS, panels = (n + COLUMNS - 1) / COLUMNS;
                for (int32_t p = 0; p < ranks; p++) shrinks.push_back({block, shard, p, 1});
                for (int64_t p = 0; p < panels; p += PANELS_AT_ONCE)
                    expands.push_back({block, shard, (int32_t)p, (int32_t)std::min<int64_t>(PANELS_AT_ONCE, panels - p)});
                products += blocks.back().num * m.rank * (k + n);
                most_ranks = std::max(most_ranks, ranks * RANKS);
            }
        }
    }
    if (shrinks.empty()) return;
    constexpr int64_t VALUES = 4 / sizeof(T);
    const int64_t panel_values = (k + VALUES - 1) / VALUES * VALUES * RANKS;
    const int64_t h_stride = num_shards * most_ranks;
    if ((int64_t)sums.size() < num_rows * h_stride) sums.resize(num_rows * h_stride);
    // By their addresses, because other threads have vectors of their own.
    const Block* const all_blocks = blocks.data();
    const Task *const all_shrinks = shrinks.data(), *const all_expands = expands.data();
    float* const h_rows = sums.data();
    const int64_t num_shrinks = (int64_t)shrinks.size(), num_expands = (int64_t)expands.size();
#pragma omp parallel if (products >= PARALLEL_PRODUCTS)
    {
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < num_shrinks; t++) {
            const Task task = all_shrinks[t];
            const Block block = all_blocks[task.block];
            const T* inputs[MAX_ROWS];
            float* h[MAX_ROWS];
            for (int64_t r = 0; r < block.num; r++) {
                const int64_t i = block.first + r;
                inputs[r] = x + order[i] * x_stride;
                h[r] = h_rows + i * h_stride + task.shard * most_ranks + task.panel * RANKS;
            }
            shrink<T>((int)block.num, h, table[block.slot * num_shards + task.shard].a + task.panel * panel_values, inputs, k);
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < num_expands; t++) {
            const Task task = all_expands[t];
            const Block block = all_blocks[task.block];
            const Matrices<T>& m = table[block.slot * num_shards + task.shard];
            const int64_t n = columns[task.shard + 1] - columns[task.shard];
            const float* h[MAX_ROWS];
            for (int64_t r = 0; r < block.num; r++) h[r] = h_rows + (block.first + r) * h_stride + task.shard * most_ranks;
            for (int64_t p = task.panel; p < task.panel + task.num_panels; p++) {
                T* target[MAX_ROWS];
                for (int64_t r = 0; r < block.num; r++) target[r] = out + order[block.first + r] * out_stride + columns[task.shard] + p * COLUMNS;
                expand<T>((int)block.num, target, m.b + p * m.rank * COLUMNS, h, m.rank, m.scale, n - p * COLUMNS);
            }
        }
    }
}

}  // namespace

// out: [m][sum of the shards' columns], x: [m][k]; order, starts: see workers/kernels/lora/rows.py. table: [num_slots][num_shards].
// columns: where each shard's begin, and where the last ones end. Strides of rows in values.
#define EXPORT_LORA(type, T)                                                                                                                            \
    TRAMONTANE_KERNEL(lora_##type)(void* out, const void* x, const int32_t* order, const int32_t* starts, const void* table, const int64_t* columns,    \
                                   int64_t num_slots, int64_t num_shards, int64_t k, int64_t x_stride, int64_t out_stride) {                            \
        lora<T>((T*)out, (const T*)x, order, starts, (const Matrices<T>*)table, columns, num_slots, num_shards, k, x_stride, out_stride);               \
    }
EXPORT_LORA(float32, float)
EXPORT_LORA(bfloat16, bf16)
