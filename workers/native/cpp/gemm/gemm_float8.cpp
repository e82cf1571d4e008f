// x @ weight.T for weights of 8-bit floats (e4m3), each block of inputs of an output with a scale in float32. Inputs are not rounded: a
// block's products are added in order, as in gemm.cpp, then sum = sum + block * scale. In float32 the bits are the same on every instruction
// set. In bfloat16, AVX-512 and AMX multiply pairs as in gemm.cpp and gemm_amx.cpp; AVX2 computes in float32.
//
// The packed weight is a header, the number of inputs in a block, then panels of 32 output columns: [ceil(n / 32)], and in each all blocks, of
// which the last may be shorter: 32 scales, then [inputs / 2][32][2] bytes. A slice of a panel is expanded once for all rows, [inputs][32]
// float32 or [inputs / 2][32][2] bfloat16, and stays in the first cache while they pass.
#include <algorithm>
#include <vector>

#ifdef __AMX_BF16__
#include "amx_steps.h"
#endif
#include "panels.h"

namespace {

constexpr int64_t HEADER_BYTES = 64, SCALES_BYTES = PANEL * 4;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 12;
#else
constexpr int MAX_ROWS = 6;
#endif

// Halves have the same bits in other places, with an exponent that is 8 too small for all but zero.
INLINE f32x16 widen(__m256i halves) {
#ifdef __AVX512F__
    return {_mm512_cvtph_ps(halves)};
#else
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
}

// In float32. T: of inputs and products.
template <class T>
struct Float32 {
    using Value = T;
    static constexpr int64_t PAIR_STEPS = 2, SLICE_PAIRS = 32, PAIR_BYTES = PANEL * 8;
    static constexpr float FACTOR = 256.0f;  // of the exponent

    static void put(uint32_t* target, const T* x, int64_t step) {
        const float value = to_float(x[step]);
        memcpy(target, &value, 4);
    }
    // [pairs][32][2] bytes -> [2 * pairs][32]
    static void expand(const char* w, int64_t pairs, char* out_) {
        float* out = (float*)out_;
        const __m256i sign = _mm256_set1_epi16((short)0x8000), rest = _mm256_set1_epi16(0x3f80);
        for (int64_t i = 0; i < pairs; i++, w += PANEL * 2, out += PANEL * 2) {
            _mm_prefetch(w + PREFETCH_BYTES, _MM_HINT_T0);
            for (int c = 0; c < PANEL; c += 16) {
                const __m256i both = _mm256_loadu_si256((const __m256i*)(w + c * 2));
                const __m256i even = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(both, 8), sign), _mm256_and_si256(_mm256_slli_epi16(both, 7), rest));
                const __m256i odd = _mm256_or_si256(_mm256_and_si256(both, sign), _mm256_and_si256(_mm256_srli_epi16(both, 1), rest));
                store(out + c, widen(even));
                store(out + PANEL + c, widen(odd));
            }
        }
    }
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        float value;
        memcpy(&value, x, 4);
        return fma(load((const float*)w), set1(value), sum);
    }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16.
struct BFloat16 {
    using Value = bf16;
    static constexpr int64_t PAIR_STEPS = 1, SLICE_PAIRS = 64, PAIR_BYTES = PANEL * 4;
    static constexpr float FACTOR = 1.0f;

    static void put(uint32_t* target, const bf16* x, int64_t step) { memcpy(target, x + 2 * step, 4); }
    // [pairs][32][2] bytes -> the same in bfloat16.
    static void expand(const char* w, int64_t pairs, char* out) {
        // The bits of m / 512, the numbers with an exponent of zero.
        alignas(64) uint16_t smallest[32] = {0, 118 << 7, 119 << 7, 119 << 7 | 64, 120 << 7, 120 << 7 | 32, 120 << 7 | 64, 120 << 7 | 96};
        const __m512i table = _mm512_load_si512(smallest);
        const __m512i sign = _mm512_set1_epi16((short)0x8000), rest = _mm512_set1_epi16(0x7f), bias = _mm512_set1_epi16(120 << 7);
        for (int64_t i = 0; i < pairs; i++, w += PANEL * 2, out += PAIR_BYTES) {
            _mm_prefetch(w + PREFETCH_BYTES, _MM_HINT_T0);
            for (int c = 0; c < PANEL; c += 16) {
                const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(w + c * 2)));
                const __m512i number = _mm512_and_si512(bytes, rest);
                const __m512i usual = _mm512_add_epi16(_mm512_slli_epi16(number, 4), bias);
                const __mmask32 is_small = _mm512_cmplt_epu16_mask(number, _mm512_set1_epi16(8));
                const __m512i value = _mm512_mask_permutexvar_epi16(usual, is_small, number, table);
                _mm512_storeu_si512(out + c * 4, _mm512_or_si512(value, _mm512_and_si512(_mm512_slli_epi16(bytes, 8), sign)));
            }
        }
    }
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        uint32_t pair;
        memcpy(&pair, x, 4);
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32((int)pair))};
    }
};
#else
using BFloat16 = Float32<bf16>;
#endif

