// x @ weight.T in float32 with AMX, for weights that bfloat16 holds exactly. An input is the sum of three numbers of 8 bits, so three products in
// bfloat16 lose nothing of it: a = a1 + a2 + a3, where a1 is the upper half of a's bits, a2 that of a - a1, and a3 what is left. (Cut off instead
// of rounded, a1 is never infinite where a is not.) Products are exact, and sums are float32, as in gemm.cpp with other last bits.
//
// Each step of a tile adds the products of a3, a2 and a1 with the same 32 weights of each column to the same sums, and steps follow each other along
// the inputs. So a row's bits do not depend on the rows beside it, weights are read once for all three, and a sum is rounded 3 times for 32 inputs,
// where a chain of multiply-adds rounds it 32 times. AMX takes numbers below 2^-126 as zero: of an input below 2^-110, a3 may be such a number.
//
// The packed weight is that of gemm_amx.cpp. Rows of x are split into tiles [m / 16][k / 32][a3, a2, a1][16][32]. With up to 16 rows, tiles have as
// many rows as x: the time of a step is that of its rows, and little is read besides the weights.
#ifdef __AMX_BF16__
#include <omp.h>

#include <algorithm>

#include "../buffer.h"
#include "amx_steps.h"

namespace {

constexpr int64_t PARTS = 3, STEP_VALUES = PARTS * TILE_VALUES;
// Steps of two panels whose weights stay in the first cache while the tiles of rows of a block pass, and the most tiles in a block.
constexpr int64_t SLICE = 4, BLOCK_TILES = 16;
// Of the inputs of a block, what stays in the second cache, and as much of its sums.
constexpr int64_t CACHE_BYTES = 1 << 20;
// Pairs of panels of a task: their parts of a row of outputs are stored together, as they lie in memory.
constexpr int64_t PAIRS_AT_ONCE = 8;
// Fewer inputs are split by the calling thread: the others need not wait for each other twice. More are split in parts of so many steps.
constexpr int64_t SERIAL_VALUES = 1 << 13, SPLIT_STEPS = 16;

// The weights of two panels.
struct PanelPair {
    const char *first, *second;

