/* The terms of a recipe over a block of frames, on a graphics card.
 *
 * One source for every pixel type and recipe: the compiler is told what is wanted (program.py writes the options), so
 * that sums stay in registers and nothing is computed in vain.  The tests compile the same text for the CPU.
 *
 *   visit          each thread block: one tile of pixels times one group of frames, read once from memory
 *   finish_rows    sums of each frame: its tiles, in their order
 *   finish_pixels  sums of each pixel: the groups, in their order, on top of the blocks before
 *   regions        sums of each frame over disjoint regions
 *
 * Integers are exact: 64-bit words modulo 2^64 (two's complement), which the host has proven to be enough.
 * Floats are added in float64 in an order that the size of a frame alone decides; no sum of floats is atomic.
 *
 *   PIXEL_U8 _U16 _U32 _I16 _F32       type of the pixels
 *   INTEGER_COLUMNS, FLOAT_COLUMNS     columns of weights, integers first
 *   NARROW                             integer sums of a warp fit 32 bits
 *   SIGNED_ROWS                        and they may be negative
 *   WANT_SUM, WANT_SQUARES, WANT_MAX   what is wanted of each pixel
 *   WITH_LEVEL                         floats are squared less a level of their pixel
 *   QUALITY                            count what is not finite, what is saturated, and which frames are empty
 */

typedef unsigned long long word;

#if defined(PIXEL_U8)
typedef unsigned char pixel;
typedef unsigned small_sum, top;
#define LOWEST 0u
#define FULL 0xFFu
#elif defined(PIXEL_U16)
typedef unsigned short pixel;
typedef unsigned small_sum, top;
#define LOWEST 0u
#define FULL 0xFFFFu
#elif defined(PIXEL_U32)
typedef unsigned pixel;
typedef word small_sum;
typedef unsigned top;
#define LOWEST 0u
#define FULL 0xFFFFFFFFu
#elif defined(PIXEL_I16)
typedef short pixel;
typedef int small_sum, top;
#define LOWEST (-32768)
#define FULL 32767
#elif defined(PIXEL_F32)
typedef float pixel;
typedef double small_sum;
typedef float top;
#define LOWEST __int_as_float((int)0xFF800000u) /* minus infinity */
#define FLOATS
#endif

#ifdef FLOATS
typedef double number; /* what a sum is kept in */
#else
typedef word number;
#endif

#ifdef NARROW
typedef unsigned row_sum;
#else
typedef word row_sum;
#endif

#ifndef THREADS
#define THREADS 256
#endif
#define WARPS (THREADS / 32)
#define PIXELS 8 /* of a thread: enough loads in flight; program.py knows this number */
#define BATCH 4  /* frames at a time, so that a weight is loaded once for all of them */
#define TILE (THREADS * PIXELS)
#define COLUMNS (INTEGER_COLUMNS + FLOAT_COLUMNS)
#define ROOM(n) ((n) > 0 ? (n) : 1)
#define LOW 0xFFFFFFFFull

__device__ inline double warp_sum(double v)
{
    for (int d = 16; d; d /= 2)
        v += __shfl_down_sync(~0u, v, d);
    return v;
}

__device__ inline word warp_sum(word v)
{
    for (int d = 16; d; d /= 2)
        v += __shfl_down_sync(~0u, v, d);
    return v;
}

__device__ inline unsigned warp_sum(unsigned v)
{
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(~0u, v);
#else
    for (int d = 16; d; d /= 2)
        v += __shfl_down_sync(~0u, v, d);
    return v;
#endif
}

/* A 64-bit word of a warp's sum. */
__device__ inline word widened(row_sum v)
{
#if defined(NARROW) && defined(SIGNED_ROWS)
    return (word)(long long)(int)v;
#else
    return v;
#endif
}

__device__ inline word bits(double v) { return (word)__double_as_longlong(v); }

__device__ inline number as_number(pixel x)
{
#ifdef FLOATS
    return (double)x;
#else
    return (word)(long long)x;
#endif
}

/* What a thread knows of one of its pixels, over one group of frames. */
struct Seen {
    small_sum sum;
    number low; /* of squares: all of it, or for 32-bit integers the low words */
    word high;
    top most;
};

