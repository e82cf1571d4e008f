// The largest of each row, as torch.max(dim=-1): the first of equal ones, and the first that is not a number before all others.
#include "simd.h"

namespace {

// Of a row, after which the largest so far is compared: the search for its place reads one block again.
constexpr int64_t BLOCK = 1024;
// Fewer values run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_VALUES = 1 << 18;

int64_t place_of_largest(const float* x, int64_t n) {
    int64_t best_block = 0;
    float best = x[0];
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        f32x16 largest[4] = {set1(x[begin]), set1(x[begin]), set1(x[begin]), set1(x[begin])};
        int is_nan = 0;
        int64_t i = begin;
        for (; i + 64 <= end; i += 64)
            for (int part = 0; part < 4; part++) largest[part] = max(largest[part], load(x + i + part * 16));
        float in_block = max_of(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
        for (; i < end; i++) in_block = x[i] > in_block ? x[i] : in_block;
        for (i = begin; i < end; i++) is_nan |= x[i] != x[i];
        if (is_nan)
            for (i = begin; i < end; i++)
                if (x[i] != x[i]) return i;
        if (in_block > best) best = in_block, best_block = begin;
    }
    int64_t place = best_block;
    while (x[place] != best) place++;
    return place;
}

}  // namespace

// x: [m][n], n at least 1; values and places: [m].
TRAMONTANE_KERNEL(largest)(float* values, int64_t* places, const float* x, int64_t m, int64_t n) {
#pragma omp parallel for schedule(static) if (m > 1 && m * n >= PARALLEL_VALUES)
    for (int64_t row = 0; row < m; row++) {
        places[row] = place_of_largest(x + row * n, n);
        values[row] = x[row * n + places[row]];
    }
}
