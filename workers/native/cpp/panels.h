// What the products of all forms of weights share: output columns in panels of 32, rows in blocks, and how a block's sums leave.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

constexpr int PANEL = 32;
constexpr int64_t PREFETCH_BYTES = 4096;
// Products smaller than this many weights run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_WEIGHTS = 1 << 19;

// The first row of block i, of `blocks` blocks of nearly the same size.
INLINE int64_t first_row(int64_t i, int64_t m, int64_t blocks) { return i * m / blocks; }

// Rounds sums [rows][PANEL] to columns p * PANEL and on of `rows` rows of out, of n columns.
template <class T>
INLINE void store_panel(T* out, const float* sums, int64_t rows, int64_t p, int64_t n, int64_t out_stride) {
    const int64_t columns = std::min<int64_t>(PANEL, n - p * PANEL);
    for (int64_t r = 0; r < rows; r++) {
        T* target = out + r * out_stride + p * PANEL;
        store_some(target, load(sums + r * PANEL), columns);
        if (columns > 16) store_some(target + 16, load(sums + r * PANEL + 16), columns - 16);
    }
}

}  // namespace
