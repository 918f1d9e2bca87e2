/* The kernels, on the vector operations that the including file defines for its instruction set.
 *
 * A kernel keeps one accumulator for each of a few frames and columns in registers: the weights and the running rows
 * of sums and maxima are loaded once for all frames of the call.
 */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define STEP (VB / 4) /* frames of a transposed word */

INLINE int64_t total(V v)
{
    int32_t lane[VB / 4];
    int64_t sum = 0;
    v_store(lane, v);
    for (size_t i = 0; i < VB / 4; i++)
        sum += lane[i];
    return sum;
}

/* The lanes of a sum of floats, in an order that is always the same. */
INLINE double total_d(D v)
{
    double lane[VB / 8];
    d_store(lane, v);
    for (size_t width = VB / 16; width; width /= 2)
        for (size_t i = 0; i < width; i++)
            lane[i] += lane[i + width];
    return lane[0];
}

INLINE uint32_t top_of(int kind, V v)
{
    uint32_t top = 0;
    if (kind == NAT_U8) {
        uint8_t lane[VB];
        v_store(lane, v);
        for (size_t i = 0; i < VB; i++)
            top = lane[i] > top ? lane[i] : top;
    } else if (kind == NAT_U32) {
        uint32_t lane[VB / 4];
        v_store(lane, v);
        for (size_t i = 0; i < VB / 4; i++)
            top = lane[i] > top ? lane[i] : top;
    } else {
        int16_t lane[VB / 2], best = INT16_MIN;
        v_store(lane, v);
        for (size_t i = 0; i < VB / 2; i++)
            best = lane[i] > best ? lane[i] : best;
        top = (uint16_t)best;
    }
    return top;
}

INLINE V larger(int kind, V a, V b)
{
    return kind == NAT_U8 ? v_max_u8(a, b) : kind == NAT_U32 ? v_max_u32(a, b) : v_max_i16(a, b);
}

INLINE V dot(int kind, V sum, V x, V w)
{
    return kind == NAT_U8 ? v_dot8(sum, x, w) : v_dot16(sum, x, w);
}

/* Add a vector of each frame to the sums of its pixels: frames are interleaved, so that one product with ones adds two
 * of them (bytes: four) into 32-bit lanes. */
INLINE void add_lanes(int kind, int frames, const V *x, int32_t *lanes)
{
    const size_t step = VB / 4;
    if (kind == NAT_U8) {
        const V none = v_zero(), one = v_set8(1);
        const V a = x[0], b = frames > 1 ? x[1] : none, c = frames > 2 ? x[2] : none, d = frames > 3 ? x[3] : none;
        const V ab = v_low8(a, b), cd = v_low8(c, d), AB = v_high8(a, b), CD = v_high8(c, d);
        v_store(lanes, v_dot8(v_load(lanes), v_low16(ab, cd), one));
        v_store(lanes + step, v_dot8(v_load(lanes + step), v_high16(ab, cd), one));
        v_store(lanes + 2 * step, v_dot8(v_load(lanes + 2 * step), v_low16(AB, CD), one));
        v_store(lanes + 3 * step, v_dot8(v_load(lanes + 3 * step), v_high16(AB, CD), one));
        return;
    }
    const V one = v_set16(1);
    V low = v_load(lanes), high = v_load(lanes + step);
    UNROLL for (int i = 0; i < frames; i += 2)
    {
        const V next = i + 1 < frames ? x[i + 1] : v_zero();
        low = v_dot16(low, v_low16(x[i], next), one);
        high = v_dot16(high, v_high16(x[i], next), one);
    }
    v_store(lanes, low);
    v_store(lanes + step, high);
}

/* Ask for the frames that come next while there is work on these: the machine's own prefetching ends with a page, and
 * with every pass.  A prefetch never faults, so nobody minds where the buffer ends. */
INLINE void fetch(const uint8_t *const *frame, int frames, size_t ahead, size_t at)
{
    if (ahead && at % 64 == 0)
        UNROLL for (int i = 0; i < frames; i++)
            _mm_prefetch((const char *)frame[i] + ahead + at, _MM_HINT_T1);
}

