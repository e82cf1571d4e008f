// The product of gemm_int.cpp for many rows with AMX: tiles of 16 rows, 16 columns and the 32 inputs of a group. The sums within a group are
// exact, and what follows is done in the same order, so the bits are those of gemm_int.cpp, which keeps few rows for itself.
//
// Rounded inputs lie in tiles [m / 16][k / 32][16][32] bytes. Weights are unpacked to signed bytes, CHUNK groups at a time, in the layout of 8 bits.
#pragma once

#include "../amx.h"
#include "../buffer.h"
#include "grouped_weight.h"

namespace {

// The fewest rows for which tiles pay: below, it takes longer to unpack weights than to multiply them.
constexpr int64_t TILES_MIN_ROWS = 10;
constexpr int64_t CHUNK = 8;
// Groups whose dots are computed before their sums are added, and the dots that are kept: tiles take long from their inputs to their sums. One group
// is begun for each that is added, so that the processor sees both at once.
constexpr int AHEAD = 3, RING = 4;
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

// The dots of a group of 16 rows and 16 columns, in one of RING tiles: its number is part of the instruction.
template <int PLACE>
INLINE void multiply_group(const int8_t* values, const int8_t* x, int32_t (*dots)[TILE_ROWS][16]) {
#define MULTIPLY(sum, a, b)                        \
    _tile_zero(sum);                               \
    _tile_loadd(a, x, GROUP);                      \
    _tile_loadd(b, values, PANEL * 4);             \
    _tile_dpbssd(sum, a, b);                       \
    _tile_stored(sum, dots[sum], 64);
    if constexpr (PLACE == 0) {
        MULTIPLY(0, 4, 6)
    } else if constexpr (PLACE == 1) {
        MULTIPLY(1, 5, 7)
    } else if constexpr (PLACE == 2) {
        MULTIPLY(2, 4, 6)
    } else {
        MULTIPLY(3, 5, 7)
    }
#undef MULTIPLY
}

// Adds a group to the sums of the first ROWS rows. w: the group's scales and what it has besides, from the first of 16 columns on; x_scales, x_totals: [16].
template <class Form, int ROWS>
INLINE void add_group(f32x16 (&acc)[ROWS], const int32_t (&dots)[TILE_ROWS][16], const typename Form::Scale* w, const float* x_scales,
                      const float* x_totals) {
    const f32x16 scales = load_scales(w);
    const f32x16 second = Form::SECOND == NOTHING ? zero() : load_scales(w + (Form::SECOND == NOTHING ? 0 : PANEL));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        f32x16 dot = {_mm512_cvtepi32_ps(_mm512_load_si512(dots[r]))};
        if constexpr (Form::SECOND == ZERO_POINT) dot = dot - second * set1(x_totals[r]);
        acc[r] = acc[r] + dot * (scales * set1(x_scales[r]));
        if constexpr (Form::SECOND == MINIMUM) acc[r] = acc[r] + set1(x_totals[r]) * (second * set1(x_scales[r]));
    }
}

// What is read while groups are added: `bytes` of the next weights with each. All at once, they would keep everything else waiting.
struct NextWeights {
    const char* next;
    int64_t bytes;

    void fetch() {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
        next += bytes;
    }
};

// Groups between a tile of inputs that is brought into the first cache and the one that is multiplied.
constexpr int64_t INPUTS_AHEAD = 8;

// Adds groups [0, num) of 16 columns of a panel to the first ROWS rows of a tile; sums: [ROWS][PANEL] of these columns, values: unpacked weights.
template <class Form, int ROWS>
void add_groups(const char* w, int64_t column, const int8_t* values, int64_t num, const int8_t* x, const float* x_scales, const float* x_totals,
                bool is_first, NextWeights& ahead, float* sums) {
    alignas(64) int32_t dots[RING][TILE_ROWS][16];
    f32x16 acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = is_first ? zero() : load(sums + r * PANEL);
    const auto multiply = [&](auto place, int64_t g) {
        if (g < num) multiply_group<place>(values + g * UNPACKED_BYTES, x + g * TILE_ROWS * GROUP, dots);
    };
    const auto step = [&](auto place, auto place_ahead, int64_t g) {
        if (g >= num) return;
        ahead.fetch();
        const char* const inputs = (const char*)x + (g + INPUTS_AHEAD) * TILE_ROWS * GROUP;
        for (int64_t i = 0; column == 0 && i < TILE_ROWS * GROUP; i += 64) _mm_prefetch(inputs + i, _MM_HINT_T0);
        multiply(place_ahead, g + AHEAD);
        add_group<Form, ROWS>(acc, dots[place], (const typename Form::Scale*)(w + g * Form::GROUP_BYTES) + column, x_scales + g * TILE_ROWS, x_totals + g * TILE_ROWS);
    };
    constexpr std::integral_constant<int, 0> P0;
    constexpr std::integral_constant<int, 1> P1;
    constexpr std::integral_constant<int, 2> P2;
    constexpr std::integral_constant<int, 3> P3;
    stores_are_done();
    multiply(P0, 0);
    multiply(P1, 1);
    multiply(P2, 2);
    for (int64_t g = 0; g < num; g += RING) {
        step(P0, P3, g);
        step(P1, P0, g + 1);
        step(P2, P1, g + 2);
        step(P3, P2, g + 3);
    }
    for (int r = 0; r < ROWS; r++) store(sums + r * PANEL, acc[r]);
}

