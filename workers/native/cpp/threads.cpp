// The part of OpenMP's runtime that the kernels use, for machines on which others need the cores as well: gateway, clients, other ranks.
//
// In libgomp a region waits for all threads, also for those that are not running, and each barrier of a step may then cost a time slice of the
// scheduler. Here a region begins with the threads that are ready within a moment, as OMP_DYNAMIC allows: a thread that the system has put
// aside is left out, and helps in the next region. Waiting threads soon offer their core to others, and then sleep.
//
// The functions are those that GCC calls for `parallel`, `for` with static and dynamic schedules, and barriers. They stay inside the library.
// How many threads there may be is what torch.set_num_threads has said to libgomp for the calling thread. Regions of several callers at once,
// and regions in regions, run on the calling thread alone. Knows no kernel.
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include <immintrin.h>

namespace {

// A thread that waits polls for SPIN_NS, most waits are over by then. Until SLEEP_NS it offers its core between polls.
constexpr int64_t SPIN_NS = 5'000;
constexpr int64_t SLEEP_NS = 100'000;
// How long a region waits for threads that are awake.
constexpr int64_t JOIN_NS = 2'000;
constexpr int POLLS_AT_ONCE = 16;

constexpr uint64_t OPEN = 1 << 16;
constexpr uint64_t COUNT = OPEN - 1;
constexpr int LOOP_BITS = 40;

using Function = void (*)(void*);

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

// A number that threads wait for, and that they sleep on. Whoever changes it wakes them.
struct Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> num_sleeping{0};