/* The frames' addresses in registers: the compiler must take it that the sums written may lie over the visit. */
#define LOCAL_FRAMES                                                                                                   \
    const uint8_t *frame[FRAMES];                                                                                      \
    const size_t ahead = visit->ahead, vectors = visit->vectors;                                                       \
    UNROLL for (int i = 0; i < frames; i++) frame[i] = visit->frame[i];

/* Whole numbers.  `first`: column 0 is the total, and sums and maxima of pixels are kept as well. */
INLINE void whole(const int kind, const int first, const int frames, const int columns, struct nat_visit *visit)
{
    const V bias = v_set32((int32_t)visit->bias);
    const V ones = kind == NAT_U8 ? v_set8(1) : kind == NAT_U32 ? v_set32(1) : v_set16(1);
    const uint8_t *weights = visit->weights;
    int32_t *lanes = visit->sum;
    uint8_t *max = visit->max;
    V sums[FRAMES][COLUMNS], x[FRAMES];
    V top = kind == NAT_U8 || kind == NAT_U32 ? v_zero() : v_set16(INT16_MIN);
    UNROLL for (int i = 0; i < frames; i++)
        UNROLL for (int k = 0; k < columns; k++)
            sums[i][k] = v_zero();
    LOCAL_FRAMES
    for (size_t v = 0; v < vectors; v++) {
        fetch(frame, frames, ahead, v * VB);
        UNROLL for (int i = 0; i < frames; i++)
            x[i] = v_load(frame[i] + v * VB);
        V best = x[0];
        if (first && kind == NAT_U32)
            UNROLL for (int i = 1; i < frames; i++)
                best = larger(kind, best, x[i]);
        if (kind != NAT_U8)
            UNROLL for (int i = 0; i < frames; i++)
                x[i] = v_xor(x[i], bias);
        if (first && kind != NAT_U32) {
            best = x[0];
            UNROLL for (int i = 1; i < frames; i++)
                best = larger(kind, best, x[i]);
        }
        if (first) {
            top = larger(kind, top, best);
            if (max)
                v_store(max + v * VB, larger(kind, best, v_load(max + v * VB)));
            if (lanes)
                add_lanes(kind, frames, x, lanes + v * (kind == NAT_U8 ? VB : VB / 2));
            UNROLL for (int i = 0; i < frames; i++)
            {
                sums[i][0] = dot(kind, sums[i][0], x[i], ones);
                KEEP(sums[i][0]);
            }
        }
        UNROLL for (int k = first; k < columns; k++, weights += VB)
        {
            V w = v_load(weights);
            KEEP(w);
            UNROLL for (int i = 0; i < frames; i++)
            {
                sums[i][k] = dot(kind, sums[i][k], x[i], w);
                KEEP(sums[i][k]);
            }
        }
    }
    UNROLL for (int i = 0; i < frames; i++)
        UNROLL for (int k = 0; k < columns; k++)
            visit->out[i][k] += (uint64_t)total(sums[i][k]);
    if (first)
        visit->top = top_of(kind, top);
}

/* Half a vector of floats of each frame into the running maxima. */
INLINE void add_max(const uint8_t *const *frame, int frames, size_t at, float *max)
{
    H best = h_load(frame[0] + at * sizeof(float));
    UNROLL for (int i = 1; i < frames; i++)
        best = h_max(h_load(frame[i] + at * sizeof(float)), best);
    h_store(max, h_max(best, h_load(max)));
}

/* Floats under masks, and `extra` columns with weights; where a weight is zero, the pixel does not count, whatever it
 * is.  Half a vector of floats is a vector of doubles. */
