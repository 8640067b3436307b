// The barrier of llama.cpp's compute threads. libgomp's enters the kernel each time the last thread arrives, whether
// anybody sleeps or not: tens of thousands of futex calls a second, each of which delays all threads and passes every
// probe of system calls. Here the kernel is called by who has waited too long, and by who wakes it.
//
// Linked into ggml-cpu with --wrap (barrier.cmake): every parallel region gets a barrier of its own, and libgomp keeps
// the threads.

#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// Long enough for what one thread does more than another between two barriers. Beside a busy process longer spinning
// keeps from the processor the thread that is waited for.
#ifndef SPIN_NANOSECONDS
#define SPIN_NANOSECONDS 75000
#endif
#define TURNS_PER_LOOK 16 // at the clock

#define CACHE_LINE 64

struct team {
    void (*work)(void *);
    void *data;
    _Alignas(CACHE_LINE) atomic_int arrived;
    _Alignas(CACHE_LINE) atomic_uint generation;
    atomic_int sleepers;
};

static __thread struct team *current __attribute__((tls_model("initial-exec")));
static __thread int members __attribute__((tls_model("initial-exec")));

void __real_GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
void __real_GOMP_barrier(void);

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); // yield is no pause on these cores
#endif
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Whether the generation ended while spinning.
static int spin(struct team *team, unsigned generation) {
    int64_t end = 0;
    for (unsigned turn = 1;; turn++) {
        if (atomic_load_explicit(&team->generation, memory_order_acquire) != generation)
            return 1;
        relax();
        if (turn % TURNS_PER_LOOK)
            continue;
        int64_t time = now();
        if (!end)
            end = time + SPIN_NANOSECONDS;
        else if (time >= end)
            return 0;
    }
}

// The order of all accesses is what keeps a wake-up from being lost: a sleeper is counted before it looks at the
// generation (the kernel looks again), and the generation ends before the sleepers are counted.
static void sleep_until_over(struct team *team, unsigned generation) {
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->generation) == generation)
        syscall(SYS_futex, &team->generation, FUTEX_WAIT_PRIVATE, generation, NULL, NULL, 0);
    atomic_fetch_sub(&team->sleepers, 1);
}

void __wrap_GOMP_barrier(void) {
    struct team *team = current;
    if (!team) {
        __real_GOMP_barrier();
        return;
    }
    unsigned generation = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) < members - 1) {
        if (!spin(team, generation))
            sleep_until_over(team, generation);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store(&team->generation, generation + 1);
    if (atomic_load(&team->sleepers))
        syscall(SYS_futex, &team->generation, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void join(void *raw) {
    struct team *team = raw, *outer = current;
    int outer_members = members;
    current = team;
    members = omp_get_num_threads();
    team->work(team->data);
    current = outer;
    members = outer_members;
}

// The team lies on the stack: libgomp returns when every thread has left it.
void __wrap_GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    struct team team = {.work = work, .data = data};
    __real_GOMP_parallel(join, &team, threads, flags);
}
