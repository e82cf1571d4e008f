// The product of gemm_int.cpp for many rows with AMX: tiles of 16 rows, 16 columns and the 32 inputs of a group. The sums within a group are
// exact, and what follows is done in the same order, so the bits are those of gemm_int.cpp, which keeps few rows for itself.
//
// Rounded inputs lie in tiles [m / 16][k / 32][16][32] bytes. Weights are unpacked to signed bytes, CHUNK groups at a time, in the layout of 8 bits.
#pragma once

#include "amx.h"
#include "grouped_weight.h"

namespace {

// The fewest rows for which tiles pay: below, they are mostly empty.
constexpr int64_t TILES_MIN_ROWS = 24;
constexpr int64_t CHUNK = 16, AT_ONCE = 4;
constexpr int64_t UNPACKED_BYTES = PANEL * GROUP;

// Inputs of all rows, rounded: values as above; scales and totals [m / 16][k / 32][16].
struct RoundedTiles {
    const int8_t* values;
    const float* scales;
    const float* totals;
};

// The values of a group, [8 quads][32 columns][4 inputs].
template <class Form>
INLINE void unpack(const uint8_t* bytes, int8_t* values) {
    const __m512i offset = _mm512_set1_epi8((char)Form::ZERO);
    for (int64_t i = 0; i < PANEL * GROUP * Form::BITS / 8; i += 64) {
        const Bytes all = load_bytes(bytes + i);
        if constexpr (Form::BITS == 8) {
            _mm512_store_si512(values + i, _mm512_sub_epi8(all, offset));
        } else {
            _mm512_store_si512(values + i, _mm512_sub_epi8(low_halves(all), offset));
            _mm512_store_si512(values + UNPACKED_BYTES / 2 + i, _mm512_sub_epi8(high_halves(all), offset));
        }
    }
}

// The dots of up to four groups; the number of a tile is part of its instruction.
INLINE void multiply_groups(const int8_t* values, const int8_t* x, int64_t num, int32_t (*dots)[TILE_ROWS][16]) {
#define MULTIPLY(g, a, b)                                            \
    _tile_zero(g);                                                   \
    _tile_loadd(a, x + g * TILE_ROWS * GROUP, GROUP);                \
    _tile_loadd(b, values + g * UNPACKED_BYTES, PANEL * 4);          \
    _tile_dpbssd(g, a, b);                                           \
    _tile_stored(g, dots[g], 64);
    MULTIPLY(0, 4, 6)
    if (num > 1) {
        MULTIPLY(1, 5, 7)
    }
    if (num > 2) {
        MULTIPLY(2, 4, 6)
    }
    if (num > 3) {
        MULTIPLY(3, 5, 7)
    }
#undef MULTIPLY
}

// Adds groups [0, num) of 16 columns of a panel to a tile of rows; sums: [16][PANEL] of these columns, values: unpacked weights.
template <class Form>
INLINE void add_groups(const char* w, int64_t column, const int8_t* values, int64_t num, const int8_t* x, const float* x_scales,
                       const float* x_totals, bool is_first, float* sums) {
    alignas(64) int32_t dots[2][AT_ONCE][TILE_ROWS][16];
    f32x16 acc[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) acc[r] = is_first ? zero() : load(sums + r * PANEL);
    stores_are_done();
    multiply_groups(values, x, std::min(AT_ONCE, num), dots[0]);
    for (int64_t g = 0; g < num; g++, w += Form::GROUP_BYTES) {
        // Tiles take long from their inputs to their sums: the next ones are computed while the sums of these are added.
        const int64_t next = g + AT_ONCE;
        if (g % AT_ONCE == 0 && next < num)
            multiply_groups(values + next * UNPACKED_BYTES, x + next * TILE_ROWS * GROUP, std::min(AT_ONCE, num - next), dots[next / AT_ONCE % 2]);
        const int32_t(&exact)[TILE_ROWS][16] = dots[g / AT_ONCE % 2][g % AT_ONCE];
        const typename Form::Scale* header = (const typename Form::Scale*)w + column;
        const f32x16 scales = load_scales(header);
        const f32x16 second = Form::SECOND == NOTHING ? zero() : load_scales(header + (Form::SECOND == NOTHING ? 0 : PANEL));
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; r++) {
            f32x16 dot = {_mm512_cvtepi32_ps(_mm512_load_si512(exact[r]))};
            if constexpr (Form::SECOND == ZERO_POINT) dot = dot - second * set1(x_totals[g * TILE_ROWS + r]);
            acc[r] = acc[r] + dot * (scales * set1(x_scales[g * TILE_ROWS + r]));
        }
        if constexpr (Form::SECOND == MINIMUM) {
#pragma GCC unroll 16
            for (int r = 0; r < TILE_ROWS; r++)
                acc[r] = acc[r] + set1(x_totals[g * TILE_ROWS + r]) * (second * set1(x_scales[g * TILE_ROWS + r]));
        }
    }
    for (int r = 0; r < TILE_ROWS; r++) store(sums + r * PANEL, acc[r]);
}

