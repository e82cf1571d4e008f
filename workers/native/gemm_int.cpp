// x @ weight.T for weights of 8 or 4 bits in groups of 32 inputs, each group with a scale of half precision. The inputs of a row are rounded
// to 8 bits in the same groups, with float32 scales; the sums within a group are whole numbers and exact, and groups are added in order:
// sum = sum + float(dot) * (weight scale * input scale), rounded after each operation. So the bits depend neither on the number of rows nor
// on the instruction set, and workers/quant/grouped.py computes the same in torch. Where a group has a minimum, its weights are
// value * scale + minimum, and sum = sum + float(sum of the inputs) * (minimum * input scale) follows.
//
// The packed weight has panels of 32 output columns: [ceil(n / 32)][k / 32] groups. A group is 32 half-precision scales, 32 minima if there
// are any, then for 8 bits [8 quads][32 columns][4 inputs] unsigned bytes, value + 128, and for 4 bits [4][32][4] bytes, value + 8, with quad
// q in the low and quad q + 4 in the high halves. With minima values are unsigned, and stored as they are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "panels.h"

namespace {

constexpr int GROUP = 32, QUADS = GROUP / 4;
constexpr int64_t SERIAL_GROUPS = 256;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 8;
#else
constexpr int MAX_ROWS = 4;
#endif

// 16 whole numbers.
#ifdef __AVX512F__
struct i32x16 {
    __m512i v;
};
using Bytes = __m512i;  // 16 columns of 4 unsigned bytes
INLINE i32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Bytes low_halves(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
INLINE i32x16 dot(i32x16 sum, Bytes w, int32_t x) { return {_mm512_dpbusd_epi32(sum.v, w, _mm512_set1_epi32(x))}; }
INLINE f32x16 to_float(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
#else
struct i32x16 {
    __m256i lo, hi;
};
struct Bytes {
    __m256i lo, hi;
};
INLINE i32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
INLINE Bytes low_halves(Bytes b) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
INLINE Bytes high_halves(Bytes b) { return low_halves({_mm256_srli_epi16(b.lo, 4), _mm256_srli_epi16(b.hi, 4)}); }
// Even and odd bytes apart: the one instruction for both saturates.
INLINE __m256i dot(__m256i sum, __m256i w, int32_t x) {
    const __m256i inputs = _mm256_set1_epi32(x), even = _mm256_set1_epi16(0xff);
    __m256i w0 = _mm256_and_si256(w, even), w1 = _mm256_srli_epi16(w, 8);
    __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8), x1 = _mm256_srai_epi16(inputs, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(w0, x0), _mm256_madd_epi16(w1, x1)));
}
INLINE i32x16 dot(i32x16 sum, Bytes w, int32_t x) { return {dot(sum.lo, w.lo, x), dot(sum.hi, w.hi, x)}; }
INLINE f32x16 to_float(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
#endif

template <int BITS, bool MINIMA>
struct Weight {
    static constexpr int ZERO = MINIMA ? 0 : BITS == 8 ? 128 : 8;
    static constexpr int64_t HEADER_BYTES = PANEL * (MINIMA ? 4 : 2), GROUP_BYTES = HEADER_BYTES + PANEL * GROUP * BITS / 8;
};

// A block of rows: quads [k / 32][QUADS][rows], scales and totals [k / 32][rows]. totals: the sums of a group's rounded inputs.
struct Rows {
    const int32_t* quads;
    const float* scales;
    const int32_t* totals;
};

// Columns [first, first + 16 * COLUMNS) of a panel for ROWS rows; sums: [ROWS][PANEL].
template <int BITS, bool MINIMA, int ROWS, int COLUMNS>
void tile(const char* w, Rows x, int64_t groups, float* sums, int first) {
    f32x16 acc[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = zero();
    using Form = Weight<BITS, MINIMA>;
    for (int64_t g = 0; g < groups; g++, w += Form::GROUP_BYTES) {
        const uint8_t* bytes = (const uint8_t*)w + Form::HEADER_BYTES + first * 4;
        for (int64_t ahead = 0; ahead < Form::GROUP_BYTES; ahead += 64) _mm_prefetch(w + PREFETCH_BYTES + ahead, _MM_HINT_T0);
        i32x16 dots[ROWS][COLUMNS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++) dots[r][c] = set1(-Form::ZERO * x.totals[g * ROWS + r]);
        const int32_t* quads = x.quads + g * QUADS * ROWS;
        if constexpr (BITS == 8) {
#pragma GCC unroll 8
            for (int q = 0; q < QUADS; q++)
#pragma GCC unroll 2
                for (int c = 0; c < COLUMNS; c++) {
                    const Bytes all = load_bytes(bytes + (q * PANEL + c * 16) * 4);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) dots[r][c] = dot(dots[r][c], all, quads[q * ROWS + r]);
                }
        } else {
#pragma GCC unroll 4
            for (int q = 0; q < QUADS / 2; q++)
#pragma GCC unroll 2
                for (int c = 0; c < COLUMNS; c++) {
                    const Bytes both = load_bytes(bytes + (q * PANEL + c * 16) * 4), low = low_halves(both), high = high_halves(both);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        dots[r][c] = dot(dots[r][c], low, quads[q * ROWS + r]);
                        dots[r][c] = dot(dots[r][c], high, quads[(q + QUADS / 2) * ROWS + r]);
                    }
                }
        }
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) {
            const f32x16 scales = load_half((const uint16_t*)w + first + c * 16);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) acc[r][c] = acc[r][c] + to_float(dots[r][c]) * (scales * set1(x.scales[g * ROWS + r]));
            if constexpr (MINIMA) {
                const f32x16 minima = load_half((const uint16_t*)w + PANEL + first + c * 16);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    acc[r][c] = acc[r][c] + set1((float)x.totals[g * ROWS + r]) * (minima * set1(x.scales[g * ROWS + r]));
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) store(sums + r * PANEL + first + c * 16, acc[r][c]);
}

template <int BITS, bool MINIMA, int ROWS = MAX_ROWS>
void panel(int rows, const char* w, Rows x, int64_t groups, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return panel<BITS, MINIMA, ROWS - 1>(rows, w, x, groups, sums);
    }
#ifdef __AVX512F__
    constexpr bool WHOLE = ROWS <= 5;  // more sums do not fit into the registers
#else
    constexpr bool WHOLE = ROWS == 1;
#endif
    if constexpr (WHOLE) {
        tile<BITS, MINIMA, ROWS, 2>(w, x, groups, sums, 0);
    } else {
        tile<BITS, MINIMA, ROWS, 1>(w, x, groups, sums, 0);
        tile<BITS, MINIMA, ROWS, 1>(w, x, groups, sums, 16);
    }
}

