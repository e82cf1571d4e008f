// Collectives between ranks of one host in shared memory, for lists of calls too: workers/parallel/shared_memory.py has the rounds and the
// rules, this file the waiting, the copies and the sums. Knows no processes: whether an awaited rank still lives is for Python to say. So no
// call waits for longer than a slice of time. One that is not done sets `pending`, and goes on where it was when it is called again.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "simd.h"

namespace {

constexpr int64_t LINE = 8;  // words in a cache line
constexpr int64_t OTHERS = -1;

// A wait polls for this long, since most are over in a few us. Then it offers its core to others between two polls. After that it sleeps
// until it is woken: a core that is idle takes over a rank that has to share the other one.
constexpr int64_t SPIN_NS = 5'000;
constexpr int64_t YIELD_NS = 60'000;
constexpr int64_t SLICE_NS = 50'000'000;
// Fewer values run on the calling thread: waking the others takes longer.
constexpr int64_t PARALLEL_VALUES = 1 << 17;

// The words of a rank's own line in shared memory: shared_file.py.
enum { ARRIVED, CLOSED, PID, BORN, SLEEPS };

// What this rank knows, as exchange.py lays it out.
struct Group {
    int64_t* words;  // the shared memory
    int64_t rank, size, capacity_bytes;
    int64_t round;
    // While a call waits: the round that the awaited rank, or all others, must have reached, and since when. 0: it does not wait.
    int64_t awaited, awaited_rank, waits_since_ns;
    int64_t pending;
    int64_t is_closed;
    // Of a collective in progress: whether this rank's part is written, and how many bytes are done.
    int64_t is_written, done_bytes;
    // All-reduces that are over, how long they took, and when the newest collective began.
    int64_t num_all_reduces, all_reduces_ns, began_ns;

