/* The way of frames through the kernels: bundles of frames, segment by segment, every term while they are in cache. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define STREAM_BYTES 262144 /* weights of a segment beyond which all frames go through one pass before the next */

/* A few frames at one segment. */
struct bundle {
    nat_part *part;
    const struct nat_segment *segment;
    const uint8_t *frames[BUNDLE]; /* where the segment begins; beyond the n-th: the last one again */
    size_t n;
    int64_t row;
    size_t stride;
    int more; /* frames follow */
};

static uint64_t *words_of(const struct bundle *b, size_t frame)
{
    const nat_pass *pass = b->part->pass;
    return b->part->words + frame * (pass->main.count + pass->weighted.count);
}

/* Weights of pass `i` from a cell on; `constant` of its columns need none. */
static const uint8_t *weights_of(const struct nat_set *set, size_t i, size_t constant, size_t cell)
{
    return set->packed + set->offset[i] + cell / set->vector * (set->width[i] - constant) * set->unit;
}

/* Pixels with the largest value, counted only where a segment has one. */
static void count_full(struct bundle *b, size_t from, size_t frames, uint32_t top)
{
    static const uint32_t full[] = {UINT8_MAX, INT16_MAX, UINT32_MAX, INT16_MAX}; /* after the bias */
    nat_pass *pass = b->part->pass;
    if (pass->kind == NAT_F32 || top != full[pass->kind])
        return;
    for (size_t i = from; i < from + frames; i++)
        b->part->quality.saturated += pass->ops->full(pass->kind, b->frames[i], b->segment->vectors * pass->vector);
}

/* How far ahead a call for a few frames may fetch: the next ones, where they follow in memory and nobody else does. */
static size_t ahead_of(const struct bundle *b, size_t from, size_t frames)
{
    int here = b->more || from + frames < b->n;
    return b->segment->tail || b->part->pass->label_count || !here ? 0 : frames * b->stride;
}

/* Columns of pass `i` of the main set, for the frames of one call. */
static void main_pass(struct bundle *b, size_t i, size_t from, size_t frames)
{
    nat_part *part = b->part;
    const nat_pass *pass = part->pass;
    const size_t cell = b->segment->vector * pass->vector;
    struct nat_visit visit = {.vectors = b->segment->vectors, .bias = pass->bias};
    size_t column = 0;
    for (size_t k = 0; k < i; k++)
        column += pass->main.width[k];
    for (size_t f = 0; f < frames; f++) {
        visit.frame[f] = b->frames[from + f];
        visit.out[f] = words_of(b, from + f) + column;
    }
    visit.weights = weights_of(&pass->main, i, !i, cell);
    const int last = i + 1 == pass->main.passes && (!pass->weighted.passes || pass->merged || part->widened);
    if (last && (i || pass->ops->prefetch))
        visit.ahead = ahead_of(b, from, frames);
    if (i) {
        pass->ops->more(pass->kind, frames, pass->main.width[i], &visit);
        return;
    }
    visit.max = part->max ? part->max + cell * pass->cell_bytes : NULL;
    visit.sum = part->sum ? (uint8_t *)part->sum + cell * (pass->kind == NAT_F32 ? 8 : 4) : NULL;
    if (pass->merged) {
        visit.extra = weights_of(&pass->weighted, 0, 0, cell);
        for (size_t f = 0; f < frames; f++)
            visit.extra_out[f] = words_of(b, from + f) + pass->main.count;
        pass->ops->both(frames, pass->main.count, pass->weighted.count, &visit);
        return;
    }
    pass->ops->first(pass->kind, frames, pass->main.width[0], &visit);
    count_full(b, from, frames, visit.top);
}