// Rounds 32 inputs to 8 bits: scale = largest / 127. Not-a-number and infinite inputs give a scale that makes the whole row not a number.
template <class T>
INLINE float round_group(const T* x, int8_t* rounded, int32_t* total) {
    const f32x16 a = load(x), b = load(x + 16);
    const float largest = max_of(max(abs(a), abs(b)));
    const float scale = largest / 127.0f;
    const f32x16 inverse = set1(largest > 0.0f ? 127.0f / largest : 0.0f);
    float values[GROUP];
    store(values, round_to_even(a * inverse));
    store(values + 16, round_to_even(b * inverse));
    *total = 0;
    for (int i = 0; i < GROUP; i++) {
        rounded[i] = (int8_t)values[i];
        *total += rounded[i];
    }
    // 0 * x is not a number where x is not finite; `max` may have passed over it.
    const float poison = sum(a * zero() + b * zero());
    return scale + poison;
}

template <int BITS, bool MINIMA, class T>
void gemm(T* out, const T* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL, blocks = (m + MAX_ROWS - 1) / MAX_ROWS;
    static thread_local std::vector<int32_t> quads, totals;
    static thread_local std::vector<float> scales;
    if ((int64_t)totals.size() < m * groups) {
        quads.resize(m * groups * QUADS);
        totals.resize(m * groups);
        scales.resize(m * groups);
    }
    int32_t *const all_quads = quads.data(), *const all_totals = totals.data();
    float* const all_scales = scales.data();
    const auto round_row = [=](int64_t row) {
        const int64_t b = ((row + 1) * blocks - 1) / m, first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
        for (int64_t g = 0; g < groups; g++) {
            alignas(16) int8_t rounded[GROUP];
            const int64_t place = first * groups + g * num + row - first;
            all_scales[place] = round_group(x + row * x_stride + g * GROUP, rounded, &all_totals[place]);
            for (int q = 0; q < QUADS; q++) memcpy(&all_quads[(first * groups + g * num) * QUADS + q * num + row - first], rounded + q * 4, 4);
        }
    };
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, round_here = m * groups < SERIAL_GROUPS;
    if (round_here)
        for (int64_t row = 0; row < m; row++) round_row(row);
#pragma omp parallel if (!alone)
    {
        if (!round_here) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) round_row(row);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t p = 0; p < panels; p++) {
            const char* w = packed + p * groups * Weight<BITS, MINIMA>::GROUP_BYTES;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
                float sums[MAX_ROWS * PANEL];
                panel<BITS, MINIMA>((int)num, w, {all_quads + first * groups * QUADS, all_scales + first * groups, all_totals + first * groups}, groups, sums);
                store_panel(out + first * out_stride, sums, num, p, n, out_stride);
            }
        }
    }
}

