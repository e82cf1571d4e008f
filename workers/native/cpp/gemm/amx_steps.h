// Products in bfloat16 with AMX, step by step: 32 inputs of two tiles of rows and of a panel. What gemm_amx.cpp and gemm_float8.cpp share.
#pragma once

#include <algorithm>

#include "../amx.h"
#include "panels.h"

namespace {

constexpr int64_t STEP = 32;  // inputs
constexpr int64_t TILE_VALUES = TILE_ROWS * STEP, STEP_BYTES = PANEL * STEP * 2;
constexpr int64_t PAIR_SUMS = 2 * TILE_ROWS * PANEL;  // of two tiles of rows and a panel

// What a task multiplies with a block of rows: `num` panels from `first` on, and with gates as many from `second` on.
struct Panels {
    const char* packed;
    int64_t bytes, first, num, second;

    const char* operator[](int64_t i) const { return packed + (i < num ? first + i : second + i - num) * bytes; }
};

// How many sums a panel and `rows` rows have.
INLINE int64_t panel_sums(int64_t rows) { return (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS) * PAIR_SUMS; }

// What is read next while a step is computed: `bytes` of the weights in each, up to `end`, and then on from `then`.
struct Ahead {
    const char* next;
    int64_t bytes;
    const char *end = nullptr, *then = nullptr;

    template <int CACHE>
    void fetch() {
        if (next == end) next = then;
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(next + i, (_mm_hint)CACHE);
        next += bytes;
    }
};

// Sums of up to four tiles, [NUM * 16][PANEL], in tiles 0 to 3: NUM is 1 or 2.
template <int NUM>
INLINE void begin_sums(bool is_first, const float* sums) {
    constexpr int64_t ROW = PANEL * 4, TILE = TILE_ROWS * PANEL;
    stores_are_done();
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + 16, ROW);
        if (NUM > 1) {
            _tile_loadd(2, sums + TILE, ROW);
            _tile_loadd(3, sums + TILE + 16, ROW);
        }
    }
}

template <int NUM>
INLINE void end_sums(float* sums) {
    constexpr int64_t ROW = PANEL * 4, TILE = TILE_ROWS * PANEL;
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + 16, ROW);
    if (NUM > 1) {
        _tile_stored(2, sums + TILE, ROW);
        _tile_stored(3, sums + TILE + 16, ROW);
    }
    stores_are_done();
}

// Adds `steps` steps of a panel to the sums of NUM tiles of rows; sums: [NUM * 16][PANEL]. x: the tiles of the rows, `x_tile` values apart.
// CACHE: where what is read ahead goes.
template <int NUM, int CACHE = _MM_HINT_T0>
void add_steps(const char* w, const bf16* x, int64_t x_tile, int64_t steps, bool is_first, Ahead& ahead, float* sums) {
    begin_sums<NUM>(is_first, sums);
    for (int64_t s = 0; s < steps; s++, w += STEP_BYTES, x += TILE_VALUES) {
        ahead.template fetch<CACHE>();
        _tile_loadd(6, w, PANEL * 4);
        _tile_loadd(4, x, STEP * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + 64, PANEL * 4);
        _tile_dpbf16ps(1, 4, 7);
        if (NUM > 1) {
            _tile_loadd(5, x + x_tile, STEP * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    end_sums<NUM>(sums);
}

// 32 inputs each of the rows from 16 * t on, filled up with zeros: tiles [k / 32][16][32].
INLINE void repack_rows(bf16* tiles, const bf16* x, int64_t t, int64_t m, int64_t k, int64_t x_stride) {
    const int64_t num = std::min<int64_t>(TILE_ROWS, m - t * TILE_ROWS);
    for (int64_t s = 0; s < (k + STEP - 1) / STEP; s++, tiles += TILE_VALUES) {
        const __mmask32 inputs = k - s * STEP >= STEP ? ~0u : (1u << (k - s * STEP)) - 1;
        const bf16* const from = x + t * TILE_ROWS * x_stride + s * STEP;
        for (int64_t r = 0; r < num; r++) _mm512_storeu_si512(tiles + r * STEP, _mm512_maskz_loadu_epi16(inputs, from + r * x_stride));
        for (int64_t r = num; r < TILE_ROWS; r++) _mm512_storeu_si512(tiles + r * STEP, _mm512_setzero_si512());
    }
}

}  // namespace
