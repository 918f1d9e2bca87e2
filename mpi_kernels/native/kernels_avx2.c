/* The kernels for AVX2: 32 bytes and two frames at a time. */
#include "kernels.h"

#ifdef NAT_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "kernels_plain.h"

#define VB 32
#define FRAMES 2
#define COLUMNS 6
typedef __m256i V;
typedef __m128 H;
typedef __m256d D;
typedef __m256d M;

#define v_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define v_store(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define v_zero() _mm256_setzero_si256()
#define v_set8(x) _mm256_set1_epi8(x)
#define v_set16(x) _mm256_set1_epi16(x)
#define v_set32(x) _mm256_set1_epi32(x)
#define v_xor(a, b) _mm256_xor_si256(a, b)
#define v_max_i16(a, b) _mm256_max_epi16(a, b)
#define v_max_u8(a, b) _mm256_max_epu8(a, b)
#define v_max_u32(a, b) _mm256_max_epu32(a, b)
#define v_low8(a, b) _mm256_unpacklo_epi8(a, b)
#define v_high8(a, b) _mm256_unpackhi_epi8(a, b)
#define v_low16(a, b) _mm256_unpacklo_epi16(a, b)
#define v_high16(a, b) _mm256_unpackhi_epi16(a, b)
#define v_low32(a, b) _mm256_unpacklo_epi32(a, b)
#define v_high32(a, b) _mm256_unpackhi_epi32(a, b)
#define v_low64(a, b) _mm256_unpacklo_epi64(a, b)
#define v_high64(a, b) _mm256_unpackhi_epi64(a, b)
#define v_dot16(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
/* two products of 255 and 64 stay below 2**15, where the instruction would saturate */
#define v_dot8(sum, a, b)                                                                                              \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))

#define h_load(p) _mm_loadu_ps((const void *)(p))
#define h_store(p, v) _mm_storeu_ps(p, v)
#define h_max(a, b) _mm_max_ps(a, b) /* b where either is not a number */

#define d_load(p) _mm256_loadu_pd(p)
#define d_store(p, v) _mm256_storeu_pd(p, v)
#define d_zero() _mm256_setzero_pd()
#define d_add(a, b) _mm256_add_pd(a, b)
#define d_widen(p) _mm256_cvtps_pd(h_load(p))
#define d_widen_low(v) _mm256_cvtps_pd(_mm256_castps256_ps128(_mm256_castsi256_ps(v)))
#define d_widen_high(v) _mm256_cvtps_pd(_mm256_extractf128_ps(_mm256_castsi256_ps(v), 1))

#define MASK_BITS 0
#define m_load(p) _mm256_castsi256_pd(_mm256_cvtepi8_epi64(_mm_loadu_si32(p)))
#define d_add_masked(sum, mask, x) _mm256_add_pd(sum, _mm256_and_pd(mask, x))
#define m_nonzero(w) _mm256_cmp_pd(w, _mm256_setzero_pd(), _CMP_NEQ_UQ)
#define d_fma_masked(sum, mask, x, w) _mm256_fmadd_pd(_mm256_and_pd(mask, x), w, sum)

/* Word `at` to `at + 3` of eight frames, of which every fourth begins at `row`. */
static inline __attribute__((always_inline)) V v_gather(const uint8_t *const *frames, size_t row, size_t at)
{
    V v = _mm256_castsi128_si256(_mm_loadu_si128((const void *)(frames[row] + at)));
    return _mm256_inserti128_si256(v, _mm_loadu_si128((const void *)(frames[row + 4] + at)), 1);
}

/* Sixteen registers are just enough if each product is added at once: left alone, the compiler makes all products
 * first and keeps the sums in memory. */
#define KEEP(v) __asm__("" : "+x"(v))
#define OPS nat_avx2
#define NAME "avx2"
#define DIGIT8 64
#include "kernels_simd.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
