/* Bit planes back into elements, and sums over masks straight from the planes.
 *
 * Source: the layout is bitshuffle's, Masui et al. 2015, doi:10.1016/j.ascom.2015.07.002.
 *
 * Counted data leave most planes empty, so the work is done plane by plane, and only for planes that have any bit: a
 * tile of bytes is built up by one bit at a time and then interleaved with its neighbours.  One source, inlined into a
 * function for each instruction set; nothing is read or written beyond planes, masks and elements.
 */
#include "codecs.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define FOR_AVX2 __attribute__((target("avx2,bmi,popcnt")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,bmi,popcnt")))
#endif

#define INLINE static inline __attribute__((always_inline))

enum { TILE = 64, EIGHTS = 8 * TILE }; /* bytes of each plane that are worked on at once, and the elements they make */

/* One byte of each of 8 * n elements (n <= TILE), from the eight planes of its bits, as far as `used` names them. */
typedef void columns(const uint8_t *planes, size_t width, unsigned used, size_t n, uint8_t *tile);

/* ---- any processor ---------------------------------------------------------------------------------------------- */

/* The bits of a byte as bytes 0 and 1, the lowest first.  The product puts bit i of seven at 8 i; no two of its terms
 * meet, so nothing carries. */
INLINE uint64_t spread(uint8_t byte)
{
    return ((uint64_t)(byte & 0x7F) * 0x0002040810204081 & 0x0101010101010101) | (uint64_t)(byte & 0x80) << 49;
}

INLINE void columns_plain(const uint8_t *planes, size_t width, unsigned used, size_t n, uint8_t *tile)
{
    memset(tile, 0, 8 * n);
    for (; used; used &= used - 1) {
        const int bit = __builtin_ctz(used);
        const uint8_t *plane = planes + (size_t)bit * width;
        for (size_t i = 0; i < n; i++)
            store_little64(tile + 8 * i, load_little64(tile + 8 * i) | spread(plane[i]) << bit);
    }
}

/* Elements from the tiles of their bytes; tile j is at tiles[j], or NULL where no element has any of its bits. */
INLINE void interleave(const uint8_t *const *tiles, size_t element, size_t n, uint8_t *out)
{
    if (element == 1 && tiles[0]) {
        memcpy(out, tiles[0], n);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    } else if (element == 2 && tiles[0] && !tiles[1]) { /* the usual case, and twice as fast as the general one */
        for (size_t i = 0; i < n; i++) {
            const uint16_t v = tiles[0][i];
            memcpy(out + 2 * i, &v, 2);
        }
    } else if (element == 2 && tiles[0]) {
        for (size_t i = 0; i < n; i++) {
            const uint16_t v = (uint16_t)(tiles[0][i] | tiles[1][i] << 8);
            memcpy(out + 2 * i, &v, 2);
        }
#endif
    } else {
        memset(out, 0, n * element);
        for (size_t j = 0; j < element; j++)
            for (size_t i = 0; tiles[j] && i < n; i++)
                out[i * element + j] = tiles[j][i];
    }
}

INLINE uint64_t used_any(const uint8_t *planes, size_t width, size_t element)
{
    uint64_t used = 0;
    for (size_t p = 0; p < 8 * element; p++, planes += width) {
        uint64_t any = 0, v;
        size_t i = 0;
        for (; i + 8 <= width; i += 8) {
            memcpy(&v, planes + i, 8);
            any |= v;
        }
        for (; i < width; i++)
            any |= planes[i];
        used |= (uint64_t)(any != 0) << p;
    }
    return used;
}

INLINE void gather_any(columns *make, const uint8_t *planes, size_t width, size_t element, uint64_t used, uint8_t *out)
{
    uint8_t space[8][EIGHTS];
    for (size_t at = 0; at < width; at += TILE) {
        const uint8_t *tiles[8] = {NULL};
        const size_t n = width - at < TILE ? width - at : TILE;
        for (size_t j = 0; j < element; j++) {
            const unsigned of_byte = (unsigned)(used >> 8 * j & 0xFF);
            if (!of_byte)
                continue;
            if (n == TILE)
                make(planes + 8 * j * width + at, width, of_byte, TILE, space[j]);
            else
                columns_plain(planes + 8 * j * width + at, width, of_byte, n, space[j]);
            tiles[j] = space[j];
        }
        interleave(tiles, element, 8 * n, out + 8 * at * element);
    }
}

