// x @ weight.T in bfloat16 with AMX: tiles of 16 rows, 16 columns and 32 inputs. A step of a tile adds the products of its 32 inputs in the
// processor's own fixed order, and steps follow each other along the inputs, so a row's bits do not depend on the rows beside it. They
// differ from those of AVX-512, which adds pair by pair.
//
// The packed weight is that of gemm.cpp: 16 pairs of inputs of a panel, 2 KiB in a row, are the two tiles of its 32 columns. Rows of x are
// repacked in tiles [m / 16][k / 32][16][32], filled up with zeros. Tiles are always whole: a single row costs 16 cycles for a KiB of
// weights, less than reading it from memory. Source of the instructions: Intel's Software Developer's Manual, volume 1, chapter 18.
//
// With many rows, two tiles of rows and a panel are four tiles of sums, whose inputs would have to come from the second cache twice as fast as
// it delivers. So a slice of a panel's weights stays in the first cache while all rows of a block pass, and only the rows are read again. Where the
// rows of a block do not stay in the second cache, the sums of several panels do, and the rows are read once for all of them.
#ifdef __AMX_BF16__
#include <omp.h>

#include <algorithm>

#include "../buffer.h"
#include "amx_steps.h"

namespace {

// Steps whose weights stay in the first cache while the rows of a block pass, pairs of tiles of rows in a block, and what stays in the second cache.
constexpr int64_t SLICE = 8, BLOCK_PAIRS = 16, CACHE_BYTES = 1 << 20;
// With so few pairs of tiles, reading weights again costs less than leaving sums behind and taking them up again.
constexpr int64_t FEW_PASSES = 2;

// 32 sums, rounded.
INLINE __m512i rounded(const float* sums) { return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)); }

// Rounds sums [rows][PANEL] to columns p * PANEL and on of `rows` rows of out, of n columns.
INLINE void store_rounded(bf16* out, const float* sums, int64_t rows, int64_t p, int64_t n, int64_t out_stride) {
    const int64_t columns = std::min<int64_t>(PANEL, n - p * PANEL);
    const __mmask32 some = columns == PANEL ? ~0u : (1u << columns) - 1;
    for (int64_t r = 0; r < rows; r++) _mm512_mask_storeu_epi16(out + r * out_stride + p * PANEL, some, rounded(sums + r * PANEL));
}

// The same, as float32.
INLINE void store_rounded(float* out, const float* sums, int64_t rows, int64_t p, int64_t n, int64_t out_stride) {
    store_panel<bf16>(out, sums, rows, p, n, out_stride);
}

// silu(gate) * up of sums [rows][PANEL], both rounded first.
INLINE void store_gated(bf16* out, const float* gates, const float* ups, int64_t rows, int64_t p, int64_t out_stride) {
    // Even and odd numbers apart: their bits need no instruction more than one to become floats.
    const auto even = [](__m512i x) { return f32x16{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}; };
    const auto odd = [](__m512i x) { return bits_and(f32x16{_mm512_castsi512_ps(x)}, 0xffff0000u); };
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(ORDER);
    for (int64_t r = 0; r < rows; r++) {
        const __m512i gate = rounded(gates + r * PANEL), up = rounded(ups + r * PANEL);
        const f32x16 low = silu_times<bf16>(even(gate), even(up)), high = silu_times<bf16>(odd(gate), odd(up));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
        _mm512_storeu_si512(out + r * out_stride + p * PANEL, _mm512_permutexvar_epi16(order, both));
    }
}

