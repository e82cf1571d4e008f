// Packs an adapter's matrices, as its file has them, for lora.cpp. On one thread: the others compute steps in the meantime. Every number is
// rounded once, as torch does it, and looked at: an adapter with infinite numbers is refused.
#include <algorithm>

#include "simd.h"

namespace {

// As in lora.cpp.
constexpr int64_t RANKS = 16, COLUMNS = 64;
// How a number is stored in an adapter's file, and how many bytes it takes.
enum Stored : int64_t { FLOAT64, FLOAT32, FLOAT16, BFLOAT16 };
constexpr int64_t STORED_BYTES[] = {8, 4, 2, 2};
constexpr int64_t READ_AT_ONCE = 256;

// What was wrong with some number: of those stored, one is infinite or not a number; of those kept, one is too large for its type.
struct Found {
    bool stored = false, kept = false;

    int64_t code() const { return stored ? 1 : kept ? 2 : 0; }
};

INLINE bool is_finite(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits >> 23 & 0xff) != 0xff;
}

// `num` stored numbers as floats; the next one after them is 0.
void read(float* to, const char* from, int64_t kind, int64_t num, Found& found) {
    bool all = true;
    if (kind == FLOAT64) {
        for (int64_t i = 0; i < num; i++) {
            uint64_t bits;
            double value;
            memcpy(&bits, from + 8 * i, 8), memcpy(&value, &bits, 8);
            all &= (bits >> 52 & 0x7ff) != 0x7ff;
            to[i] = (float)value;
        }
    } else {
        if (kind == FLOAT32) {
            memcpy(to, from, 4 * num);
        } else if (kind == BFLOAT16) {
            for (int64_t i = 0; i < num; i++) {
                uint16_t bits;
                memcpy(&bits, from + 2 * i, 2);
                const uint32_t wide = (uint32_t)bits << 16;
                memcpy(to + i, &wide, 4);
            }
        } else {
            for (int64_t i = 0; i < num; i += 16) {
                uint16_t some[16] = {};
                float values[16];
                memcpy(some, from + 2 * i, 2 * std::min<int64_t>(16, num - i));
                store(values, load_half(some));
                memcpy(to + i, values, 4 * std::min<int64_t>(16, num - i));
            }
        }
        for (int64_t i = 0; i < num; i++) all &= is_finite(to[i]);
    }
    to[num] = 0;
    found.stored |= !all;
}

INLINE void keep(float* to, float x, Found& found) { *to = x, found.kept |= !is_finite(x); }
// To the nearest, of two to the even one.
INLINE void keep(bf16* to, float x, Found& found) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to->bits = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    found.kept |= (to->bits >> 7 & 0xff) == 0xff;
}

template <class T>
int64_t pack_a(T* out, const char* a, int64_t kind, int64_t rank, int64_t k, int64_t row_bytes) {
    constexpr int64_t VALUES = 4 / sizeof(T);
    const int64_t steps = (k + VALUES - 1) / VALUES;
    float values[READ_AT_ONCE + 1] = {};
    Found found;
    for (int64_t first = 0; first < rank; first += RANKS, out += steps * VALUES * RANKS)
        for (int64_t begin = 0; begin < k; begin += READ_AT_ONCE) {
            const int64_t num = std::min(READ_AT_ONCE, k - begin), end = (num + VALUES - 1) / VALUES * VALUES;
            T* const chunk = out + begin * RANKS;
            for (int64_t r = 0; r < RANKS; r++) {
                if (first + r < rank) read(values, a + (first + r) * row_bytes + begin * STORED_BYTES[kind], kind, num, found);
                else std::fill(values, values + end, 0.0f);
                for (int64_t i = 0; i < end; i++) keep(chunk + (i / VALUES * RANKS + r) * VALUES + i % VALUES, values[i], found);
            }
        }
    return found.code();
}

template <class T>
int64_t pack_b(T* out, const char* b, int64_t kind, int64_t n, int64_t rank, int64_t row_bytes) {
    float values[READ_AT_ONCE + 1] = {};
    Found found;
    for (int64_t first = 0; first < n; first += COLUMNS, out += rank * COLUMNS)
        for (int64_t begin = 0; begin < rank; begin += READ_AT_ONCE) {
            const int64_t num = std::min(READ_AT_ONCE, rank - begin);
            for (int64_t c = 0; c < COLUMNS; c++) {
                if (first + c < n) read(values, b + (first + c) * row_bytes + begin * STORED_BYTES[kind], kind, num, found);
                else std::fill(values, values + num, 0.0f);
                for (int64_t i = 0; i < num; i++) keep(out + (begin + i) * COLUMNS + c, values[i], found);
            }
        }
    return found.code();
}

}  // namespace

// a: [rank][k], b: [n][rank] of `kind`, rows `row_bytes` apart. 0; 1 if some number is infinite or none at all, 2 if one is too large.
#define EXPORT_PACKS(type, T)                                                                                                               \
    TRAMONTANE_FUNCTION(int64_t, lora_pack_a_##type)(void* out, const void* a, int64_t kind, int64_t rank, int64_t k, int64_t row_bytes) {   \
        return pack_a<T>((T*)out, (const char*)a, kind, rank, k, row_bytes);                                                                \
    }                                                                                                                                       \
    TRAMONTANE_FUNCTION(int64_t, lora_pack_b_##type)(void* out, const void* b, int64_t kind, int64_t n, int64_t rank, int64_t row_bytes) {   \
        return pack_b<T>((T*)out, (const char*)b, kind, n, rank, row_bytes);                                                                \
    }
EXPORT_PACKS(float32, float)
EXPORT_PACKS(bfloat16, bf16)