INLINE uint64_t count_both(const uint8_t *a, const uint8_t *b, size_t n)
{
    uint64_t sum = 0, x, y;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        memcpy(&x, a + i, 8);
        memcpy(&y, b + i, 8);
        sum += (uint64_t)__builtin_popcountll(x & y);
    }
    for (; i < n; i++)
        sum += (uint64_t)__builtin_popcount(a[i] & b[i]);
    return sum;
}

INLINE void count_any(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks, size_t at, int k,
                      uint64_t *sums)
{
    for (; used; used &= used - 1) {
        const int p = __builtin_ctzll(used);
        for (int m = 0; m < k; m++)
            sums[m] += count_both(planes + (size_t)p * width, masks[m] + at, width) << p;
    }
}

static uint64_t used_portable(const uint8_t *planes, size_t width, size_t element)
{
    return used_any(planes, width, element);
}

static void gather_portable(const uint8_t *planes, size_t width, size_t element, uint64_t used, uint8_t *out)
{
    gather_any(columns_plain, planes, width, element, used, out);
}

static void count_portable(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks, size_t at,
                           int k, uint64_t *sums)
{
    count_any(planes, width, used, masks, at, k, sums);
}

static const struct nat_bits portable = {"portable", used_portable, gather_portable, count_portable};

/* ---- AVX2 ------------------------------------------------------------------------------------------------------- */

#ifdef X86

/* A whole tile: 32 bits of a plane are spread over 32 bytes and compared with the bit that each byte stands for. */
FOR_AVX2 static void columns_avx2(const uint8_t *planes, size_t width, unsigned used, size_t n, uint8_t *tile)
{
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i own = _mm256_set1_epi64x((long long)0x8040201008040201);
    for (size_t at = 0; at < n; at += 16) {
        const __m256i none = _mm256_setzero_si256();
        __m256i sum[4] = {none, none, none, none};
        for (unsigned left = used; left; left &= left - 1) {
            const int bit = __builtin_ctz(left);
            const __m256i value = _mm256_set1_epi8((char)(1 << bit));
            const uint8_t *plane = planes + (size_t)bit * width + at;
            for (int i = 0; i < 4; i++) {
                int word;
                memcpy(&word, plane + 4 * i, 4);
                __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
                v = _mm256_cmpeq_epi8(_mm256_and_si256(v, own), own);
                sum[i] = _mm256_or_si256(sum[i], _mm256_and_si256(v, value));
            }
        }
        for (int i = 0; i < 4; i++)
            _mm256_storeu_si256((__m256i *)(tile + 8 * at + 32 * i), sum[i]);
    }
}

FOR_AVX2 static uint64_t used_avx2(const uint8_t *planes, size_t width, size_t element)
{
    return used_any(planes, width, element);
}

FOR_AVX2 static void gather_avx2(const uint8_t *planes, size_t width, size_t element, uint64_t used, uint8_t *out)
{
    gather_any(columns_avx2, planes, width, element, used, out);
}

FOR_AVX2 static void count_avx2(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks,
                                size_t at, int k, uint64_t *sums)
{
    count_any(planes, width, used, masks, at, k, sums);
}

static const struct nat_bits avx2 = {"avx2", used_avx2, gather_avx2, count_avx2};

/* ---- AVX-512 ---------------------------------------------------------------------------------------------------- */

/* A whole tile: 64 bits of a plane are the mask under which 64 bytes get that bit. */
FOR_AVX512 static void columns_avx512(const uint8_t *planes, size_t width, unsigned used, size_t n, uint8_t *tile)
{
    (void)n;
    __m512i sum[8];
    for (int i = 0; i < 8; i++)
        sum[i] = _mm512_setzero_si512();
    for (; used; used &= used - 1) {
        const int bit = __builtin_ctz(used);
        const __m512i value = _mm512_set1_epi8((char)(1 << bit));
        const uint8_t *plane = planes + (size_t)bit * width;
        for (int i = 0; i < 8; i++) {
            __mmask64 ones;
            memcpy(&ones, plane + 8 * i, 8);
            sum[i] = _mm512_mask_add_epi8(sum[i], ones, sum[i], value);
        }
    }
    for (int i = 0; i < 8; i++)
        _mm512_storeu_si512(tile + 64 * i, sum[i]);
}

