/* The kernels in plain C, for any machine. */
#include "kernels_plain.h"

#define VECTOR 64 /* cells; 64 products of 16 and 8 bits stay far below 2**31 */

static void lanes_16(const any_u16 *x, uint16_t bias, size_t n, int32_t *restrict sum)
{
    for (size_t p = 0; p < n; p++)
        sum[p] += (int16_t)(x[p] ^ bias);
}

static uint32_t max_16(const any_u16 *x, uint16_t bias, size_t n, int16_t *restrict max)
{
    int16_t top = INT16_MIN;
    for (size_t p = 0; p < n; p++) {
        int16_t value = (int16_t)(x[p] ^ bias);
        top = value > top ? value : top;
        if (max)
            max[p] = value > max[p] ? value : max[p];
    }
    return (uint16_t)top;
}

#define MAX_OF(NAME, PIXEL, TYPE)                                                                                      \
    static uint32_t NAME(const PIXEL *x, size_t n, TYPE *restrict max)                                                 \
    {                                                                                                                  \
        TYPE top = 0;                                                                                                  \
        for (size_t p = 0; p < n; p++) {                                                                               \
            top = x[p] > top ? x[p] : top;                                                                             \
            if (max)                                                                                                   \
                max[p] = x[p] > max[p] ? x[p] : max[p];                                                                \
        }                                                                                                              \
        return top;                                                                                                    \
    }
MAX_OF(max_8, uint8_t, uint8_t)
MAX_OF(max_32, any_u32, uint32_t)

/* A value that is not a number is seen to by the caller. */
static void max_float(const any_f32 *x, size_t n, float *restrict max)
{
    for (size_t p = 0; p < n; p++)
        max[p] = x[p] > max[p] ? x[p] : max[p];
}

static int64_t total_16(const any_u16 *x, uint16_t bias, size_t step)
{
    int32_t sum = 0;
    for (size_t p = 0; p < VECTOR; p += step)
        sum += (int16_t)(x[p] ^ bias);
    return sum;
}

static int64_t column_16(const any_u16 *x, uint16_t bias, const int16_t *weights)
{
    int32_t sum = 0;
    for (size_t p = 0; p < VECTOR; p++)
        sum += (int16_t)(x[p] ^ bias) * weights[p];
    return sum;
}

static int64_t column_8(const uint8_t *x, const int8_t *weights)
{
    int32_t sum = 0;
    for (size_t p = 0; p < VECTOR; p++)
        sum += x[p] * (weights ? weights[p] : 1);
    return sum;
}

static double column_bytes(const any_f32 *x, const uint8_t *mask)
{
    double sum = 0.0;
    for (size_t p = 0; p < VECTOR; p++)
        sum += !mask || mask[p] ? (double)x[p] : 0.0;
    return sum;
}

static double column_float(const any_f32 *x, const double *weights)
{
    double sum = 0.0;
    for (size_t p = 0; p < VECTOR; p++)
        sum += weights[p] != 0.0 ? (double)x[p] * weights[p] : 0.0;
    return sum;
}

static void columns(int kind, size_t count, int total, const struct nat_visit *visit)
{
    size_t cell = kind == NAT_U8 ? 1 : kind == NAT_F32 ? 4 : 2, unit = VECTOR * (kind == NAT_F32 ? 1 : cell);
    uint16_t bias = (uint16_t)visit->bias;
    const uint8_t *weights = visit->weights;
    for (size_t v = 0; v < visit->vectors; v++) {
        const uint8_t *x = visit->frame[0] + v * VECTOR * cell;
        for (size_t k = 0; k < count; k++) {
            const uint8_t *w = total && !k ? NULL : weights;
            weights += w ? unit : 0;
            if (kind == NAT_F32)
                ((double *)visit->out[0])[k] += column_bytes((const any_f32 *)x, w);
            else if (kind == NAT_U8)
                ((int64_t *)visit->out[0])[k] += column_8(x, (const int8_t *)w);
            else if (!w)
                ((int64_t *)visit->out[0])[k] += total_16((const any_u16 *)x, bias, kind == NAT_U32 ? 2 : 1);
            else
                ((int64_t *)visit->out[0])[k] += column_16((const any_u16 *)x, bias, (const int16_t *)w);
        }
    }
}