// Adds steps to columns [first, first + 16 * COLUMNS) of a panel for ROWS rows; sums: [ROWS][PANEL].
template <class Type, int ROWS, int COLUMNS>
void tile(const char* w, const uint32_t* x, int64_t steps, bool is_first, float* sums, int first) {
    f32x16 acc[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = is_first ? zero() : load(sums + r * PANEL + first + c * 16);
    w += first * 4;
    for (int64_t step = 0; step < steps; step++, w += PANEL * 4, x += ROWS) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++) acc[r][c] = Type::mac(acc[r][c], w + c * 64, x + r);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) store(sums + r * PANEL + first + c * 16, acc[r][c]);
}

template <class Type, int ROWS = MAX_ROWS>
void add_rows(int rows, const char* w, const uint32_t* x, int64_t steps, bool is_first, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return add_rows<Type, ROWS - 1>(rows, w, x, steps, is_first, sums);
    }
#ifdef __AVX512F__
    constexpr bool WHOLE = true;
#else
    constexpr bool WHOLE = ROWS <= 2;
#endif
    if constexpr (WHOLE) {
        tile<Type, ROWS, 2>(w, x, steps, is_first, sums, 0);
    } else {
        tile<Type, ROWS, 1>(w, x, steps, is_first, sums, 0);
        tile<Type, ROWS, 1>(w, x, steps, is_first, sums, 16);
    }
}

// totals [m][PANEL], or the first of them, get the sums of a block by its scales.
INLINE void add_block(float* totals, const float* sums, const float* scales, float factor, int64_t m, bool is_first) {
    const f32x16 left = load(scales) * set1(factor), right = load(scales + 16) * set1(factor);
    for (int64_t r = 0; r < m; r++, totals += PANEL, sums += PANEL) {
        const f32x16 a = load(sums) * left, b = load(sums + 16) * right;
        store(totals, is_first ? a : load(totals) + a);
        store(totals + 16, is_first ? b : load(totals + 16) + b);
    }
}

int64_t block_of(const char* packed) {
    int64_t block;
    memcpy(&block, packed, 8);
    return block;
}

const char* panel_at(const char* packed, int64_t p, int64_t k) {
    const int64_t block = block_of(packed);
    return packed + HEADER_BYTES + p * ((k + block - 1) / block * SCALES_BYTES + k * PANEL);
}

// Calls add_slice(weights of a slice, its first pair, how many, whether it begins a block) and end_block(scales, whether it is the first).
template <class Slice, class End>
INLINE void for_slices(const char* w, int64_t k, int64_t block, int64_t slice_pairs, Slice add_slice, End end_block) {
    for (int64_t first = 0; first < k; first += block) {
        const float* scales = (const float*)w;
        const int64_t pairs = std::min(block, k - first) / 2;
        w += SCALES_BYTES;
        for (int64_t s = 0; s < pairs; s += slice_pairs) add_slice(w + s * PANEL * 2, first / 2 + s, std::min(slice_pairs, pairs - s), s == 0);
        w += pairs * PANEL * 2;
        end_block(scales, first == 0);
    }
}

template <class Type>
void gemm(typename Type::Value* out, const typename Type::Value* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride,
          int64_t out_stride) {
    const int64_t steps = k / 2 * Type::PAIR_STEPS, panels = (n + PANEL - 1) / PANEL, blocks = (m + MAX_ROWS - 1) / MAX_ROWS, block = block_of(packed);
    static thread_local std::vector<uint32_t> buffer;
    if ((int64_t)buffer.size() < m * steps) buffer.resize(m * steps);
    uint32_t* const rows = buffer.data();
    const auto repack = [=](int64_t b) {
        const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
        for (int64_t r = 0; r < num; r++)
            for (int64_t s = 0; s < steps; s++) Type::put(rows + first * steps + s * num + r, x + (first + r) * x_stride, s);
    };
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = blocks == 1;
    if (repack_here) repack(0);
#pragma omp parallel if (!alone)
    {
        alignas(64) char expanded[Type::SLICE_PAIRS * Type::PAIR_BYTES];
        static thread_local std::vector<float> sums_of_rows;
        if ((int64_t)sums_of_rows.size() < 2 * m * PANEL) sums_of_rows.resize(2 * m * PANEL);
        float *const sums = sums_of_rows.data(), *const totals = sums + m * PANEL;
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) repack(b);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t p = 0; p < panels; p++) {
            for_slices(
                panel_at(packed, p, k), k, block, Type::SLICE_PAIRS,
                [&](const char* w, int64_t pair, int64_t pairs, bool is_first) {
                    Type::expand(w, pairs, expanded);
                    for (int64_t b = 0; b < blocks; b++) {
                        const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
                        const uint32_t* inputs = rows + first * steps + pair * Type::PAIR_STEPS * num;
                        add_rows<Type>((int)num, expanded, inputs, pairs * Type::PAIR_STEPS, is_first, sums + first * PANEL);
                    }
                },
                [&](const float* scales, bool is_first) { add_block(totals, sums, scales, Type::FACTOR, m, is_first); });
            store_panel<std::remove_pointer_t<decltype(out)>>(out, totals, m, p, n, out_stride);
        }
    }
}

