/* Masks and moments as columns of weights that the machine can multiply. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static int is_whole(const nat_pass *pass)
{
    return pass->kind != NAT_F32;
}

/* The array with room for one more item, perhaps elsewhere; NULL: out of memory, the old one stays. */
static void *grown(void *array, size_t count, size_t *room, size_t item)
{
    if (count < *room)
        return array;
    size_t wanted = *room ? 2 * *room : 8;
    void *made = realloc(array, wanted * item);
    if (made)
        *room = wanted;
    return made;
}

/* Number of a column, an old one if its cells are equal; below 0: NAT_NO_MEMORY. */
static int64_t set_add(struct nat_set *set, const void *row)
{
    size_t bytes = set->cells * set->item;
    for (size_t k = 0; k < set->count; k++)
        if (!memcmp(set->dense + k * bytes, row, bytes))
            return (int64_t)k;
    size_t room = set->room;
    uint8_t *dense = grown(set->dense, set->count, &room, bytes);
    if (!dense)
        return NAT_NO_MEMORY;
    set->dense = dense;
    size_t again = set->room;
    int *largest = grown(set->largest, set->count, &again, sizeof *largest);
    if (!largest)
        return NAT_NO_MEMORY;
    set->largest = largest;
    int64_t *sums = grown(set->sums, set->count, &set->room, sizeof *sums);
    if (!sums)
        return NAT_NO_MEMORY;
    set->sums = sums;
    memcpy(set->dense + set->count * bytes, row, bytes);
    int64_t sum = 0;
    int most = 0;
    for (size_t p = 0; set->item == sizeof(int16_t) && p < set->cells; p++) {
        int weight = ((const int16_t *)row)[p], size = abs(weight);
        sum += weight;
        most = size > most ? size : most;
    }
    set->sums[set->count] = sum;
    set->largest[set->count] = most;
    return (int64_t)set->count++;
}

static int term_add(nat_pass *pass, int64_t column, int weighted, uint64_t factor)
{
    if (column < 0)
        return (int)column;
    struct nat_term *terms = grown(pass->terms, pass->term_count, &pass->term_room, sizeof *terms);
    if (!terms)
        return NAT_NO_MEMORY;
    pass->terms = terms;
    struct nat_result *result = &pass->results[pass->result_count - 1];
    pass->terms[pass->term_count++] = (struct nat_term){(size_t)column, weighted, factor};
    result->terms++;
    if (pass->bias && !weighted)
        result->constant += factor * ((uint64_t)BIAS * (uint64_t)pass->main.sums[column]);
    return NAT_OK;
}

static int result_add(nat_pass *pass, enum nat_outcome outcome, uint64_t *out, size_t stride)
{
    struct nat_result *results = grown(pass->results, pass->result_count, &pass->result_room, sizeof *results);
    if (!results)
        return NAT_NO_MEMORY;
    pass->results = results;
    pass->results[pass->result_count++] = (struct nat_result){outcome, out, stride, pass->term_count, 0, 0};
    return NAT_OK;
}

/* Put whole weights of pixels into cells: of a uint32, the low or the high half. */
static void spread(const nat_pass *pass, const int16_t *digits, size_t half, int16_t *cells)
{
    size_t step = pass->kind == NAT_U32 ? 2 : 1;
    if (step > 1)
        memset(cells, 0, pass->cells * sizeof *cells);
    for (size_t p = 0; p < pass->pixels; p++)
        cells[p * step + half] = digits[p];
}

/* The lowest digit of every weight, which is taken off; base 128, from -64 to 63, unless all fit the multiplier as
 * they are.  Returns 0 when nothing is left. */