INLINE void masked(const int first, const int frames, const int columns, const int extra, struct nat_visit *visit)
{
    const size_t half = VB / 8, unit = MASK_BITS ? VB / 64 : VB / 8; /* pixels, bytes of a mask */
    const uint8_t *weights = visit->weights;
    const double *more = (const double *)visit->extra;
    double *group = visit->sum;
    float *max = (float *)visit->max;
    D sums[FRAMES][COLUMNS], x[FRAMES];
    UNROLL for (int i = 0; i < frames; i++)
        UNROLL for (int k = 0; k < columns + extra; k++)
            sums[i][k] = d_zero();
    LOCAL_FRAMES
    for (size_t at = 0; at < vectors * 2 * half; at += half) {
        fetch(frame, frames, ahead, at * sizeof(float));
        UNROLL for (int i = 0; i < frames; i++)
            x[i] = d_widen(frame[i] + at * sizeof(float));
        if (first && group) {
            D sum = d_load(group + at); /* frame after frame, so that the order does not depend on the calls */
            UNROLL for (int i = 0; i < frames; i++)
                sum = d_add(sum, x[i]);
            d_store(group + at, sum);
        }
        if (first && max)
            add_max(frame, frames, at, max + at);
        if (first)
            UNROLL for (int i = 0; i < frames; i++)
            {
                sums[i][0] = d_add(sums[i][0], x[i]);
                KEEP(sums[i][0]);
            }
        UNROLL for (int k = first; k < columns; k++, weights += unit)
        {
            const M mask = m_load(weights);
            UNROLL for (int i = 0; i < frames; i++)
            {
                sums[i][k] = d_add_masked(sums[i][k], mask, x[i]);
                KEEP(sums[i][k]);
            }
        }
        UNROLL for (int k = columns; k < columns + extra; k++, more += half)
        {
            const D w = d_load(more);
            const M mask = m_nonzero(w);
            UNROLL for (int i = 0; i < frames; i++)
            {
                sums[i][k] = d_fma_masked(sums[i][k], mask, x[i], w);
                KEEP(sums[i][k]);
            }
        }
    }
    UNROLL for (int i = 0; i < frames; i++)
        UNROLL for (int k = 0; k < columns + extra; k++)
        {
            uint64_t *out = k < columns ? visit->out[i] + k : visit->extra_out[i] + (k - columns);
            *(double *)out += total_d(sums[i][k]);
        }
}

/* Weights alone. */
INLINE void multiplied(const int frames, const int columns, struct nat_visit *visit)
{
    visit->extra = visit->weights;
    UNROLL for (int i = 0; i < frames; i++)
        visit->extra_out[i] = visit->out[i];
    masked(0, frames, 0, columns, visit);
}

/* ---- one function for each number of frames and columns ---- */

typedef void (*kernel)(struct nat_visit *visit);
#define KERNEL(NAME, ...)                                                                                              \
    static void NAME(struct nat_visit *visit)                                                                          \
    {                                                                                                                  \
        __VA_ARGS__;                                                                                                   \
    }
