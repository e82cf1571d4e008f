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

TRAMONTANE_KERNEL(run_calls)(const void* calls, int64_t num_calls) {
    const Call* call = (const Call*)calls;
    for (const Call* end = call + num_calls; call < end; call++) {
        const int64_t* a = call->arguments;
        ((Kernel)call->kernel)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], call->real);
    }
}

// out: [num_rows][row_bytes], row i is row indices[i] of the table.
TRAMONTANE_KERNEL(gather_rows)(void* out, const void* table, const int64_t* indices, int64_t num_rows, int64_t row_bytes) {
    for (int64_t i = 0; i < num_rows; i++) memcpy((char*)out + i * row_bytes, (const char*)table + indices[i] * row_bytes, row_bytes);
}

TRAMONTANE_KERNEL(copy_bytes)(void* out, const void* in, int64_t num_bytes) { memcpy(out, in, num_bytes); }

// bfloat16 to float32.
TRAMONTANE_KERNEL(widen)(void* out, const void* in, int64_t num_values) {
    for (int64_t i = 0; i < num_values; i += 16) store_some((float*)out + i, load_some((const bf16*)in + i, num_values - i), num_values - i);
}
