/* One LZ4 block.
 *
 * Source: the LZ4 block format, https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md.  A block is a row of
 * sequences: a token (4 bits number of literals, 4 bits length of the match less 4; 15 goes on in further bytes), the
 * literals, and the distance of the match as two bytes.  The last sequence has literals only.
 *
 * Speed is in the short sequences, so these are copied in whole vectors that may run past their end into bytes written
 * later anyhow; that is allowed only where the distance to the end of both buffers has been proven.  The last bytes of
 * a block go the exact way.  Each byte that steers is read once, so a file that changes meanwhile changes the
 * result, and nothing else.
 */
#include "codecs.h"

enum {
    LITERALS = 15, /* and more: the length goes on */
    MATCH = 15,    /* the same for matches */
    SHORTEST = 4,  /* of a match */
    WILD = 32,     /* bytes that are written for a short match, or beyond the end of a long copy */
    FAST = 16      /* bytes that are read and written for up to 14 literals; the distance is among those read */
};

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

static inline void copy16(uint8_t *to, const uint8_t *from)
{
    uint64_t a[2]; /* all is loaded before anything is stored: the two may overlap */
    memcpy(a, from, 16);
    memcpy(to, a, 16);
}

/* For a distance below 8: the bytes that repeat, the factor that repeats them, and the bytes of whole periods in 8. */
static const uint64_t repeats_of[8] = {0,          0xFF,         0xFFFF,         0xFFFFFF,
                                       0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF};
static const uint64_t repeated_by[8] = {0, 0x0101010101010101, 0x0001000100010001, 0x0001000001000001,
                                        0x0000000100000001, 0x0000010000000001, 0x0001000000000001, 0x0100000000000001};
static const uint8_t whole_in_8[8] = {0, 8, 8, 6, 8, 5, 6, 7};

/* 8 bytes that go on with the last `distance` (1 to 7) bytes before `to`; 8 bytes must be readable there. */
static inline uint64_t period(const uint8_t *to, size_t distance)
{
    return (load_little64(to - distance) & repeats_of[distance]) * repeated_by[distance];
}

/* A match of up to 18 bytes; 32 bytes are writable at `to`. */
static inline void short_match(uint8_t *to, size_t distance)
{
    if (likely(distance >= 16)) {
        copy16(to, to - distance);
        copy16(to + 16, to + 16 - distance);
    } else if (distance < 8) {
        uint64_t v = period(to, distance);
        size_t step = whole_in_8[distance]; /* at least 5: three stores reach 18 */
        store_little64(to, v);
        store_little64(to + step, v);
        store_little64(to + 2 * step, v);
    } else {
        for (int i = 0; i < 24; i += 8)
            store_little64(to + i, load_little64(to + i - distance));
    }
}

/* A match of any length; `room` bytes are writable at `to`, at least `length`. */
static void long_match(uint8_t *to, size_t distance, size_t length, size_t room)
{
    uint8_t *const end = to + length;
    const size_t proven = room < WILD ? 0 : room - WILD; /* a copy that begins before this stays inside */
    uint8_t *const stop = to + (length < proven ? length : proven);
    if (distance < 8 && stop > to) {
        const uint64_t v = period(to, distance);
        const size_t step = whole_in_8[distance];
        if (distance == 1 || v == 0) { /* nearly all that is long in bit planes: pixels that never counted so far */
            memset(to, (int)(v & 0xFF), length);
            return;
        }
        for (; to < stop; to += step)
            store_little64(to, v);
    } else if (distance < 16) {
        for (; to < stop; to += 8)
            store_little64(to, load_little64(to - distance));
    } else {
        for (; to < stop; to += 32) {
            copy16(to, to - distance);
            copy16(to + 16, to + 16 - distance);
        }
    }
    for (; to < end; to++)
        *to = *(to - distance);
}

/* `length` bytes of literals that both buffers are known to have. */
static inline void literals(uint8_t *to, size_t to_room, const uint8_t *from, size_t from_room, size_t length)
{
    if (to_room - length < WILD || from_room - length < WILD || length > 256) {
        memcpy(to, from, length);
        return;
    }
    for (size_t i = 0; i < length; i += 32) {
        copy16(to + i, from + i);
        copy16(to + i + 16, from + i + 16);
    }
}

/* Add what follows a length of 15; more than `most` is as bad as the end of the input, so nothing overflows. */
static inline int extend(const uint8_t **in, const uint8_t *end, size_t *length, size_t most)
{
    const uint8_t *ip = *in;
    size_t sum = *length;
    uint8_t byte;
    do {
        if (ip == end || sum > most)
            return NAT_BAD_DATA;
        byte = *ip++;
        sum += byte;
    } while (byte == 255);
    *in = ip;
    *length = sum;
    return 0;
}

int nat_lz4_block(const uint8_t *in, size_t n, uint8_t *out, size_t size)
{
    const uint8_t *ip = in, *const iend = in + n;
    uint8_t *op = out, *const oend = out + size;

    while (ip < iend) {
        const uint8_t token = *ip++;
        size_t length = token >> 4;
        size_t in_room = (size_t)(iend - ip), out_room = (size_t)(oend - op);
        if (likely(length < LITERALS && in_room >= FAST && out_room >= FAST)) {
            copy16(op, ip);
        } else {
            if (length == LITERALS) {
                if (extend(&ip, iend, &length, out_room))
                    return NAT_BAD_DATA;
                in_room = (size_t)(iend - ip);
            }
            if (length > in_room || length > out_room)
                return NAT_BAD_DATA;
            literals(op, out_room, ip, in_room, length);
            if (length == in_room) /* the last sequence */
                return length == out_room ? 0 : NAT_BAD_DATA;
            if (in_room - length < 2)
                return NAT_BAD_DATA;
        }
        ip += length;
        op += length;
        out_room -= length;

        const size_t distance = (size_t)ip[0] | (size_t)ip[1] << 8;
        ip += 2;
        if (unlikely(distance - 1 >= (size_t)(op - out))) /* before the start; 0 wraps to the largest number */
            return NAT_BAD_DATA;
        length = token & 15;
        if (likely(length < MATCH && out_room >= WILD)) {
            short_match(op, distance);
            op += length + SHORTEST;
            continue;
        }
        if (length == MATCH && extend(&ip, iend, &length, out_room))
            return NAT_BAD_DATA;
        length += SHORTEST;
        if (length > out_room)
            return NAT_BAD_DATA;
        long_match(op, distance, length, out_room);
        op += length;
    }
    return NAT_BAD_DATA; /* the input ended after a match, or is empty */
}