// One panel for all rows; sums: [whole tiles of rows][PANEL].
template <class Form>
void panel_of_tiles(const char* w, RoundedTiles x, int64_t num_rows, int64_t groups, float* sums) {
    // Sums of rows that do not exist cost as much as others.
    constexpr decltype(&add_groups<Form, 16>) functions[] = {add_groups<Form, 4>, add_groups<Form, 8>, add_groups<Form, 12>, add_groups<Form, 16>};
    const int64_t num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    alignas(64) int8_t unpacked[CHUNK * UNPACKED_BYTES];
    for (int64_t first = 0; first < groups; first += CHUNK, w += CHUNK * Form::GROUP_BYTES) {
        const int64_t num = std::min(CHUNK, groups - first);
        NextWeights ahead{w + CHUNK * Form::GROUP_BYTES, (Form::GROUP_BYTES / (2 * num_tiles) + 63) / 64 * 64};
        for (int64_t g = 0; g < num; g++) unpack<Form>((const uint8_t*)w + g * Form::GROUP_BYTES + Form::HEADER_BYTES, unpacked + g * UNPACKED_BYTES);
        for (int64_t t = 0; t < num_tiles; t++) {
            const auto add = functions[std::min<int64_t>(3, (num_rows - t * TILE_ROWS - 1) / 4)];
            const int64_t place = (t * groups + first) * TILE_ROWS;
            for (int64_t column = 0; column < PANEL; column += 16)
                add(w, column, unpacked + column * 4, num, x.values + place * GROUP, x.scales + place, x.totals + place, first == 0, ahead,
                                 sums + t * TILE_ROWS * PANEL + column);
        }
    }
}

// See gemm_int.cpp.
template <class Form, bool GATED, class T, class Out>
void gemm_of_tiles(Out* out, const T* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, rows = tiles * TILE_ROWS;
    static thread_local Buffer<int8_t> values;
    static thread_local Buffer<float> scales, totals;
    int8_t* const all_values = values.reserve(rows * k);
    float *const all_scales = scales.reserve(rows * groups), *const all_totals = totals.reserve(rows * groups);
    const RoundedTiles rounded{all_values, all_scales, all_totals};
#pragma omp parallel
    {
        const Tiles configured(GROUP, GROUP / 4);
        static thread_local Buffer<float> buffer;
        float* const sums = buffer.reserve((GATED ? 2 : 1) * rows * PANEL);
        // Rows beyond m keep what was there: whole numbers, whose sums nobody reads.
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t place = (row / TILE_ROWS * groups + g) * TILE_ROWS + row % TILE_ROWS;
                int32_t total;
                all_scales[place] = round_group(x + row * x_stride + g * GROUP, all_values + place * GROUP, &total);
                all_totals[place] = (float)total;
            }
        const int64_t tasks = GATED ? panels / 2 : panels;
        const auto multiply = [&](int64_t p, float* sums) { panel_of_tiles<Form>(packed + p * groups * Form::GROUP_BYTES, rounded, m, groups, sums); };
#pragma omp for schedule(dynamic, std::max<int64_t>(1, tasks / 32))
        for (int64_t p = 0; p < tasks; p++) {
            multiply(p, sums);
            if constexpr (GATED) {
                float* const ups = sums + rows * PANEL;
                multiply(p + tasks, ups);
                store_gated(out, sums, ups, m, p, out_stride);
            } else {
                store_panel<T>(out, sums, m, p, n, out_stride);
            }
        }
    }
}

}  // namespace