    int64_t* line(int64_t r) const { return words + (1 + r) * LINE; }
    // The line that says what is in a buffer; the buffer follows it.
    int64_t* tag(int64_t r) const { return words + (1 + size) * LINE + (2 * r + (round & 1)) * (LINE + capacity_bytes / (int64_t)sizeof(int64_t)); }
    template <class T>
    T* buffer(int64_t r) const {
        return (T*)(tag(r) + LINE);
    }
};

enum { ALL_REDUCE, GATHER, BROADCAST, MIN, NUM_OPERATIONS };  // as in shared_memory.py

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

int64_t load_word(const int64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

// The lower half of a word, which is what a futex compares.
uint32_t* half(int64_t* word) { return (uint32_t*)word; }

// Sleeps until the counter is no longer `seen`, or the time is over, or a signal comes.
void sleep_on(Group* g, int64_t* counter, int64_t seen, int64_t ns) {
    int64_t* const sleeps = g->line(g->rank) + SLEEPS;
    __atomic_store_n(sleeps, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(counter, __ATOMIC_SEQ_CST) == seen) {
        const timespec time = {ns / 1'000'000'000, ns % 1'000'000'000};
        syscall(SYS_futex, half(counter), FUTEX_WAIT, (uint32_t)seen, &time, nullptr, 0);
    }
    __atomic_store_n(sleeps, 0, __ATOMIC_SEQ_CST);
}

// This rank has written, or read, what its round is about.
void arrive(Group* g) {
    int64_t* const counter = g->line(g->rank) + ARRIVED;
    __atomic_store_n(counter, g->round, __ATOMIC_SEQ_CST);
    for (int64_t r = 0; r < g->size; r++)
        if (r != g->rank && __atomic_load_n(g->line(r) + SLEEPS, __ATOMIC_SEQ_CST)) {
            syscall(SYS_futex, half(counter), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
            return;
        }
}

// Whether the rank, or all others, have reached this rank's round. Waits for it as long as a slice of time.
bool has_arrived(Group* g, int64_t rank) {
    if (g->is_closed) return false;
    int64_t began = 0;
    for (int64_t r = 0; r < g->size; r++) {
        if (r == g->rank || (rank != OTHERS && r != rank)) continue;
        int64_t* const counter = g->line(r) + ARRIVED;
        for (int64_t seen; (seen = load_word(counter)) < g->round;) {
            const int64_t now = now_ns();
            if (!began) {
                began = now;
                if (!g->awaited) {
                    g->waits_since_ns = now;
                    g->awaited_rank = rank;
                    __atomic_store_n(&g->awaited, g->round, __ATOMIC_RELEASE);
                }
            }
            const int64_t waited = now - began;
            if (waited >= SLICE_NS || load_word(&g->is_closed)) return false;
            if (waited < SPIN_NS)
                _mm_pause();
            else if (waited < YIELD_NS)
                sched_yield();
            else
                sleep_on(g, counter, seen, SLICE_NS - waited);
        }
    }
    __atomic_store_n(&g->awaited, 0, __ATOMIC_RELEASE);
    return true;
}

// Rounds in which every rank writes a chunk of `in`, and those that read take the same chunk of all ranks. `read` gets where the chunk begins
// and its bytes, and finds them in the buffers.
template <class Read>
void exchange(Group* g, int operation, const char* in, int64_t num_bytes, bool reads, Read read) {
    const int64_t tag = num_bytes * NUM_OPERATIONS + operation;
    if (!g->pending) g->began_ns = now_ns();
    g->pending = 1;
    while (g->done_bytes < num_bytes) {
        const int64_t chunk = num_bytes - g->done_bytes < g->capacity_bytes ? num_bytes - g->done_bytes : g->capacity_bytes;
        if (!g->is_written) {
            // Until the buffer is free.
            if (!has_arrived(g, OTHERS)) return;
            g->round++;
            memcpy(g->buffer<char>(g->rank), in + g->done_bytes, chunk);
            *g->tag(g->rank) = tag;
            arrive(g);
            g->is_written = 1;
        }
        if (reads) {
            if (!has_arrived(g, OTHERS)) return;
            for (int64_t r = 0; r < g->size; r++)
                if (*g->tag(r) != tag) return;  // which Python will see as well
            read(g->done_bytes, chunk);
        }
        g->done_bytes += chunk;
        g->is_written = 0;
    }
    g->done_bytes = 0;
    g->pending = 0;
}

// The parts of all ranks are added in float32, first to last, and rounded once: sum_in_rank_order in workers/parallel/group.py.
template <class T>
void all_reduce(Group* g, T* x, int64_t num_values) {
    exchange(g, ALL_REDUCE, (const char*)x, num_values * (int64_t)sizeof(T), true, [=](int64_t begin, int64_t num_bytes) {
        T* const out = x + begin / (int64_t)sizeof(T);
        const int64_t n = num_bytes / (int64_t)sizeof(T);
#pragma omp parallel for schedule(static) if (n >= PARALLEL_VALUES)
        for (int64_t i = 0; i < n; i += 16) {
            f32x16 total = load_some(g->buffer<const T>(0) + i, n - i);
            for (int64_t r = 1; r < g->size; r++) total = total + load_some(g->buffer<const T>(r) + i, n - i);
            store_some(out + i, total, n - i);
        }
    });
    if (g->pending) return;
    g->num_all_reduces++;
    g->all_reduces_ns += now_ns() - g->began_ns;
}

}  // namespace

TRAMONTANE_KERNEL(all_reduce_float32)(Group* g, float* x, int64_t num_values) { all_reduce(g, x, num_values); }
TRAMONTANE_KERNEL(all_reduce_bfloat16)(Group* g, bf16* x, int64_t num_values) { all_reduce(g, x, num_values); }

// x: [num_rows][row_bytes] of each rank; out: [num_rows][size][row_bytes], on rank 0 only. The others do not wait for it.
TRAMONTANE_KERNEL(gather_ranks)(Group* g, char* out, const char* x, int64_t num_rows, int64_t row_bytes) {
    exchange(g, GATHER, x, num_rows * row_bytes, g->rank == 0, [=](int64_t begin, int64_t num_bytes) {
        for (int64_t r = 0; r < g->size; r++)
            for (int64_t at = 0; at < num_bytes;) {
                // To the end of the row, which may have begun in the chunk before.
                const int64_t row = (begin + at) / row_bytes, column = (begin + at) % row_bytes;
                const int64_t n = row_bytes - column < num_bytes - at ? row_bytes - column : num_bytes - at;
                memcpy(out + (row * g->size + r) * row_bytes + column, g->buffer<char>(r) + at, n);
                at += n;
            }
    });
}

TRAMONTANE_KERNEL(arrive)(Group* g) { arrive(g); }

// rank: OTHERS for all others.
TRAMONTANE_KERNEL(await_round)(Group* g, int64_t rank) { g->pending = !has_arrived(g, rank); }
