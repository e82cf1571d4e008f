// x @ weight.T for weights of 8 or 4 bits in groups of 32 inputs, each group with a scale, of half precision or "wide", float32. The inputs of
// a row are rounded to 8 bits in the same groups, with float32 scales; the sums within a group are whole numbers and exact, and groups are added
// in order:
// sum = sum + float(dot) * (weight scale * input scale), rounded after each operation. So the bits depend neither on the number of rows nor
// on the instruction set, and workers/quant/grouped.py computes the same in torch; only bfloat16 with AMX is different, see
// gemm_expanded_amx.h. Where a group has a minimum, its weights are
// value * scale + minimum, and sum = sum + float(sum of the inputs) * (minimum * input scale) follows. Where it has a zero point, a whole number
// that half precision holds, its weights are (value - zero point) * scale, and the dot is less zero point * sum of the inputs, which is exact.
//
// The packed weight is a header, then panels of 32 output columns: [ceil(n / 32)][k / 32] groups. A group is 32 scales, 32 minima or zero points
// of the same type if there are any, then for 8 bits [8 quads][32 columns][4 inputs] unsigned bytes, value + 128, and for 4 bits [4][32][4] bytes, value + 8,
// with quad q in the low and quad q + 4 in the high halves. With minima or zero points, values of 4 bits are unsigned, and stored as they are.
#include <algorithm>
#include <vector>

#ifdef __AMX_INT8__
#include "gemm_expanded_amx.h"
#include "gemm_int_amx.h"
#endif
#include "grouped_weight.h"

namespace {

constexpr int64_t SERIAL_GROUPS = 256;
#ifdef __AVX512F__
constexpr int MAX_ROWS = 8;
#else
constexpr int MAX_ROWS = 4;
#endif

// A block of rows: quads [k / 32][QUADS][rows], scales and totals [k / 32][rows]. totals: the sums of a group's rounded inputs.
struct Rows {
    const int32_t* quads;
    const float* scales;
    const int32_t* totals;
};

// Columns [first, first + 16 * COLUMNS) of a panel for ROWS rows; sums: [ROWS][PANEL].
template <class Form, int ROWS, int COLUMNS>
void tile(const char* w, Rows x, int64_t groups, float* sums, int first) {
    f32x16 acc[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) acc[r][c] = zero();
    for (int64_t g = 0; g < groups; g++, w += Form::GROUP_BYTES) {
        const uint8_t* bytes = (const uint8_t*)w + Form::HEADER_BYTES + first * 4;
        for (int64_t ahead = 0; ahead < Form::GROUP_BYTES; ahead += 64) _mm_prefetch(w + PREFETCH_BYTES + ahead, _MM_HINT_T0);
        i32x16 dots[ROWS][COLUMNS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++) dots[r][c] = set1(-Form::ZERO * x.totals[g * ROWS + r]);
        const int32_t* quads = x.quads + g * QUADS * ROWS;
        if constexpr (Form::BITS == 8) {
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
            const f32x16 scales = load_scales((const typename Form::Scale*)w + first + c * 16);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                f32x16 dot = to_float(dots[r][c]);
                if constexpr (Form::SECOND == ZERO_POINT)
                    dot = dot - load_scales((const typename Form::Scale*)w + PANEL + first + c * 16) * set1((float)x.totals[g * ROWS + r]);
                acc[r][c] = acc[r][c] + dot * (scales * set1(x.scales[g * ROWS + r]));
            }
            if constexpr (Form::SECOND == MINIMUM) {
                const f32x16 minima = load_scales((const typename Form::Scale*)w + PANEL + first + c * 16);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    acc[r][c] = acc[r][c] + set1((float)x.totals[g * ROWS + r]) * (minima * set1(x.scales[g * ROWS + r]));
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) store(sums + r * PANEL + first + c * 16, acc[r][c]);
}

template <class Form, int ROWS = MAX_ROWS>
void panel(int rows, const char* w, Rows x, int64_t groups, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return panel<Form, ROWS - 1>(rows, w, x, groups, sums);
    }
#ifdef __AVX512F__
    constexpr bool WHOLE = ROWS <= 5;  // more sums do not fit into the registers
#else
    constexpr bool WHOLE = ROWS == 1;
#endif
    if constexpr (WHOLE) {
        tile<Form, ROWS, 2>(w, x, groups, sums, 0);
    } else {
        tile<Form, ROWS, 1>(w, x, groups, sums, 0);
        tile<Form, ROWS, 1>(w, x, groups, sums, 16);
    }
}

// GATED, Out: see gemm.cpp.
template <class Form, bool GATED, class T, class Out>
void gemm(Out* out, const T* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
#ifdef __AMX_INT8__
    if constexpr (std::is_same_v<T, bf16>) return gemm_of_expanded<Form, GATED>(out, x, packed, m, n, k, x_stride, out_stride);
    if (m >= TILES_MIN_ROWS) return gemm_of_tiles<Form, GATED>(out, x, packed + sizeof(Header), m, n, k, x_stride, out_stride);
#endif
    packed += sizeof(Header);
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
        const int64_t tasks = GATED ? panels / 2 : panels;
#pragma omp for schedule(dynamic, std::max<int64_t>(1, tasks / 32))
        for (int64_t p = 0; p < tasks; p++)
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = first_row(b, m, blocks), num = first_row(b + 1, m, blocks) - first;
                const Rows block{all_quads + first * groups * QUADS, all_scales + first * groups, all_totals + first * groups};
                const auto multiply = [&](int64_t p, float* sums) { panel<Form>((int)num, packed + p * groups * Form::GROUP_BYTES, block, groups, sums); };
                float sums[GATED ? 2 : 1][MAX_ROWS * PANEL];
                multiply(p, sums[0]);
                if constexpr (GATED) {
                    multiply(p + tasks, sums[1]);
                    store_gated(out + first * out_stride, sums[0], sums[1], num, p, out_stride);
                } else {
                    store_panel<T>(out + first * out_stride, sums[0], num, p, n, out_stride);
                }
            }
    }
}

