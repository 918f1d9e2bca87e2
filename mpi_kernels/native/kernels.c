/* Life of a pass: the terms of a recipe, the accumulators of its threads, and how these become the arrays asked for.
 *
 * Integers are exact: 32-bit lanes are emptied before they can overflow, squares are kept as two words.  Floats are
 * added in float64: the pixels of a frame in an order that depends on the frame's size and the instruction set alone,
 * the frames of a pixel in fixed groups, whose sums are added with the rounding error kept (high + low).
 */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define GROUP_BYTES (4 << 20)
#define GROUP_LEAST 4
#define GROUP_MOST 1024

void *nat_aligned(size_t bytes)
{
    size_t whole = (bytes + 63) / 64 * 64;
    void *made = aligned_alloc(64, whole ? whole : 64);
    if (made)
        memset(made, 0, whole);
    return made;
}

/* ---- a pass ---- */

static int64_t group_of(size_t frame_bytes)
{
    int64_t group = GROUP_LEAST;
    while (group < GROUP_MOST && 2 * (size_t)group * frame_bytes <= GROUP_BYTES)
        group *= 2;
    return group;
}

/* The terms are added next, then nat_pass_ready.  NULL: out of memory.  The sizes must fit: pixels * 8 in size_t. */
nat_pass *nat_pass_new(const struct nat_ops *ops, int kind, int64_t height, int64_t width, int64_t rows)
{
    static const size_t cell_bytes[] = {1, 2, 2, 2, 4};
    static const uint64_t largest[] = {UINT8_MAX, UINT16_MAX, UINT32_MAX, 32768, 0};
    nat_pass *pass = calloc(1, sizeof *pass);
    if (!pass)
        return NULL;
    pthread_mutex_init(&pass->lock, NULL);
    pthread_mutex_init(&pass->busy, NULL);
    pass->ops = ops;
    pass->kind = kind;
    pass->height = height;
    pass->width = width;
    pass->rows = rows;
    pass->pixels = (size_t)(height * width);
    pass->cells = pass->pixels * (kind == NAT_U32 ? 2 : 1);
    pass->cell_bytes = cell_bytes[kind];
    pass->frame_bytes = pass->cells * pass->cell_bytes;
    pass->vector = ops->vector[kind];
    pass->vectors = (pass->cells + pass->vector - 1) / pass->vector;
    pass->padded = pass->vectors * pass->vector;
    pass->bias = kind == NAT_U16 || kind == NAT_U32 ? 0x80008000u : 0;
    pass->largest = largest[kind];
    pass->group = group_of(pass->frame_bytes);
    pass->masks_only = kind == NAT_U8 || kind == NAT_U16 || kind == NAT_U32;
    if (nat_weights_begin(pass)) {
        nat_pass_free(pass);
        return NULL;
    }
    return pass;
}

/* Bits of a column; of a uint32, every second cell is a pixel. */
static uint8_t *bits_of(const nat_pass *pass, const int16_t *dense)
{
    uint8_t *bits = nat_aligned((pass->pixels + 7) / 8);
    size_t step = pass->kind == NAT_U32 ? 2 : 1;
    for (size_t p = 0; bits && p < pass->pixels; p++)
        if (dense[p * step])
            bits[p / 8] = (uint8_t)(bits[p / 8] | 1 << p % 8);
    return bits;
}

static int masks_ready(nat_pass *pass)
{
    pass->masks_only &= !pass->sum && !pass->squares && !pass->max && pass->result_count > 1;
    if (!pass->masks_only)
        return NAT_OK;
    pass->bits = calloc(pass->result_count, sizeof *pass->bits);
    if (!pass->bits)
        return NAT_NO_MEMORY;
    for (pass->bit_count = 0; pass->bit_count < pass->result_count; pass->bit_count++) {
        const struct nat_result *result = &pass->results[pass->bit_count];
        const int16_t *dense = (const int16_t *)(const void *)pass->main.dense;
        if (result->terms) /* the low halves come first */
            dense += pass->terms[result->first].column * pass->main.cells;
        uint8_t *bits = result->terms ? bits_of(pass, dense) : nat_aligned((pass->pixels + 7) / 8);
        if (!bits)
            return NAT_NO_MEMORY;
        pass->bits[pass->bit_count] = bits;
    }
    return NAT_OK;
}