/* Columns of float weights; whole pixels are made floats first. */
static void weighted_passes(struct bundle *b, size_t from, size_t frames)
{
    nat_part *part = b->part;
    const nat_pass *pass = part->pass;
    const size_t cells = b->segment->vectors * pass->vector;
    struct nat_visit visit = {.vectors = cells / pass->ops->vector[NAT_F32]};
    for (size_t f = 0; f < frames; f++) {
        visit.frame[f] = b->frames[from + f];
        visit.out[f] = words_of(b, from + f) + pass->main.count;
        if (part->widened) {
            pass->ops->widen(pass->kind, visit.frame[f], part->widened + f * cells, cells);
            visit.frame[f] = (const uint8_t *)(part->widened + f * cells);
        }
    }
    for (size_t i = 0; i < pass->weighted.passes; i++) {
        visit.weights = weights_of(&pass->weighted, i, 0, b->segment->vector * pass->vector);
        visit.ahead = part->widened || i + 1 < pass->weighted.passes ? 0 : ahead_of(b, from, frames);
        pass->ops->weighted(frames, pass->weighted.width[i], &visit);
        for (size_t f = 0; f < frames; f++)
            visit.out[f] += pass->weighted.width[i];
    }
}

static void squares(struct bundle *b)
{
    nat_part *part = b->part;
    const nat_pass *pass = part->pass;
    const size_t cell = b->segment->vector * pass->vector, cells = b->segment->vectors * pass->vector;
    uint64_t *low = part->squares + (pass->kind == NAT_U32 ? cell / 2 : cell);
    uint64_t *high = pass->kind == NAT_U32 ? low + pass->padded / 2 : NULL;
    const double *level = pass->level ? pass->level + cell : NULL;
    for (size_t i = 0; i < b->n; i += QUAD) {
        size_t frames = b->n - i < QUAD ? b->n - i : QUAD;
        pass->ops->squares(pass->kind, b->frames + i, frames, cells, level, low, high);
    }
}

static void columns(struct bundle *b)
{
    const nat_pass *pass = b->part->pass;
    const struct nat_set *set = &pass->main;
    const size_t quad = pass->ops->quad;
    const int stream = set->count * set->unit * b->segment->vectors > STREAM_BYTES;
    for (size_t outer = 0; outer < (stream ? set->passes : 1); outer++)
        for (size_t i = 0, frames; i < b->n; i += frames) {
            frames = b->n - i < quad ? 1 : quad;
            for (size_t k = stream ? outer : 0; k < (stream ? outer + 1 : set->passes); k++)
                main_pass(b, k, i, frames);
            if (!outer && pass->weighted.count && !pass->merged)
                weighted_passes(b, i, frames);
        }
}

/* ---- labels ---- */

static uint64_t *rows_of(const struct nat_labels *set, int64_t row)
{
    return set->out + (size_t)row * (size_t)set->regions;
}

static size_t set_lane_bytes(const nat_pass *pass, const struct nat_labels *set)
{
    return set->bins * pass->ops->lane_bytes * (pass->kind == NAT_F32 ? 2 : 1);
}

static void labels_begin(struct bundle *b)
{
    const nat_pass *pass = b->part->pass;
    for (size_t i = 0; i < pass->label_count; i++)
        for (size_t f = 0; f < b->n; f++)
            memcpy(rows_of(&pass->labels[i], b->row) + f * (size_t)pass->labels[i].regions, pass->labels[i].start,
                   (size_t)pass->labels[i].regions * sizeof(uint64_t));
}

static void labels_spill(struct bundle *b)
{
    const nat_pass *pass = b->part->pass;
    uint8_t *lanes = b->part->lanes;
    if (pass->ops->lane_bytes)
        for (size_t i = 0; i < pass->label_count; i++) {
            pass->ops->spill(pass->kind, &pass->labels[i], b->n, lanes, rows_of(&pass->labels[i], b->row));
            lanes += set_lane_bytes(pass, &pass->labels[i]);
        }
}

