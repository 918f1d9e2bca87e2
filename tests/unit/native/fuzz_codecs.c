/* Mutants of compressed records against the decoders, under the sanitizers: fuzz_codecs SEEDS MUTANTS SEED
 *
 * SEEDS holds records as test_codecs.py writes them: four little-endian uint32 (codec, element, decoded bytes, stored
 * bytes) and the stored bytes.  Every mutant is decoded from, into and with buffers of exactly the size that the
 * decoder was told, in turn on the heap (the address sanitizer sees both sides of each) and against pages that can't be
 * touched (which also stop vector instructions that the sanitizer does not know).  What decodes must do so to the same
 * pixels with every instruction set and whatever lay in the buffers before, and sums over masks must be those of its
 * pixels.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "codecs.h"

enum { MOST_SEEDS = 4096, MOST_BYTES = 1 << 18, MASKS = 6, FRAMES = 2 };

struct record {
    uint32_t codec, element, out_bytes, n;
    uint8_t *data;
};

static struct record seeds[MOST_SEEDS];
static int seed_count;
static uint64_t state;

static uint64_t draw(uint64_t below)
{
    state ^= state << 13; /* xorshift64, Marsaglia 2003 */
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

static void fail(const char *what, long mutant)
{
    fprintf(stderr, "mutant %ld: %s\n", mutant, what);
    exit(2);
}

static void read_seeds(const char *path)
{
    FILE *file = fopen(path, "rb");
    uint32_t head[4];
    if (!file)
        fail(path, -1);
    while (fread(head, sizeof head, 1, file) == 1) {
        struct record *seed = &seeds[seed_count++];
        *seed = (struct record){head[0], head[1], head[2], head[3], malloc(head[3] + 1)};
        if (seed_count == MOST_SEEDS || head[2] > MOST_BYTES / 2 || head[3] > MOST_BYTES / 2 ||
            fread(seed->data, 1, seed->n, file) != seed->n)
            fail("seeds that can't be read", -1);
    }
    fclose(file);
}

/* ---- buffers that end, or begin, where nothing may be touched --------------------------------------------------- */

struct buffer {
    uint8_t *fence; /* MOST_BYTES between two pages without access */
    uint8_t *heap, *at;
};

static void fence(struct buffer *buffer)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *all = mmap(NULL, MOST_BYTES + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + page, MOST_BYTES, PROT_READ | PROT_WRITE))
        fail("no memory", -1);
    buffer->fence = all + page;
}

static uint8_t *get(struct buffer *buffer, size_t n, int where, int fill)
{
    buffer->heap = where == 0 ? malloc(n) : NULL; /* of 0 bytes too: nothing of it may be touched */
    buffer->at = where == 0 ? buffer->heap : where == 1 ? buffer->fence + MOST_BYTES - n : buffer->fence;
    if (n)
        memset(buffer->at, fill, n);
    return buffer->at;
}

/* ---- mutations -------------------------------------------------------------------------------------------------- */

static void store_big(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--, value >>= 8)
        at[i] = (uint8_t)value;
}

