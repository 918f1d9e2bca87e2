/* Where frames lie: arithmetic on a layout that was checked when it was made. */
#include "feed.h"

/* What lies between two records is read along up to here: a seek costs a disk as much. */
enum { GAP_BYTES = 64 << 10 };

int64_t feed_offset(const struct feed_layout *layout, int64_t record)
{
    if (layout->offsets)
        return layout->offsets[record];
    return layout->first + record * (layout->lead + layout->payload + layout->tail);
}

int feed_file(const struct feed_layout *layout, int64_t record)
{
    return layout->file_of ? layout->file_of[record] : 0;
}

/* Bytes of a record as it is stored, without its tail. */
int64_t feed_stored(const struct feed_layout *layout, int64_t record)
{
    return layout->sizes ? layout->sizes[record] : layout->lead + layout->payload;
}

/* Records that carry marks are fetched from their first byte on, whichever frame is wanted, so that none goes unchecked. */
bool feed_marked(const struct feed_layout *layout)
{
    return layout->magic_bytes || layout->numbered;
}

static bool written(const struct feed_layout *layout, int64_t record)
{
    return feed_offset(layout, record) >= 0 && feed_stored(layout, record) > 0;
}

/* Byte at which a plain frame's pixels start. */
int64_t feed_frame_at(const struct feed_layout *layout, int64_t frame)
{
    int64_t record = frame / layout->record_frames;
    return feed_offset(layout, record) + layout->lead + (frame - record * layout->record_frames) * layout->frame_bytes;
}

/* The byte after the last one that frame `frame` needs. */
static int64_t end_of(const struct feed_layout *layout, int64_t frame)
{
    if (layout->codec == NAT_PLAIN)
        return feed_frame_at(layout, frame) + layout->frame_bytes;
    int64_t record = frame / layout->record_frames;
    return feed_offset(layout, record) + layout->sizes[record];
}

/* Frames of a plain record from `frame` on that end at `end` at the latest; `last` is the record's end in frames. */
static int64_t fitting(const struct feed_layout *layout, int64_t frame, int64_t last, int64_t end)
{
    int64_t n = (end - feed_frame_at(layout, frame)) / layout->frame_bytes;
    return n < 0 ? 0 : (n < last - frame ? n : last - frame);
}

static int64_t record_stop(const struct feed_layout *layout, int64_t record, int64_t b)
{
    int64_t stop = (record + 1) * layout->record_frames;
    return stop < b ? stop : b;
}

/* Frames from a on, at most to b, that one access of about `limit` bytes fetches: at least one frame (of a compressed
 * layout, one record), and no more than one file. */
struct feed_span feed_span(const struct feed_layout *layout, int64_t a, int64_t b, int64_t limit)
{
    int64_t record = a / layout->record_frames;
    struct feed_span span = {.a = a, .b = record_stop(layout, record, b), .file = feed_file(layout, record)};
    if (!written(layout, record)) {
        span.file = -1;
        return span;
    }
    /* from the middle of a plain record the frames before are not fetched */
    bool middle = layout->codec == NAT_PLAIN && !feed_marked(layout) && a % layout->record_frames;
    span.lo = middle ? feed_frame_at(layout, a) : feed_offset(layout, record);
    if (layout->codec == NAT_PLAIN) {
        int64_t n = fitting(layout, a, span.b, span.lo + limit);
        span.b = a + (n ? n : 1);
    }
    span.hi = end_of(layout, span.b - 1);
    while (span.b < b && span.b % layout->record_frames == 0) {
        record = span.b / layout->record_frames;
        int64_t at = feed_offset(layout, record), stop = record_stop(layout, record, b);
        if (!written(layout, record) || feed_file(layout, record) != span.file || at < span.hi || at - span.hi > GAP_BYTES)
            break;
        if (layout->codec == NAT_PLAIN)
            stop = span.b + fitting(layout, span.b, stop, span.lo + limit);
        if (stop == span.b || end_of(layout, stop - 1) - span.lo > limit)
            break;
        span.b = stop;
        span.hi = end_of(layout, stop - 1);
    }
    /* the kernels take 16 or 4 frames at a time; what is left of a span would go one by one */
    int64_t n = span.b - a, odd = n % (n < 16 ? 4 : 16);
    if (layout->codec == NAT_PLAIN && !feed_marked(layout) && span.b < b && odd < n && odd) {
        span.b -= odd;
        span.hi = end_of(layout, span.b - 1);
    }
    return span;
}

/* The first frame of a span that needs a byte at `end` of the file or behind it, span->b if there is none. */
int64_t feed_first_cut(const struct feed_layout *layout, const struct feed_span *span, int64_t end, int64_t *missing)
{
    if (span->hi <= end)
        return span->b;
    int64_t lo = span->a, hi = span->b - 1; /* ends grow within a span */
    while (lo < hi) {
        int64_t middle = lo + (hi - lo) / 2;
        if (end_of(layout, middle) > end)
            hi = middle;
        else
            lo = middle + 1;
    }
    *missing = end_of(layout, lo) - end;
    return lo;
}

/* The most bytes that one frame (of a compressed layout, one record) of a:b takes. */
int64_t feed_longest(const struct feed_layout *layout, int64_t a, int64_t b)
{
    if (layout->codec == NAT_PLAIN)
        return layout->lead + (feed_marked(layout) ? layout->payload : layout->frame_bytes);
    int64_t longest = 0;
    for (int64_t record = a / layout->record_frames; record * layout->record_frames < b; record++)
        longest = layout->sizes[record] > longest ? layout->sizes[record] : longest;
    return longest;
}
