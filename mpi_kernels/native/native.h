/* What the parts of the extension know of one another.
 *
 *   kernels.c    the fused arithmetic on frames in memory, one source, several instruction sets
 *   codecs.c     decoders of hostile input, bounds-checked
 *   feed.c       threads that fetch records (memory map, read, O_DIRECT), decode them in cache and hand them to the kernels
 *   module.c     the Python module mpi_kernels._native: each part adds its own functions and types
 *
 * No part but module.c and the py_*.c files knows Python; all loops run without the global lock.
 */
#ifndef EMFLOW_NATIVE_H
#define EMFLOW_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* Kinds of pixels that the kernels know, always in native byte order. */
enum nat_pixel { NAT_U8 = 0, NAT_U16, NAT_U32, NAT_I16, NAT_F32 };

/* ---- kernels.c -------------------------------------------------------------------------------------------------- */

typedef struct nat_pass nat_pass; /* the terms of a recipe and the arrays they fill; shared by all threads */
typedef struct nat_part nat_part; /* accumulators of one thread; they persist between calls until the pass is flushed */

size_t nat_frame_bytes(const nat_pass *pass);
int64_t nat_pass_rows(const nat_pass *pass); /* frames of this rank's share */
int nat_pass_kind(const nat_pass *pass);     /* enum nat_pixel */

/* Frames that one thread must see in order, beginning at rows that are multiples of it: the fixed groups in which
 * floats are summed, so that neither threads nor blocks change a bit.  A function of the frame's size alone. */
int64_t nat_group(const nat_pass *pass);

/* The accumulators of thread `index`, made at the first call; NULL: out of memory.  Not to be called from two threads
 * with the same index. */
nat_part *nat_pass_part(nat_pass *pass, int index);

/* Add n frames that stand `stride` bytes apart, at any byte; the first one is row `row` of this rank's
 * share.  0, or NAT_*.  May stop in the middle of a group: the next call with the same part goes on with it. */
int nat_add(nat_pass *pass, nat_part *part, const void *frames, size_t stride, int64_t n, int64_t row);

/* Binary masks that are all a pass wants, for whoever can sum without making pixels of the data: their number (the first
 * is all ones, the total) and their bits, pixel i at bit i % 8 of byte i / 8, zero-padded to 64 bytes; 0 where the pass
 * wants anything else. */
int nat_pass_masks(const nat_pass *pass, const uint8_t *const **bits);

/* Deliver one frame's sums over those masks, and how many of its pixels have the type's largest value. */
void nat_pass_put(nat_pass *pass, nat_part *part, int64_t row, const uint64_t *sums, uint64_t full);

/* ---- codecs.c --------------------------------------------------------------------------------------------------- */

/* NAT_BITSHUFFLE: planes without LZ4, in blocks of the default size (what the filter's third parameter 0 means). */
enum nat_codec { NAT_PLAIN = 0, NAT_BITSHUFFLE_LZ4, NAT_LZ4, NAT_BITSHUFFLE };

/* Bytes of scratch that a decoder wants for records of `out_bytes` bytes; where it is 0, scratch may be NULL.  Of large
 * scratch only as much is touched as one block of the file has. */
size_t nat_scratch_bytes(enum nat_codec codec, size_t element, size_t out_bytes);

/* Decode n stored bytes into exactly out_bytes; 0, or NAT_BAD_DATA.  Reads and writes nothing outside of the buffers,
 * whatever the input.  Elements are of 1, 2, 4 or 8 bytes and stay in the byte order that they were stored in. */
int nat_decode(enum nat_codec codec, size_t element, const uint8_t *in, size_t n, uint8_t *out, size_t out_bytes,
               uint8_t *scratch);

/* Sums of a record's unsigned pixels over k binary masks straight from the bit planes of NAT_BITSHUFFLE_LZ4 (the bits as
 * nat_pass_masks gives them), frame after frame, and the pixels of all of them with all bits set; 0, or NAT_BAD_DATA.
 * Elements are little-endian, of 1, 2 or 4 bytes, fewer than 2^32, and no block lies in two frames; NAT_BAD_NUMBER
 * otherwise. */
int nat_decode_masks(size_t element, const uint8_t *in, size_t n, size_t out_bytes, size_t frames,
                     const uint8_t *const *bits, int k, uint64_t *sums, uint64_t *full, uint8_t *scratch);

/* ---- feed.c ----------------------------------------------------------------------------------------------------- */

enum nat_status {
    NAT_OK = 0,
    NAT_NO_MEMORY = -1,
    NAT_BAD_DATA = -2, /* compressed data that can't be decoded */
    NAT_SHORT = -3,    /* the file ends before the record does */
    NAT_IO = -4,       /* errno is kept beside the frame */
    NAT_BAD_MARK = -5, /* a record does not begin with its magic */
    NAT_BAD_NUMBER = -6,
    NAT_OVERFLOW = -7, /* a sum would leave 64 bits */
    NAT_STOPPED = -8
};

/* ---- module.c --------------------------------------------------------------------------------------------------- */

struct _object; /* PyObject, without asking for Python.h */
int nat_register_kernels(struct _object *module);
int nat_register_codecs(struct _object *module);
int nat_register_feed(struct _object *module);

#endif
