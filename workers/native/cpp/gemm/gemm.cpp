// x @ weight.T for weights of float32 or bfloat16, and of float32 that bfloat16 holds exactly: every output is one chain of multiply-adds along the inputs, in order, whatever the number
// of rows. So a row's bits do not depend on the rows beside it.
//
// The packed weight has panels of 32 output columns: [ceil(n / 32)][k / KSTEP][32][KSTEP]. A step of a panel is 128 bytes in either type: one
// float or a pair of bfloat16 for each column. Rows of x are repacked in blocks of up to MAX_ROWS, [k / KSTEP * XSTEP][rows], so that a block's
// values of one step lie together. The blocked product is Goto and van de Geijn's, "Anatomy of High-Performance Matrix Multiplication".
#include <algorithm>
#include <atomic>
#include <vector>

#include "../buffer.h"
#include "panels.h"

namespace {

constexpr int64_t SERIAL_UNITS = 1 << 13;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 12;
#else
constexpr int MAX_ROWS = 6;
#endif

// KSTEP: inputs in a step. XSTEP: in how many units of 4 bytes they are. mac<I> adds the products of unit I.
struct Float32 {
    using Value = float;
    static constexpr int KSTEP = 1, XSTEP = 1;

    template <int I>
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        float value;
        memcpy(&value, x, 4);
        return fma(load((const float*)w), set1(value), sum);
    }
};

// Weights packed as bfloat16, inputs of float32: the chain of Float32, and so its bits, from half of the memory.
struct NarrowFloat32 {
    using Value = float;
    static constexpr int KSTEP = 2, XSTEP = 2;

    template <int I>
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        const f32x16 both = load((const float*)w);
        float value;
        memcpy(&value, x, 4);
        return fma(I == 0 ? bits_left(both, 16) : bits_and(both, 0xffff0000u), set1(value), sum);
    }
};

// What is read as 4 bytes may begin at any even address.
INLINE uint32_t pair(const uint32_t* x) {
    uint32_t value;
    memcpy(&value, x, 4);
    return value;
}

// On AVX-512 the processor's own dot product of pairs, elsewhere two multiply-adds of widened values: other bits.
struct BFloat16 {
    using Value = bf16;
    static constexpr int KSTEP = 2, XSTEP = 1;

#ifdef __AVX512BF16__
    template <int I>
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair(x)))};
    }
#else
    INLINE __m256 mac(__m256 sum, __m256i w, uint32_t x) {
        __m256 x0 = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x << 16)));
        __m256 x1 = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x & 0xffff0000u)));
        sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), x0, sum);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u))), x1, sum);
    }
    template <int I>
    INLINE f32x16 mac(f32x16 sum, const char* w, const uint32_t* x) {
        return {mac(sum.lo, _mm256_loadu_si256((const __m256i*)w), pair(x)), mac(sum.hi, _mm256_loadu_si256((const __m256i*)(w + 32)), pair(x))};
    }
#endif
};

// What is read for later while a panel is multiplied: `bytes` with each step.
struct NextPanel {
    const char* place;
    int64_t bytes;
};

template <class Type, int I, int ROWS, int COLUMNS>
INLINE void add_unit(f32x16 (&acc)[ROWS][COLUMNS], const char* w, const uint32_t* x) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = Type::template mac<I>(acc[r][c], w + c * 64, x + r);
}

// Columns [first, first + 16 * COLUMNS) of a panel for ROWS rows; sums: [ROWS][PANEL].
template <class Type, int ROWS, int COLUMNS>
void tile(const char* w, const uint32_t* x, int64_t steps, NextPanel next, float* sums, int first) {
    f32x16 acc[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = zero();
    w += first * 4;
    for (int64_t step = 0; step < steps; step++, w += PANEL * 4, x += ROWS * Type::XSTEP, next.place += next.bytes) {
        if (next.bytes) _mm_prefetch(next.place, _MM_HINT_T1);
        _mm_prefetch(w + PREFETCH_BYTES, _MM_HINT_T0);
        if (COLUMNS == 2) _mm_prefetch(w + PREFETCH_BYTES + 64, _MM_HINT_T0);
        add_unit<Type, 0, ROWS, COLUMNS>(acc, w, x);
        if constexpr (Type::XSTEP == 2) add_unit<Type, 1, ROWS, COLUMNS>(acc, w, x + ROWS);
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) store(sums + r * PANEL + first + c * 16, acc[r][c]);
}

template <class Type, int ROWS>
void panel_of_rows(const char* w, const uint32_t* x, int64_t steps, NextPanel next, float* sums) {
#ifdef __AVX512F__
    tile<Type, ROWS, 2>(w, x, steps, next, sums, 0);
#else
    if constexpr (ROWS <= 2) {
        tile<Type, ROWS, 2>(w, x, steps, next, sums, 0);
    } else {
        tile<Type, ROWS, 1>(w, x, steps, next, sums, 0);
        tile<Type, ROWS, 1>(w, x, steps, next, sums, 16);
    }
#endif
}

template <class Type, int ROWS = MAX_ROWS>
void panel(int rows, const char* w, const uint32_t* x, int64_t steps, NextPanel next, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return panel<Type, ROWS - 1>(rows, w, x, steps, next, sums);
    }
    panel_of_rows<Type, ROWS>(w, x, steps, next, sums);
}

