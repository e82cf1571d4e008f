// Inputs in another order, for weights whose groups are of inputs that are not neighbors: see QuantizedTensor.inputs.
#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t PARALLEL_VALUES = 1 << 17;

template <class T>
void take_columns(T* out, const T* x, const int64_t* columns, int64_t m, int64_t n, int64_t x_stride) {
#pragma omp parallel for schedule(static) if (m > 1 && m * n > PARALLEL_VALUES)
    for (int64_t row = 0; row < m; row++)
        for (int64_t i = 0; i < n; i++) out[row * n + i] = x[row * x_stride + columns[i]];
}

}  // namespace

// out: [m, n], x: [m, any] with rows `x_stride` values apart; column i of out is column columns[i] of x.
#define EXPORT(bytes, T)                                                                                                                      \
    TRAMONTANE_KERNEL(take_columns_##bytes)(void* out, const void* x, const void* columns, int64_t m, int64_t n, int64_t x_stride) {           \
        take_columns((T*)out, (const T*)x, (const int64_t*)columns, m, n, x_stride);                                                          \
    }
EXPORT(4, uint32_t)
EXPORT(2, uint16_t)