static void first(int kind, size_t frames, size_t count, struct nat_visit *visit)
{
    (void)frames; /* one at a time */
    const uint8_t *x = visit->frame[0];
    size_t n = visit->vectors * VECTOR;
    uint16_t bias = (uint16_t)visit->bias;
    if (kind == NAT_U8)
        visit->top = max_8(x, n, visit->max);
    else if (kind == NAT_U32)
        visit->top = max_32((const any_u32 *)x, n / 2, (uint32_t *)visit->max);
    else if (kind != NAT_F32)
        visit->top = max_16((const any_u16 *)x, bias, n, (int16_t *)visit->max);
    else if (visit->max)
        max_float((const any_f32 *)x, n, (float *)visit->max);
    if (visit->sum && kind == NAT_F32)
        for (size_t p = 0; p < n; p++)
            ((double *)visit->sum)[p] += ((const any_f32 *)x)[p];
    else if (visit->sum && kind == NAT_U8)
        for (size_t p = 0; p < n; p++)
            ((int32_t *)visit->sum)[p] += x[p];
    else if (visit->sum)
        lanes_16((const any_u16 *)x, bias, n, visit->sum);
    columns(kind, count, 1, visit);
}

static void more(int kind, size_t frames, size_t count, struct nat_visit *visit)
{
    (void)frames;
    columns(kind, count, 0, visit);
}

static void weighted(size_t frames, size_t count, struct nat_visit *visit)
{
    (void)frames;
    const double *weights = (const double *)visit->weights;
    for (size_t v = 0; v < visit->vectors; v++)
        for (size_t k = 0; k < count; k++, weights += VECTOR)
            ((double *)visit->out[0])[k] += column_float((const any_f32 *)visit->frame[0] + v * VECTOR, weights);
}

/* Labels straight into the rows of the result; pixels without a region have none to go to. */
#define LABELS_OF(TYPE, SUM)                                                                                           \
    for (size_t i = 0; i < n; i++) {                                                                                   \
        const TYPE *x = (const TYPE *)frames[i];                                                                       \
        SUM *row = (SUM *)rows + i * (size_t)set->regions;                                                             \
        for (size_t p = 0; p < count; p++)                                                                             \
            if (labels[p] >= 0)                                                                                        \
                row[labels[p]] += x[p];                                                                                \
    }

static void add_labels(int kind, const struct nat_labels *set, const struct nat_segment *segment,
                       const uint8_t *const *frames, size_t n, size_t cells, size_t ahead, uint8_t *lanes,
                       uint8_t *scratch, uint64_t *rows)
{
    (void)ahead, (void)lanes, (void)scratch;
    size_t per = kind == NAT_U32 ? 2 : 1, count = cells / per;
    const int32_t *labels = set->labels + segment->vector * VECTOR / per;
    switch (kind) {
    case NAT_U8:
        LABELS_OF(uint8_t, uint64_t)
        break;
    case NAT_U16:
        LABELS_OF(any_u16, uint64_t)
        break;
    case NAT_U32:
        LABELS_OF(any_u32, uint64_t)
        break;
    case NAT_I16:
        LABELS_OF(any_i16, int64_t)
        break;
    default:
        LABELS_OF(any_f32, double)
    }
}

const struct nat_ops nat_portable = {
    .name = "portable",
    .vector = {VECTOR, VECTOR, VECTOR, VECTOR, VECTOR},
    .doubles = VECTOR,
    .quad = 1,
    .width = WIDEST,
    .digit8 = 127,
    .digit16 = 127,
    .first = first,
    .more = more,
    .weighted = weighted,
    .labels = add_labels,
    .squares = plain_squares,
    .fold = plain_fold,
    .full = plain_full,
    .widen = plain_widen,
};
