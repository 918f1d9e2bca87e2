/* O_DIRECT: one thread reads large aligned pieces in the order of the scan into a ring of buffers, the others compute.
 *
 * Every computing thread visits every slot and takes the units that are its own: unit k is thread k % threads's.  So a
 * unit may span slots, and yet one thread sees it in order.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "feed.h"

/* One is read, one is computed with, one lies between; requests of 8 MiB keep a disk busy. */
enum { SLOTS = 3, SLOT_BYTES = 8 << 20, RING_BYTES = 24 << 20 };

struct slot {
    uint8_t *buffer;
    struct feed_span span;
    struct feed_bytes got;
    int left; /* threads that have not been here yet */
};

struct feed_ring {
    pthread_t thread;
    pthread_cond_t filled, freed;
    bool ended;
    int slots;
    int64_t slot_bytes, produced;
    struct slot slot[SLOTS];
    int file, fd; /* in hand, -1: none */
    bool direct;  /* and opened so */
};

static void let_go(struct feed_call *call)
{
    struct feed_ring *ring = call->ring;
    if (ring->file >= 0)
        feed_files_give(call->feed->files, ring->file, ring->direct);
    ring->file = -1;
}

/* Have a file in hand, with O_DIRECT unless it refuses; 0 or errno. */
static int hold(struct feed_call *call, int file, bool direct)
{
    struct feed_ring *ring = call->ring;
    struct feed_files *files = call->feed->files;
    if (ring->file == file && ring->direct == direct)
        return 0;
    let_go(call);
    int fd = feed_files_take(files, file, direct);
    if (fd == -EINVAL && direct) {
        feed_files_refuse(files, file);
        return hold(call, file, false);
    }
    if (fd < 0)
        return -fd;
    ring->file = file;
    ring->fd = fd;
    ring->direct = direct;
    return 0;
}

/* Read again without O_DIRECT where that was refused, or left a piece that the file has: 1 if that was so. */
static bool buffered_instead(struct feed_call *call, int file, int64_t end, int error)
{
    struct stat facts;
    if (!call->ring->direct || (error && error != EINVAL))
        return false;
    if (!error && (fstat(call->ring->fd, &facts) || facts.st_size <= end))
        return false;
    if (error)
        feed_files_refuse(call->feed->files, file);
    return hold(call, file, false) == 0;
}

static struct feed_bytes read_span(struct feed_call *call, struct slot *slot)
{
    struct feed_span *span = &slot->span;
    int64_t lo = span->lo / FEED_PAGE * FEED_PAGE, hi = (span->hi + FEED_PAGE - 1) / FEED_PAGE * FEED_PAGE;
    struct feed_bytes got = {.at = slot->buffer + (span->lo - lo)};
    if (span->file < 0)
        return got;
    got.error = hold(call, span->file, feed_files_direct(call->feed->files, span->file));
    int64_t done = 0;
    while (!got.error && lo + done < span->hi) {
        ssize_t n = pread(call->ring->fd, slot->buffer + done, (size_t)(hi - lo - done), lo + done);
        int error = n < 0 ? errno : 0;
        if (error == EINTR)
            continue;
        done += n > 0 ? n : 0;
        bool odd = n <= 0 || (call->ring->direct && done % FEED_PAGE && lo + done < span->hi);
        if (odd && !buffered_instead(call, span->file, lo + done, error)) {
            got.error = error;
            break;
        }
    }
    done -= span->lo - lo;
    got.there = done < 0 ? 0 : (done < span->hi - span->lo ? done : span->hi - span->lo);
    return got;
}

static void *reader(void *argument)
{
    struct feed_call *call = argument;
    struct feed_ring *ring = call->ring;
    bool whole = true;
    for (int64_t a = call->start; whole && a < call->stop && feed_wanted(call, a);) {
        struct slot *slot = &ring->slot[ring->produced % ring->slots];
        pthread_mutex_lock(&call->lock);
        while (slot->left && feed_wanted(call, a))
            pthread_cond_wait(&ring->freed, &call->lock);
        bool free_slot = slot->left == 0;
        pthread_mutex_unlock(&call->lock);
        if (!free_slot)
            break;
        slot->span = feed_span(&call->feed->layout, a, call->stop, ring->slot_bytes - 2 * FEED_PAGE);
        slot->got = read_span(call, slot);
        whole = slot->got.there == slot->span.hi - slot->span.lo;
        a = slot->span.b;
        pthread_mutex_lock(&call->lock);
        slot->left = call->workers;
        ring->produced++;
        pthread_cond_broadcast(&ring->filled);
        pthread_mutex_unlock(&call->lock);
    }
    pthread_mutex_lock(&call->lock);
    ring->ended = true;
    pthread_cond_broadcast(&ring->filled);
    pthread_mutex_unlock(&call->lock);
    let_go(call);
    return NULL;
}

