// What the products of all forms of weights share: output columns in panels of 32, rows in blocks, and how a block's sums leave.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../silu.h"

namespace {

constexpr int PANEL = 32;
constexpr int64_t PREFETCH_BYTES = 4096;
// Products smaller than this many weights run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_WEIGHTS = 1 << 19;

// The first row of block i, of `blocks` blocks of nearly the same size.
INLINE int64_t first_row(int64_t i, int64_t m, int64_t blocks) { return i * m / blocks; }

// Rounds sums [rows][PANEL] to T, and writes them to columns p * PANEL and on of `rows` rows of out, of n columns, as T or as float32.
template <class T, class Out>
INLINE void store_panel(Out* out, const float* sums, int64_t rows, int64_t p, int64_t n, int64_t out_stride) {
    const int64_t columns = std::min<int64_t>(PANEL, n - p * PANEL);
    const auto rounded = [](const float* x) {
        if constexpr (std::is_same_v<T, Out>)
            return load(x);  // as the store rounds it
        else
            return rounded_to((const T*)nullptr, load(x));
    };
    for (int64_t r = 0; r < rows; r++) {
        Out* const target = out + r * out_stride + p * PANEL;
        store_some(target, rounded(sums + r * PANEL), columns);
        if (columns > 16) store_some(target + 16, rounded(sums + r * PANEL + 16), columns - 16);
    }
}

// silu(gate) * up of sums [rows][PANEL] of a panel of gates and of the panel of ups beside it, both rounded first, as if they had been stored.
template <class T>
INLINE void store_gated(T* out, const float* gates, const float* ups, int64_t rows, int64_t p, int64_t out_stride) {
    const auto rounded = [](const float* x) { return rounded_to((const T*)nullptr, load(x)); };
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < PANEL; c += 16)
            store(out + r * out_stride + p * PANEL + c, silu_times<T>(rounded(gates + r * PANEL + c), rounded(ups + r * PANEL + c)));
}

}  // namespace
