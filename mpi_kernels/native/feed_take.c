/* The frames of a span in memory: checked, decoded, brought into native order, and handed to a pass or a buffer.
 *
 * Records are looked at in scan order, so that the first bad frame is the one that is named.
 */
#include <string.h>

#include "feed.h"

/* Frames are converted this many bytes at a time, to stay in a core's second-level cache. */
enum { BLOCK_BYTES = 256 << 10 };

static int fail(struct feed_worker *w, int status, int64_t frame, int error, int64_t detail)
{
    w->failure = feed_failed(status, frame, error, detail);
    return -1;
}

/* Hand the frames in hand to the pass. */
static int flush(struct feed_worker *w)
{
    struct feed_call *call = w->call;
    int64_t n = w->batch_frames, first = w->batch_first;
    w->batch_frames = w->block_used = 0;
    if (n == 0)
        return 0;
    int status = nat_add(call->pass, w->part, w->batch, (size_t)w->batch_stride, n, call->row + first - call->start);
    return status ? fail(w, status, first, 0, 0) : 0;
}

/* Add n native frames, `stride` bytes apart, to those in hand, if they go on with them. */
static int gather(struct feed_worker *w, int64_t frame, const uint8_t *at, int64_t stride, int64_t n)
{
    int64_t step = at - w->batch;
    if (w->batch_frames == 1 && n == 1 && step >= w->call->feed->layout.frame_bytes) {
        w->batch_stride = step;
        w->batch_frames = 2;
        return 0;
    }
    if (w->batch_frames && step == w->batch_frames * w->batch_stride && (n == 1 || stride == w->batch_stride)) {
        w->batch_frames += n;
        return 0;
    }
    int64_t used = w->block_used; /* the frames may lie in the block themselves */
    if (flush(w))
        return -1;
    w->block_used = used;
    w->batch = at;
    w->batch_stride = stride;
    w->batch_frames = n;
    w->batch_first = frame;
    return 0;
}

/* Where `bytes` bytes can be decoded: in the block, after handing on what fills it. */
static uint8_t *room(struct feed_worker *w, int64_t bytes)
{
    if (w->block_used + bytes > w->block_bytes) {
        if (flush(w))
            return NULL;
        if (feed_grow(&w->block, &w->block_bytes, bytes < BLOCK_BYTES ? BLOCK_BYTES : bytes)) {
            fail(w, NAT_NO_MEMORY, w->batch_first, 0, 0);
            return NULL;
        }
    }
    uint8_t *at = w->block + w->block_used;
    w->block_used += bytes;
    return at;
}

/* Plain frames as they are stored, `stride` bytes apart. */
static int push(struct feed_worker *w, int64_t frame, const uint8_t *at, int64_t stride, int64_t n)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    int64_t size = layout->frame_bytes;
    if (w->call->out) {
        uint8_t *to = w->call->out + (frame - w->call->start) * size;
        if (stride == size)
            feed_convert(layout, to, at, (size_t)(n * size));
        else
            for (int64_t i = 0; i < n; i++)
                feed_convert(layout, to + i * size, at + i * stride, (size_t)size);
        return 0;
    }
    if (!layout->swap && !layout->flagged)
        return gather(w, frame, at, stride, n);
    for (int64_t i = 0; i < n; i++) {
        uint8_t *to = room(w, size);
        if (!to)
            return -1;
        feed_convert(layout, to, at + i * stride, (size_t)size);
        if (gather(w, frame + i, to, size, 1))
            return -1;
    }
    return 0;
}

/* The second of comma-separated fields is the record's number; six digits, so a long acquisition may count on from 0.
 * Source: Merlin Detector Interface manual, "MQ1 header". */
static bool numbered_right(struct feed_worker *w, int64_t record, const uint8_t *head, int64_t bytes)
{
    const uint8_t *end = head + (bytes < FEED_NUMBER ? bytes : FEED_NUMBER);
    const uint8_t *from = memchr(head, ',', (size_t)(end - head));
    memset(w->failure.told, 0, sizeof w->failure.told);
    if (!from++)
        return false;
    const uint8_t *to = memchr(from, ',', (size_t)(end - from));
    size_t n = (size_t)((to ? to : end) - from);
    memcpy(w->failure.told, from, n);
    int64_t number = 0;
    bool digits = n > 0;
    for (size_t i = 0; digits && i < n; i++) {
        digits = from[i] >= '0' && from[i] <= '9';
        number = (number * 10 + (from[i] - '0')) % 1000000;
    }
    return digits && (number - w->call->feed->layout.number - record) % 1000000 == 0;
}

/* Check what stands before a record's pixels; the record starts at head. */
static int check_head(struct feed_worker *w, int64_t frame, const uint8_t *head)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    int64_t record = frame / layout->record_frames;
    if (memcmp(head, layout->magic, (size_t)layout->magic_bytes))
        return fail(w, NAT_BAD_MARK, frame, 0, 0);
    if (layout->numbered && !numbered_right(w, record, head, layout->lead)) {
        char told[FEED_NUMBER + 1];
        memcpy(told, w->failure.told, sizeof told);
        fail(w, NAT_BAD_NUMBER, frame, 0, layout->number + record);
        memcpy(w->failure.told, told, sizeof told);
        return -1;
    }
    return 0;
}

