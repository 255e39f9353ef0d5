/* Preloaded before libfaketime by tests/chaos/clock.py: the waits until a time of day that libfaketime does not know.
 *
 * librdkafka waits by C11's cnd_timedwait, Python's multiprocessing by sem_timedwait. Their deadlines come from the
 * stepped clock, the kernel's clock is not stepped: so each is waited for in slices, and the stepped clock is looked at
 * after each. A step during the wait counts, as it does when a real clock is set: the kernel's timers on CLOCK_REALTIME
 * follow it, in both directions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <semaphore.h>
#include <sys/syscall.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS 1000000000LL
#define SLICE_NS 50000000LL /* how late a step may be noticed */

static long long as_ns(const struct timespec *when) { return when->tv_sec * SECOND_NS + when->tv_nsec; }

/* Until when to wait now, on the kernel's clock. Returns 0 when the stepped clock has reached the deadline. */
static int next_slice(const struct timespec *deadline, struct timespec *until) {
    struct timespec stepped, true_time;
    clock_gettime(CLOCK_REALTIME, &stepped);
    long long left_ns = as_ns(deadline) - as_ns(&stepped);
    if (left_ns <= 0) return 0;
    if (left_ns > SLICE_NS) left_ns = SLICE_NS;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &true_time);
    long long until_ns = as_ns(&true_time) + left_ns;
    until->tv_sec = until_ns / SECOND_NS;
    until->tv_nsec = until_ns % SECOND_NS;
    return 1;
}

int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex, const struct timespec *restrict deadline) {
    static int (*wait)(cnd_t *, mtx_t *, const struct timespec *);
    if (!wait) wait = dlsym(RTLD_NEXT, "cnd_timedwait");
    struct timespec until = {0, 0}; /* the past: at least one look, which lets go of the mutex */
    int more = next_slice(deadline, &until);
    for (;;) {
        int result = wait(condition, mutex, &until);
        if (result != thrd_timedout || !more) return result;
        more = next_slice(deadline, &until);
        if (!more) return thrd_timedout;
    }
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    static int (*wait)(sem_t *, const struct timespec *);
    if (!wait) wait = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec until = {0, 0};
    int more = next_slice(deadline, &until);
    for (;;) {
        int result = wait(semaphore, &until);
        if (result == 0 || errno != ETIMEDOUT || !more) return result;
        more = next_slice(deadline, &until);
        if (!more) {
            errno = ETIMEDOUT;
            return -1;
        }
    }
}
