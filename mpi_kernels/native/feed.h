/* What the files of the reader know of one another.
 *
 *   feed_layout.c   where frames lie: spans of bytes that are fetched at once
 *   feed_files.c    files, opened when they are needed, a few at a time
 *   feed_guard.c    a file that is cut off while it is mapped
 *   feed_fetch.c    one span into memory: by map, read or O_DIRECT
 *   feed_take.c     the frames of a span in memory: checked, decoded, handed on
 *   feed_ring.c     one thread that reads with O_DIRECT ahead of those that compute
 *   feed.c          the threads of one call
 *   py_feed.c       what Python sees
 */
#ifndef EMFLOW_FEED_H
#define EMFLOW_FEED_H

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "native.h"

enum { FEED_MAGIC = 64, FEED_NUMBER = 32, FEED_PAGE = 4096 };
enum feed_reading { FEED_MMAP = 0, FEED_READ, FEED_DIRECT };

/* Where the frames lie, as mpi_kernels.layout.Layout says; checked when it is made, so that no sum here overflows. */
struct feed_layout {
    int64_t frames, frame_bytes;   /* of the scan */
    int64_t record_frames, payload; /* payload = record_frames * frame_bytes */
    int64_t first, lead, tail;
    int64_t files;
    const int64_t *offsets; /* of each record, or NULL */
    const int32_t *file_of;
    const int64_t *sizes;
    enum nat_codec codec;
    size_t element;
    size_t pixel; /* bytes */
    int kind;     /* enum nat_pixel, or -1 */
    bool swap, flagged, countable; /* countable: unsigned, as stored: masks can be summed on the bit planes */
    uint64_t flag;
    uint8_t magic[FEED_MAGIC];
    int64_t magic_bytes;
    bool numbered;
    int64_t number;
};

/* Frames a:b, all in bytes lo:hi of one file.  file -1: the record was never written. */
struct feed_span {
    int64_t a, b, lo, hi;
    int file;
};

/* What of a span is in memory: `there` bytes; `error` is why it is not all, 0 where the file ends. */
struct feed_bytes {
    const uint8_t *at;
    int64_t there;
    int error;
};

/* The first frame in scan order that is not there. */
struct feed_failure {
    int status; /* NAT_* */
    int error;  /* errno */
    int64_t frame, detail;
    char told[FEED_NUMBER + 1]; /* the number that a record carries */
};

bool feed_marked(const struct feed_layout *layout);
int64_t feed_offset(const struct feed_layout *layout, int64_t record);
int feed_file(const struct feed_layout *layout, int64_t record);
int64_t feed_stored(const struct feed_layout *layout, int64_t record);
int64_t feed_frame_at(const struct feed_layout *layout, int64_t frame);
struct feed_span feed_span(const struct feed_layout *layout, int64_t a, int64_t b, int64_t limit);
int64_t feed_first_cut(const struct feed_layout *layout, const struct feed_span *span, int64_t end, int64_t *missing);
int64_t feed_longest(const struct feed_layout *layout, int64_t a, int64_t b);

/* ---- feed_files.c ---- */

struct feed_files;
struct feed_files *feed_files_new(int n, const char *const *paths);
void feed_files_free(struct feed_files *files);
int feed_files_take(struct feed_files *files, int index, bool direct); /* descriptor, or -errno */
void feed_files_give(struct feed_files *files, int index, bool direct);
void feed_files_refuse(struct feed_files *files, int index); /* no O_DIRECT any more */
bool feed_files_direct(struct feed_files *files, int index);
int feed_files_refused(struct feed_files *files); /* how many refused O_DIRECT */

/* ---- feed_guard.c ---- */

int feed_guard_begin(void);
void feed_guard_end(void);
/* Of the thread: a fault within lo:hi jumps to `jump` instead of ending the process, NULL: none does. */
struct feed_guard {
    sigjmp_buf jump;
    const uint8_t *lo, *hi;
    const uint8_t *volatile at; /* where it faulted */
};
void feed_guard_set(struct feed_guard *guard);

/* ---- feed_convert.c ---- */

void feed_convert(const struct feed_layout *layout, uint8_t *to, const uint8_t *from, size_t bytes);

/* ---- threads ---- */

struct nat_feed {
    struct feed_layout layout;
    struct feed_files *files;
    enum feed_reading reading;
    int threads;
    pthread_mutex_t busy;
};

struct feed_ring;

struct feed_worker {
    struct feed_call *call;
    int index;
    pthread_t thread;
    nat_part *part;
    int file, fd; /* the file in hand, -1: none */
    uint8_t *map; /* its window map_lo:map_hi */
    int64_t map_lo, map_hi;
    uint8_t *stored, *block, *scratch;
    int64_t stored_bytes, block_bytes, block_used;
    const uint8_t *const *masks; /* all that the pass wants, to be summed on the bit planes */
    int mask_count;
    uint64_t *mask_sums;
    const uint8_t *batch; /* frames that are handed on together */
    int64_t batch_stride, batch_frames, batch_first;
    struct feed_failure failure;
    struct feed_guard guard;
};

struct feed_call {
    struct nat_feed *feed;
    nat_pass *pass; /* either a pass ... */
    uint8_t *out;   /* ... or a buffer */
    int64_t start, stop, row;
    int64_t unit, shift, units; /* unit k holds frames start - shift + k * unit and on */
    bool last_apart;            /* the last unit ends within a group: thread 0 takes it, after all of its others */
    int workers, running; /* threads that were started, that did not end yet */
    struct feed_worker *worker;
    struct feed_ring *ring;
    bool guarded, reading_ahead;
    atomic_llong next, done, bad; /* unit; frames; first frame that failed */
    atomic_bool stop_flag;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    struct feed_failure failure;
};

bool feed_wanted(struct feed_call *call, int64_t frame); /* nobody asked to stop, and no earlier frame failed */
void feed_fail(struct feed_call *call, const struct feed_failure *failure);
bool feed_unit(const struct feed_call *call, int64_t k, int64_t *a, int64_t *b);
struct feed_failure feed_failed(int status, int64_t frame, int error, int64_t detail);

int feed_fetch_and_take(struct feed_worker *w, const struct feed_span *span);
int feed_take(struct feed_worker *w, const struct feed_span *span, int64_t a, int64_t b, struct feed_bytes got);
int feed_hold(struct feed_worker *w, int file); /* a descriptor, or -errno */
void feed_drop(struct feed_worker *w);
int feed_grow(uint8_t **buffer, int64_t *bytes, int64_t wanted);

int feed_thread(pthread_t *thread, void *(*run)(void *), void *argument); /* 0 or errno */

struct feed_ring *feed_ring_new(void);
int feed_ring_start(struct feed_call *call, bool wanted);
void feed_ring_work(struct feed_worker *w);
void feed_ring_wake(struct feed_call *call);
void feed_ring_end(struct feed_call *call, bool started);

/* A call: begin, wait until it returns 1 (at most `ms` each time), end.  A call that is stopped must still be waited
 * for.  begin: 0 or NAT_NO_MEMORY. */
int feed_begin(struct feed_call *call);
int feed_wait(struct feed_call *call, int ms);
void feed_stop(struct feed_call *call);
void feed_end(struct feed_call *call);

#endif
