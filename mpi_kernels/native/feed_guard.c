/* A file that is cut off while it is mapped: the kernel answers an access behind its end with SIGBUS.
 *
 * The handler is there only while threads read through a map.  It jumps out of an access that such a thread announced,
 * and hands every other fault to whoever handled it before.  Source: mmap(2), signal-safety(7).
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>

#include "feed.h"

/* initial-exec: the handler may run in a thread that never touched it, where a lazy allocation is not allowed */
static __thread struct feed_guard *volatile current __attribute__((tls_model("initial-exec")));

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int users;
static struct sigaction before;

static void pass_on(int number, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        /* the access is tried again, and ends the process as it would have without us */
        signal(number, SIG_DFL);
    } else {
        before.sa_handler(number);
    }
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    struct feed_guard *guard = current;
    const uint8_t *at = info->si_addr;
    if (guard && info->si_code > 0 && at >= guard->lo && at < guard->hi) {
        guard->at = at;
        siglongjmp(guard->jump, 1);
    }
    pass_on(number, info, context);
}

/* 0, or -1 where the handler can't be installed. */
int feed_guard_begin(void)
{
    pthread_mutex_lock(&lock);
    int status = 0;
    if (users == 0) {
        /* SA_NODEFER: jumping out must not leave the signal blocked */
        struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
        sigemptyset(&ours.sa_mask);
        status = sigaction(SIGBUS, &ours, &before);
    }
    users += status == 0;
    pthread_mutex_unlock(&lock);
    return status;
}

void feed_guard_end(void)
{
    pthread_mutex_lock(&lock);
    struct sigaction now;
    /* whoever installed another one meanwhile knows ours as the one before, and keeps it */
    if (--users == 0 && sigaction(SIGBUS, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault)
        sigaction(SIGBUS, &before, NULL);
    pthread_mutex_unlock(&lock);
}

void feed_guard_set(struct feed_guard *guard)
{
    current = guard;
}
