/* Decoders of records as HDF5 filters store them.  All that is read comes from files and is believed after a check.
 *
 * Filter 32008, bitshuffle with LZ4: 8 bytes size of the record, 4 bytes size of a block, both big-endian and in bytes
 * of decoded data; then for each block 4 bytes length and one LZ4 block of bit planes.  The last block has the multiple
 * of 8 elements that is left; the elements after it, at most 7, are stored as they are.  Without LZ4 there is nothing
 * but planes.  Filter 32004, LZ4: the same header; a block whose length is its decoded size is stored as it is.
 * Source: bshuf_h5filter.c of https://github.com/kiyo-masui/bitshuffle and H5Zlz4.c of
 * https://github.com/HDFGroup/hdf5_plugins.  As there, bytes after the last block are not looked at.
 */
#include "codecs.h"

enum { HEADER = 12, LENGTH = 4, DEFAULT_BLOCK = 8192 };

/* What is left of a record. */
struct input {
    const uint8_t *at;
    size_t left;
};

/* Let the reader have the next n bytes; NULL: there are not so many. */
static const uint8_t *take(struct input *input, size_t n)
{
    const uint8_t *at = input->at;
    if (n > input->left)
        return NULL;
    input->at += n;
    input->left -= n;
    return at;
}

/* The next part that begins with its length. */
static const uint8_t *take_part(struct input *input, size_t *n)
{
    const uint8_t *length = take(input, LENGTH);
    if (!length)
        return NULL;
    *n = load_big32(length);
    return take(input, *n);
}

/* The block's size that a header names; 0 is a legal answer.  A record that names another size than ours is refused. */
static int header(struct input *input, size_t out_bytes, size_t *block)
{
    const uint8_t *at = take(input, HEADER);
    if (!at || load_big64(at) != out_bytes)
        return NAT_BAD_DATA;
    *block = load_big32(at + 8);
    return 0;
}

static int decode_lz4(struct input *input, uint8_t *out, size_t out_bytes)
{
    size_t block, n;
    if (header(input, out_bytes, &block) || (block == 0 && out_bytes))
        return NAT_BAD_DATA;
    for (; out_bytes; out += block, out_bytes -= block) {
        if (block > out_bytes)
            block = out_bytes;
        const uint8_t *part = take_part(input, &n);
        if (!part)
            return NAT_BAD_DATA;
        if (n == block)
            memcpy(out, part, block);
        else if (nat_lz4_block(part, n, out, block))
            return NAT_BAD_DATA;
    }
    return 0;
}

/* One record of bit planes on its way: blocks come one after the other, then `rest` bytes of plain elements. */
struct shuffled {
    struct input input;
    size_t element, block, left, rest; /* all but the first in bytes of decoded data */
    int packed;                        /* with LZ4 */
    uint8_t *scratch;                  /* the planes of one block */
};

static int begin(struct shuffled *record, size_t element, int packed, const uint8_t *in, size_t n, size_t out_bytes,
                 uint8_t *scratch)
{
    size_t block = 0;
    *record = (struct shuffled){.input = {in, n}, .element = element, .packed = packed, .scratch = scratch};
    if (out_bytes % element || (packed && header(&record->input, out_bytes, &block)))
        return NAT_BAD_DATA;
    block /= element;
    if (block == 0)
        block = DEFAULT_BLOCK / element;
    if (block % 8)
        return NAT_BAD_DATA;
    record->block = block * element;
    record->rest = out_bytes % (8 * element);
    record->left = out_bytes - record->rest;
    return 0;
}

/* The planes of the next block and its decoded size; NULL: bad data.  Not to be called when nothing is left. */
static const uint8_t *next(struct shuffled *record, size_t *size)
{
    size_t n;
    const uint8_t *part;
    *size = record->left < record->block ? record->left : record->block;
    record->left -= *size;
    if (!record->packed)
        return take(&record->input, *size);
    part = take_part(&record->input, &n);
    return part && nat_lz4_block(part, n, record->scratch, *size) == 0 ? record->scratch : NULL;
}

static int decode_shuffled(const struct nat_bits *with, struct shuffled *record, uint8_t *out)
{
    while (record->left) {
        size_t size;
        const uint8_t *planes = next(record, &size);
        if (!planes)
            return NAT_BAD_DATA;
        const size_t width = size / (8 * record->element);
        const uint64_t used = with->used(planes, width, record->element);
        if (used)
            with->gather(planes, width, record->element, used, out);
        else
            memset(out, 0, size);
        out += size;
    }
    const uint8_t *rest = take(&record->input, record->rest);
    if (!rest)
        return NAT_BAD_DATA;
    memcpy(out, rest, record->rest);
    return 0;
}

