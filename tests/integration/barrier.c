// Teams at scripts/llama/barrier.c: no thread may pass a barrier before all have come. Prints the calls of the kernel.
#include <omp.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 8
#define ROUNDS 2000

static atomic_long kernel_calls;

long __real_syscall(long number, long a, long b, long c, long d, long e, long f);

long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f) {
    atomic_fetch_add(&kernel_calls, 1);
    return __real_syscall(number, a, b, c, d, e, f);
}

static void regions(int most) {
    for (int threads = 2; threads <= most; threads++) {
        _Atomic int round_of[MOST] = {0};
#pragma omp parallel num_threads(threads)
        {
            int me = omp_get_thread_num();
            if (omp_get_num_threads() != threads)
                exit(3);
            for (int round = 1; round <= ROUNDS; round++) {
                atomic_store(&round_of[me], round);
#pragma omp barrier
                for (int other = 0; other < threads; other++)
                    if (atomic_load(&round_of[other]) < round)
                        exit(4);
#pragma omp barrier
            }
        }
    }
}

static void *owner(void *most) {
    regions((int)(long)most);
    return NULL;
}

int main(int count, char **arguments) {
    long most = count > 1 ? atol(arguments[1]) : MOST;
    pthread_t second;
    pthread_create(&second, NULL, owner, (void *)most); // two teams at a time, as of two models in one process
    owner((void *)most);
    pthread_join(second, NULL);
    printf("%ld\n", atomic_load(&kernel_calls));
    return 0;
}
