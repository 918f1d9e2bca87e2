/* What the files of codecs.c know of one another: the LZ4 block decoder and the work on bit planes. */
#ifndef EMFLOW_CODECS_H
#define EMFLOW_CODECS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native.h"

/* Numbers in the headers are big-endian, those inside LZ4 little-endian, whatever the machine is. */
static inline uint64_t load_big64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    return v;
}

static inline uint32_t load_big32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline uint64_t load_little64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    return v;
}

static inline void store_little64(uint8_t *p, uint64_t v)
{
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    v = __builtin_bswap64(v);
#endif
    memcpy(p, &v, 8);
}

/* Decode one LZ4 block of n bytes into exactly `size` bytes; 0, or NAT_BAD_DATA.  Nothing outside of the two buffers is
 * read or written; what `out` holds after an error is undefined. */
int nat_lz4_block(const uint8_t *in, size_t n, uint8_t *out, size_t size);

/* The work on bit planes, once for each instruction set.  `planes` holds 8 * element planes of `width` bytes one after
 * the other, pixel i at bit i % 8 of byte i / 8; plane 8 * j + b is bit b of byte j of each element, in the order of
 * memory.  Bit p of `used` is set where plane p has any bit set; planes without are not looked at again. */
struct nat_bits {
    const char *name;
    uint64_t (*used)(const uint8_t *planes, size_t width, size_t element);
    /* Make 8 * width elements of the planes. */
    void (*gather)(const uint8_t *planes, size_t width, size_t element, uint64_t used, uint8_t *out);
    /* sums[m] += over all planes 2^p * popcount(plane p & the `width` bytes at masks[m] + at). */
    void (*count)(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks, size_t at, int k,
                  uint64_t *sums);
};

/* The fastest that this processor can do, or the one of that name; NULL: unknown, or not on this processor. */
const struct nat_bits *nat_bits(const char *name);

/* Their names, fastest first, ended by NULL; some may be beyond this processor. */
extern const char *const nat_bits_names[];

/* nat_decode and nat_decode_masks with a given instruction set, so that tests reach all of them. */
int nat_decode_with(const struct nat_bits *with, enum nat_codec codec, size_t element, const uint8_t *in, size_t n,
                    uint8_t *out, size_t out_bytes, uint8_t *scratch);
int nat_decode_masks_with(const struct nat_bits *with, size_t element, const uint8_t *in, size_t n, size_t out_bytes,
                          size_t frames, const uint8_t *const *masks, int k, uint64_t *sums, uint64_t *full,
                          uint8_t *scratch);

#endif
