/* The threads of one call: they take units of whole groups, fetch them and hand them on, until all are done, one frame
 * is found bad, or the caller wants to stop. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "feed.h"

/* Bytes of pixels that a thread takes at a time, and that are fetched at once: by a map for one call of the system, by
 * read into a buffer that stays in a core's second-level cache. */
enum { UNIT_BYTES = 4 << 20, MAP_BYTES = 1 << 20, READ_BYTES = 256 << 10, LONGEST_UNIT_BYTES = 32 << 20 };
/* No loop here keeps an array on its stack. */
enum { STACK_BYTES = 1 << 20 };

struct feed_failure feed_failed(int status, int64_t frame, int error, int64_t detail)
{
    return (struct feed_failure){.status = status, .error = error, .frame = frame, .detail = detail};
}

bool feed_wanted(struct feed_call *call, int64_t frame)
{
    return !atomic_load_explicit(&call->stop_flag, memory_order_relaxed) &&
           frame < atomic_load_explicit(&call->bad, memory_order_relaxed);
}

/* Keep the failure of the earliest frame; threads that are at earlier ones go on, and may find an earlier one yet. */
void feed_fail(struct feed_call *call, const struct feed_failure *failure)
{
    pthread_mutex_lock(&call->lock);
    if (failure->frame < call->bad) {
        call->failure = *failure;
        atomic_store(&call->bad, failure->frame);
    }
    pthread_mutex_unlock(&call->lock);
    feed_ring_wake(call);
}

/* Frames a:b of unit k; false where there is none. */
bool feed_unit(const struct feed_call *call, int64_t k, int64_t *a, int64_t *b)
{
    if (k >= call->units)
        return false;
    *a = call->start - call->shift + k * call->unit;
    *b = *a + call->unit < call->stop ? *a + call->unit : call->stop;
    *a = *a > call->start ? *a : call->start;
    return true;
}