// One panel for all tiles of rows; sums: [num_tiles * 16][PANEL].
template <class Form>
void panel_of_tiles(const char* w, RoundedTiles x, int64_t num_tiles, int64_t groups, float* sums) {
    alignas(64) int8_t unpacked[CHUNK * UNPACKED_BYTES];
    for (int64_t first = 0; first < groups; first += CHUNK, w += CHUNK * Form::GROUP_BYTES) {
        const int64_t num = std::min(CHUNK, groups - first);
        // The next chunk is read while this one is computed.
        for (int64_t i = 0; i < num * Form::GROUP_BYTES; i += 64) _mm_prefetch(w + CHUNK * Form::GROUP_BYTES + i, _MM_HINT_T0);
        for (int64_t g = 0; g < num; g++) unpack<Form>((const uint8_t*)w + g * Form::GROUP_BYTES + Form::HEADER_BYTES, unpacked + g * UNPACKED_BYTES);
        for (int64_t t = 0; t < num_tiles; t++) {
            const int64_t place = (t * groups + first) * TILE_ROWS;
            for (int64_t column = 0; column < PANEL; column += 16)
                add_groups<Form>(w, column, unpacked + column * 4, num, x.values + place * GROUP, x.scales + place, x.totals + place, first == 0,
                                 sums + t * TILE_ROWS * PANEL + column);
        }
    }
}

// See gemm_int.cpp.
template <class Form, class T>
void gemm_of_tiles(T* out, const T* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, rows = tiles * TILE_ROWS;
    static thread_local std::vector<int8_t> values;
    static thread_local std::vector<float> scales, totals;
    if ((int64_t)totals.size() < rows * groups) {
        values.resize(rows * k);
        scales.resize(rows * groups);
        totals.resize(rows * groups);
    }
    const RoundedTiles rounded{values.data(), scales.data(), totals.data()};
    int8_t* const all_values = values.data();
    float *const all_scales = scales.data(), *const all_totals = totals.data();
#pragma omp parallel
    {
        const Tiles configured(GROUP, GROUP / 4);
        static thread_local std::vector<float> sums;
        if ((int64_t)sums.size() < rows * PANEL) sums.resize(rows * PANEL);
        // Rows beyond m keep what was there: whole numbers, whose sums nobody reads.
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t place = (row / TILE_ROWS * groups + g) * TILE_ROWS + row % TILE_ROWS;
                int32_t total;
                all_scales[place] = round_group(x + row * x_stride + g * GROUP, all_values + place * GROUP, &total);
                all_totals[place] = (float)total;
            }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t p = 0; p < panels; p++) {
            panel_of_tiles<Form>(packed + p * groups * Form::GROUP_BYTES, rounded, tiles, groups, sums.data());
            store_panel(out, sums.data(), m, p, n, out_stride);
        }
    }
}

}  // namespace