/* Take squares of floats less these, one for each pixel.  0, or NAT_NO_MEMORY. */
int nat_pass_level(nat_pass *pass, const double *level)
{
    pass->level = nat_aligned(pass->padded * sizeof *pass->level);
    if (!pass->level)
        return NAT_NO_MEMORY;
    memcpy(pass->level, level, pass->pixels * sizeof *level);
    return NAT_OK;
}

/* All terms are there: pack the weights, plan the labels. */
int nat_pass_ready(nat_pass *pass)
{
    int error = masks_ready(pass);
    if (!error)
        error = nat_weights_pack(pass);
    if (!error)
        error = nat_labels_ready(pass);
    free(pass->main.dense);
    free(pass->weighted.dense);
    pass->main.dense = pass->weighted.dense = NULL;
    return error;
}

static void part_free(nat_part *part)
{
    if (!part)
        return;
    free(part->sum);
    free(part->sum_high);
    free(part->sum_low);
    free(part->max);
    free(part->squares);
    free(part->squares_high);
    free(part->squares_low);
    free(part->words);
    free(part->tails);
    free(part->widened);
    free(part->lanes);
    free(part->scratch);
    free(part);
}

void nat_pass_free(nat_pass *pass)
{
    if (!pass)
        return;
    for (int i = 0; i < PARTS; i++)
        part_free(pass->parts[i]);
    nat_set_free(&pass->main);
    nat_set_free(&pass->weighted);
    nat_labels_free(pass);
    for (size_t i = 0; i < pass->bit_count; i++)
        free(pass->bits[i]);
    free(pass->bits);
    free(pass->level);
    free(pass->results);
    free(pass->terms);
    free(pass->segments);
    pthread_mutex_destroy(&pass->lock);
    pthread_mutex_destroy(&pass->busy);
    free(pass);
}

size_t nat_frame_bytes(const nat_pass *pass)
{
    return pass->frame_bytes;
}

int64_t nat_pass_rows(const nat_pass *pass)
{
    return pass->rows;
}

int nat_pass_kind(const nat_pass *pass)
{
    return pass->kind;
}

int64_t nat_group(const nat_pass *pass)
{
    return pass->group;
}

int nat_pass_masks(const nat_pass *pass, const uint8_t *const **bits)
{
    *bits = (const uint8_t *const *)pass->bits;
    return pass->masks_only ? (int)pass->bit_count : 0;
}

void nat_pass_put(nat_pass *pass, nat_part *part, int64_t row, const uint64_t *sums, uint64_t full)
{
    for (size_t i = 1; i < pass->result_count; i++)
        pass->results[i].out[(size_t)row * pass->results[i].stride] = sums[i];
    part->quality.pixels += pass->pixels;
    part->quality.saturated += full;
    part->quality.empty_frames += !sums[0];
}

/* ---- accumulators of a thread ---- */

static void lowest(const nat_pass *pass, uint8_t *max)
{
    for (size_t p = 0; p < pass->padded; p++)
        if (pass->kind == NAT_F32)
            ((float *)max)[p] = -INFINITY;
        else if (pass->kind == NAT_U16 || pass->kind == NAT_I16)
            ((int16_t *)max)[p] = INT16_MIN;
        else
            memset(max + p * pass->cell_bytes, 0, pass->cell_bytes);
}

static size_t lane_bytes(const nat_pass *pass)
{
    size_t bytes = 0;
    for (size_t i = 0; i < pass->label_count; i++)
        bytes += pass->labels[i].bins * pass->ops->lane_bytes * (pass->kind == NAT_F32 ? 2 : 1);
    return bytes;
}