static int64_t common_multiple(int64_t a, int64_t b)
{
    int64_t x = a, y = b;
    while (y) {
        int64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

/* Units: whole groups of the pass, that cut no record if that is to be had, enough of them for all threads.
 *
 * A group that the caller cuts, at either end, is thread 0's in every call, so that the next call goes on with it. */
static void plan(struct feed_call *call)
{
    const struct feed_layout *layout = &call->feed->layout;
    int64_t frames = call->stop - call->start, size = layout->frame_bytes;
    int64_t group = call->pass ? nat_group(call->pass) : 1, step = group;
    /* the last record may hold more frames than the scan: a bound there would be of no use */
    if (layout->record_frames < layout->frames && layout->record_frames * size <= LONGEST_UNIT_BYTES &&
        common_multiple(group, layout->record_frames) * size <= LONGEST_UNIT_BYTES)
        step = common_multiple(group, layout->record_frames);
    int64_t fair = frames / call->feed->threads / 4, wanted = UNIT_BYTES / size;
    wanted = wanted < fair ? wanted : fair;
    call->unit = wanted > step ? wanted / step * step : step;
    int64_t first = call->pass ? call->row : call->start;
    call->shift = first % call->unit;
    call->units = (frames + call->shift + call->unit - 1) / call->unit;
    call->last_apart = call->pass && (call->row + frames) % group != 0;
}

static bool take_unit(struct feed_worker *w, int64_t k)
{
    struct feed_call *call = w->call;
    int64_t a, b, limit = call->feed->reading == FEED_MMAP ? MAP_BYTES : READ_BYTES;
    if (!feed_unit(call, k, &a, &b))
        return false;
    while (a < b) {
        if (!feed_wanted(call, a))
            return false;
        struct feed_span span = feed_span(&call->feed->layout, a, b, limit);
        if (feed_fetch_and_take(w, &span)) {
            feed_fail(call, &w->failure);
            return false;
        }
        a = span.b;
    }
    return true;
}

static void take_units(struct feed_worker *w)
{
    struct feed_call *call = w->call;
    int64_t shared = call->units - call->last_apart;
    /* unit 0 may go on with a group that the call before left to this thread */
    bool more = w->index || call->units == 0 || take_unit(w, 0);
    while (more) {
        int64_t k = atomic_fetch_add(&call->next, 1);
        more = k < shared && take_unit(w, k);
    }
    if (w->index == 0 && call->last_apart && call->units > 1)
        take_unit(w, call->units - 1);
}

static int prepare(struct feed_worker *w)
{
    struct feed_call *call = w->call;
    const struct feed_layout *layout = &call->feed->layout;
    if (layout->codec == NAT_PLAIN)
        return 0;
    size_t bytes = nat_scratch_bytes(layout->codec, layout->element, (size_t)layout->payload);
    w->scratch = aligned_alloc(FEED_PAGE, (bytes / FEED_PAGE + 1) * FEED_PAGE);
    if (!w->scratch)
        return NAT_NO_MEMORY;
    if (!call->pass || layout->codec != NAT_BITSHUFFLE_LZ4 || !layout->countable)
        return 0;
    w->mask_count = nat_pass_masks(call->pass, &w->masks);
    w->mask_sums = calloc((size_t)layout->record_frames, ((size_t)w->mask_count + 1) * sizeof *w->mask_sums);
    return w->mask_sums ? 0 : NAT_NO_MEMORY;
}

static void *work(void *argument)
{
    struct feed_worker *w = argument;
    struct feed_call *call = w->call;
    int status = prepare(w);
    if (status) {
        struct feed_failure failure = feed_failed(status, call->start, 0, 0);
        feed_fail(call, &failure);
    }
    if (call->ring)
        feed_ring_work(w);
    else
        take_units(w);
    feed_drop(w);
    free(w->stored);
    free(w->block);
    free(w->scratch);
    free(w->mask_sums);
    pthread_mutex_lock(&call->lock);
    if (--call->running == 0)
        pthread_cond_signal(&call->ended);
    pthread_mutex_unlock(&call->lock);
    return NULL;
}

int feed_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    int error = pthread_create(thread, &small, run, argument);
    pthread_attr_destroy(&small);
    return error;
}

/* Threads that see no signal but those of their own faults: the others are the caller's to handle. */
static int start(struct feed_call *call)
{
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int wanted = call->units < call->feed->threads ? (int)call->units : call->feed->threads, status = 0;
    pthread_mutex_lock(&call->lock); /* none of them goes on before the number of them is known */
    for (int i = 0; i < wanted && !status; i++) {
        struct feed_worker *w = &call->worker[i];
        *w = (struct feed_worker){.call = call, .index = i, .file = -1, .fd = -1};
        if (call->pass && !(w->part = nat_pass_part(call->pass, i)))
            status = NAT_NO_MEMORY;
        else if (feed_thread(&w->thread, work, w))
            break; /* the threads that there are do all of it */
        else
            call->running = ++call->workers;
    }
    pthread_mutex_unlock(&call->lock);
    if (call->ring) {
        bool wanted_ahead = call->workers && !status;
        int ahead = feed_ring_start(call, wanted_ahead);
        call->reading_ahead = ahead == 0;
        status = status ? status : wanted_ahead ? ahead : 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return call->workers || !wanted ? status : NAT_NO_MEMORY;
}

int feed_begin(struct feed_call *call)
{
    struct nat_feed *feed = call->feed;
    pthread_condattr_t steady;
    pthread_mutex_init(&call->lock, NULL);
    pthread_condattr_init(&steady);
    pthread_condattr_setclock(&steady, CLOCK_MONOTONIC);
    pthread_cond_init(&call->ended, &steady);
    pthread_condattr_destroy(&steady);
    atomic_init(&call->bad, LLONG_MAX);
    plan(call);
    atomic_init(&call->next, 1); /* unit 0 is thread 0's */
    call->worker = calloc((size_t)feed->threads, sizeof *call->worker);
    call->ring = feed->reading == FEED_DIRECT ? feed_ring_new() : NULL;
    call->guarded = feed->reading == FEED_MMAP && feed_guard_begin() == 0;
    int status = call->worker && (feed->reading != FEED_DIRECT || call->ring) &&
                         (feed->reading != FEED_MMAP || call->guarded)
                     ? start(call)
                     : NAT_NO_MEMORY;
    if (status) {
        struct feed_failure failure = feed_failed(status, call->start, 0, 0);
        feed_fail(call, &failure);
    }
    return status;
}

/* 1 when all threads have ended, 0 after `ms` at the latest. */
int feed_wait(struct feed_call *call, int ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)ms * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&call->lock);
    int status = 0;
    while (call->running && status == 0)
        status = pthread_cond_timedwait(&call->ended, &call->lock, &until);
    bool ended = call->running == 0;
    pthread_mutex_unlock(&call->lock);
    return ended;
}

void feed_stop(struct feed_call *call)
{
    atomic_store(&call->stop_flag, true);
    feed_ring_wake(call);
}

/* After feed_wait returned 1. */
void feed_end(struct feed_call *call)
{
    for (int i = 0; i < call->workers; i++)
        pthread_join(call->worker[i].thread, NULL);
    if (call->ring)
        feed_ring_end(call, call->reading_ahead);
    if (call->guarded)
        feed_guard_end();
    free(call->worker);
    pthread_cond_destroy(&call->ended);
    pthread_mutex_destroy(&call->lock);
}