__device__ inline void look(Seen &seen, pixel x, double level)
{
#ifdef WANT_SUM
    seen.sum += (small_sum)x;
#endif
#ifdef WANT_SQUARES
#if defined(PIXEL_U32)
    const word square = (word)x * x;
    seen.low += square & LOW;
    seen.high += square >> 32;
#elif defined(FLOATS)
    const double off = (double)x - level;
    seen.low += off * off;
#else
    seen.low += (unsigned)x * (unsigned)x; /* modulo 2^32, which squares of 16 bits do not reach */
#endif
#endif
#ifdef WANT_MAX
    if ((top)x > seen.most || x != x) /* a NaN wins, and stays */
        seen.most = (top)x;
#endif
}

/* What a thread knows of a few frames, over its pixels. */
struct Batch {
    row_sum integers[BATCH][ROOM(INTEGER_COLUMNS)];
    double floats[BATCH][ROOM(FLOAT_COLUMNS)];
    unsigned any, not_finite, saturated; /* any: a bit for each frame */
};

/* The frames from `at` on.  WHOLE: all of them and all pixels are there; then no check stands between the loads, which
 * are under way together. */
template <bool WHOLE>
__device__ __forceinline__ void take(const pixel *frames, long long at, long long last, long long own, long long pixels,
                                     const row_sum *integer_weights, const double *float_weights, const double *levels,
                                     Seen (&seen)[PIXELS], Batch &batch)
{
#pragma unroll
    for (int j = 0; j < PIXELS; j++) {
        const long long p = own + (long long)j * THREADS;
        if (!WHOLE && p >= pixels)
            continue;
#ifdef WITH_LEVEL
        const double level = levels[p];
#else
        const double level = 0;
#endif
        pixel x[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            x[b] = WHOLE || at + b < last ? frames[(at + b) * pixels + p] : (pixel)0;
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (!WHOLE && at + b >= last)
                continue;
            look(seen[j], x[b], level);
#ifdef QUALITY
            batch.any |= (unsigned)(x[b] != 0) << b;
#ifdef FLOATS
            batch.not_finite += !(x[b] - x[b] == 0);
#else
            batch.saturated += x[b] == FULL;
#endif
#endif
        }
#pragma unroll
        for (int c = 0; c < INTEGER_COLUMNS; c++) {
            const row_sum w = integer_weights[c * pixels + p];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                batch.integers[b][c] += w * (row_sum)x[b];
        }
#pragma unroll
        for (int c = 0; c < FLOAT_COLUMNS; c++) {
            const double w = float_weights[c * pixels + p];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                batch.floats[b][c] += w == 0 ? 0.0 : w * (double)x[b]; /* weight 0: whatever it is, it does not count */
        }
    }
}

/* Grid (tiles, groups).  row_parts is (tiles, COLUMNS, n); the other parts are (groups, pixels). */
extern "C" __global__ void __launch_bounds__(THREADS)
visit(const pixel *frames, long long n, long long pixels, long long group, const row_sum *integer_weights,
      const double *float_weights, const double *levels, word *row_parts, number *sum_parts, number *low_parts,
      word *high_parts, top *most_parts, unsigned char *filled, word *counts)
{
    __shared__ word of_warps[BATCH][ROOM(COLUMNS)][WARPS];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const long long tile = (long long)blockIdx.x * TILE, own = tile + thread; /* its first pixel */
    const long long first = blockIdx.y * group, last = first + group < n ? first + group : n;
    unsigned not_finite = 0, saturated = 0;
    Seen seen[PIXELS];
#pragma unroll
    for (int j = 0; j < PIXELS; j++)
        seen[j] = Seen{0, 0, 0, LOWEST};

    for (long long at = first; at < last; at += BATCH) {
        Batch batch = {};
        if (tile + TILE <= pixels && at + BATCH <= last)
            take<true>(frames, at, last, own, pixels, integer_weights, float_weights, levels, seen, batch);
        else
            take<false>(frames, at, last, own, pixels, integer_weights, float_weights, levels, seen, batch);
        not_finite += batch.not_finite;
        saturated += batch.saturated;
#ifdef QUALITY
        for (int b = 0; b < BATCH; b++)
            if (batch.any >> b & 1)
                filled[at + b] = 1; /* by many threads, all of which write the same */
#endif
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
#pragma unroll
            for (int c = 0; c < INTEGER_COLUMNS; c++) {
                const row_sum v = warp_sum(batch.integers[b][c]);
                if (!lane)
                    of_warps[b][c][warp] = widened(v);
            }
#pragma unroll
            for (int c = 0; c < FLOAT_COLUMNS; c++) {
                const double v = warp_sum(batch.floats[b][c]);
                if (!lane)
                    of_warps[b][INTEGER_COLUMNS + c][warp] = bits(v);
            }
        }
        __syncthreads();
        for (int i = thread; i < BATCH * COLUMNS; i += THREADS) {
            const int b = i / ROOM(COLUMNS), c = i % ROOM(COLUMNS);
            word whole = 0;
            double sum = 0;
            for (int w = 0; w < WARPS; w++)
                if (c < INTEGER_COLUMNS)
                    whole += of_warps[b][c][w];
                else
                    sum += __longlong_as_double((long long)of_warps[b][c][w]);
            if (at + b < last)
                row_parts[((long long)blockIdx.x * COLUMNS + c) * n + at + b] = c < INTEGER_COLUMNS ? whole : bits(sum);
        }
        __syncthreads();
    }
    for (int j = 0; j < PIXELS; j++) {
        const long long p = own + (long long)j * THREADS;
        if (p >= pixels)
            continue;
#ifdef WANT_SUM
#ifdef FLOATS
        sum_parts[blockIdx.y * pixels + p] = seen[j].sum;
#else
        sum_parts[blockIdx.y * pixels + p] = (word)(long long)seen[j].sum;
#endif
#endif
#ifdef WANT_SQUARES
        low_parts[blockIdx.y * pixels + p] = seen[j].low;
#ifdef PIXEL_U32
        high_parts[blockIdx.y * pixels + p] = seen[j].high;
#endif
#endif
#ifdef WANT_MAX
        most_parts[blockIdx.y * pixels + p] = seen[j].most;
#endif
    }
    if (not_finite)
        atomicAdd(counts, (word)not_finite);
    if (saturated)
        atomicAdd(counts + 1, (word)saturated);
}