static uint64_t lie(uint64_t truth)
{
    const uint64_t lies[] = {0, 1, 7, 8, 9, 64, 255, 4096, 8192, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                             (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7, truth - 1, truth + 1, truth * 2, truth / 2,
                             truth & ~(uint64_t)7};
    return lies[draw(sizeof lies / sizeof *lies)];
}

static void insert(struct record *m, size_t at, int byte, size_t n)
{
    if (m->n + n > MOST_BYTES)
        return;
    memmove(m->data + at + n, m->data + at, m->n - at);
    memset(m->data + at, byte, n);
    m->n += (uint32_t)n;
}

static void mutate(struct record *m)
{
    static const uint8_t bytes[] = {0, 1, 2, 0x0F, 0x1F, 0xF0, 0xFF, 0x10, 0x80, 0x40, 0xE0, 0x04};
    const size_t at = m->n ? draw(m->n) : 0;
    const size_t head = m->codec == NAT_BITSHUFFLE ? 0 : 12;
    switch (m->n < 20 ? 5 : draw(13)) {
    case 0: case 1:
        m->data[at] ^= (uint8_t)(1 << draw(8));
        break;
    case 2: case 3:
        m->data[at] = bytes[draw(sizeof bytes)];
        break;
    case 4: /* cut */
        m->n = (uint32_t)at;
        break;
    case 5: /* extend */
        insert(m, m->n, (int)draw(256), draw(40));
        break;
    case 6: /* a size of the header */
        if (draw(2))
            store_big(m->data, lie(m->out_bytes), 8);
        else
            store_big(m->data + 8, lie(load_big32(m->data + 8)), 4);
        break;
    case 7: /* the length of the first block */
        store_big(m->data + head, lie(load_big32(m->data + head)), 4);
        break;
    case 8: /* other decoded bytes, and a header that agrees */
        m->out_bytes = (uint32_t)(draw(4) ? m->out_bytes + draw(65) - 32 : draw(2 * m->out_bytes + 1));
        m->out_bytes %= MOST_BYTES / 2;
        store_big(m->data, m->out_bytes, 8);
        break;
    case 9: /* a distance of 0, or before the start, or a short one */
        m->data[at] = (uint8_t)(draw(3) ? draw(20) : 0xFF);
        m->data[at + (at + 1 < m->n)] = draw(2) ? 0 : 0xFF;
        break;
    case 10: /* a length that goes on and on */
        insert(m, at, 0xFF, draw(8) ? draw(12) : draw(600));
        break;
    case 11: { /* remove some */
        size_t n = 1 + draw(8);
        n = n < m->n - at ? n : m->n - at;
        memmove(m->data + at, m->data + at + n, m->n - at - n);
        m->n -= (uint32_t)n;
        break;
    }
    default: { /* a piece of another record */
        const struct record *other = &seeds[draw((uint64_t)seed_count)];
        size_t n = other->n < m->n - at ? other->n : m->n - at;
        n = n ? draw(n) : 0;
        memcpy(m->data + at, other->data + other->n - n, n);
    }
    }
}

/* ---- one mutant ------------------------------------------------------------------------------------------------- */

static struct buffer in, out, scratch, mask[MASKS];

static void give_back(void)
{
    struct buffer *all[] = {&in, &out, &scratch};
    for (int i = 0; i < 3 + MASKS; i++) {
        struct buffer *buffer = i < 3 ? all[i] : &mask[i - 3];
        free(buffer->heap);
        buffer->heap = NULL;
    }
}

static const struct nat_bits *any_set(void)
{
    const struct nat_bits *with = NULL;
    while (!with)
        with = nat_bits(nat_bits_names[draw(3)]);
    return with;
}

static int decode(const struct record *m, const struct nat_bits *with, int where, int fill)
{
    const size_t room = nat_scratch_bytes((enum nat_codec)m->codec, m->element, m->out_bytes);
    if (m->n)
        memcpy(get(&in, m->n, where, 0), m->data, m->n);
    else
        get(&in, 0, where, 0);
    return nat_decode_with(with, (enum nat_codec)m->codec, m->element, in.at, m->n, get(&out, m->out_bytes, where, fill),
                           m->out_bytes, get(&scratch, room, where, ~fill));
}

/* The sums over masks, or their refusal, against the pixels of `known` (NULL: they could not be decoded). */
static void check_masks(const struct record *m, const uint8_t *known, int where, long mutant)
{
    const size_t pixels = m->out_bytes / m->element, frames = pixels % (8 * FRAMES) || draw(2) ? 1 : FRAMES;
    const size_t each = pixels / frames, bytes = (each + 7) / 8;
    const int k = (int)draw(MASKS + 1);
    const uint8_t *masks[MASKS];
    uint64_t sums[FRAMES * MASKS], full, expected[FRAMES * MASKS] = {0}, most = 0;
    memcpy(get(&in, m->n, where, 0), m->data, m->n);
    for (int i = 0; i < k; i++) {
        masks[i] = get(&mask[i], bytes, where, 0xFF);
        for (size_t j = 0; i && j < bytes; j++)
            mask[i].at[j] = (uint8_t)draw(256);
    }
    const size_t room = nat_scratch_bytes(NAT_BITSHUFFLE_LZ4, m->element, m->out_bytes);
    const int rc = nat_decode_masks_with(any_set(), m->element, in.at, m->n, m->out_bytes, frames, masks, k, sums,
                                         &full, get(&scratch, room, where, 1));
    if (rc == NAT_BAD_NUMBER && frames > 1) /* a block of two frames */
        return;
    if ((rc == 0) != (known != NULL))
        fail("sums and pixels do not agree that the record is good", mutant);
    for (size_t i = 0; known && i < pixels; i++) {
        uint64_t value = 0;
        for (size_t j = 0; j < m->element; j++)
            value |= (uint64_t)known[i * m->element + j] << 8 * j;
        most += value == ((uint64_t)1 << 8 * m->element) - 1;
        for (int j = 0; j < k; j++)
            expected[i / each * (size_t)k + (size_t)j] += masks[j][i % each / 8] >> i % each % 8 & 1 ? value : 0;
    }
    if (known && (full != most || memcmp(sums, expected, frames * (size_t)k * sizeof *sums)))
        fail("sums over masks are not those of the pixels", mutant);
}

int main(int count, char **words)
{
    static uint8_t data[MOST_BYTES + 64], first[MOST_BYTES];
    long good = 0, bad = 0;
    if (count != 4)
        fail("fuzz_codecs SEEDS MUTANTS SEED", -1);
    read_seeds(words[1]);
    state = strtoull(words[3], NULL, 10);
    fence(&in), fence(&out), fence(&scratch);
    for (int i = 0; i < MASKS; i++)
        fence(&mask[i]);
    for (long mutant = 0; mutant < atol(words[2]); mutant++) {
        struct record m = seeds[draw((uint64_t)seed_count)];
        memcpy(data, m.data, m.n);
        m.data = data;
        for (uint64_t rounds = draw(8) ? 1 : draw(4); rounds; rounds--) /* now and then none: seeds must decode */
            mutate(&m);
        const int where = (int)(mutant % 3);
        const int rc = decode(&m, nat_bits("portable"), where, 0xA5);
        if (rc && rc != NAT_BAD_DATA)
            fail("neither good nor bad", mutant);
        if (m.out_bytes)
            memcpy(first, out.at, m.out_bytes);
        give_back();
        if (decode(&m, any_set(), where, 0x3C) != rc || (rc == 0 && m.out_bytes && memcmp(first, out.at, m.out_bytes)))
            fail("instruction sets differ", mutant);
        give_back();
        if (m.codec == NAT_BITSHUFFLE_LZ4 && m.element <= 4 && m.n) {
            check_masks(&m, rc ? NULL : first, where, mutant);
            give_back();
        }
        if (rc)
            bad++;
        else
            good++;
    }
    printf("%ld %ld\n", good, bad);
    return 0;
}
