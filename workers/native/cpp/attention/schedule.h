// How the queries of a step are divided into work for threads. No bit of a result depends on it.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "paged_cache.h"

namespace {

// KV heads that a thread computes together.
struct Item {
    const Work* work;
    int64_t first_head, num_heads;
};

// The sequences of a step, see AttentionMetadata. block_table: [num_seqs, max_blocks]; cu_seqlens: [num_seqs + 1], seq_lens: [num_seqs].
struct Sequences {
    const int32_t *block_table, *cu_seqlens, *seq_lens;
    int64_t num_seqs, max_blocks;
};

// Into how many items a query is divided. Few: the heads of a key lie next to each other, and are read fastest together. One sequence on two
// threads: 2; three sequences: 2, which is three items for each thread; from 8 sequences on: 1.
INLINE int64_t parts_of_a_decode(int64_t num_works, int64_t num_kv_heads, int64_t num_threads) {
    for (int64_t parts = 1; parts < num_kv_heads; parts++)
        if (num_works * parts % num_threads == 0 || num_works * parts >= 4 * num_threads) return parts;
    return num_kv_heads;
}

// Calls attend(item) for every query and head, on all threads. Inside: what a thread holds while it takes items; may be empty.
template <class Inside, class Attend>
void for_each_item(const Sequences& sequences, const Shape& s, int64_t query_tile, Attend attend) {
    std::vector<Work> works;
    int64_t num_pairs = 0;
    for (int64_t i = 0; i < sequences.num_seqs; i++) {
        const int64_t token = sequences.cu_seqlens[i], query_len = sequences.cu_seqlens[i + 1] - token;
        for (int64_t first = 0; first < query_len; first += query_tile) {
            const int64_t position = sequences.seq_lens[i] - query_len + first, num = std::min(query_tile, query_len - first);
            works.push_back({token + first, position, num, sequences.block_table + i * sequences.max_blocks});
            num_pairs += num * (position + num);
        }
    }
    // Below this much, waking other threads takes longer.
    const bool alone = num_pairs * s.num_heads * s.head_dim < (1 << 16);
    const int64_t decode_parts = parts_of_a_decode((int64_t)works.size(), s.num_kv_heads, alone ? 1 : omp_get_max_threads());
    std::vector<Item> items;
    for (const Work& work : works) {
        // Where rows share the keys, these are read rarely, and all heads' rows would not fit in the caches.
        const int64_t parts = work.num == 1 ? decode_parts : s.num_kv_heads;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t begin = p * s.num_kv_heads / parts;
            items.push_back({&work, begin, (p + 1) * s.num_kv_heads / parts - begin});
        }
    }
#pragma omp parallel if (!alone && items.size() > 1)
    {
        [[maybe_unused]] const Inside inside;
        // The last queries see the most keys, so they come first.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = (int64_t)items.size() - 1; i >= 0; i--) attend(items[i]);
    }
}

}  // namespace