size_t nat_scratch_bytes(enum nat_codec codec, size_t element, size_t out_bytes)
{
    (void)element;
    return codec == NAT_BITSHUFFLE_LZ4 ? out_bytes : 0;
}

static int is_element(size_t element)
{
    return element == 1 || element == 2 || element == 4 || element == 8;
}

int nat_decode_with(const struct nat_bits *with, enum nat_codec codec, size_t element, const uint8_t *in, size_t n,
                    uint8_t *out, size_t out_bytes, uint8_t *scratch)
{
    struct input input = {in, n};
    struct shuffled record;
    if (codec == NAT_LZ4)
        return decode_lz4(&input, out, out_bytes);
    if (codec == NAT_PLAIN) {
        if (n != out_bytes)
            return NAT_BAD_DATA;
        memcpy(out, in, n);
        return 0;
    }
    if (!is_element(element) || begin(&record, element, codec == NAT_BITSHUFFLE_LZ4, in, n, out_bytes, scratch))
        return NAT_BAD_DATA;
    return decode_shuffled(with, &record, out);
}

/* Pixels of a block with all bits set; all planes are known to have some. */
static uint64_t count_full(const uint8_t *planes, size_t width, size_t element)
{
    uint64_t full = 0;
    for (size_t i = 0; i < width; i++) {
        unsigned all = 0xFF;
        for (size_t p = 0; p < 8 * element; p++)
            all &= planes[p * width + i];
        full += (uint64_t)__builtin_popcount(all);
    }
    return full;
}

/* The elements after the last block, from pixel `first`, one by one. */
static void add_rest(const uint8_t *rest, size_t n, size_t element, size_t first, const uint8_t *const *masks, int k,
                     uint64_t *sums, uint64_t *full)
{
    for (size_t pixel = first; n; pixel++, rest += element, n -= element) {
        uint64_t value = 0;
        for (size_t j = 0; j < element; j++)
            value |= (uint64_t)rest[j] << 8 * j;
        *full += value == UINT64_MAX >> (64 - 8 * element);
        for (int m = 0; m < k; m++)
            sums[m] += masks[m][pixel / 8] >> pixel % 8 & 1 ? value : 0;
    }
}

int nat_decode_masks_with(const struct nat_bits *with, size_t element, const uint8_t *in, size_t n, size_t out_bytes,
                          size_t frames, const uint8_t *const *masks, int k, uint64_t *sums, uint64_t *full,
                          uint8_t *scratch)
{
    struct shuffled record;
    size_t at = 0; /* bytes of the masks, 8 pixels each */
    /* the largest sum of fewer than 2^32 pixels of 32 bits fits into 64 bits */
    if (!is_element(element) || element == 8 || out_bytes / element > UINT32_MAX)
        return NAT_BAD_NUMBER;
    if (frames != 1 && (frames == 0 || out_bytes / frames % (8 * element) || out_bytes % frames))
        return NAT_BAD_NUMBER;
    const size_t whole = frames == 1 ? SIZE_MAX : out_bytes / frames / (8 * element); /* of a frame, in these bytes */
    memset(sums, 0, frames * (size_t)k * sizeof *sums);
    *full = 0;
    if (begin(&record, element, 1, in, n, out_bytes, scratch))
        return NAT_BAD_DATA;
    while (record.left) {
        size_t size;
        const uint8_t *planes = next(&record, &size);
        if (!planes)
            return NAT_BAD_DATA;
        const size_t width = size / (8 * element);
        if (width > whole - at)
            return NAT_BAD_NUMBER;
        const uint64_t used = with->used(planes, width, element);
        with->count(planes, width, used, masks, at, k, sums);
        if (used == UINT64_MAX >> (64 - 8 * element))
            *full += count_full(planes, width, element);
        at += width;
        if (at == whole) {
            at = 0;
            sums += k;
        }
    }
    const uint8_t *rest = take(&record.input, record.rest);
    if (!rest)
        return NAT_BAD_DATA;
    add_rest(rest, record.rest, element, 8 * at, masks, k, sums, full);
    return 0;
}

int nat_decode(enum nat_codec codec, size_t element, const uint8_t *in, size_t n, uint8_t *out, size_t out_bytes,
               uint8_t *scratch)
{
    return nat_decode_with(nat_bits(NULL), codec, element, in, n, out, out_bytes, scratch);
}

int nat_decode_masks(size_t element, const uint8_t *in, size_t n, size_t out_bytes, size_t frames,
                     const uint8_t *const *bits, int k, uint64_t *sums, uint64_t *full, uint8_t *scratch)
{
    return nat_decode_masks_with(nat_bits(NULL), element, in, n, out_bytes, frames, bits, k, sums, full, scratch);
}