// x: the tiles of `rows` rows. next: the weights that the next task begins with. sums: room for those of all panels and tiles.
// Calls store(panel, first row, number of rows, sums), where the sums of a panel before it lie panel_sums(rows) values before.
template <class Store>
void multiply_panels(const Panels& panels, int64_t num_panels, const char* next, const bf16* x, int64_t x_tile, int64_t rows, int64_t k, float* sums,
                     Store store) {
    const int64_t whole = k / STEP, steps = (k + STEP - 1) / STEP, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, passes = (tiles + 1) / 2;
    const auto one = passes == 1 ? add_steps<1, _MM_HINT_T0> : add_steps<1, _MM_HINT_T1>;
    const auto two = passes == 1 ? add_steps<2, _MM_HINT_T0> : add_steps<2, _MM_HINT_T1>;
    alignas(64) char rest[STEP_BYTES];
    const int64_t slice = passes <= FEW_PASSES ? steps : SLICE;
    for (int64_t s = 0; s < steps;) {
        const bool is_rest = s == whole;  // what is left is less than a step
        const int64_t num = is_rest ? 1 : std::min(slice, whole - s);
        const bool is_last = s + num == steps;
        for (int64_t p = 0; p < num_panels; p++) {
            const char* weights = panels[p] + s * STEP_BYTES;
            const char* const then = p + 1 < num_panels ? panels[p + 1] + s * STEP_BYTES : is_last ? next : panels[0] + (s + num) * STEP_BYTES;
            // The reading of what comes then is spread over all passes.
            Ahead ahead{then, (STEP_BYTES / passes + 63) / 64 * 64};
            if (passes == 1) ahead = {weights + PREFETCH_BYTES, STEP_BYTES, weights + num * STEP_BYTES, then};
            if (is_rest) {
                memset(rest, 0, sizeof rest);
                memcpy(rest, weights, k % STEP * PANEL * 2);
                weights = rest;
            }
            for (int64_t pass = 0; pass < passes; pass++) {
                const bf16* const inputs = x + 2 * pass * x_tile + s * TILE_VALUES;
                float* const target = sums + (p * passes + pass) * PAIR_SUMS;
                (2 * pass + 1 == tiles ? one : two)(weights, inputs, x_tile, num, s == 0, ahead, target);
                const int64_t first = pass * 2 * TILE_ROWS;
                if (is_last) store(p, first, std::min<int64_t>(2 * TILE_ROWS, rows - first), target);
            }
        }
        s += num;
    }
}

// See gemm.cpp.
template <bool GATED, class Out>
void gemm(Out* out, const bf16* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m == 0) return;
    const int64_t steps = (k + STEP - 1) / STEP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, x_tile = steps * TILE_VALUES;
    static thread_local Buffer<bf16> buffer;
    bf16* const repacked = buffer.reserve(tiles * x_tile);
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, repack_here = tiles == 1;
    if (repack_here) repack_rows(repacked, x, 0, m, k, x_stride);
    const int64_t pairs = (tiles + 1) / 2, blocks = (pairs + BLOCK_PAIRS - 1) / BLOCK_PAIRS, block_rows = std::min(m, (pairs + blocks - 1) / blocks * 2 * TILE_ROWS);
    // Panels of which each is one of outputs. Where the inputs of a block do not stay in the second cache, the sums of several panels do.
    const int64_t outputs = GATED ? panels / 2 : panels;
    int64_t at_once = 1;
    if (block_rows * k * 2 > CACHE_BYTES) {
        const int64_t most = CACHE_BYTES / (panel_sums(block_rows) * 4 * (GATED ? 2 : 1));
        at_once = std::max<int64_t>(1, std::min(most, outputs / (alone ? 1 : omp_get_max_threads())));
    }
    const int64_t tasks = (outputs + at_once - 1) / at_once;
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2);
        static thread_local Buffer<float> sums;
        float* const room = sums.reserve((GATED ? 2 : 1) * at_once * panel_sums(block_rows));
        if (!repack_here) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles; t++) repack_rows(repacked + t * x_tile, x, t, m, k, x_stride);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, tasks / 32))
        for (int64_t i = 0; i < tasks * blocks; i++) {
            const int64_t b = i / tasks, task = i % tasks, first = b * pairs / blocks * 2 * TILE_ROWS, end = (b + 1) * pairs / blocks * 2 * TILE_ROWS;
            const int64_t p = task * outputs / tasks, num = (task + 1) * outputs / tasks - p, rows = std::min(end, m) - first;
            Out* const target = out + first * out_stride;
            const Panels some{packed, k * PANEL * 2, p, num, p + outputs};
            const auto multiply = [&](int64_t num_panels, auto store) {
                multiply_panels(some, num_panels, packed + (p + num) * k * PANEL * 2, repacked + first / TILE_ROWS * x_tile, x_tile, rows, k, room, store);
            };
            if constexpr (GATED) {
                multiply(2 * num, [&](int64_t i, int64_t row, int64_t num_rows, const float* sums) {
                    if (i >= num) store_gated(target + row * out_stride, sums - num * panel_sums(rows), sums, num_rows, p + i - num, out_stride);
                });
            } else {
                multiply(num, [&](int64_t i, int64_t row, int64_t num_rows, const float* sums) {
                    store_rounded(target + row * out_stride, sums, num_rows, p + i, n, out_stride);
                });
            }
        }
    }
}

}  // namespace

// As in gemm.cpp.
#define EXPORT(name, GATED, Out)                                                                                                                   \
    TRAMONTANE_KERNEL(name)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) { \
        gemm<GATED>((Out*)out, (const bf16*)x, (const char*)packed, m, n, k, x_stride, out_stride);                                                \
    }
EXPORT(gemm_bfloat16, false, bf16)
EXPORT(gated_gemm_bfloat16, true, bf16)
EXPORT(wide_gemm_bfloat16, false, float)
#endif