#define KERNELS(F, K)                                                                                                  \
    KERNEL(first_8_##F##_##K, whole(NAT_U8, 1, F, K, visit))                                                           \
    KERNEL(first_16_##F##_##K, whole(NAT_U16, 1, F, K, visit))                                                         \
    KERNEL(first_32_##F##_##K, whole(NAT_U32, 1, F, K, visit))                                                         \
    KERNEL(first_f_##F##_##K, masked(1, F, K, 0, visit))                                                               \
    KERNEL(more_8_##F##_##K, whole(NAT_U8, 0, F, K, visit))                                                            \
    KERNEL(more_16_##F##_##K, whole(NAT_U16, 0, F, K, visit))                                                          \
    KERNEL(more_f_##F##_##K, masked(0, F, K, 0, visit))                                                                \
    KERNEL(weighted_##F##_##K, multiplied(F, K, visit))
#define ALL_KERNELS(F) KERNELS(F, 1) KERNELS(F, 2) KERNELS(F, 3) KERNELS(F, 4) KERNELS(F, 5) KERNELS(F, 6)
#define ROW(NAME, F)                                                                                                   \
    {NULL, NAME##_##F##_1, NAME##_##F##_2, NAME##_##F##_3, NAME##_##F##_4, NAME##_##F##_5, NAME##_##F##_6}

ALL_KERNELS(1)
#if FRAMES == 2
ALL_KERNELS(2)
#define TABLE(NAME) {ROW(NAME, 1), ROW(NAME, 2)}
#else
ALL_KERNELS(4)
#define TABLE(NAME) {ROW(NAME, 1), ROW(NAME, 4)}
#endif

/* by enum nat_pixel */
static const kernel first_kernels[5][2][COLUMNS + 1] = {TABLE(first_8), TABLE(first_16), TABLE(first_32),
                                                        TABLE(first_16), TABLE(first_f)};
static const kernel more_kernels[5][2][COLUMNS + 1] = {TABLE(more_8), TABLE(more_16), TABLE(more_16), TABLE(more_16),
                                                       TABLE(more_f)};
static const kernel weighted_kernels[2][COLUMNS + 1] = TABLE(weighted);

static void first(int kind, size_t frames, size_t columns, struct nat_visit *visit)
{
    first_kernels[kind][frames > 1][columns](visit);
}

static void more(int kind, size_t frames, size_t columns, struct nat_visit *visit)
{
    more_kernels[kind][frames > 1][columns](visit);
}

#define BOTH(F, K, X) KERNEL(both_##F##_##K##_##X, masked(1, F, K, X, visit))
#define ALL_BOTH(F)                                                                                                    \
    BOTH(F, 1, 1) BOTH(F, 2, 1) BOTH(F, 3, 1) BOTH(F, 4, 1) BOTH(F, 5, 1)                                              \
    BOTH(F, 1, 2) BOTH(F, 2, 2) BOTH(F, 3, 2) BOTH(F, 4, 2)
#define BOTH_ROWS(F)                                                                                                   \
    {{NULL, both_##F##_1_1, both_##F##_2_1, both_##F##_3_1, both_##F##_4_1, both_##F##_5_1},                           \
     {NULL, both_##F##_1_2, both_##F##_2_2, both_##F##_3_2, both_##F##_4_2, NULL}}
ALL_BOTH(1)
#if FRAMES == 2
ALL_BOTH(2)
static const kernel both_kernels[2][2][COLUMNS] = {BOTH_ROWS(1), BOTH_ROWS(2)};
#else
ALL_BOTH(4)
static const kernel both_kernels[2][2][COLUMNS] = {BOTH_ROWS(1), BOTH_ROWS(4)};
#endif

static void both(size_t frames, size_t columns, size_t extra, struct nat_visit *visit)
{
    both_kernels[frames > 1][extra - 1][columns](visit);
}

static void weighted(size_t frames, size_t columns, struct nat_visit *visit)
{
    weighted_kernels[frames > 1][columns](visit);
}

/* ---- labels: words of 32 bits of several frames are transposed, then whole vectors are added bin by bin ---- */

INLINE void transpose(const uint8_t *const *frames, size_t at, size_t words, size_t ahead, V bias, uint8_t *scratch)
{
    for (size_t w = 0; w < words; w += 4, at += 16, scratch += 4 * VB) {
        if (ahead && w % 16 == 0)
            UNROLL for (size_t i = 0; i < STEP; i++)
                _mm_prefetch((const char *)frames[i] + ahead + at, _MM_HINT_T1);
        const V a = v_xor(v_gather(frames, 0, at), bias), b = v_xor(v_gather(frames, 1, at), bias);
        const V c = v_xor(v_gather(frames, 2, at), bias), d = v_xor(v_gather(frames, 3, at), bias);
        const V ab = v_low32(a, b), cd = v_low32(c, d), AB = v_high32(a, b), CD = v_high32(c, d);
        v_store(scratch, v_low64(ab, cd));
        v_store(scratch + VB, v_high64(ab, cd));
        v_store(scratch + 2 * VB, v_low64(AB, CD));
        v_store(scratch + 3 * VB, v_high64(AB, CD));
    }
}

INLINE void run_steps(int kind, const struct nat_step *step, const struct nat_step *end, const uint8_t *scratch,
                      uint8_t *lanes)
{
    for (; step < end; step++) {
        const V x = v_load(scratch + step->word * VB);
        if (kind == NAT_F32) {
            double *sum = (double *)lanes + step->bin * (size_t)STEP;
            d_store(sum, d_add(d_load(sum), d_widen_low(x)));
            d_store(sum + STEP / 2, d_add(d_load(sum + STEP / 2), d_widen_high(x)));
        } else {
            uint8_t *sum = lanes + step->bin * (size_t)VB;
            v_store(sum, dot(kind, v_load(sum), x, v_set32((int32_t)step->pattern)));
        }
    }
}

/* Lanes hold, for every STEP frames of the bundle, a vector for each bin (floats: two). */
INLINE void labelled(int kind, const struct nat_labels *labels, const struct nat_segment *segment,
                     const uint8_t *const *frames, size_t n, size_t words, size_t ahead, uint8_t *lanes,
                     uint8_t *scratch)
{
    const V bias = v_set32(kind == NAT_U16 || kind == NAT_U32 ? (int32_t)0x80008000u : 0);
    const size_t room = labels->bins * VB * (kind == NAT_F32 ? 2 : 1);
    for (size_t i = 0; i < n; i += STEP, lanes += room, frames += STEP) {
        const size_t *tile = labels->tile + segment->tile;
        for (size_t word = 0; word < words; word += TILE, tile++) {
            transpose(frames, word * 4, words - word < TILE ? words - word : TILE, ahead, bias, scratch);
            run_steps(kind, labels->steps + tile[0], labels->steps + tile[1], scratch, lanes);
        }
    }
}

static void add_labels(int kind, const struct nat_labels *labels, const struct nat_segment *segment,
                       const uint8_t *const *frames, size_t n, size_t cells, size_t ahead, uint8_t *lanes,
                       uint8_t *scratch, uint64_t *rows)
{
    (void)rows;
    switch (kind) {
    case NAT_U8:
        labelled(NAT_U8, labels, segment, frames, n, cells / 4, ahead, lanes, scratch);
        break;
    case NAT_I16:
        labelled(NAT_I16, labels, segment, frames, n, cells / 2, ahead, lanes, scratch);
        break;
    case NAT_F32:
        labelled(NAT_F32, labels, segment, frames, n, cells, ahead, lanes, scratch);
        break;
    default:
        labelled(NAT_U16, labels, segment, frames, n, cells / 2, ahead, lanes, scratch);
    }
}

/* Lanes to the rows of the result, and clear. */
static void spill(int kind, const struct nat_labels *labels, size_t n, uint8_t *lanes, uint64_t *rows)
{
    const size_t regions = (size_t)labels->regions, room = labels->bins * STEP;
    for (size_t i = 0; i < n; i++, rows += regions) {
        const size_t at = i / STEP * room + i % STEP;
        for (size_t r = 0; r < regions; r++)
            if (kind == NAT_F32)
                ((double *)rows)[r] += ((double *)lanes)[at + r * STEP];
            else if (kind == NAT_U32)
                rows[r] += (uint64_t)((int32_t *)lanes)[at + 2 * r * STEP] +
                           ((uint64_t)((int32_t *)lanes)[at + (2 * r + 1) * STEP] << 16);
            else
                rows[r] += (uint64_t)((int32_t *)lanes)[at + r * STEP];
    }
    memset(lanes, 0, (n + STEP - 1) / STEP * room * (kind == NAT_F32 ? 8 : 4));
}

const struct nat_ops OPS = {
    .name = NAME,
    .vector = {VB, VB / 2, VB / 2, VB / 2, VB / 4},
    .doubles = VB / 8,
    .quad = FRAMES,
    .width = COLUMNS,
    .digit8 = DIGIT8,
    .digit16 = 127,
    .spread = 1,
    .prefetch = VB < 64,
    .mask_bits = MASK_BITS,
    .first = first,
    .more = more,
    .both = both,
    .weighted = weighted,
    .lane_bytes = BUNDLE * 4,
    .labels = add_labels,
    .spill = spill,
    .squares = plain_squares,
    .fold = plain_fold,
    .full = plain_full,
    .widen = plain_widen,
};
