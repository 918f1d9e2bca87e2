/* One span into memory, by a map of the file or by reading it, and its frames handed on. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "feed.h"

/* A thread maps this much of a file at a time: page tables don't grow with the file, and one unmapping costs little. */
#define WINDOW_BYTES ((int64_t)256 << 20)
/* Windows start on bounds of large pages, so that the kernel can map large folios of the page cache as a whole. */
#define WINDOW_STEP ((int64_t)2 << 20)

int feed_grow(uint8_t **buffer, int64_t *bytes, int64_t wanted)
{
    if (*bytes >= wanted)
        return 0;
    free(*buffer);
    *bytes = 0;
    *buffer = aligned_alloc(FEED_PAGE, (size_t)((wanted + FEED_PAGE - 1) / FEED_PAGE * FEED_PAGE));
    if (!*buffer)
        return NAT_NO_MEMORY;
    *bytes = wanted;
    return 0;
}

void feed_drop(struct feed_worker *w)
{
    if (w->map)
        munmap(w->map, (size_t)(w->map_hi - w->map_lo));
    w->map = NULL;
    w->map_lo = w->map_hi = 0;
    if (w->file >= 0)
        feed_files_give(w->call->feed->files, w->file, false);
    w->file = w->fd = -1;
}

int feed_hold(struct feed_worker *w, int file)
{
    if (w->file == file)
        return w->fd;
    feed_drop(w);
    int fd = feed_files_take(w->call->feed->files, file, false);
    if (fd >= 0) {
        w->file = file;
        w->fd = fd;
    }
    return fd;
}

static int failed(struct feed_worker *w, int status, int64_t frame, int error, int64_t detail)
{
    w->failure = feed_failed(status, frame, error, detail);
    return -1;
}

/* Read a span; straight to where its frames belong, if all of its bytes are pixels of the caller's buffer. */
static int by_read(struct feed_worker *w, const struct feed_span *span)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    int64_t wanted = span->hi - span->lo, done = 0;
    bool straight = w->call->out && layout->codec == NAT_PLAIN && wanted == (span->b - span->a) * layout->frame_bytes;
    if (!straight && feed_grow(&w->stored, &w->stored_bytes, wanted))
        return failed(w, NAT_NO_MEMORY, span->a, 0, 0);
    uint8_t *to = straight ? w->call->out + (span->a - w->call->start) * layout->frame_bytes : w->stored;
    struct feed_bytes got = {.at = to};
    while (done < wanted) {
        ssize_t n = pread(w->fd, to + done, (size_t)(wanted - done), span->lo + done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            got.error = errno;
        if (n <= 0)
            break;
        done += n;
    }
    got.there = done;
    return feed_take(w, span, span->a, span->b, got);
}

/* Have the span's window of the file mapped; 0 or errno. */
static int window(struct feed_worker *w, int64_t lo, int64_t hi, int64_t size)
{
    if (w->map && lo >= w->map_lo && hi <= w->map_hi)
        return 0;
    if (w->map)
        munmap(w->map, (size_t)(w->map_hi - w->map_lo));
    w->map = NULL;
    w->map_lo = lo / WINDOW_STEP * WINDOW_STEP;
    w->map_hi = w->map_lo + WINDOW_BYTES > hi ? w->map_lo + WINDOW_BYTES : hi;
    w->map_hi = w->map_hi < size ? w->map_hi : size;
    void *map = mmap(NULL, (size_t)(w->map_hi - w->map_lo), PROT_READ, MAP_SHARED, w->fd, w->map_lo);
    if (map == MAP_FAILED)
        return errno;
    w->map = map;
    return 0;
}

/* Nothing that changes lives in registers across the jump: a function of its own, all state behind `w`. */
static int guarded(struct feed_worker *w, const struct feed_span *span, int64_t there)
{
    struct feed_bytes got = {.at = w->map + (span->lo - w->map_lo), .there = there};
    w->guard.at = NULL;
    w->guard.lo = w->map;
    w->guard.hi = w->map + (w->map_hi - w->map_lo) + sysconf(_SC_PAGESIZE); /* the last page is mapped as a whole */
    if (sigsetjmp(w->guard.jump, 0)) {
        feed_guard_set(NULL);
        int64_t missing = 0, at = w->map_lo + (w->guard.at - w->map);
        return failed(w, NAT_IO, feed_first_cut(&w->call->feed->layout, span, at, &missing), EIO, 0);
    }
    feed_guard_set(&w->guard);
    if (w->call->feed->layout.codec != NAT_PLAIN) {
        /* a decoder must not see bytes that change under its checks */
        memcpy(w->stored, got.at, (size_t)there);
        got.at = w->stored;
    }
    int status = feed_take(w, span, span->a, span->b, got);
    feed_guard_set(NULL);
    return status;
}

static int by_map(struct feed_worker *w, const struct feed_span *span)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    struct stat facts;
    if (fstat(w->fd, &facts))
        return failed(w, NAT_IO, span->a, errno, 0);
    int64_t size = facts.st_size, hi = size < span->hi ? size : span->hi;
    if (hi <= span->lo)
        return feed_take(w, span, span->a, span->b, (struct feed_bytes){0});
    int error = window(w, span->lo, hi, size);
    if (error)
        return failed(w, NAT_IO, span->a, error, 0);
    if (layout->codec != NAT_PLAIN && feed_grow(&w->stored, &w->stored_bytes, span->hi - span->lo))
        return failed(w, NAT_NO_MEMORY, span->a, 0, 0);
#ifdef MADV_POPULATE_READ
    /* one call instead of a fault for every 16 pages; where it fails, the access itself tells why */
    uint8_t *from = w->map + (span->lo - w->map_lo) / FEED_PAGE * FEED_PAGE;
    madvise(from, (size_t)(w->map + (hi - w->map_lo) - from), MADV_POPULATE_READ);
#endif
    int status = guarded(w, span, hi - span->lo);
    /* a file cut off within a page gives zeros instead of a fault */
    if (fstat(w->fd, &facts))
        return failed(w, NAT_IO, span->a, errno, 0);
    int64_t missing = 0, frame = feed_first_cut(layout, span, facts.st_size, &missing);
    if (frame < span->b && (status == 0 || frame <= w->failure.frame))
        return failed(w, NAT_SHORT, frame, 0, missing);
    return status;
}

/* 0, or -1 with the first bad frame in w->failure. */
int feed_fetch_and_take(struct feed_worker *w, const struct feed_span *span)
{
    if (span->file < 0)
        return feed_take(w, span, span->a, span->b, (struct feed_bytes){0});
    int fd = feed_hold(w, span->file);
    if (fd < 0)
        return failed(w, NAT_IO, span->a, -fd, 0);
    return w->call->feed->reading == FEED_MMAP ? by_map(w, span) : by_read(w, span);
}