/* The units of a slot that are this thread's. */
static void visit(struct feed_worker *w, struct slot *slot)
{
    struct feed_call *call = w->call;
    for (int64_t a = slot->span.a; a < slot->span.b;) {
        int64_t k = (a - call->start + call->shift) / call->unit, from, to;
        feed_unit(call, k, &from, &to);
        to = to < slot->span.b ? to : slot->span.b;
        int64_t owner = k == call->units - 1 && call->last_apart ? 0 : k % call->workers;
        if (owner == w->index && feed_wanted(call, a) && feed_take(w, &slot->span, a, to, slot->got))
            feed_fail(call, &w->failure);
        a = to;
    }
}

void feed_ring_work(struct feed_worker *w)
{
    struct feed_call *call = w->call;
    struct feed_ring *ring = call->ring;
    for (int64_t k = 0;; k++) {
        pthread_mutex_lock(&call->lock);
        while (ring->produced <= k && !ring->ended)
            pthread_cond_wait(&ring->filled, &call->lock);
        bool more = ring->produced > k;
        pthread_mutex_unlock(&call->lock);
        if (!more)
            return;
        struct slot *slot = &ring->slot[k % ring->slots];
        visit(w, slot);
        pthread_mutex_lock(&call->lock);
        if (--slot->left == 0)
            pthread_cond_signal(&ring->freed);
        pthread_mutex_unlock(&call->lock);
    }
}

/* After a failure or a wish to stop. */
void feed_ring_wake(struct feed_call *call)
{
    if (!call->ring)
        return;
    pthread_mutex_lock(&call->lock);
    pthread_cond_broadcast(&call->ring->freed);
    pthread_cond_broadcast(&call->ring->filled);
    pthread_mutex_unlock(&call->lock);
}

static void free_slots(struct feed_ring *ring)
{
    for (int i = 0; i < SLOTS; i++)
        if (ring->slot[i].buffer)
            munmap(ring->slot[i].buffer, (size_t)ring->slot_bytes);
}

/* Buffers as many as the request fills, in memory of whole pages, large ones where the system has them. */
static int allocate(struct feed_call *call, struct feed_ring *ring)
{
    const struct feed_layout *layout = &call->feed->layout;
    int64_t longest = feed_longest(layout, call->start, call->stop) + 2 * FEED_PAGE;
    ring->slot_bytes = longest > SLOT_BYTES ? (longest + FEED_PAGE - 1) / FEED_PAGE * FEED_PAGE : SLOT_BYTES;
    int64_t most = RING_BYTES / ring->slot_bytes;
    ring->slots = most > SLOTS ? SLOTS : most < 2 ? 2 : (int)most;
    for (int i = 0; i < ring->slots; i++) {
        void *at = mmap(NULL, (size_t)ring->slot_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            return -1;
        madvise(at, (size_t)ring->slot_bytes, MADV_HUGEPAGE);
        ring->slot[i].buffer = at;
    }
    return 0;
}

/* The buffers and the thread that fills them, once call->workers is known; 0 or NAT_NO_MEMORY.  Where nothing is
 * `wanted`, or it can't be had, the threads that wait for slots end. */
int feed_ring_start(struct feed_call *call, bool wanted)
{
    struct feed_ring *ring = call->ring;
    if (wanted && allocate(call, ring) == 0 && feed_thread(&ring->thread, reader, call) == 0)
        return 0;
    pthread_mutex_lock(&call->lock);
    ring->ended = true;
    pthread_cond_broadcast(&ring->filled);
    pthread_mutex_unlock(&call->lock);
    return NAT_NO_MEMORY;
}

struct feed_ring *feed_ring_new(void)
{
    struct feed_ring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return NULL;
    pthread_cond_init(&ring->filled, NULL);
    pthread_cond_init(&ring->freed, NULL);
    ring->file = ring->fd = -1;
    return ring;
}

void feed_ring_end(struct feed_call *call, bool started)
{
    struct feed_ring *ring = call->ring;
    if (started)
        pthread_join(ring->thread, NULL);
    free_slots(ring);
    pthread_cond_destroy(&ring->filled);
    pthread_cond_destroy(&ring->freed);
    free(ring);
    call->ring = NULL;
}