static int take_digits(const nat_pass *pass, int64_t *weights, int16_t *digits)
{
    const int most = pass->kind == NAT_U8 ? pass->ops->digit8 : pass->ops->digit16;
    int64_t low = 0, high = 0;
    for (size_t p = 0; p < pass->pixels; p++) {
        low = weights[p] < low ? weights[p] : low;
        high = weights[p] > high ? weights[p] : high;
    }
    if (!low && !high)
        return 0;
    if (low >= -most && high <= most) {
        for (size_t p = 0; p < pass->pixels; p++)
            digits[p] = (int16_t)weights[p];
        memset(weights, 0, pass->pixels * sizeof *weights);
        return 1;
    }
    for (size_t p = 0; p < pass->pixels; p++) {
        int64_t digit = ((weights[p] & 127) ^ 64) - 64;
        digits[p] = (int16_t)digit;
        weights[p] = weights[p] / 128 + (weights[p] % 128 - digit) / 128;
    }
    return 1;
}

/* Add factor * (sum of pixels by whole weights) to the result in hand; `weights` are used up. */
static int whole_add(nat_pass *pass, int64_t *weights, uint64_t factor)
{
    int16_t *digits = malloc(pass->pixels * sizeof *digits), *cells = malloc(pass->cells * sizeof *cells);
    int error = digits && cells ? NAT_OK : NAT_NO_MEMORY;
    for (uint64_t scale = factor; !error && take_digits(pass, weights, digits); scale *= 128)
        for (size_t half = 0; !error && half < (pass->kind == NAT_U32 ? 2 : 1); half++) {
            spread(pass, digits, half, cells);
            error = term_add(pass, set_add(&pass->main, cells), 0, half ? scale << 16 : scale);
        }
    free(digits);
    free(cells);
    return error;
}

/* The same for floats: a mask where all weights are 0 or 1, else weights. */
static int float_add(nat_pass *pass, const double *weights)
{
    int binary = !is_whole(pass), error = NAT_OK;
    for (size_t p = 0; binary && p < pass->pixels; p++)
        binary = weights[p] == 0.0 || weights[p] == 1.0;
    void *cells = calloc(pass->cells, sizeof(double));
    if (!cells)
        return NAT_NO_MEMORY;
    if (binary) {
        for (size_t p = 0; p < pass->pixels; p++)
            ((uint8_t *)cells)[p] = weights[p] != 0.0;
        error = term_add(pass, set_add(&pass->main, cells), 0, 1);
    } else {
        size_t step = pass->kind == NAT_U32 ? 2 : 1;
        for (size_t p = 0; p < pass->pixels; p++) {
            ((double *)cells)[p * step] = weights[p];
            if (step > 1)
                ((double *)cells)[2 * p + 1] = weights[p] * 65536.0;
        }
        error = term_add(pass, set_add(&pass->weighted, cells), 1, 1);
    }
    free(cells);
    return error;
}

/* Whether weights are whole and sum |w| * (largest pixel) stays below `limit`. */
static int bounded(const nat_pass *pass, uint64_t norm, uint64_t limit)
{
    uint64_t bound;
    return !__builtin_mul_overflow(norm, pass->largest, &bound) && bound < limit;
}

/* Weight number p as int64; uint64 from 2**63 on wraps, as the sums do. */
static int64_t whole_weight(const void *weights, enum nat_weight type, size_t p)
{
    switch (type) {
    case W_BOOL:
        return ((const uint8_t *)weights)[p] != 0;
    case W_I8:
        return ((const int8_t *)weights)[p];
    case W_U8:
        return ((const uint8_t *)weights)[p];
    case W_I16:
        return ((const int16_t *)weights)[p];
    case W_U16:
        return ((const uint16_t *)weights)[p];
    case W_I32:
        return ((const int32_t *)weights)[p];
    case W_U32:
        return ((const uint32_t *)weights)[p];
    default:
        return ((const int64_t *)weights)[p];
    }
}

