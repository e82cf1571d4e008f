// A list of calls of kernels in one call from Python, and the few things between kernels that torch does otherwise: see calls.py.
#include "simd.h"

namespace {

constexpr int MAX_ARGUMENTS = 18;

// As calls.py packs it. `real`: the argument that is a float, if there is one.
struct Call {
    const void* kernel;
    int64_t arguments[MAX_ARGUMENTS];
    float real;
    int32_t padding;
};

// By the calling convention of x86-64 (System V ABI 1.0, 3.2.3), floats have registers of their own wherever they stand, and a function does
// not see arguments after its own. So every kernel can be called as one of these.
using Kernel = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t, float);

}  // namespace

// pending: a word that is not 0 when a call was not done and wants to be called again; null if all calls always are. Returns how many are done.
TRAMONTANE_FUNCTION(int64_t, run_calls)(const void* calls, int64_t num_calls, const int64_t* pending) {
    const Call* const begin = (const Call*)calls;
    for (const Call *call = begin, *end = begin + num_calls; call < end; call++) {
        const int64_t* a = call->arguments;
        ((Kernel)call->kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], call->real);
        if (pending && __atomic_load_n(pending, __ATOMIC_RELAXED)) return call - begin;
    }
    return num_calls;
}

// out: [num_rows][row_bytes], row i is row indices[i] - first of the table, or zeros if it has no such row.
TRAMONTANE_KERNEL(gather_rows)(void* out, const void* table, const int64_t* indices, int64_t num_rows, int64_t row_bytes, int64_t first, int64_t table_rows) {
    for (int64_t i = 0; i < num_rows; i++) {
        char* const target = (char*)out + i * row_bytes;
        const int64_t row = indices[i] - first;
        if (row >= 0 && row < table_rows)
            memcpy(target, (const char*)table + row * row_bytes, row_bytes);
        else
            memset(target, 0, row_bytes);
    }
}

TRAMONTANE_KERNEL(copy_bytes)(void* out, const void* in, int64_t num_bytes) { memcpy(out, in, num_bytes); }

// x: [m][n], bias: [n].
#define EXPORT_BIAS(type, T)                                                                                                             \
    TRAMONTANE_KERNEL(add_bias_##type)(void* out, const void* x, const void* bias, int64_t m, int64_t n) {                                \
        for (int64_t row = 0; row < m; row++)                                                                                            \
            for (int64_t i = 0; i < n; i += 16)                                                                                          \
                store_some((T*)out + row * n + i, load_some((const T*)x + row * n + i, n - i) + load_some((const T*)bias + i, n - i), n - i); \
    }
EXPORT_BIAS(float32, float)
EXPORT_BIAS(bfloat16, bf16)

// Multiplies the first n values of each row, `stride` values apart, by the row's factor.
#define EXPORT_SCALE(type, T)                                                                                                            \
    TRAMONTANE_KERNEL(scale_rows_##type)(void* x, const float* factors, int64_t m, int64_t n, int64_t stride) {                           \
        for (int64_t row = 0; row < m; row++)                                                                                            \
            for (int64_t i = 0; i < n; i += 16) {                                                                                        \
                T* const values = (T*)x + row * stride + i;                                                                              \
                store_some(values, load_some((const T*)values, n - i) * set1(factors[row]), n - i);                                       \
            }                                                                                                                            \
    }
EXPORT_SCALE(float32, float)
EXPORT_SCALE(bfloat16, bf16)

// bfloat16 to float32.
TRAMONTANE_KERNEL(widen)(void* out, const void* in, int64_t num_values) {
    for (int64_t i = 0; i < num_values; i += 16) store_some((float*)out + i, load_some((const bf16*)in + i, num_values - i), num_values - i);
}