/* rows (COLUMNS, n) from row_parts (tiles, COLUMNS, n); one thread per number. */
extern "C" __global__ void finish_rows(const word *row_parts, long long tiles, long long n, word *rows)
{
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x, all = COLUMNS * n;
    if (i >= all)
        return;
    word whole = 0;
    double sum = 0;
    const bool integer = i < INTEGER_COLUMNS * n;
    for (long long t = 0; t < tiles; t++)
        if (integer)
            whole += row_parts[t * all + i];
        else
            sum += __longlong_as_double((long long)row_parts[t * all + i]);
    rows[i] = integer ? whole : bits(sum);
}

/* One thread per pixel.  squares is (2, pixels) of [high, low] words for integers, else (pixels). */
extern "C" __global__ void finish_pixels(const number *sum_parts, const number *low_parts, const word *high_parts,
                                         const top *most_parts, long long groups, long long pixels, number *sum,
                                         number *squares, top *most)
{
    const long long p = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (p >= pixels)
        return;
    for (long long g = 0; g < groups; g++) {
#ifdef WANT_SUM
        sum[p] += sum_parts[g * pixels + p];
#endif
#ifdef WANT_SQUARES
#ifdef FLOATS
        squares[p] += low_parts[g * pixels + p];
#else
        word low = squares[pixels + p] + (low_parts[g * pixels + p] & LOW);
        word high = squares[p] + (low_parts[g * pixels + p] >> 32);
#ifdef PIXEL_U32
        high += high_parts[g * pixels + p];
#endif
        squares[p] = high + (low >> 32);
        squares[pixels + p] = low & LOW;
#endif
#endif
#ifdef WANT_MAX
        if (most_parts[g * pixels + p] > most[p] || most_parts[g * pixels + p] != most_parts[g * pixels + p])
            most[p] = most_parts[g * pixels + p];
#endif
    }
}

/* One thread block per frame, one warp per region: rows (n, count) over the pixels order[starts[r]:starts[r + 1]]. */
extern "C" __global__ void regions(const pixel *frames, long long pixels, const int *order, const int *starts,
                                   long long count, number *rows)
{
    const int lane = threadIdx.x % 32;
    const long long frame = blockIdx.x;
    for (long long base = 0; base < count; base += WARPS) { /* every warp goes round as often */
        const long long r = base + threadIdx.x / 32;
        number sum = 0;
        if (r < count)
            for (int i = starts[r] + lane; i < starts[r + 1]; i += 32)
                sum += as_number(frames[frame * pixels + order[i]]);
        sum = warp_sum(sum);
        if (!lane && r < count)
            rows[frame * count + r] = sum;
    }
}