/* Weights as int64 and the sum of their magnitudes; 0 if that does not fit 64 bits, or a weight is not whole. */
static int read_whole(const nat_pass *pass, const void *weights, enum nat_weight type, int64_t *whole, uint64_t *norm)
{
    *norm = 0;
    for (size_t p = 0; type == W_BOOL && p < pass->pixels; p++) { /* most are: a loop without a choice in it */
        whole[p] = ((const uint8_t *)weights)[p] != 0;
        *norm += (uint64_t)whole[p];
    }
    for (size_t p = 0; type != W_BOOL && p < pass->pixels; p++) {
        if (type == W_F64) {
            double w = ((const double *)weights)[p];
            if (!(w > -9007199254740992.0 && w < 9007199254740992.0) || w != (double)(int64_t)w)
                return 0;
            whole[p] = (int64_t)w;
        } else {
            whole[p] = whole_weight(weights, type, p);
        }
        uint64_t magnitude = whole[p] < 0 && type != W_U64 ? 0 - (uint64_t)whole[p] : (uint64_t)whole[p];
        if (__builtin_add_overflow(*norm, magnitude, norm))
            return 0;
    }
    return 1;
}

static void read_float(const nat_pass *pass, const void *weights, enum nat_weight type, double *out)
{
    for (size_t p = 0; p < pass->pixels; p++)
        out[p] = type == W_F64   ? ((const double *)weights)[p]
                 : type == W_U64 ? (double)((const uint64_t *)weights)[p]
                                 : (double)whole_weight(weights, type, p);
}

static int mask_add(nat_pass *pass, const void *weights, enum nat_weight type, int64_t *whole, double *floats)
{
    uint64_t norm;
    int is = read_whole(pass, weights, type, whole, &norm);
    struct nat_result *result = &pass->results[pass->result_count - 1];
    if (is_whole(pass) && type != W_F64)
        return is && bounded(pass, norm, (uint64_t)1 << 63) ? whole_add(pass, whole, 1) : NAT_OVERFLOW;
    if (is_whole(pass) && is && bounded(pass, norm, (uint64_t)1 << 53)) {
        result->outcome = WHOLE_AS_FLOAT;
        return whole_add(pass, whole, 1);
    }
    read_float(pass, weights, type, floats);
    return float_add(pass, floats);
}

int nat_pass_masks_add(nat_pass *pass, const void *weights, enum nat_weight type, size_t count, uint64_t *out)
{
    static const size_t sizes[] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 8};
    int64_t *whole = malloc(pass->pixels * sizeof *whole);
    double *floats = malloc(pass->pixels * sizeof *floats);
    int error = whole && floats ? NAT_OK : NAT_NO_MEMORY;
    pass->masks_only &= type == W_BOOL;
    for (size_t k = 0; !error && k < count; k++) {
        enum nat_outcome outcome = is_whole(pass) && type != W_F64 ? WHOLE : FLOAT;
        error = result_add(pass, outcome, out ? out + k : NULL, count);
        if (!error)
            error = mask_add(pass, (const uint8_t *)weights + k * pass->pixels * sizes[type], type, whole, floats);
    }
    free(whole);
    free(floats);
    return error;
}

static int moment_add(nat_pass *pass, const uint8_t *mask, int axis, int64_t *whole, double *floats)
{
    /* coordinates from the middle have half the magnitude; the rest is a multiple of the mask's own sum */
    int64_t middle = axis == 0 ? 0 : (axis == 1 ? pass->height : pass->width) / 2;
    uint64_t norm = 0;
    size_t p = 0;
    for (int64_t y = 0; y < pass->height; y++)
        for (int64_t x = 0; x < pass->width; x++, p++) {
            int64_t counts = !mask || mask[p], weight = counts * (axis == 0 ? 1 : axis == 1 ? y : x);
            norm += (uint64_t)weight;
            floats[p] = (double)weight;
            whole[p] = weight - counts * middle;
        }
    if (!is_whole(pass))
        return float_add(pass, floats);
    if (!bounded(pass, norm, (uint64_t)1 << 63))
        return NAT_OVERFLOW;
    int error = whole_add(pass, whole, 1);
    for (p = 0; p < pass->pixels; p++)
        whole[p] = !mask || mask[p];
    return error || !middle ? error : whole_add(pass, whole, (uint64_t)middle);
}

