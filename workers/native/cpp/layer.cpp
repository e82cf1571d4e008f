// What a decoder layer computes between its products, row by row: norm, rotary embedding with the write to the KV cache, SwiGLU.
// Shapes and rounding are those of workers/kernels/layers/layer_specification.py; sums are added in vectors of 16, then by halves.
#include <cmath>
#include <type_traits>
#include <vector>

#include "kv_cache.h"
#include "silu.h"

namespace {

// Fewer values run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_VALUES = 1 << 15;

// Calls use(place, number of values, part of four) for the vectors of a row; `use` sees whole ones at compile time.
template <class Use>
INLINE void for_each_vector(int64_t n, Use use) {
    constexpr std::integral_constant<int64_t, 16> WHOLE;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) use(i + part * 16, WHOLE, part);
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++, i += 16)
        if (i < n) use(i, n - i, part);
}

template <class T>
void add_rms_norm(T* normed, T* total, const T* x, const T* residual, const T* weight, int64_t m, int64_t n, float eps) {
#pragma omp parallel for schedule(static) if (m * n >= PARALLEL_VALUES)
    for (int64_t row = 0; row < m; row++) {
        const int64_t first = row * n;
        f32x16 squares[4] = {zero(), zero(), zero(), zero()};
        const auto add_square = [&](f32x16 value, int part) { squares[part] = fma(value, value, squares[part]); };
        if (residual) {
            for_each_vector(n, [&](int64_t i, auto num, int part) {
                const f32x16 value = rounded_to((const T*)nullptr, load_some(x + first + i, num) + load_some(residual + first + i, num));
                store_some(total + first + i, value, num);
                add_square(value, part);
            });
        } else {
            for_each_vector(n, [&](int64_t i, auto num, int part) { add_square(load_some(x + first + i, num), part); });
        }
        const T* const sums = residual ? total + first : x + first;
        const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)n;
        const f32x16 inverse = set1(1.0f / std::sqrt(mean + eps));
        for_each_vector(n, [&](int64_t i, auto num, int) { store_some(normed + first + i, load_some(sums + i, num) * inverse * load_some(weight + i, num), num); });
    }
}

// Keys or values of one layer. scales: [num_blocks, num_heads, block_size]; null where KV has none.
template <class KV>
struct Cache {
    KV* values;  // [num_blocks, block_size, num_heads, dim]
    float* scales;
    int64_t block_size, num_heads, dim;

    KV* head_of(int64_t slot, int64_t head) const { return values + (slot * num_heads + head) * dim; }

    template <class T>
    void write(int64_t slot, int64_t head, const T* x) const {
        KV* const target = head_of(slot, head);
        if constexpr (is_scaled<KV>)
            scales[(slot / block_size * num_heads + head) * block_size + slot % block_size] = quantize_head(target, x, dim);
        else
            memcpy(target, x, dim * sizeof(KV));
    }
};

template <class T>
INLINE void rotate(T* out, const T* x, const float* c, const float* s, int64_t half, int64_t i, int64_t some) {
    const f32x16 a = load_some(x + i, some), b = load_some(x + half + i, some);
    store_some(out + i, fma(b, load_some(s + i, some), a * load_some(c + i, some)), some);
    store_some(out + half + i, fma(a, load_some(s + half + i, some), b * load_some(c + half + i, some)), some);
}

