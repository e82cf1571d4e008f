// The online softmax for a tile of 16 rows and 64 keys: from scores in float32 to weights in bfloat16, with largest scores and sums in float32.
// A row's results depend on its own numbers only.
#pragma once

#include "pair_tile.h"

namespace {

// Below every score, and a number, so that a row that has seen nothing yet stays one.
constexpr float LOWEST = -1e30f;

// 2^x within 3e-6 of it, which is far less than bfloat16 rounds to. Exactly 1 for 0, so that a tile without a new key changes nothing; 0 for minus
// infinity.
INLINE f32x16 exp2(f32x16 x) {
    // x less the whole number below it. By minimax on [0, 1).
    const f32x16 part = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
    f32x16 p = set1(1.34266838e-2f);
    p = fma(p, part, set1(5.22424728e-2f));
    p = fma(p, part, set1(2.41280198e-1f));
    p = fma(p, part, set1(6.93044841e-1f));
    p = fma(p, part, set1(1.0f));
    return {_mm512_scalef_ps(p.v, x.v)};
}

// Element r of the result is all elements of rows[r] joined, always in the same order.
template <class Join>
INLINE f32x16 join_rows(const f32x16 (&rows)[16], Join join) {
    f32x16 halves[8], quarters[4];
    for (int i = 0; i < 8; i++) {
        const __m512 a = rows[2 * i].v, b = rows[2 * i + 1].v;
        halves[i] = join(f32x16{_mm512_unpacklo_ps(a, b)}, f32x16{_mm512_unpackhi_ps(a, b)});
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(halves[2 * i].v), b = _mm512_castps_pd(halves[2 * i + 1].v);
        quarters[i] = join(f32x16{_mm512_castpd_ps(_mm512_unpacklo_pd(a, b))}, f32x16{_mm512_castpd_ps(_mm512_unpackhi_pd(a, b))});
    }
    const auto blocks = [&](f32x16 a, f32x16 b) { return join(f32x16{_mm512_shuffle_f32x4(a.v, b.v, 0x88)}, f32x16{_mm512_shuffle_f32x4(a.v, b.v, 0xdd)}); };
    return blocks(blocks(quarters[0], quarters[1]), blocks(quarters[2], quarters[3]));
}

// Of 16 rows. Scores are in units of log2: times 1 / ln 2.
struct RowStates {
    float largest[TILE_OF_ROWS], sums[TILE_OF_ROWS];
};

// The keys of a tile that a row sees: [begin, end).
struct Seen {
    int begin[TILE_OF_ROWS], end[TILE_OF_ROWS];
};

// scores: [16][64], of which num_rows count; lost. seen: null if all rows see all keys. scale: of scores, in units of log2.
// key_scales, value_scales: [64], or null. weights: [2][16][32]. Returns the factors of what came before.
template <bool IS_SCALED>
INLINE f32x16 softmax_rows(float* scores, int num_rows, const Seen* seen, float scale, const float* key_scales, const float* value_scales, RowStates& states,
                           bf16* weights) {
    f32x16 rows[TILE_OF_ROWS];
    for (int r = 0; r < TILE_OF_ROWS; r++) rows[r] = zero();
    for (int r = 0; r < num_rows; r++) {
        float* const row = scores + r * TILE;
        f32x16 v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = load(row + i * 16);
            if (IS_SCALED) v[i] = v[i] * load(key_scales + i * 16);
        }
        if (seen) {
            const uint64_t keys = ((seen->end[r] < TILE ? 1ull << seen->end[r] : 0) - 1) & ~0ull << seen->begin[r];
            for (int i = 0; i < 4; i++) v[i].v = _mm512_mask_mov_ps(set1(-INFINITY).v, (__mmask16)(keys >> i * 16), v[i].v);
        }
        if (IS_SCALED || seen)
            for (int i = 0; i < 4; i++) store(row + i * 16, v[i]);
        rows[r] = max(max(v[0], v[1]), max(v[2], v[3]));
    }
    const f32x16 before = load(states.largest), now = max(before, join_rows(rows, [](f32x16 a, f32x16 b) { return max(a, b); }) * set1(scale));
    const f32x16 factors = exp2(before - now);
    store(states.largest, now);
    for (int r = 0; r < num_rows; r++) {
        const float* const row = scores + r * TILE;
        const f32x16 largest = set1(states.largest[r]);
        f32x16 v[4];
        for (int i = 0; i < 4; i++) v[i] = exp2(fma(load(row + i * 16), set1(scale), zero() - largest));
        rows[r] = (v[0] + v[1]) + (v[2] + v[3]);
        if (IS_SCALED)
            for (int i = 0; i < 4; i++) v[i] = v[i] * load(value_scales + i * 16);
        _mm512_store_si512(weights + r * CHUNK, (__m512i)_mm512_cvtne2ps_pbh(v[1].v, v[0].v));
        _mm512_store_si512(weights + UNIT + r * CHUNK, (__m512i)_mm512_cvtne2ps_pbh(v[3].v, v[2].v));
    }
    store(states.sums, fma(load(states.sums), factors, join_rows(rows, [](f32x16 a, f32x16 b) { return a + b; })));
    return factors;
}

}  // namespace