int nat_pass_moments_add(nat_pass *pass, const uint8_t *mask, uint64_t *out)
{
    int64_t *whole = malloc(pass->pixels * sizeof *whole);
    double *floats = malloc(pass->pixels * sizeof *floats);
    int error = whole && floats ? NAT_OK : NAT_NO_MEMORY;
    pass->masks_only = 0;
    for (int axis = 0; !error && axis < 3; axis++) {
        error = result_add(pass, is_whole(pass) ? WHOLE : FLOAT, out ? out + axis : NULL, 3);
        if (!error)
            error = moment_add(pass, mask, axis, whole, floats);
    }
    free(whole);
    free(floats);
    return error;
}

/* Column 0 and result 0: the total of all pixels. */
int nat_weights_begin(nat_pass *pass)
{
    size_t step = pass->kind == NAT_U32 ? 2 : 1;
    pass->main.item = is_whole(pass) ? sizeof(int16_t) : 1;
    pass->weighted.item = sizeof(double);
    pass->main.cells = pass->weighted.cells = pass->cells;
    int64_t *ones = malloc(pass->pixels * sizeof *ones);
    double *floats = malloc(pass->pixels * sizeof *floats);
    int error = ones && floats ? result_add(pass, is_whole(pass) ? WHOLE : FLOAT, NULL, 0) : NAT_NO_MEMORY;
    for (size_t p = 0; !error && p < pass->pixels; p++) {
        ones[p] = 1;
        floats[p] = 1.0;
    }
    if (!error)
        error = is_whole(pass) ? whole_add(pass, ones, 1) : float_add(pass, floats);
    free(ones);
    free(floats);
    if (error || !is_whole(pass))
        return error;
    /* the kernel adds up the padding as well, which reads as -32768 where pixels are biased */
    int64_t padding = (int64_t)((pass->padded - pass->cells) / step);
    pass->main.sums[0] += padding;
    if (pass->kind == NAT_U16 || pass->kind == NAT_U32)
        pass->results[0].constant += (uint64_t)BIAS * (uint64_t)padding;
    return NAT_OK;
}

/* ---- packing ---- */

static void pack_column(const nat_pass *pass, const struct nat_set *set, size_t column, size_t vector, uint8_t *out)
{
    const uint8_t *dense = set->dense + column * set->cells * set->item;
    const size_t from = vector * set->vector, left = from < set->cells ? set->cells - from : 0;
    const size_t n = left < set->vector ? left : set->vector; /* what follows in `out` is zero already */
    dense += from * set->item;
    if (set->item == sizeof(double) || (set->item != 1 && pass->kind != NAT_U8))
        memcpy(out, dense, n * set->item);
    else if (set->item != 1)
        for (size_t p = 0; p < n; p++)
            out[p] = (uint8_t)((const int16_t *)(const void *)dense)[p];
    else if (pass->ops->mask_bits)
        for (size_t p = 0; p < n; p++)
            out[p / 8] = (uint8_t)(out[p / 8] | (dense[p] ? 1 << p % 8 : 0));
    else
        for (size_t p = 0; p < n; p++)
            out[p] = dense[p] ? 255 : 0;
}

/* Columns in passes of about equal width; `constant` of the first pass need no memory. */
static int pack(nat_pass *pass, struct nat_set *set, size_t constant)
{
    size_t most = pass->ops->width;
    set->passes = (set->count + most - 1) / most;
    set->width = calloc(set->passes + 1, sizeof *set->width);
    set->offset = calloc(set->passes + 1, sizeof *set->offset);
    set->packed = nat_aligned(set->count * set->unit * (pass->padded / set->vector));
    if (!set->width || !set->offset || !set->packed)
        return NAT_NO_MEMORY;
    size_t column = 0, at = 0;
    for (size_t i = 0; i < set->passes; i++) {
        size_t width = (set->count - column + set->passes - i - 1) / (set->passes - i);
        set->width[i] = width;
        set->offset[i] = at;
        for (size_t v = 0; v < pass->padded / set->vector; v++)
            for (size_t k = i ? 0 : constant; k < width; k++, at += set->unit)
                pack_column(pass, set, column + k, v, set->packed + at);
        column += width;
    }
    return NAT_OK;
}