// Rotates the first num_heads + num_kv_heads heads of a row of qkv; queries go to q, keys and values to their slots.
template <class T, class KV>
void rotary_kv(T* q, const Cache<KV>& k_cache, const Cache<KV>& v_cache, const T* qkv, const float* cos, const float* sin, const int64_t* slots, int64_t m,
               int64_t num_heads, int64_t angle_stride) {
    const int64_t num_kv_heads = k_cache.num_heads, dim = k_cache.dim;
    const int64_t half = dim / 2, width = (num_heads + 2 * num_kv_heads) * dim;
#pragma omp parallel for schedule(static) if (m * width >= PARALLEL_VALUES)
    for (int64_t row = 0; row < m; row++) {
        const float *c = cos + row * angle_stride, *s = sin + row * angle_stride;
        for (int64_t head = 0; head < num_heads + num_kv_heads; head++) {
            const T* const x = qkv + row * width + head * dim;
            const bool is_query = head < num_heads;
            // A key goes to its slot at once where the cache has this type.
            T* target;
            if constexpr (is_scaled<KV>) {
                static thread_local std::vector<T> rotated;
                if (!is_query && (int64_t)rotated.size() < dim) rotated.resize(dim);
                target = is_query ? q + (row * num_heads + head) * dim : rotated.data();
            } else {
                target = is_query ? q + (row * num_heads + head) * dim : k_cache.head_of(slots[row], head - num_heads);
            }
            int64_t i = 0;
            for (; i + 16 <= half; i += 16) rotate(target, x, c, s, half, i, 16);
            if (i < half) rotate(target, x, c, s, half, i, half - i);
            if (is_scaled<KV> && !is_query) k_cache.write(slots[row], head - num_heads, target);
        }
        for (int64_t head = 0; head < num_kv_heads; head++) v_cache.write(slots[row], head, qkv + row * width + (num_heads + num_kv_heads + head) * dim);
    }
}

template <class T>
void silu_mul(T* out, const T* gate_up, int64_t m, int64_t n) {
#pragma omp parallel for schedule(static) if (m * n >= PARALLEL_VALUES)
    for (int64_t row = 0; row < m; row++) {
        const T *gate = gate_up + row * 2 * n, *up = gate + n;
        for_each_vector(n, [&](int64_t i, auto num, int) { store_some(out + row * n + i, silu_times<T>(load_some(gate + i, num), load_some(up + i, num)), num); });
    }
}

}  // namespace

// residual may be null, and then total is not written. All [m, n]; weight: [n].
// qkv: [m, num_heads + 2 * num_kv_heads, head_dim]; cos, sin: rows of head_dim, angle_stride apart; slots: [m]. The caches: see Cache.
// gate_up: [m, 2 * n], gate first; out: [m, n].
#define EXPORT(type, T)                                                                                                                                \
    TRAMONTANE_KERNEL(add_rms_norm_##type)(void* normed, void* total, const void* x, const void* residual, const void* weight, int64_t m, int64_t n,  \
                                           float eps) {                                                                                                \
        add_rms_norm<T>((T*)normed, (T*)total, (const T*)x, (const T*)residual, (const T*)weight, m, n, eps);                                          \
    }                                                                                                                                                  \
    TRAMONTANE_KERNEL(silu_mul_##type)(void* out, const void* gate_up, int64_t m, int64_t n) { silu_mul<T>((T*)out, (const T*)gate_up, m, n); }
EXPORT(float32, float)
EXPORT(bfloat16, bf16)

// name: the type of qkv, and of the cache where that is another.
#define EXPORT_ROTARY(name, T, KV)                                                                                                                     \
    TRAMONTANE_KERNEL(rotary_kv_##name)(void* q, void* k_values, float* k_scales, void* v_values, float* v_scales, const void* qkv, const float* cos, \
                                        const float* sin, const int64_t* slots, int64_t m, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, \
                                        int64_t block_size, int64_t angle_stride) {                                                                    \
        const Cache<KV> keys{(KV*)k_values, k_scales, block_size, num_kv_heads, head_dim}, values{(KV*)v_values, v_scales, block_size, num_kv_heads, head_dim}; \
        rotary_kv<T, KV>((T*)q, keys, values, (const T*)qkv, cos, sin, slots, m, num_heads, angle_stride);                                             \
    }
EXPORT_ROTARY(float32, float, float)
EXPORT_ROTARY(bfloat16, bf16, bf16)
EXPORT_ROTARY(float32_int8, float, int8_t)
EXPORT_ROTARY(bfloat16_int8, bf16, int8_t)
EXPORT_ROTARY(float32_fp8, float, e4m3)
EXPORT_ROTARY(bfloat16_fp8, bf16, e4m3)