/* An array if it is wanted; `missing` is set where memory is. */
static void *wanted(int is, size_t bytes, int *missing)
{
    void *made = is ? nat_aligned(bytes) : NULL;
    *missing |= is && !made;
    return made;
}

static nat_part *part_new(nat_pass *pass)
{
    nat_part *part = calloc(1, sizeof *part);
    if (!part)
        return NULL;
    const int floats = pass->kind == NAT_F32, sum = pass->sum != NULL, squares = pass->squares != NULL;
    const size_t doubles = pass->padded * 8, longest = pass->longest * pass->vector;
    int missing = 0;
    part->pass = pass;
    part->next = -1;
    part->sum = wanted(sum, pass->padded * (floats ? 8 : 4), &missing);
    part->sum_high = wanted(sum && floats, doubles, &missing);
    part->sum_low = wanted(sum && floats, doubles, &missing);
    part->max = wanted(pass->max != NULL, pass->padded * pass->cell_bytes, &missing);
    part->squares = wanted(squares, doubles, &missing);
    part->squares_high = wanted(squares && floats, doubles, &missing);
    part->squares_low = wanted(squares && floats, doubles, &missing);
    part->words = wanted(1, BUNDLE * (pass->main.count + pass->weighted.count) * 8, &missing);
    part->tails = wanted(1, BUNDLE * pass->vector * pass->cell_bytes, &missing);
    part->widened = wanted(!floats && pass->weighted.count, QUAD * longest * sizeof(float), &missing);
    part->lanes = wanted(1, lane_bytes(pass), &missing);
    part->scratch = wanted(1, TILE * 64, &missing);
    if (missing) {
        part_free(part);
        return NULL;
    }
    if (part->max)
        lowest(pass, part->max);
    return part;
}

nat_part *nat_pass_part(nat_pass *pass, int index)
{
    if (index < 0 || index >= PARTS)
        return NULL;
    if (!pass->parts[index])
        pass->parts[index] = part_new(pass);
    return pass->parts[index];
}

/* Where the lane of a cell is: the unpack instructions take from each 16 bytes the low cells first. */
static size_t lane_of(const nat_pass *pass, size_t cell)
{
    if (!pass->ops->spread)
        return cell;
    size_t vector = cell / pass->vector, in = cell % pass->vector, chunk = pass->kind == NAT_U8 ? 16 : 8;
    size_t lanes = pass->vector / (chunk / 4); /* of one vector of sums */
    return vector * pass->vector + in % chunk / 4 * lanes + in / chunk * 4 + in % 4;
}

static void flush_sum(nat_part *part)
{
    const nat_pass *pass = part->pass;
    const uint64_t bias = pass->bias ? BIAS * (uint64_t)part->frames : 0;
    int32_t *lanes = part->sum;
    uint64_t *out = pass->sum;
    for (size_t p = 0; p < pass->pixels; p++)
        if (pass->kind == NAT_U32)
            out[p] += (uint64_t)lanes[lane_of(pass, 2 * p)] + bias +
                      (((uint64_t)lanes[lane_of(pass, 2 * p + 1)] + bias) << 16);
        else
            out[p] += (uint64_t)lanes[lane_of(pass, p)] + bias;
    memset(lanes, 0, pass->padded * sizeof *lanes);
}

static void flush_squares(nat_part *part)
{
    const nat_pass *pass = part->pass;
    uint64_t *high = pass->squares, *low = high + pass->pixels, *words = part->squares;
    for (size_t p = 0; p < pass->pixels; p++) {
        low[p] += words[p] & UINT32_MAX;
        high[p] += (words[p] >> 32) + (low[p] >> 32);
        if (pass->kind == NAT_U32)
            high[p] += words[pass->padded / 2 + p];
        low[p] &= UINT32_MAX;
    }
    memset(words, 0, pass->padded * sizeof *words);
}