/* Add |weights| of a vector's cells to its lanes, and tell the largest sum of one; beyond the frame they are `padding`. */
static uint32_t gather(const nat_pass *pass, const int16_t *dense, size_t cell, int padding, uint32_t *lane)
{
    const size_t per = pass->kind == NAT_U8 ? 4 : 2, n = pass->vector;
    int16_t copy[64];
    if (cell + n > pass->cells) {
        for (size_t p = 0; p < n; p++)
            copy[p] = (int16_t)(cell + p < pass->cells ? dense[cell + p] : padding);
        dense = copy;
        cell = 0;
    }
    uint32_t most = 0;
    for (size_t l = 0; l < n / per; l++) {
        for (size_t p = l * per; p < (l + 1) * per; p++)
            lane[l] += (uint32_t)abs(dense[cell + p]);
        most = lane[l] > most ? lane[l] : most;
    }
    return most;
}

/* Longest run of vectors whose products fit 32-bit lanes, from `vector` on; `lane` counts |weights| of each lane. */
static size_t run(const nat_pass *pass, size_t vector, size_t most, uint32_t *lane)
{
    const struct nat_set *set = &pass->main;
    const size_t per = pass->kind == NAT_U8 ? 4 : 2;
    const uint32_t limit = pass->kind == NAT_U8 ? INT32_MAX / 255 : INT32_MAX / BIAS;
    size_t shortest = most;
    for (size_t k = 0; k < set->count; k++) {
        const int16_t *dense = (const int16_t *)(const void *)set->dense + k * set->cells;
        if ((uint64_t)set->largest[k] * per * shortest <= limit)
            continue;
        memset(lane, 0, pass->vector / per * sizeof *lane);
        for (size_t v = 0; v < shortest; v++)
            if (gather(pass, dense, (vector + v) * pass->vector, k ? 0 : 1, lane) > limit)
                shortest = v;
    }
    return shortest ? shortest : 1;
}

static int cut(nat_pass *pass)
{
    size_t full = pass->cells / pass->vector, most = SEGMENT_BYTES / (pass->vector * pass->cell_bytes);
    uint32_t *lane = malloc(pass->vector * sizeof *lane);
    pass->segments = calloc(pass->vectors + 1, sizeof *pass->segments);
    if (!lane || !pass->segments) {
        free(lane);
        return NAT_NO_MEMORY;
    }
    for (size_t v = 0; v < full;) {
        size_t length = full - v < most ? full - v : most;
        if (is_whole(pass))
            length = run(pass, v, length, lane);
        pass->segments[pass->segment_count++] = (struct nat_segment){.vector = v, .vectors = length};
        pass->longest = length > pass->longest ? length : pass->longest;
        v += length;
    }
    if (full < pass->vectors) {
        size_t tail = (pass->cells - full * pass->vector) * pass->cell_bytes;
        pass->segments[pass->segment_count++] = (struct nat_segment){.vector = full, .vectors = 1, .tail = tail};
        pass->longest = pass->longest ? pass->longest : 1;
    }
    free(lane);
    return NAT_OK;
}

int nat_weights_pack(nat_pass *pass)
{
    const size_t doubles = pass->ops->doubles;
    pass->main.vector = is_whole(pass) ? pass->vector : doubles;
    pass->main.unit = is_whole(pass) ? pass->vector * pass->cell_bytes : doubles / (pass->ops->mask_bits ? 8 : 1);
    pass->weighted.vector = doubles;
    pass->weighted.unit = doubles * sizeof(double);
    pass->merged = !is_whole(pass) && pass->ops->both && pass->weighted.count && pass->weighted.count <= 2 &&
                   pass->main.count + pass->weighted.count <= pass->ops->width;
    int error = cut(pass);
    if (!error)
        error = pack(pass, &pass->main, 1);
    if (!error)
        error = pack(pass, &pass->weighted, 0);
    return error;
}

void nat_set_free(struct nat_set *set)
{
    free(set->dense);
    free(set->sums);
    free(set->largest);
    free(set->width);
    free(set->offset);
    free(set->packed);
}
