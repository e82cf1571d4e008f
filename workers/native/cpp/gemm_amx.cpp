// x @ weight.T in bfloat16 with AMX: tiles of 16 rows, 16 columns and 32 inputs. A step of a tile adds the products of its 32 inputs in the
// processor's own fixed order, and steps follow each other along the inputs, so a row's bits do not depend on the rows beside it. They
// differ from those of AVX-512, which adds pair by pair.
//
// The packed weight is that of gemm.cpp: 16 pairs of inputs of a panel, 2 KiB in a row, are the two tiles of its 32 columns. Rows of x are
// repacked in tiles [m / 16][k / 32][16][32], filled up with zeros. Tiles are always whole: a single row costs 16 cycles for a KiB of
// weights, less than reading it from memory. Source of the instructions: Intel's Software Developer's Manual, volume 1, chapter 18.
//
// With many rows, two tiles of rows and a panel are four tiles of sums, whose inputs would have to come from the second cache twice as fast as
// it delivers. So a slice of a panel's weights stays in the first cache while all rows of a block pass, and only the rows are read again.
#ifdef __AMX_BF16__
#include <algorithm>

#include "amx_steps.h"
#include "buffer.h"

namespace {

constexpr int64_t PAIR_SUMS = 2 * TILE_ROWS * PANEL;
// Steps whose weights stay in the first cache while the rows of a block pass, and the inputs of a block, in bytes, which stay in the second.
constexpr int64_t SLICE = 8, BLOCK_BYTES = 1 << 20;

// Rounds sums [rows][PANEL] to columns p * PANEL and on of `rows` rows of out, of n columns.
INLINE void store_rounded(bf16* out, const float* sums, int64_t rows, int64_t p, int64_t n, int64_t out_stride) {
    const int64_t columns = std::min<int64_t>(PANEL, n - p * PANEL);
    const __mmask32 some = columns == PANEL ? ~0u : (1u << columns) - 1;
    for (int64_t r = 0; r < rows; r++)
        _mm512_mask_storeu_epi16(out + r * out_stride + p * PANEL, some,
                                 (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + r * PANEL + 16), _mm512_load_ps(sums + r * PANEL)));
}

// A panel and `rows` rows, whose tiles begin at x. sums: room for those of all tiles.
void multiply_panel(bf16* out, const char* w, const bf16* x, int64_t x_tile, int64_t rows, int64_t p, int64_t n, int64_t k, int64_t out_stride, float* sums) {
    const int64_t whole = k / STEP, steps = (k + STEP - 1) / STEP, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, passes = (tiles + 1) / 2;
    // The reading of the next panel is spread over all passes of this one.
    Ahead ahead{w + (passes > 1 ? k * PANEL * 2 : PREFETCH_BYTES), (STEP_BYTES / passes + 63) / 64 * 64};
    const auto one = passes == 1 ? add_steps<1, _MM_HINT_T0> : add_steps<1, _MM_HINT_T1>;
    const auto two = passes == 1 ? add_steps<2, _MM_HINT_T0> : add_steps<2, _MM_HINT_T1>;
    alignas(64) char rest[STEP_BYTES];
    const int64_t slice = passes == 1 ? steps : SLICE;
    for (int64_t s = 0; s < steps;) {
        int64_t num = std::min(slice, whole - s);
        const char* weights = w + s * STEP_BYTES;
        if (num == 0) {  // what is left is less than a step
            memset(rest, 0, sizeof rest);
            memcpy(rest, weights, k % STEP * PANEL * 2);
            weights = rest, num = 1;
        }
        const bool is_last = s + num == steps;
        for (int64_t pass = 0; pass < passes; pass++) {
            const bf16* inputs = x + 2 * pass * x_tile + s * TILE_VALUES;
            float* const target = sums + pass * PAIR_SUMS;
            (2 * pass + 1 == tiles ? one : two)(weights, inputs, x_tile, num, s == 0, ahead, target);
            const int64_t first = pass * 2 * TILE_ROWS;
            if (is_last) store_rounded(out + first * out_stride, target, std::min<int64_t>(2 * TILE_ROWS, rows - first), p, n, out_stride);
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
    static thread_local Buffer<bf16> buffer;
    bf16* const repacked = buffer.reserve(tiles * x_tile);
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = tiles == 1;
    if (repack_here) repack_rows(repacked, x, 0, m, k, x_stride);
    const int64_t blocks = (tiles * x_tile * 2 + BLOCK_BYTES - 1) / BLOCK_BYTES, pairs = (tiles + 1) / 2;
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2);
        static thread_local Buffer<float> sums;
        float* const room = sums.reserve((pairs + blocks - 1) / blocks * PAIR_SUMS);
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) repack_rows(repacked + t * x_tile, x, t, m, k, x_stride);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, panels / 32))
        for (int64_t i = 0; i < panels * blocks; i++) {
            const int64_t b = i / panels, p = i % panels, first = b * pairs / blocks * 2 * TILE_ROWS, end = (b + 1) * pairs / blocks * 2 * TILE_ROWS;
            multiply_panel(out + first * out_stride, packed + p * k * PANEL * 2, repacked + first / TILE_ROWS * x_tile, x_tile, std::min(end, m) - first, p, n, k,
                           out_stride, room);
        }
    }
}
#endif