// `num` rows of `steps` units of 4 bytes, `row_bytes` apart -> [steps][num], num at most 16.
INLINE void transpose_rows(float* out, const char* x, int64_t num, int64_t steps, int64_t row_bytes) {
    float* const end = out + steps * num;
    for (int64_t s = 0; s < steps; s += 16) {
        f32x16 square[16];
        for (int64_t r = 0; r < 16; r++) square[r] = r < num ? load_some((const float*)(x + r * row_bytes) + s, steps - s) : zero();
        transpose(square);
        // A vector's surplus is where the next one goes.
        for (int64_t i = 0; i < std::min<int64_t>(16, steps - s); i++, out += num) store_some(out, square[i], end - out >= 16 ? 16 : num);
    }
}

// GATED: the first half of the columns are gates, the second ups; n counts both and is a multiple of 2 * PANEL, out has half of them. Out: the type
// of inputs, or float32, in which the same numbers are stored.
template <class Type, bool GATED, class Out>
void gemm(Out* out, const typename Type::Value* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride,
          int64_t out_stride) {
    const int64_t steps = k / Type::KSTEP, units = steps * Type::XSTEP, panels = (n + PANEL - 1) / PANEL, blocks = (m + MAX_ROWS - 1) / MAX_ROWS;
    static thread_local std::vector<uint32_t> buffer;
    if (m > 1 && (int64_t)buffer.size() < m * units) buffer.resize(m * units);
    uint32_t* const rows = m > 1 ? buffer.data() : (uint32_t*)x;
    const auto repack = [=](int64_t b) {
        const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
        transpose_rows((float*)rows + first * units, (const char*)(x + first * x_stride), num, units, x_stride * (int64_t)sizeof *x);
    };
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = m > 1 && m * units < SERIAL_UNITS;
    if (repack_here)
        for (int64_t b = 0; b < blocks; b++) repack(b);
#pragma omp parallel if (!alone)
    {
        if (m > 1 && !repack_here) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) repack(b);
        }
        const int64_t tasks = GATED ? panels / 2 : panels, panel_bytes = steps * PANEL * 4;
        static thread_local Buffer<float> buffer_of_gates;
        float* const gates = GATED ? buffer_of_gates.reserve(m * PANEL) : nullptr;
        // Reading the next panel is spread over all blocks: the first one alone would wait for memory, which would then wait for the others.
        // With a row or two, nothing waits but memory.
        const int64_t ahead = m > 2 ? PANEL * 4 / blocks : 0;
        // Calls use(first row, number of rows, their sums) for panel p. kept: where the sums of all rows go, or null.
        const auto multiply = [&](int64_t p, int64_t next, float* kept, auto use) {
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
                alignas(64) float room[MAX_ROWS * PANEL];
                float* const sums = kept ? kept + first * PANEL : room;
                panel<Type>((int)num, packed + p * panel_bytes, rows + first * units, steps, {packed + next * panel_bytes + b * steps * ahead, ahead}, sums);
                use(first, num, sums);
            }
        };
#pragma omp for schedule(dynamic, std::max<int64_t>(1, tasks / 32))
        for (int64_t p = 0; p < tasks; p++) {
            if constexpr (GATED) {
                multiply(p, p + tasks, gates, [](int64_t, int64_t, const float*) {});
                multiply(p + tasks, p + 1, nullptr, [&](int64_t first, int64_t num, const float* sums) {
                    store_gated(out + first * out_stride, gates + first * PANEL, sums, num, p, out_stride);
                });
            } else {
                multiply(p, p + 1, nullptr,
                         [&](int64_t first, int64_t num, const float* sums) { store_panel<typename Type::Value>(out + first * out_stride, sums, num, p, n, out_stride); });
            }
        }
    }
}