    void set(uint32_t next) {
        value.store(next);
        if (num_sleeping.load()) syscall(SYS_futex, (uint32_t*)&value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    // Returns once it is no longer `seen`.
    void wait_while(uint32_t seen) {
        int64_t began = 0;
        while (value.load(std::memory_order_acquire) == seen) {
            for (int i = 0; i < POLLS_AT_ONCE; i++) {
                if (value.load(std::memory_order_acquire) != seen) return;
                _mm_pause();
            }
            const int64_t now = now_ns();
            if (!began) began = now;
            if (now - began < SPIN_NS) continue;
            if (now - began < SLEEP_NS) {
                sched_yield();
                continue;
            }
            num_sleeping.fetch_add(1);
            if (value.load() == seen) syscall(SYS_futex, (uint32_t*)&value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
            num_sleeping.fetch_sub(1);
        }
    }
};

// The region that runs now. `enrolled`: its number, OPEN while threads may still join, and how many have besides the caller.
struct alignas(64) Team {
    alignas(64) Signal region;
    alignas(64) std::atomic<uint64_t> enrolled{0};
    std::atomic<uint64_t> wanted{0};
    Function function = nullptr;
    void* data = nullptr;
    alignas(64) std::atomic<uint32_t> num_arrived{0};
    Signal barrier;
    // Of the newest dynamic loop: its number in the region, and how many chunks threads have taken.
    alignas(64) std::atomic<uint64_t> loop{0};
    alignas(64) std::atomic<bool> is_busy{false};
    int num_workers = 0;  // the caller that made it busy changes it
};

Team team;

// Of the calling thread, within a region. A thread outside is a team of its own.
struct Place {
    int id = 0, size = 1;
    bool is_inside = false;
    uint64_t loop = 0;
    int64_t begin = 0, end = 0, step = 1, chunk = 1;
};

thread_local Place here;

void run(Function function, void* data, int id, int size) {
    const Place outside = here;
    here = Place{id, size, true};
    function(data);
    here = outside;
}

// All threads of the region reach it before one goes on.
void barrier(int size) {
    if (size == 1) return;
    const uint32_t seen = team.barrier.value.load();
    if (team.num_arrived.fetch_add(1) + 1 == (uint32_t)size) {
        team.num_arrived.store(0);
        team.barrier.set(seen + 1);
    } else {
        team.barrier.wait_while(seen);
    }
}

// Takes part in the region of this number if it still can.
void join_region(uint32_t region) {
    uint64_t seen = team.enrolled.load();
    do {
        if (seen >> 32 != region || !(seen & OPEN) || (seen & COUNT) >= team.wanted.load()) return;
    } while (!team.enrolled.compare_exchange_weak(seen, seen + 1));
    const int id = (int)(seen & COUNT) + 1;
    for (int polls = 0; (seen = team.enrolled.load()) & OPEN; polls++) polls % POLLS_AT_ONCE ? _mm_pause() : (void)sched_yield();
    const int size = (int)(seen & COUNT) + 1;
    run(team.function, team.data, id, size);
    barrier(size);
}

void* work(void*) {
    for (uint32_t region = 0;;) {
        team.region.wait_while(region);
        region = team.region.value.load();
        join_region(region);
    }
    return nullptr;
}

// There are none in the child of a fork.
void forget_workers() { team.num_workers = 0, team.is_busy = false, team.region.num_sleeping = 0; }

void start_workers(int num) {
    if (team.num_workers >= num) return;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_workers);
    (void)registered;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; team.num_workers < num; team.num_workers++) {
        // A machine without room for another thread computes with fewer.
        if (pthread_create(&thread, nullptr, work, nullptr)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

int max_threads() {
    using Get = int (*)();
    static const Get get = (Get)dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    return get ? get() : 1;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return here.id; }
int omp_get_num_threads() { return here.size; }
int omp_get_max_threads() { return max_threads(); }

// num_threads: at most; 0 for all.
void GOMP_parallel(Function function, void* data, unsigned num_threads, unsigned) {
    const int most = here.is_inside || num_threads == 1 ? 1 : max_threads();
    const int wanted = (num_threads && (int)num_threads < most ? (int)num_threads : most) - 1;
    if (wanted <= 0 || team.is_busy.exchange(true)) return run(function, data, 0, 1);
    start_workers(wanted);
    team.function = function, team.data = data;
    team.wanted = (uint64_t)wanted;
    team.loop = 0;
    const uint32_t region = team.region.value.load() + 1;
    team.enrolled = (uint64_t)region << 32 | OPEN;
    const bool all_sleep = (int)team.region.num_sleeping.load() >= team.num_workers;
    team.region.set(region);
    if (!all_sleep)
        for (int64_t until = now_ns() + JOIN_NS; (team.enrolled.load() & COUNT) < (uint64_t)wanted && now_ns() < until;) _mm_pause();
    const int size = (int)(team.enrolled.fetch_and(~OPEN) & COUNT) + 1;
    run(function, data, 0, size);
    barrier(size);
    team.is_busy = false;
}

void GOMP_barrier() { barrier(here.size); }

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
    uint64_t taken = team.loop.load();
    for (;;) {
        // A later loop has begun: nothing of this one is left.
        if (here.size > 1 && taken >> LOOP_BITS != here.loop) return false;
        const int64_t number = here.size > 1 ? (int64_t)(taken & ((uint64_t(1) << LOOP_BITS) - 1)) : 0;
        const int64_t first = here.size > 1 ? here.begin + number * here.chunk * here.step : here.begin;
        if (here.step > 0 ? first >= here.end : first <= here.end) return false;
        const int64_t last = first + here.chunk * here.step;
        if (here.size > 1 && !team.loop.compare_exchange_weak(taken, taken + 1)) continue;
        if (here.size == 1) here.begin = last;
        *begin = first;
        *end = here.step > 0 ? (last < here.end ? last : here.end) : (last > here.end ? last : here.end);
        return true;
    }
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
    here.loop++;
    here.begin = begin, here.end = end, here.step = step, here.chunk = chunk;
    if (here.size > 1) {
        uint64_t taken = team.loop.load();
        while (taken >> LOOP_BITS < here.loop && !team.loop.compare_exchange_weak(taken, here.loop << LOOP_BITS)) {
        }
    }
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { barrier(here.size); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
