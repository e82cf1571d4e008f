// The product of gemm_int.cpp in bfloat16 with AMX: inputs as they are, weights expanded to bfloat16 (expand_amx.h), tiles of 16 rows, 16 columns
// and the 32 inputs of a group. A step of a tile adds the products of its 32 inputs in the processor's own fixed order, and steps follow each
// other along the inputs, for one row as for many. So a row's bits do not depend on the rows beside it; they are not those of gemm_int.cpp.
//
// While a tile is multiplied, others are expanded. Up to two tiles of rows, a group is expanded for the next step. With more, a slice of a
// panel's groups is expanded once and stays in the first cache while the rows pass: see gemm_amx.cpp.
#pragma once

#include <omp.h>

#include "../buffer.h"
#include "amx_steps.h"
#include "expand_amx.h"

namespace {

// Groups in a slice, tiles of rows in a block, what stays in the second cache, and how many groups a thread takes at once of few rows.
constexpr int64_t SLICE = 8, BLOCK_TILES = 32, CACHE_BYTES = 1 << 20, CHUNK_GROUPS = 256;
constexpr int64_t EXPANDED_BYTES = PANEL * GROUP * 2;

// Rows from 16 * t on in tiles [k / 32][tile_rows][32], multiplied by a power of two. Of four inputs, the second and the third change places, as
// in expanded weights.
INLINE void repack_scaled(bf16* tiles, const bf16* x, int64_t t, int64_t tile_rows, int64_t m, int64_t k, int64_t x_stride, float factor) {
    const __m512 factors = _mm512_set1_ps(factor);
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    for (int64_t r = 0; r < tile_rows; r++) {
        const int64_t row = t * TILE_ROWS + r;
        for (int64_t s = 0; s < k / GROUP; s++) {
            __m512i inputs = _mm512_setzero_si512();
            if (row < m) {
                inputs = _mm512_loadu_si512(x + row * x_stride + s * GROUP);
                inputs = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(inputs, 0xd8), 0xd8);
                const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(inputs, 16)), factors);
                const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(inputs, upper)), factors);
                // What is exact needs no rounding.
                inputs = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_and_si512(_mm512_castps_si512(odd), upper));
            }
            _mm512_storeu_si512(tiles + (s * tile_rows + r) * STEP, inputs);
        }
    }
}