    PanelPair operator+(int64_t bytes) const { return {first + bytes, second + bytes}; }
};

// The upper halves of 32 numbers.
INLINE __m512i upper_halves(__m512 low, __m512 high) {
    alignas(64) static constexpr uint16_t ODD[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(ODD), _mm512_castps_si512(high));
}

// What a number's upper half leaves. Of infinity nothing, so that it is infinite as a whole; of what is not a number the same.
INLINE __m512 without_upper_half(__m512 a) {
    const __mmask16 has_rest = _mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return _mm512_maskz_sub_ps(has_rest, a, bits_and({a}, 0xffff0000u).v);
}

// 32 inputs each of the rows from 16 * t on, split: tiles [k / 32][a3, a2, a1][16][32], of which it writes those of `steps` steps from `first_step` on.
// A row that is not there stays as it is: no other sees it.
INLINE void split_rows(bf16* tiles, const float* x, int64_t t, int64_t first_step, int64_t steps, int64_t m, int64_t k, int64_t x_stride) {
    const int64_t num = std::min<int64_t>(TILE_ROWS, m - t * TILE_ROWS);
    tiles += first_step * STEP_VALUES;
    for (int64_t s = first_step; s < std::min(first_step + steps, (k + STEP - 1) / STEP); s++, tiles += STEP_VALUES) {
        const int64_t inputs = std::min<int64_t>(STEP, k - s * STEP);
        const __mmask16 first = inputs >= 16 ? 0xffff : (1u << inputs) - 1, second = inputs == STEP ? 0xffff : inputs > 16 ? (1u << (inputs - 16)) - 1 : 0;
        const float* from = x + t * TILE_ROWS * x_stride + s * STEP;
        for (int64_t r = 0; r < num; r++, from += x_stride) {
            __m512 low = _mm512_maskz_loadu_ps(first, from), high = _mm512_maskz_loadu_ps(second, from + 16);
            for (int64_t part = PARTS - 1; part >= 0; part--) {
                _mm512_store_si512(tiles + part * TILE_VALUES + r * STEP, upper_halves(low, high));
                low = without_upper_half(low), high = without_upper_half(high);
            }
        }
    }
}

// Adds `steps` steps of two panels to the sums of a tile of rows; sums: [2][16][PANEL].
// All three parts of the inputs are in tiles of their own, and each tile of weights is read once for them.
template <int CACHE>
void add_split_steps(PanelPair w, const bf16* x, int64_t steps, bool is_first, Ahead& ahead0, Ahead& ahead1, float* sums) {
    begin_sums<2>(is_first, sums);
    for (int64_t s = 0; s < steps; s++, w.first += STEP_BYTES, w.second += STEP_BYTES, x += STEP_VALUES) {
        ahead0.template fetch<CACHE>();
        ahead1.template fetch<CACHE>();
        _tile_loadd(4, x, STEP * 2);
        _tile_loadd(5, x + TILE_VALUES, STEP * 2);
        _tile_loadd(6, x + 2 * TILE_VALUES, STEP * 2);
        _tile_loadd(7, w.first, PANEL * 4);
        _tile_dpbf16ps(0, 4, 7);
        _tile_dpbf16ps(0, 5, 7);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, w.first + 64, PANEL * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(1, 5, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_loadd(7, w.second, PANEL * 4);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(2, 5, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(7, w.second + 64, PANEL * 4);
        _tile_dpbf16ps(3, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_dpbf16ps(3, 6, 7);
    }
    end_sums<2>(sums);
}

// Multiplies `num` pairs of panels with a block of rows. x: the tiles of `rows` rows, `x_tile` values apart. pair(i): the weights of one, up to those that
// the next task begins with, i = num. sums: room for those of all pairs. Calls store(pair, first row, number of rows, sums of the pair).
template <class Pair, class Store>
void multiply_pairs(int64_t num, Pair pair, const bf16* x, int64_t x_tile, int64_t rows, int64_t k, float* sums, Store store) {
    const int64_t whole = k / STEP, steps = (k + STEP - 1) / STEP, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const auto add = tiles == 1 ? add_split_steps<_MM_HINT_T0> : add_split_steps<_MM_HINT_T1>;
    alignas(64) char rest[2][STEP_BYTES];
    const int64_t slice = tiles == 1 ? steps : SLICE;
    for (int64_t s = 0; s < steps;) {
        const bool is_rest = s == whole;  // what is left is less than a step
        const int64_t now = is_rest ? 1 : std::min(slice, whole - s);
        const bool is_last = s + now == steps;
        for (int64_t p = 0; p < num; p++) {
            PanelPair weights = pair(p) + s * STEP_BYTES;
            const PanelPair then = p + 1 < num ? pair(p + 1) + s * STEP_BYTES : is_last ? pair(num) : pair(0) + (s + now) * STEP_BYTES;
            // The reading of what comes then is spread over all tiles of rows.
            const int64_t bytes = (STEP_BYTES / tiles + 63) / 64 * 64;
            Ahead ahead0{then.first, bytes}, ahead1{then.second, bytes};
            if (tiles == 1) {
                ahead0 = {weights.first + PREFETCH_BYTES, STEP_BYTES, weights.first + now * STEP_BYTES, then.first};
                ahead1 = {weights.second + PREFETCH_BYTES, STEP_BYTES, weights.second + now * STEP_BYTES, then.second};
            }
            if (is_rest) {
                memset(rest, 0, sizeof rest);
                memcpy(rest[0], weights.first, k % STEP * PANEL * 2);
                memcpy(rest[1], weights.second, k % STEP * PANEL * 2);
                weights = {rest[0], rest[1]};
            }
            for (int64_t t = 0; t < tiles; t++) {
                add(weights, x + t * x_tile + s * STEP_VALUES, now, s == 0, ahead0, ahead1, sums + (p * tiles + t) * PAIR_SUMS);
            }
        }
        s += now;
    }
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t p = 0; p < num; p++) store(p, t * TILE_ROWS, std::min<int64_t>(TILE_ROWS, rows - t * TILE_ROWS), sums + (p * tiles + t) * PAIR_SUMS);
}

// See gemm.cpp.
template <bool GATED>
void gemm(float* out, const float* x, const char* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) {
    if (m == 0) return;
    const int64_t steps = (k + STEP - 1) / STEP, panels = (n + PANEL - 1) / PANEL, tiles = (m + TILE_ROWS - 1) / TILE_ROWS, x_tile = steps * STEP_VALUES;
    static thread_local Buffer<bf16> buffer;
    bf16* const split = buffer.reserve(tiles * x_tile);
    // The threads need not meet for little.
    const bool alone = n * k * m < PARALLEL_WEIGHTS, split_here = m * k < SERIAL_VALUES;
    const int64_t parts = (steps + SPLIT_STEPS - 1) / SPLIT_STEPS;
    const auto split_part = [=](int64_t i) { split_rows(split + i / parts * x_tile, x, i / parts, i % parts * SPLIT_STEPS, SPLIT_STEPS, m, k, x_stride); };
    if (split_here)
        for (int64_t i = 0; i < tiles * parts; i++) split_part(i);
    const int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES, block_tiles = (tiles + blocks - 1) / blocks;
    // Gates and ups, or neighbors, of which the last may have none.
    const int64_t pairs = (panels + 1) / 2, panel_bytes = k * PANEL * 2;
    const auto pair = [=](int64_t i) -> PanelPair {
        if (GATED) return {packed + i * panel_bytes, packed + (i + pairs) * panel_bytes};
        return {packed + 2 * i * panel_bytes, packed + std::min(2 * i + 1, panels - 1) * panel_bytes};
    };
    // Where the inputs of a block do not stay in the second cache, they are read once for as many pairs as have room there for their sums.
    int64_t at_once = 1;
    if (tiles > 1) {
        const int64_t room = CACHE_BYTES / (block_tiles * PAIR_SUMS * 4), wanted = block_tiles * x_tile * 2 > CACHE_BYTES ? room : std::min(room, PAIRS_AT_ONCE);
        at_once = std::max<int64_t>(1, std::min<int64_t>(wanted, pairs / (alone ? 1 : omp_get_max_threads())));
    }
    const int64_t tasks = (pairs + at_once - 1) / at_once;
#pragma omp parallel if (!alone)
    {
        const Tiles configured(STEP * 2, STEP / 2, std::min<int64_t>(m, TILE_ROWS), 7);
        static thread_local Buffer<float> sums;
        float* const room = sums.reserve(at_once * block_tiles * PAIR_SUMS);
        if (!split_here) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tiles * parts; i++) split_part(i);
        }
#pragma omp for schedule(dynamic, std::max<int64_t>(1, tasks / 32))
        for (int64_t i = 0; i < tasks * blocks; i++) {
            const int64_t b = i / tasks, task = i % tasks, tile = b * tiles / blocks, first = tile * TILE_ROWS;
            const int64_t rows = std::min((b + 1) * tiles / blocks * TILE_ROWS, m) - first, p = task * pairs / tasks, num = (task + 1) * pairs / tasks - p;
            float* const target = out + first * out_stride;
            multiply_pairs(
                num, [&](int64_t i) { return pair(p + i); }, split + tile * x_tile, x_tile, rows, k, room,
                [&](int64_t i, int64_t row, int64_t num_rows, const float* sums) {
                    float* const to = target + row * out_stride;
                    const float* const second = sums + TILE_ROWS * PANEL;
                    if constexpr (GATED) {
                        store_gated(to, sums, second, num_rows, p + i, out_stride);
                    } else {
                        const int64_t panel = 2 * (p + i);
                        store_panel<float>(to, sums, num_rows, panel, n, out_stride);
                        if (panel + 1 < panels) store_panel<float>(to, second, num_rows, panel + 1, n, out_stride);
                    }
                });
        }
    }
}

}  // namespace

// As in gemm.cpp.
#define EXPORT(name, GATED)                                                                                                                        \
    TRAMONTANE_KERNEL(name)(void* out, const void* x, const void* packed, int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride) { \
        gemm<GATED>((float*)out, (const float*)x, (const char*)packed, m, n, k, x_stride, out_stride);                                             \
    }
EXPORT(gemm_narrow_float32, false)
EXPORT(gated_gemm_narrow_float32, true)
#endif
