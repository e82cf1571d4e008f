// x @ weight.T in bfloat16 with AMX: tiles of 16 rows, 16 columns and 32 inputs. A step of a tile adds the products of its 32 inputs in the
// processor's own fixed order, and steps follow each other along the inputs, so a row's bits do not depend on the rows beside it. They
// differ from those of AVX-512, which adds pair by pair.
//
// The packed weight is that of gemm.cpp: 16 pairs of inputs of a panel, 2 KiB in a row, are the two tiles of its 32 columns. Rows of x are
// repacked in tiles [m / 16][k / 32][16][32], filled up with zeros. Tiles are always whole: a single row costs 16 cycles for a KiB of
// weights, less than reading it from memory. Source of the instructions: Intel's Software Developer's Manual, volume 1, chapter 18.
#ifdef __AMX_BF16__
#include <algorithm>
#include <vector>

#include "amx.h"
#include "panels.h"

namespace {

constexpr int64_t STEP = 32;  // inputs
constexpr int64_t TILE_VALUES = TILE_ROWS * STEP, STEP_BYTES = PANEL * STEP * 2;
constexpr int MAX_TILES = 2;                      // of rows that are computed together
constexpr int64_t SLICE = 64;                      // steps whose weights stay in the second cache while all rows pass

// What is read next while a step is computed: `bytes` of the weights in each.
struct Ahead {
    const char* next;
    int64_t bytes;

    void fetch() {
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
        next += bytes;
    }
};

// Adds `steps` steps of a panel to the sums of NUM tiles of rows; sums: [NUM * 16][PANEL]. x: the tiles of the rows, `x_tile` values apart.
template <int NUM>
INLINE void add_steps(const char* w, const bf16* x, int64_t x_tile, int64_t steps, bool is_first, Ahead& ahead, float* sums) {
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
    for (int64_t s = 0; s < steps; s++, w += STEP_BYTES, x += TILE_VALUES) {
        ahead.fetch();
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
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + 16, ROW);
    if (NUM > 1) {
        _tile_stored(2, sums + TILE, ROW);
        _tile_stored(3, sums + TILE + 16, ROW);
    }
}

// One panel for all tiles of rows; sums: [num_tiles * 16][PANEL].
void panel(const char* w, const bf16* x, int64_t x_tile, int64_t num_tiles, int64_t k, float* sums) {
    alignas(64) char rest[STEP_BYTES];
    // The reading of the next panel is spread over all passes of this one.
    const int64_t passes = (num_tiles + MAX_TILES - 1) / MAX_TILES;
    Ahead ahead{w + (passes > 1 ? k * PANEL * 2 : PREFETCH_BYTES), (STEP_BYTES / passes + 63) / 64 * 64};
    const int64_t whole = k / STEP, steps = (k + STEP - 1) / STEP, slice = num_tiles > MAX_TILES ? SLICE : steps;
    for (int64_t s = 0; s < steps;) {
        int64_t num = std::min(slice, whole - s);
        const char* weights = w + s * STEP_BYTES;
        if (num == 0) {  // what is left is less than a step
            memset(rest, 0, sizeof rest);
            memcpy(rest, weights, k % STEP * PANEL * 2);
            weights = rest, num = 1;
        }
        for (int64_t t = 0; t < num_tiles; t += MAX_TILES) {
            const bf16* inputs = x + t * x_tile + s * TILE_VALUES;
            float* target = sums + t * TILE_ROWS * PANEL;
            if (num_tiles - t == 1)
                add_steps<1>(weights, inputs, x_tile, num, s == 0, ahead, target);
            else
                add_steps<2>(weights, inputs, x_tile, num, s == 0, ahead, target);
        }
        s += num;
    }
}

}  // namespace

// As in gemm.cpp.
TRAMONTANE_KERNEL(gemm_bfloat16)(void* out_, const void* x_, const void* packed_, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m == 0) return;
    bf16* const out = (bf16*)out_;
    const bf16* const x = (const bf16*)x_;
    const char* const packed = (const char*)packed_;
    const int64_t steps = (k + STEP - 1) / STEP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, x_tile = steps * TILE_VALUES;
    static thread_local std::vector<bf16> buffer;
    if ((int64_t)buffer.size() < tiles * x_tile) buffer.resize(tiles * x_tile);
    bf16* const repacked = buffer.data();
    const auto repack = [=](int64_t t) {
        const int64_t num = std::min<int64_t>(TILE_ROWS, m - t * TILE_ROWS);
        for (int64_t s = 0; s < steps; s++) {
            bf16* target = repacked + t * x_tile + s * TILE_VALUES;
            const int64_t inputs = std::min<int64_t>(STEP, k - s * STEP);
            if (num < TILE_ROWS || inputs < STEP) memset(target, 0, TILE_VALUES * 2);
            for (int64_t r = 0; r < num; r++) memcpy(target + r * STEP, x + (t * TILE_ROWS + r) * x_stride + s * STEP, inputs * 2);
        }
    };
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = tiles == 1;
    if (repack_here) repack(0);
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2);
        static thread_local std::vector<float> sums;
        if ((int64_t)sums.size() < tiles * TILE_ROWS * PANEL) sums.resize(tiles * TILE_ROWS * PANEL);
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) repack(t);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t p = 0; p < panels; p++) {
            panel(packed + p * k * PANEL * 2, repacked, x_tile, tiles, k, sums.data());
            store_panel(out, sums.data(), m, p, n, out_stride);
        }
    }
}
#endif