// values: [n, k] bytes; scales, minima: [n, k / 32] half precision.
template <int BITS, bool MINIMA>
void pack(char* packed, const int8_t* values, const uint16_t* scales, const uint16_t* minima, int64_t n, int64_t k) {
    using Form = Weight<BITS, MINIMA>;
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t g = 0; g < groups; g++) {
            char* target = packed + (p * groups + g) * Form::GROUP_BYTES;
            memset(target, 0, Form::HEADER_BYTES);
            uint8_t* bytes = (uint8_t*)target + Form::HEADER_BYTES;
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t row = p * PANEL + c;
                if (row < n) memcpy(target + c * 2, &scales[row * groups + g], 2);
                if (MINIMA && row < n) memcpy(target + (PANEL + c) * 2, &minima[row * groups + g], 2);
                uint8_t offset[GROUP];
                for (int i = 0; i < GROUP; i++) offset[i] = (uint8_t)((row < n ? values[row * k + g * GROUP + i] : 0) + Form::ZERO);
                for (int q = 0; q < QUADS * BITS / 8; q++)
                    for (int i = 0; i < 4; i++) {
                        const uint8_t low = offset[q * 4 + i];
                        bytes[(q * PANEL + c) * 4 + i] = BITS == 8 ? low : (uint8_t)(low | offset[(q + QUADS / 2) * 4 + i] << 4);
                    }
            }
        }
}

}  // namespace

// out: [m, n]; x: [m, k]; packed: as `pack` left [n, k]. Strides of rows in values; k is a multiple of 32. minima is null where there are none.
#define EXPORT_GEMM(form, bits, has_minima, type, T)                                                                                               \
    TRAMONTANE_KERNEL(gemm_##form##_##type)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride,       \
                                            int64_t out_stride) {                                                                                  \
        gemm<bits, has_minima, T>((T*)out, (const T*)x, (const char*)packed, m, n, k, x_stride, out_stride);                                       \
    }
#define EXPORT(form, bits, has_minima)                                                                                                             \
    EXPORT_GEMM(form, bits, has_minima, float32, float)                                                                                            \
    EXPORT_GEMM(form, bits, has_minima, bfloat16, bf16)                                                                                            \
    TRAMONTANE_KERNEL(pack_##form)(void* packed, const void* values, const void* scales, const void* minima, int64_t n, int64_t k) {               \
        pack<bits, has_minima>((char*)packed, (const int8_t*)values, (const uint16_t*)scales, (const uint16_t*)minima, n, k);                      \
    }
EXPORT(int8, 8, false)
EXPORT(int4, 4, false)
EXPORT(int4_minima, 4, true)