/* Add high + low to a pair of arrays, with the rounding error kept; see fold in kernels_plain.h. */
static void flush_pair(const nat_pass *pass, double *high, double *low, double *to)
{
    pass->ops->fold(high, to, to + pass->pixels, pass->pixels);
    for (size_t p = 0; p < pass->pixels; p++)
        to[pass->pixels + p] += low[p];
    memset(low, 0, pass->padded * sizeof *low);
}

#define FLUSH_MAX(TYPE, FLIP)                                                                                          \
    do {                                                                                                               \
        TYPE *out = pass->max;                                                                                         \
        for (size_t p = 0; p < pass->pixels; p++) {                                                                    \
            TYPE found = (TYPE)(((const TYPE *)(const void *)part->max)[p] ^ (FLIP));                                  \
            out[p] = found > out[p] ? found : out[p];                                                                  \
        }                                                                                                              \
    } while (0)

static void flush_max(nat_part *part)
{
    const nat_pass *pass = part->pass;
    const float *row = (const float *)(const void *)part->max;
    float *floats = pass->max;
    switch (pass->kind) {
    case NAT_U8:
        FLUSH_MAX(uint8_t, 0);
        break;
    case NAT_U16:
        FLUSH_MAX(uint16_t, BIAS);
        break;
    case NAT_U32:
        FLUSH_MAX(uint32_t, 0);
        break;
    case NAT_I16:
        FLUSH_MAX(int16_t, 0);
        break;
    default:
        for (size_t p = 0; p < pass->pixels; p++)
            if (row[p] > floats[p] || isnan(row[p]))
                floats[p] = row[p];
    }
}

/* The group of frames in hand is over. */
void nat_part_fold(nat_part *part)
{
    const struct nat_pass *pass = part->pass;
    if (part->sum)
        pass->ops->fold(part->sum, part->sum_high, part->sum_low, pass->padded);
    if (part->squares)
        pass->ops->fold((double *)part->squares, part->squares_high, part->squares_low, pass->padded);
}

/* Everything a part has gathered to the arrays; it can go on afterwards. */
void nat_part_flush(nat_part *part)
{
    nat_pass *pass = part->pass;
    pthread_mutex_lock(&pass->lock);
    if (pass->kind == NAT_F32) {
        nat_part_fold(part);
        if (part->sum)
            flush_pair(pass, part->sum_high, part->sum_low, pass->sum);
        if (part->squares)
            flush_pair(pass, part->squares_high, part->squares_low, pass->squares);
    } else {
        if (part->sum)
            flush_sum(part);
        if (part->squares)
            flush_squares(part);
    }
    if (part->max)
        flush_max(part);
    part->frames = 0;
    pass->quality.pixels += part->quality.pixels;
    pass->quality.not_finite += part->quality.not_finite;
    pass->quality.saturated += part->quality.saturated;
    pass->quality.empty_frames += part->quality.empty_frames;
    part->quality = (struct nat_quality){0};
    pthread_mutex_unlock(&pass->lock);
}

void nat_pass_flush(nat_pass *pass)
{
    pthread_mutex_lock(&pass->busy);
    for (int i = 0; i < PARTS; i++)
        if (pass->parts[i])
            nat_part_flush(pass->parts[i]);
    pthread_mutex_unlock(&pass->busy);
}

/* Of all frames so far, flushed or not. */
struct nat_quality nat_pass_quality(nat_pass *pass)
{
    pthread_mutex_lock(&pass->busy);
    struct nat_quality quality = pass->quality;
    for (int i = 0; i < PARTS; i++)
        if (pass->parts[i]) {
            const struct nat_quality *part = &pass->parts[i]->quality;
            quality.pixels += part->pixels;
            quality.not_finite += part->not_finite;
            quality.saturated += part->saturated;
            quality.empty_frames += part->empty_frames;
        }
    pthread_mutex_unlock(&pass->busy);
    return quality;
}