// Adds the products of the first or the second tile of an expanded group. x: tiles of inputs, x_tile values apart.
template <int NUM, int HALF>
INLINE void add_tile(const char* expanded, const bf16* x, int64_t x_tile) {
    if constexpr (HALF == 0) {
        _tile_loadd(6, expanded, 64);
        _tile_loadd(4, x, STEP * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (NUM > 1) {
            _tile_loadd(5, x + x_tile, STEP * 2);
            _tile_dpbf16ps(2, 5, 6);
        }
    } else {
        _tile_loadd(7, expanded + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (NUM > 1) _tile_dpbf16ps(3, 5, 7);
    }
}

// Weights are read ahead by so much, into the second cache: the first one then has no open reads left for others.
template <class Form>
constexpr int64_t AHEAD_BYTES = (PREFETCH_BYTES / Form::GROUP_BYTES + 1) * Form::GROUP_BYTES;

// A panel for NUM tiles of rows; sums: [NUM * 16][PANEL]. next: what is read after it. begun: what was to be read next, so that its beginning has been.
template <class Form, int NUM>
void multiply_panel(const char* w, const char* next, const char*& begun, const Expansion<Form>& expansion, const bf16* x, int64_t x_tile, int64_t groups,
                    float* sums) {
    alignas(64) char expanded[2][EXPANDED_BYTES];
    const int64_t x_step = x_tile / groups;
    const char *const end = w + groups * Form::GROUP_BYTES, *ahead = w + AHEAD_BYTES<Form>;
    for (int64_t i = 0; w != begun && i < AHEAD_BYTES<Form>; i += 64) _mm_prefetch(w + i, _MM_HINT_T1);
    begun = next;
    begin_sums<NUM>(true, sums);
    for (int half = 0; half < 2; half++) expansion.expand(w, half, expanded[0], w + Form::GROUP_BYTES);
    for (int64_t g = 0; g < groups; g++, x += x_step) {
        if (ahead == end) ahead = next;
        const char* const tiles = expanded[g % 2];
        char* const following = expanded[(g + 1) % 2];
        stores_are_done();
        w = std::min(w + Form::GROUP_BYTES, end - Form::GROUP_BYTES);
        add_tile<NUM, 0>(tiles, x, x_tile);
        expansion.expand(w, 0, following, ahead);
        add_tile<NUM, 1>(tiles, x, x_tile);
        expansion.expand(w, 1, following, ahead);
        ahead += Form::GROUP_BYTES;
    }
    end_sums<NUM>(sums);
}

// What is done beside the products of a slice: the groups of the next one are expanded, half by half, and those of the one after it are read ahead.
template <class Form>
struct Beside {
    const Expansion<Form>& expansion;
    const char *groups, *ahead;
    char* expanded;
    int64_t num_halves, num_steps, done = 0, owed = 0;

    void expand() {
        const int64_t place = done / 2 * Form::GROUP_BYTES;
        expansion.expand(groups + place, done % 2, expanded + done / 2 * EXPANDED_BYTES, ahead + place);
        done++;
    }
    void step() {
        for (owed += num_halves; owed >= num_steps; owed -= num_steps) expand();
    }
    void finish() {
        while (done < num_halves) expand();
    }
};

// Adds expanded groups to the sums of NUM tiles of rows.
template <class Form, int NUM>
void add_slice(const char* w, const bf16* x, int64_t x_tile, int64_t groups, bool is_first, Beside<Form>& beside, float* sums) {
    begin_sums<NUM>(is_first, sums);
    for (int64_t g = 0; g < groups; g++, w += EXPANDED_BYTES, x += TILE_VALUES) {
        add_tile<NUM, 0>(w, x, x_tile);
        add_tile<NUM, 1>(w, x, x_tile);
        beside.step();
    }
    end_sums<NUM>(sums);
}

// x: the tiles of `rows` rows. sums: room for those of all panels. Calls store(panel, first row, number of rows, sums).
template <class Form, class Store>
void multiply_panels(const Panels& panels, int64_t num_panels, const char* next, const char*& begun, const Expansion<Form>& expansion, const bf16* x, int64_t x_tile,
                     int64_t rows, int64_t groups, float* sums, Store store) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, passes = (tiles + 1) / 2;
    if (passes == 1) {
        for (int64_t p = 0; p < num_panels; p++, sums += PAIR_SUMS) {
            const char* const then = p + 1 < num_panels ? panels[p + 1] : next;
            (tiles == 1 ? multiply_panel<Form, 1> : multiply_panel<Form, 2>)(panels[p], then, begun, expansion, x, x_tile, groups, sums);
            store(p, 0, rows, sums);
        }
        return;
    }
    alignas(64) char expanded[2][SLICE * EXPANDED_BYTES];
    const int64_t num_slices = (groups + SLICE - 1) / SLICE * num_panels;
    const auto groups_of = [&](int64_t i) { return panels[i % num_panels] + i / num_panels * SLICE * Form::GROUP_BYTES; };
    const auto size_of = [&](int64_t i) { return i < num_slices ? std::min(SLICE, groups - i / num_panels * SLICE) : 0; };
    Beside<Form>{expansion, groups_of(0), next, expanded[0], 2 * size_of(0), 0}.finish();
    for (int64_t i = 0; i < num_slices; i++) {
        const int64_t p = i % num_panels, first = i / num_panels * SLICE, num = size_of(i);
        const char* const ahead = i + 2 < num_slices ? groups_of(i + 2) : next;
        Beside<Form> beside{expansion, groups_of(i + 1), ahead, expanded[(i + 1) % 2], 2 * size_of(i + 1), passes * num};
        for (int64_t pass = 0; pass < passes; pass++) {
            const bf16* const inputs = x + 2 * pass * x_tile + first * TILE_VALUES;
            float* const target = sums + (p * passes + pass) * PAIR_SUMS;
            (2 * pass + 1 == tiles ? add_slice<Form, 1> : add_slice<Form, 2>)(expanded[i % 2], inputs, x_tile, num, first == 0, beside, target);
            const int64_t row = pass * 2 * TILE_ROWS;
            if (first + num == groups) store(p, row, std::min<int64_t>(2 * TILE_ROWS, rows - row), target);
        }
        beside.finish();
    }
}

// See gemm_int.cpp.
template <class Form, bool GATED, class Out>
void gemm_of_expanded(Out* out, const bf16* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m == 0) return;
    const int64_t groups = k / GROUP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
    // A tile of few rows is read and multiplied faster.
    const int64_t tile_rows = std::min<int64_t>(m, TILE_ROWS), x_tile = groups * tile_rows * STEP;
    const Header header = *(const Header*)packed;
    const Expansion<Form> expansion(header.shift);
    const float factor = header.is_finite ? std::ldexp(1.0f, 112 - header.shift) : NAN;
    packed += sizeof(Header);
    static thread_local Buffer<bf16> buffer;
    bf16* const repacked = buffer.reserve(tiles * x_tile);
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = tiles == 1;
    if (repack_here) repack_scaled(repacked, x, 0, tile_rows, m, k, x_stride, factor);
    const int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES, pairs = (tiles + 1) / 2;
    const int64_t block_rows = std::min(m, (pairs + blocks - 1) / blocks * 2 * TILE_ROWS), outputs = GATED ? panels / 2 : panels;
    const int64_t threads = alone ? 1 : omp_get_max_threads();
    int64_t at_once = 1;
    if (block_rows * k * 2 > CACHE_BYTES) {
        const int64_t most = CACHE_BYTES / (panel_sums(block_rows) * 4 * (GATED ? 2 : 1));
        at_once = std::max<int64_t>(1, std::min(most, outputs / threads));
    }
    const int64_t tasks = (outputs + at_once - 1) / at_once;
    // A thread that goes on to the next panel has begun to read it.
    const int64_t at_least = tiles > 2 ? 1 : std::min(CHUNK_GROUPS / groups, tasks / (2 * threads));
    const int64_t chunk = std::max<int64_t>({1, at_least, tasks / 32});
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2, tile_rows);
        static thread_local Buffer<float> sums;
        float* const room = sums.reserve((GATED ? 2 : 1) * at_once * panel_sums(block_rows));
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) repack_scaled(repacked + t * x_tile, x, t, tile_rows, m, k, x_stride, factor);
        }
        const char* begun = nullptr;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t i = 0; i < tasks * blocks; i++) {
            const int64_t b = i / tasks, task = i % tasks, first = b * pairs / blocks * 2 * TILE_ROWS, end = (b + 1) * pairs / blocks * 2 * TILE_ROWS;
            const int64_t p = task * outputs / tasks, num = (task + 1) * outputs / tasks - p, rows = std::min(end, m) - first;
            Out* const target = out + first * out_stride;
            const Panels some{packed, groups * Form::GROUP_BYTES, p, num, p + outputs};
            const auto multiply = [&](int64_t num_panels, auto store) {
                const char* const next = packed + (p + num) * groups * Form::GROUP_BYTES;
                multiply_panels<Form>(some, num_panels, next, begun, expansion, repacked + first / TILE_ROWS * x_tile, x_tile, rows, groups, room, store);
            };
            if constexpr (GATED) {
                multiply(2 * num, [&](int64_t i, int64_t row, int64_t num_rows, const float* sums) {
                    if (i >= num) store_gated(target + row * out_stride, sums - num * panel_sums(rows), sums, num_rows, p + i - num, out_stride);
                });
            } else {
                multiply(num, [&](int64_t i, int64_t row, int64_t num_rows, const float* sums) {
                    store_panel<bf16>(target + row * out_stride, sums, num_rows, p + i, n, out_stride);
                });
            }
        }
    }
}

}  // namespace