FOR_AVX512 static uint64_t used_avx512(const uint8_t *planes, size_t width, size_t element)
{
    const __mmask64 tail = _cvtu64_mask64(((uint64_t)1 << width % 64) - 1);
    uint64_t used = 0;
    for (size_t p = 0; p < 8 * element; p++, planes += width) {
        size_t i = 0;
        __m512i any = _mm512_setzero_si512();
        for (; i + 64 <= width; i += 64)
            any = _mm512_or_si512(any, _mm512_loadu_si512(planes + i));
        if (i < width)
            any = _mm512_or_si512(any, _mm512_maskz_loadu_epi8(tail, planes + i));
        used |= (uint64_t)(_mm512_test_epi64_mask(any, any) != 0) << p;
    }
    return used;
}

FOR_AVX512 static void gather_avx512(const uint8_t *planes, size_t width, size_t element, uint64_t used, uint8_t *out)
{
    gather_any(columns_avx512, planes, width, element, used, out);
}

/* Up to four masks at once: each vector of a plane is loaded once, and lanes are added up once for all planes. */
FOR_AVX512 INLINE void count_some(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks,
                                  size_t at, int k, uint64_t *sums)
{
    const __mmask64 tail = _cvtu64_mask64(((uint64_t)1 << width % 64) - 1);
    __m512i total[4];
    for (int m = 0; m < k; m++)
        total[m] = _mm512_setzero_si512();
    for (; used; used &= used - 1) {
        const int p = __builtin_ctzll(used);
        const uint8_t *plane = planes + (size_t)p * width;
        const __m128i shift = _mm_cvtsi32_si128(p);
        __m512i sum[4];
        for (int m = 0; m < k; m++)
            sum[m] = _mm512_setzero_si512();
        for (size_t i = 0; i < width; i += 64) {
            const __mmask64 here = width - i < 64 ? tail : ~(__mmask64)0;
            const __m512i bits = _mm512_maskz_loadu_epi8(here, plane + i);
            for (int m = 0; m < k; m++) {
                const __m512i both = _mm512_and_si512(bits, _mm512_maskz_loadu_epi8(here, masks[m] + at + i));
                sum[m] = _mm512_add_epi64(sum[m], _mm512_popcnt_epi64(both));
            }
        }
        for (int m = 0; m < k; m++)
            total[m] = _mm512_add_epi64(total[m], _mm512_sll_epi64(sum[m], shift));
    }
    for (int m = 0; m < k; m++)
        sums[m] += (uint64_t)_mm512_reduce_add_epi64(total[m]);
}

FOR_AVX512 static void count_avx512(const uint8_t *planes, size_t width, uint64_t used, const uint8_t *const *masks,
                                    size_t at, int k, uint64_t *sums)
{
    for (; k >= 4; k -= 4, masks += 4, sums += 4)
        count_some(planes, width, used, masks, at, 4, sums);
    if (k == 3)
        count_some(planes, width, used, masks, at, 3, sums);
    else if (k == 2)
        count_some(planes, width, used, masks, at, 2, sums);
    else if (k == 1)
        count_some(planes, width, used, masks, at, 1, sums);
}

static const struct nat_bits avx512 = {"avx512", used_avx512, gather_avx512, count_avx512};

#endif

/* ---- choice ----------------------------------------------------------------------------------------------------- */

const char *const nat_bits_names[] = {"avx512", "avx2", "portable", NULL};

const struct nat_bits *nat_bits(const char *name)
{
#ifdef X86
    if (!name || !strcmp(name, "avx512"))
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
            return &avx512;
    if (!name || !strcmp(name, "avx2"))
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt"))
            return &avx2;
#endif
    return !name || !strcmp(name, "portable") ? &portable : NULL;
}