static void labels_add(struct bundle *b)
{
    const nat_pass *pass = b->part->pass;
    const size_t cells = b->segment->tail ? b->segment->tail / pass->cell_bytes : b->segment->vectors * pass->vector;
    const size_t ahead = b->more && !b->segment->tail ? b->n * b->stride : 0;
    uint8_t *lanes = b->part->lanes;
    for (size_t i = 0; i < pass->label_count; i++) {
        const struct nat_labels *set = &pass->labels[i];
        pass->ops->labels(pass->kind, set, b->segment, b->frames, b->n,
                          pass->ops->lane_bytes ? b->segment->vectors * pass->vector : cells, i ? 0 : ahead, lanes,
                          b->part->scratch, rows_of(set, b->row));
        lanes += set_lane_bytes(pass, set);
    }
}

/* ---- results ---- */

static void store(const nat_pass *pass, const struct nat_result *result, const uint64_t *words, int64_t row)
{
    const struct nat_term *term = pass->terms + result->first;
    uint64_t *out = result->out + (size_t)row * result->stride;
    if (result->outcome == FLOAT) {
        *out = words[term->column + (term->weighted ? pass->main.count : 0)];
        return;
    }
    uint64_t sum = result->constant;
    for (size_t i = 0; i < result->terms; i++)
        sum += term[i].factor * words[term[i].column];
    double number = (double)(int64_t)sum;
    if (result->outcome == WHOLE_AS_FLOAT)
        memcpy(out, &number, sizeof number);
    else
        *out = sum;
}

static int anything(const uint8_t *frame, const nat_pass *pass)
{
    if (pass->kind != NAT_F32) {
        for (size_t i = 0; i < pass->frame_bytes; i++)
            if (frame[i])
                return 1;
        return 0;
    }
    for (size_t p = 0; p < pass->pixels; p++)
        if (((const any_f32 *)frame)[p] != 0.0f)
            return 1;
    return 0;
}

/* A frame of floats with NaN or infinity: count them, and let NaN win in the maxima, as in numpy. */
static void not_finite(nat_part *part, const any_f32 *frame)
{
    float *max = (float *)part->max;
    for (size_t p = 0; p < part->pass->pixels; p++) {
        part->quality.not_finite += !isfinite(frame[p]);
        if (max && isnan(frame[p]))
            max[p] = frame[p];
    }
}

static void finish(struct bundle *b, const uint8_t *frames, size_t stride)
{
    nat_part *part = b->part;
    const nat_pass *pass = part->pass;
    for (size_t f = 0; f < b->n; f++) {
        const uint64_t *words = words_of(b, f);
        uint64_t total = 0;
        double number = 0.0;
        struct nat_result first = pass->results[0];
        first.out = &total;
        first.stride = 0;
        store(pass, &first, words, 0);
        for (size_t i = 1; i < pass->result_count; i++)
            store(pass, &pass->results[i], words, b->row + (int64_t)f);
        if (pass->kind == NAT_F32) {
            memcpy(&number, &total, sizeof number);
            total = number != 0.0;
            if (!isfinite(number))
                not_finite(part, (const any_f32 *)(frames + f * stride));
        }
        int empty = !total;
        if (empty && (pass->kind == NAT_F32 || pass->kind == NAT_I16))
            empty = !anything(frames + f * stride, pass);
        part->quality.empty_frames += empty;
    }
    part->quality.pixels += b->n * pass->pixels;
}

/* ---- frames ---- */

/* Where the segment begins in each frame; the last cells are copied, so that whole vectors can be read. */
static void look_at(struct bundle *b, const struct nat_segment *segment, const uint8_t *frames, size_t stride)
{
    const nat_pass *pass = b->part->pass;
    const size_t at = segment->vector * pass->vector * pass->cell_bytes, bytes = pass->vector * pass->cell_bytes;
    b->segment = segment;
    for (size_t f = 0; f < b->n; f++) {
        b->frames[f] = frames + f * stride + at;
        if (segment->tail) {
            memcpy(b->part->tails + f * bytes, b->frames[f], segment->tail);
            b->frames[f] = b->part->tails + f * bytes;
        }
    }
    for (size_t f = b->n; f < BUNDLE; f++)
        b->frames[f] = b->frames[b->n - 1];
}

