/* Pixels as the kernels want them: native byte order, the flag of dead pixels turned into 0.  Elementwise, so that
 * source and target may be the same; loops that compilers vectorise. */
#include <string.h>

#include "feed.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define BEST_SET __attribute__((target_clones("avx2", "default")))
#else
#define BEST_SET
#endif

#define SAME(v) (v)
#define SWAP2(v) ((uint16_t)((v) << 8 | (v) >> 8))
#define LOOP(type, order, value)                          \
    for (size_t i = 0; i < n; i++) {                      \
        type v;                                           \
        memcpy(&v, from + i * sizeof v, sizeof v);        \
        v = order(v);                                     \
        v = value;                                        \
        memcpy(to + i * sizeof v, &v, sizeof v);          \
    }
#define CONVERT(name, type, order)                                                                               \
    BEST_SET static void name(uint8_t *to, const uint8_t *from, size_t n, bool swap, bool flagged, type flag)    \
    {                                                                                                            \
        if (swap && flagged)                                                                                     \
            LOOP(type, order, v == flag ? 0 : v)                                                                 \
        else if (swap)                                                                                           \
            LOOP(type, order, v)                                                                                 \
        else                                                                                                     \
            LOOP(type, SAME, v == flag ? 0 : v)                                                                  \
    }

CONVERT(convert1, uint8_t, SAME)
CONVERT(convert2, uint16_t, SWAP2)
CONVERT(convert4, uint32_t, __builtin_bswap32)
CONVERT(convert8, uint64_t, __builtin_bswap64)

void feed_convert(const struct feed_layout *layout, uint8_t *to, const uint8_t *from, size_t bytes)
{
    bool swap = layout->swap, flagged = layout->flagged;
    size_t n = bytes / layout->pixel;
    if (!swap && !flagged) {
        if (to != from)
            memcpy(to, from, bytes);
        return;
    }
    switch (layout->pixel) {
    case 1:
        convert1(to, from, n, swap, flagged, (uint8_t)layout->flag);
        break;
    case 2:
        convert2(to, from, n, swap, flagged, (uint16_t)layout->flag);
        break;
    case 4:
        convert4(to, from, n, swap, flagged, (uint32_t)layout->flag);
        break;
    default:
        convert8(to, from, n, swap, flagged, layout->flag);
    }
}
