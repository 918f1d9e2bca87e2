/* Plain C that every instruction set compiles for itself: the compiler turns these loops into vectors. */
#include <string.h>

#include "kernels.h"

#define SQUARES_OF(TYPE, WIDE)                                                                                         \
    do {                                                                                                               \
        const TYPE *a = (const TYPE *)frames[0], *b, *c, *d;                                                           \
        if (n == 4) {                                                                                                  \
            b = (const TYPE *)frames[1], c = (const TYPE *)frames[2], d = (const TYPE *)frames[3];                     \
            for (size_t p = 0; p < cells; p++)                                                                         \
                low[p] += (uint64_t)((WIDE)a[p] * (WIDE)a[p]) + (WIDE)b[p] * (WIDE)b[p] +                              \
                          (uint64_t)((WIDE)c[p] * (WIDE)c[p]) + (WIDE)d[p] * (WIDE)d[p];                               \
            return;                                                                                                    \
        }                                                                                                              \
        for (size_t i = 0; i < n; i++) {                                                                               \
            a = (const TYPE *)frames[i];                                                                               \
            for (size_t p = 0; p < cells; p++)                                                                         \
                low[p] += (WIDE)a[p] * (WIDE)a[p];                                                                     \
        }                                                                                                              \
    } while (0)

static void squares_u32(const any_u32 *frame, size_t pixels, uint64_t *restrict low, uint64_t *restrict high)
{
    for (size_t p = 0; p < pixels; p++) {
        uint64_t square = (uint64_t)frame[p] * frame[p];
        low[p] += square & UINT32_MAX;
        high[p] += square >> 32;
    }
}

/* The square of a float is exact in a double, so contraction changes nothing. */
static void squares_f32(const any_f32 *frame, size_t pixels, double *restrict sum)
{
    for (size_t p = 0; p < pixels; p++)
        sum[p] += (double)frame[p] * (double)frame[p];
}

/* The same about a level of each pixel, which keeps the digits of what varies on a pedestal.  A contraction is one
 * rounding less, in all lanes alike. */
static void squares_about(const any_f32 *frame, const double *restrict level, size_t pixels, double *restrict sum)
{
    for (size_t p = 0; p < pixels; p++) {
        double off = (double)frame[p] - level[p];
        sum[p] += off * off;
    }
}

/* Add the squares of up to four frames' pixels; of floats less `level`, if there is one. */
static void plain_squares(int kind, const uint8_t *const *frames, size_t n, size_t cells, const double *level,
                          uint64_t *restrict low, uint64_t *restrict high)
{
    switch (kind) {
    case NAT_U8:
        SQUARES_OF(uint8_t, uint32_t);
        break;
    case NAT_U16:
        SQUARES_OF(any_u16, uint64_t);
        break;
    case NAT_I16:
        SQUARES_OF(any_i16, int64_t);
        break;
    case NAT_U32:
        for (size_t i = 0; i < n; i++)
            squares_u32((const any_u32 *)frames[i], cells / 2, low, high);
        break;
    default:
        for (size_t i = 0; i < n; i++)
            if (level)
                squares_about((const any_f32 *)frames[i], level, cells, (double *)low);
            else
                squares_f32((const any_f32 *)frames[i], cells, (double *)low);
    }
}

/* Add a group's sums to high + low without losing what rounding cuts off, and clear them.
 * Source: the sum of two floats and its error, Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B. */
static void plain_fold(double *restrict group, double *restrict high, double *restrict low, size_t n)
{
    for (size_t p = 0; p < n; p++) {
        double sum = high[p] + group[p], added = sum - high[p];
        double error = (high[p] - (sum - added)) + (group[p] - added);
        low[p] += sum - sum == 0.0 ? error : 0.0; /* infinity has no error */
        high[p] = sum;
        group[p] = 0.0;
    }
}

#define FULL_OF(TYPE, VALUE, COUNT)                                                                                    \
    do {                                                                                                               \
        const TYPE *x = (const TYPE *)frame;                                                                           \
        for (size_t p = 0; p < (COUNT);) {                                                                             \
            size_t end = (COUNT)-p > 65536 ? p + 65536 : (COUNT);                                                      \
            uint32_t found = 0;                                                                                        \
            for (; p < end; p++)                                                                                       \
                found += x[p] == (VALUE);                                                                              \
            count += found;                                                                                            \
        }                                                                                                              \
    } while (0)

/* Pixels that have the largest value of their type. */
static uint64_t plain_full(int kind, const uint8_t *frame, size_t cells)
{
    uint64_t count = 0;
    switch (kind) {
    case NAT_U8:
        FULL_OF(uint8_t, UINT8_MAX, cells);
        break;
    case NAT_U16:
        FULL_OF(any_u16, UINT16_MAX, cells);
        break;
    case NAT_I16:
        FULL_OF(any_i16, INT16_MAX, cells);
        break;
    case NAT_U32:
        FULL_OF(any_u32, UINT32_MAX, cells / 2);
        break;
    default:
        break;
    }
    return count;
}

/* Cells as floats; exact, a cell has 16 bits at most. */
static void plain_widen(int kind, const uint8_t *restrict frame, float *restrict out, size_t cells)
{
    if (kind == NAT_U8)
        for (size_t p = 0; p < cells; p++)
            out[p] = frame[p];
    else if (kind == NAT_I16)
        for (size_t p = 0; p < cells; p++)
            out[p] = ((const any_i16 *)frame)[p];
    else
        for (size_t p = 0; p < cells; p++)
            out[p] = ((const any_u16 *)frame)[p];
}