#ifdef __AMX_BF16__
// Blocks are multiples of a step, or one.
void gemm_of_tiles(bf16* out, const bf16* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    constexpr int64_t SLICE_PAIRS = 128, STEP_PAIRS = STEP / 2;
    const int64_t steps = (k + STEP - 1) / STEP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, x_tile = steps * TILE_VALUES;
    const int64_t rows = tiles * TILE_ROWS, block = block_of(packed);
    static thread_local std::vector<bf16> buffer;
    if ((int64_t)buffer.size() < tiles * x_tile) buffer.resize(tiles * x_tile);
    bf16* const repacked = buffer.data();
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = tiles == 1;
    if (repack_here) repack_rows(repacked, x, 0, m, k, x_stride);
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2);
        alignas(64) char expanded[SLICE_PAIRS * PANEL * 4];
        static thread_local std::vector<float> sums_of_rows;
        if ((int64_t)sums_of_rows.size() < 2 * rows * PANEL) sums_of_rows.resize(2 * rows * PANEL);
        float *const sums = sums_of_rows.data(), *const totals = sums + rows * PANEL;
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) repack_rows(repacked + t * x_tile, x, t, m, k, x_stride);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t p = 0; p < panels; p++) {
            for_slices(
                panel_at(packed, p, k), k, block, SLICE_PAIRS,
                [&](const char* w, int64_t pair, int64_t pairs, bool is_first) {
                    BFloat16::expand(w, pairs, expanded);
                    const int64_t num = (pairs + STEP_PAIRS - 1) / STEP_PAIRS;
                    memset(expanded + pairs * PANEL * 4, 0, num * STEP_BYTES - pairs * PANEL * 4);
                    for (int64_t t = 0; t < tiles; t += 2) {
                        Ahead none{nullptr, 0};
                        const bf16* inputs = repacked + t * x_tile + pair / STEP_PAIRS * TILE_VALUES;
                        float* target = sums + t * TILE_ROWS * PANEL;
                        if (tiles - t == 1)
                            add_steps<1>(expanded, inputs, x_tile, num, is_first, none, target);
                        else
                            add_steps<2>(expanded, inputs, x_tile, num, is_first, none, target);
                    }
                },
                [&](const float* scales, bool is_first) { add_block(totals, sums, scales, 1.0f, m, is_first); });
            store_panel<std::remove_pointer_t<decltype(out)>>(out, totals, m, p, n, out_stride);
        }
    }
}
#endif

}  // namespace

// values: [n, k] bytes; scales: [n, ceil(k / block)] float32. k is even, and so is the block unless it is k.
TRAMONTANE_KERNEL(pack_float8)(void* packed_, const void* values_, const void* scales_, int64_t n, int64_t k, int64_t block) {
    char* const packed = (char*)packed_;
    const uint8_t* const values = (const uint8_t*)values_;
    const float* const scales = (const float*)scales_;
    const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (k + block - 1) / block;
    memset(packed, 0, HEADER_BYTES);
    memcpy(packed, &block, 8);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        char* target = (char*)panel_at(packed, p, k);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * block, inputs = std::min(block, k - first);
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t row = p * PANEL + c;
                const float scale = row < n ? scales[row * blocks + b] : 0.0f;
                memcpy(target + c * 4, &scale, 4);
                for (int64_t i = 0; i < inputs; i++)
                    target[SCALES_BYTES + (i / 2 * PANEL + c) * 2 + i % 2] = row < n ? (char)values[row * k + first + i] : 0;
            }
            target += SCALES_BYTES + inputs * PANEL;
        }
    }
}

// out: [m, n]; x: [m, k]; packed: as pack_float8 left [n, k]. Strides of rows in values.
TRAMONTANE_KERNEL(gemm_float8_float32)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m > 0) gemm<Float32<float>>((float*)out, (const float*)x, (const char*)packed, m, n, k, x_stride, out_stride);
}
TRAMONTANE_KERNEL(gemm_float8_bfloat16)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m == 0) return;
#ifdef __AMX_BF16__
    const int64_t block = block_of((const char*)packed);
    if (block % STEP == 0 || block >= k) return gemm_of_tiles((bf16*)out, (const bf16*)x, (const char*)packed, m, n, k, x_stride, out_stride);
#endif
    gemm<BFloat16>((bf16*)out, (const bf16*)x, (const char*)packed, m, n, k, x_stride, out_stride);
}