// values: [n, k] bytes; scales, and seconds (minima or zero points): [n, k / 32].
template <class Form>
void pack(char* packed, const int8_t* values, const typename Form::Scale* scales, const typename Form::Scale* seconds, int64_t n, int64_t k) {
    constexpr int BITS = Form::BITS;
    constexpr int64_t SCALE_BYTES = sizeof(typename Form::Scale);
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL;
    float largest = 0.0f;
    for (int64_t i = 0; i < n * groups; i++) {
        const float scale = std::abs(one_scale(scales[i])), second = Form::SECOND == NOTHING ? 0.0f : std::abs(one_scale(seconds[i]));
        const float weight = Form::SECOND == ZERO_POINT ? scale * std::max(second, 15.0f) : scale * (BITS == 8 ? 128 : 16) + second;
        // Not `max`: what is not a number stays.
        if (!(weight <= largest)) largest = weight;
        if (std::isnan(largest)) break;
    }
    const Header header = header_for(largest);
    memcpy(packed, &header, sizeof header);
    packed += sizeof header;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t g = 0; g < groups; g++) {
            char* target = packed + (p * groups + g) * Form::GROUP_BYTES;
            memset(target, 0, Form::HEADER_BYTES);
            uint8_t* bytes = (uint8_t*)target + Form::HEADER_BYTES;
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t row = p * PANEL + c;
                if (row < n) memcpy(target + c * SCALE_BYTES, &scales[row * groups + g], SCALE_BYTES);
                if (Form::SECOND != NOTHING && row < n) memcpy(target + (PANEL + c) * SCALE_BYTES, &seconds[row * groups + g], SCALE_BYTES);
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

// out: [m, n]; x: [m, k]; packed: as `pack` left [n, k]. Strides of rows in values; k is a multiple of 32. seconds is null where there are none.
// gated, wide: as in gemm.cpp, for weights that are quantized at load.
#define EXPORT_GEMM(name, Form, T, GATED, Out)                                                                                                \
    TRAMONTANE_KERNEL(name)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) { \
        gemm<Form, GATED>((Out*)out, (const T*)x, (const char*)packed, m, n, k, x_stride, out_stride);                                          \
    }
#define EXPORT(name, bits, second, Scale)                                                                                                      \
    using name##_form = Weight<bits, second, Scale>;                                                                                           \
    EXPORT_GEMM(gemm_##name##_float32, name##_form, float, false, float)                                                                       \
    EXPORT_GEMM(gemm_##name##_bfloat16, name##_form, bf16, false, bf16)                                                                        \
    TRAMONTANE_KERNEL(pack_##name)(void* packed, const void* values, const void* scales, const void* seconds, int64_t n, int64_t k) {          \
        pack<name##_form>((char*)packed, (const int8_t*)values, (const Scale*)scales, (const Scale*)seconds, n, k);                            \
    }
#define EXPORT_FUSED(name)                                                      \
    EXPORT_GEMM(gated_gemm_##name##_float32, name##_form, float, true, float)   \
    EXPORT_GEMM(gated_gemm_##name##_bfloat16, name##_form, bf16, true, bf16)    \
    EXPORT_GEMM(wide_gemm_##name##_bfloat16, name##_form, bf16, false, float)
EXPORT(int8, 8, NOTHING, uint16_t)
EXPORT(int4, 4, NOTHING, uint16_t)
EXPORT(int8_minima, 8, MINIMUM, uint16_t)
EXPORT(int4_minima, 4, MINIMUM, uint16_t)
EXPORT(int4_zeros, 4, ZERO_POINT, uint16_t)
EXPORT(int8_wide, 8, NOTHING, float)
EXPORT(int4_wide, 4, NOTHING, float)
EXPORT(int8_minima_wide, 8, MINIMUM, float)
EXPORT(int4_minima_wide, 4, MINIMUM, float)
EXPORT_FUSED(int8)
EXPORT_FUSED(int4)
