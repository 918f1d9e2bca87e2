/* The kernels for AVX-512 with VNNI: 64 bytes and four frames at a time. */
#include "kernels.h"

#ifdef NAT_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))),        \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif
#include <immintrin.h>

#include "kernels_plain.h"

#define VB 64
#define FRAMES 4
#define COLUMNS 6
typedef __m512i V;
typedef __m256 H;
typedef __m512d D;
typedef __mmask8 M;

#define v_load(p) _mm512_loadu_si512(p)
#define v_store(p, v) _mm512_storeu_si512(p, v)
#define v_zero() _mm512_setzero_si512()
#define v_set8(x) _mm512_set1_epi8(x)
#define v_set16(x) _mm512_set1_epi16(x)
#define v_set32(x) _mm512_set1_epi32(x)
#define v_xor(a, b) _mm512_xor_si512(a, b)
#define v_max_i16(a, b) _mm512_max_epi16(a, b)
#define v_max_u8(a, b) _mm512_max_epu8(a, b)
#define v_max_u32(a, b) _mm512_max_epu32(a, b)
#define v_low8(a, b) _mm512_unpacklo_epi8(a, b)
#define v_high8(a, b) _mm512_unpackhi_epi8(a, b)
#define v_low16(a, b) _mm512_unpacklo_epi16(a, b)
#define v_high16(a, b) _mm512_unpackhi_epi16(a, b)
#define v_low32(a, b) _mm512_unpacklo_epi32(a, b)
#define v_high32(a, b) _mm512_unpackhi_epi32(a, b)
#define v_low64(a, b) _mm512_unpacklo_epi64(a, b)
#define v_high64(a, b) _mm512_unpackhi_epi64(a, b)
#define v_dot16(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#define v_dot8(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)

#define h_load(p) _mm256_loadu_ps((const void *)(p))
#define h_store(p, v) _mm256_storeu_ps(p, v)
#define h_max(a, b) _mm256_max_ps(a, b) /* b where either is not a number */

#define d_load(p) _mm512_loadu_pd(p)
#define d_store(p, v) _mm512_storeu_pd(p, v)
#define d_zero() _mm512_setzero_pd()
#define d_add(a, b) _mm512_add_pd(a, b)
#define d_widen(p) _mm512_cvtps_pd(h_load(p))
#define d_widen_low(v) _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_castsi512_ps(v)))
#define d_widen_high(v) _mm512_cvtps_pd(_mm512_extractf32x8_ps(_mm512_castsi512_ps(v), 1))

#define MASK_BITS 1
#define m_load(p) ((__mmask8) * (const uint8_t *)(p))
#define d_add_masked(sum, mask, x) _mm512_mask_add_pd(sum, mask, sum, x)
#define m_nonzero(w) _mm512_cmp_pd_mask(w, _mm512_setzero_pd(), _CMP_NEQ_UQ)
#define d_fma_masked(sum, mask, x, w) _mm512_mask3_fmadd_pd(x, w, sum, mask)

/* Word `at` to `at + 3` of sixteen frames, of which every fourth begins at `row`. */
static inline __attribute__((always_inline)) V v_gather(const uint8_t *const *frames, size_t row, size_t at)
{
    V v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(frames[row] + at)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(frames[row + 4] + at)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(frames[row + 8] + at)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(frames[row + 12] + at)), 3);
}

#define KEEP(v) __asm__("" : "+v"(v))
#define OPS nat_avx512
#define NAME "avx512"
#define DIGIT8 127
#include "kernels_simd.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