/* The span's bytes end early: the frame is not there. */
static int cut(struct feed_worker *w, const struct feed_span *span, struct feed_bytes got)
{
    int64_t missing = 0;
    int64_t frame = feed_first_cut(&w->call->feed->layout, span, span->lo + got.there, &missing);
    return fail(w, got.error ? NAT_IO : NAT_SHORT, frame, got.error, missing);
}

static int take_plain(struct feed_worker *w, const struct feed_span *span, int64_t a, int64_t b, struct feed_bytes got)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    bool marked = feed_marked(layout);
    if (layout->record_frames == 1 && !layout->offsets && !marked)
        return push(w, a, got.at + (feed_frame_at(layout, a) - span->lo), layout->lead + layout->payload + layout->tail,
                    b - a);
    while (a < b) {
        int64_t record = a / layout->record_frames;
        int64_t stop = (record + 1) * layout->record_frames;
        stop = stop < b ? stop : b;
        if (marked && check_head(w, a, got.at + (feed_offset(layout, record) - span->lo)))
            return -1;
        if (push(w, a, got.at + (feed_frame_at(layout, a) - span->lo), layout->frame_bytes, stop - a))
            return -1;
        a = stop;
    }
    return 0;
}

/* Sum a whole record without making pixels of it: 1 done, 0 it has to be decoded, -1 failed. */
static int take_planes(struct feed_worker *w, int64_t frame, const uint8_t *in, int64_t n)
{
    struct feed_call *call = w->call;
    const struct feed_layout *layout = &call->feed->layout;
    uint64_t full = 0;
    int64_t frames = layout->record_frames, row = call->row + frame - call->start;
    int status = nat_decode_masks(layout->element, in, (size_t)n, (size_t)layout->payload, (size_t)frames, w->masks,
                                  w->mask_count, w->mask_sums, &full, w->scratch);
    if (status && status != NAT_BAD_NUMBER)
        return fail(w, status, frame, 0, 0);
    if (status || (full && layout->flagged)) {
        /* blocks lie in two frames, or flags were summed: records are alike, and a dead pixel is dead in every frame,
         * so the planes are not tried again */
        w->mask_count = 0;
        return 0;
    }
    for (int64_t i = 0; i < frames; i++)
        nat_pass_put(call->pass, w->part, row + i, w->mask_sums + i * w->mask_count, i ? 0 : full);
    return 1;
}

static int take_stored(struct feed_worker *w, int64_t a, int64_t stop, int64_t record, const uint8_t *in)
{
    struct feed_call *call = w->call;
    const struct feed_layout *layout = &call->feed->layout;
    int64_t n = layout->sizes[record], skipped = (a - record * layout->record_frames) * layout->frame_bytes;
    bool whole = stop - a == layout->record_frames;
    if (w->mask_count && whole) {
        int done = take_planes(w, a, in, n);
        if (done)
            return done < 0 ? -1 : 0;
    }
    uint8_t *out = call->out ? call->out + (a - call->start) * layout->frame_bytes : NULL;
    uint8_t *to = out && whole ? out : room(w, layout->payload);
    if (!to)
        return -1;
    int status = nat_decode(layout->codec, layout->element, in, (size_t)n, to, (size_t)layout->payload, w->scratch);
    if (status)
        return fail(w, status, a, 0, 0);
    size_t bytes = (size_t)((stop - a) * layout->frame_bytes);
    if (out) {
        feed_convert(layout, out, to + skipped, bytes);
        w->block_used = 0;
        return 0;
    }
    feed_convert(layout, to + skipped, to + skipped, bytes);
    return gather(w, a, to + skipped, layout->frame_bytes, stop - a);
}

static int take(struct feed_worker *w, const struct feed_span *span, int64_t a, int64_t b, struct feed_bytes got)
{
    const struct feed_layout *layout = &w->call->feed->layout;
    if (layout->codec == NAT_PLAIN)
        return take_plain(w, span, a, b, got);
    while (a < b) {
        int64_t record = a / layout->record_frames;
        int64_t stop = (record + 1) * layout->record_frames;
        stop = stop < b ? stop : b;
        if (take_stored(w, a, stop, record, got.at + (feed_offset(layout, record) - span->lo)))
            return -1;
        a = stop;
    }
    return 0;
}

/* Hand on frames a:b of a span; 0, or -1 with the first bad frame in w->failure. */
int feed_take(struct feed_worker *w, const struct feed_span *span, int64_t a, int64_t b, struct feed_bytes got)
{
    struct feed_call *call = w->call;
    if (span->file < 0)
        return fail(w, NAT_SHORT, a, 0, -1);
    int64_t missing, whole = feed_first_cut(&call->feed->layout, span, span->lo + got.there, &missing);
    int64_t there = whole < b ? (whole > a ? whole : a) : b;
    w->batch_frames = w->block_used = 0;
    if (take(w, span, a, there, got) || flush(w))
        return -1;
    atomic_fetch_add_explicit(&call->done, there - a, memory_order_relaxed);
    return there < b ? cut(w, span, got) : 0;
}