static void add_bundle(nat_part *part, const uint8_t *frames, size_t stride, size_t n, int64_t row, int more)
{
    const nat_pass *pass = part->pass;
    struct bundle b = {.part = part, .n = n, .row = row, .stride = stride, .more = more};
    size_t held = 0; /* cells in the lanes of labels */
    memset(part->words, 0, n * (pass->main.count + pass->weighted.count) * sizeof *part->words);
    labels_begin(&b);
    for (size_t s = 0; s < pass->segment_count; s++) {
        const struct nat_segment *segment = &pass->segments[s];
        const size_t cells = segment->vectors * pass->vector;
        look_at(&b, segment, frames, stride);
        columns(&b);
        if (part->squares)
            squares(&b);
        if (pass->label_count) {
            if (held + cells > 65535 && pass->kind != NAT_F32) { /* 65535 * 32768 < 2**31 */
                labels_spill(&b);
                held = 0;
            }
            held += cells;
            labels_add(&b);
        }
    }
    labels_spill(&b);
    finish(&b, frames, stride);
}

int nat_add(nat_pass *pass, nat_part *part, const void *frames, size_t stride, int64_t n, int64_t row)
{
    if (n < 0 || row < 0 || n > pass->rows - row)
        return NAT_BAD_NUMBER;
    const uint8_t *at = frames;
    while (n) {
        const int64_t in_group = row % pass->group;
        int64_t now = n < BUNDLE ? n : BUNDLE;
        if (pass->kind == NAT_F32) {
            if (!in_group || row != part->next)
                nat_part_fold(part);
            now = now < pass->group - in_group ? now : pass->group - in_group;
        } else if (part->frames + now > LANE_FRAMES) {
            nat_part_flush(part);
        }
        add_bundle(part, at, stride, (size_t)now, row, n > now);
        part->frames += now;
        at += (size_t)now * stride;
        row += now;
        n -= now;
        part->next = row;
    }
    return NAT_OK;
}

/* ---- several threads ---- */

struct worker {
    nat_pass *pass;
    nat_part *part;
    const uint8_t *frames;
    int64_t n, row, index, threads;
    int error;
    pthread_t thread;
    int started;
};

/* Every `threads`-th group of frames, so that a group goes to the same part however the frames are split into calls. */
static void *work(void *argument)
{
    struct worker *w = argument;
    const int64_t group = w->pass->group, end = w->row + w->n;
    for (int64_t g = w->row / group; g * group < end && !w->error; g++) {
        if (g % w->threads != w->index)
            continue;
        int64_t from = g * group > w->row ? g * group : w->row;
        int64_t to = (g + 1) * group < end ? (g + 1) * group : end;
        w->error = nat_add(w->pass, w->part, w->frames + (size_t)(from - w->row) * w->pass->frame_bytes,
                           w->pass->frame_bytes, to - from, from);
    }
    return NULL;
}

/* Add frames that lie one after the other; the calling thread works as well. */
int nat_pass_run(nat_pass *pass, const uint8_t *frames, int64_t n, int64_t row, int threads)
{
    if (n < 0 || row < 0 || n > pass->rows - row || threads < 1 || threads > PARTS)
        return NAT_BAD_NUMBER;
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    if (!workers)
        return NAT_NO_MEMORY;
    pthread_mutex_lock(&pass->busy);
    int error = NAT_OK;
    for (int t = 0; t < threads; t++) {
        nat_part *part = nat_pass_part(pass, t);
        workers[t] = (struct worker){pass, part, frames, n, row, t, threads, NAT_OK, 0, 0};
        error = part ? error : NAT_NO_MEMORY;
    }
    for (int t = 1; !error && t < threads; t++)
        workers[t].started = !pthread_create(&workers[t].thread, NULL, work, &workers[t]);
    for (int t = 0; !error && t < threads; t++)
        if (!workers[t].started)
            work(&workers[t]);
    for (int t = 0; t < threads; t++) {
        if (workers[t].started)
            pthread_join(workers[t].thread, NULL);
        error = error ? error : workers[t].error;
    }
    pthread_mutex_unlock(&pass->busy);
    free(workers);
    return error;
}