template <class Type>
void pack(char* packed, const typename Type::Value* weight, int64_t n, int64_t k) {
    const int64_t steps = k / Type::KSTEP, panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < PANEL; c++) {
            const char* row = (const char*)(weight + (p * PANEL + c) * k);
            char* target = packed + (p * steps * PANEL + c) * 4;
            for (int64_t s = 0; s < steps; s++)
                if (p * PANEL + c < n)
                    memcpy(target + s * PANEL * 4, row + s * 4, 4);
                else
                    memset(target + s * PANEL * 4, 0, 4);
        }
}

// The upper halves of 32 numbers, and all the bits that are not in them.
INLINE uint32_t narrow(uint16_t* out, const uint32_t* in) {
    uint32_t rest = 0;
    for (int i = 0; i < 32; i++) {
        out[i] = (uint16_t)(in[i] >> 16);
        rest |= in[i] & 0xffffu;
    }
    return rest;
}

// False, and `packed` is of no use, if some weight needs more bits than bfloat16 has. k is even.
bool pack_narrow(char* packed, const uint32_t* weight, int64_t n, int64_t k) {
    const int64_t steps = k / 2, panels = (n + PANEL - 1) / PANEL;
    std::atomic<bool> is_exact{true};
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        uint32_t rest = 0;
        for (int64_t s = 0; s < steps && rest == 0 && is_exact.load(std::memory_order_relaxed); s += 16) {
            const int64_t num = std::min<int64_t>(16, steps - s);
            for (int64_t half = 0; half < PANEL; half += 16) {
                alignas(64) uint16_t pairs[16][32] = {};
                for (int64_t c = 0; c < 16 && p * PANEL + half + c < n; c++) {
                    const uint32_t* const from = weight + (p * PANEL + half + c) * k + s * 2;
                    uint32_t some[32] = {};
                    if (num < 16) memcpy(some, from, num * 8);
                    rest |= narrow(pairs[c], num < 16 ? some : from);
                }
                f32x16 square[16];
                for (int c = 0; c < 16; c++) square[c] = load((const float*)pairs[c]);
                transpose(square);
                for (int64_t i = 0; i < num; i++) store((float*)packed + ((p * steps + s + i) * PANEL + half), square[i]);
            }
        }
        if (rest != 0) is_exact.store(false, std::memory_order_relaxed);
    }
    return is_exact;
}

}  // namespace

// Returns 1, or 0 if the weight has no such form.
TRAMONTANE_FUNCTION(int64_t, pack_narrow_float32)(void* packed, const void* weight, int64_t n, int64_t k) {
    return pack_narrow((char*)packed, (const uint32_t*)weight, n, k);
}

TRAMONTANE_KERNEL(pack_float32)(void* packed, const void* weight, int64_t n, int64_t k) { pack<Float32>((char*)packed, (const float*)weight, n, k); }
TRAMONTANE_KERNEL(pack_bfloat16)(void* packed, const void* weight, int64_t n, int64_t k) { pack<BFloat16>((char*)packed, (const bf16*)weight, n, k); }

// out: [m, n]; x: [m, k]; packed: as `pack` left [n, k]. Strides of rows in values; k is even but for float32 as such.
// gated: n is a multiple of 64, the first half of the product are gates, the second ups; out: [m, n / 2], silu(gate) * up.
// wide: rounded to the type of x, and stored as float32.
#define EXPORT(name, Type, T, GATED, Out)                                                                                                     \
    TRAMONTANE_KERNEL(name)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) { \
        gemm<Type, GATED>((Out*)out, (const T*)x, (const char*)packed, m, n, k, x_stride, out_stride);                                          \
    }
EXPORT(gemm_float32, Float32, float, false, float)
EXPORT(gated_gemm_float32, Float32, float, true, float)
#ifndef __AMX_BF16__  // then gemm_amx.cpp and gemm_amx_split.cpp have them
EXPORT(gemm_narrow_float32, NarrowFloat32, float, false, float)
EXPORT(gated_gemm_narrow_float32, NarrowFloat32, float, true, float)
EXPORT(gemm_bfloat16, BFloat16, bf16, false, bf16)
EXPORT(gated_gemm_bfloat16, BFloat16, bf16, true, bf16)
EXPORT(wide_gemm_bfloat16, BFloat16, bf16, false, float)
#endif
