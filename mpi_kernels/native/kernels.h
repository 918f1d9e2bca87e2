/* What the files kernels*.c share: a pass, its columns of weights, and the functions of one instruction set.
 *
 * A frame is a row of cells.  A cell is a pixel, but for uint32, whose pixels are two cells of 16 bits: low, then high.
 * 16-bit cells are read as x' = x - 32768 where pixels are unsigned (their highest bit flipped), because the machine
 * multiplies signed numbers; what that takes away is a constant of each sum and is given back at its end.
 *
 * Sums of a frame are columns: one weight per cell.  Column 0 is always the plain total.  Integer weights are split
 * into digits that fit the multiplier, and a result is a linear combination of columns modulo 2**64, which is exact
 * because the constructor refuses sums that could leave 63 bits.
 *
 * The frame is cut into segments that stay in cache, short enough that no 32-bit lane overflows; the last cells, if
 * they fill no vector, are a segment of their own, copied and padded with zeros.
 */
#ifndef EMFLOW_KERNELS_H
#define EMFLOW_KERNELS_H

#include <pthread.h>

#include "native.h"

#define BUNDLE 16            /* frames that go through a segment before the next one */
#define QUAD 4               /* frames of one call of a kernel at most */
#define WIDEST 8             /* columns of one call of a kernel at most */
#define TILE 128             /* words of 32 bits that are transposed at a time for labels */
#define SEGMENT_BYTES 32768  /* of one frame: a bundle of them fits a second-level cache */
#define LANE_FRAMES 32768    /* frames that 32-bit lanes hold: 32768 * 32768 < 2**31 */
#define PARTS 1024           /* threads at most */
#define BIAS 32768

/* Pixels where they lie in a file: at any byte, in memory that has no type yet.  The compiler loads them as it loads
 * aligned ones where the machine can, and they are of their own size everywhere else. */
#define AT_ANY_BYTE __attribute__((aligned(1), may_alias))
typedef uint16_t AT_ANY_BYTE any_u16;
typedef uint32_t AT_ANY_BYTE any_u32;
typedef int16_t AT_ANY_BYTE any_i16;
typedef float AT_ANY_BYTE any_f32;

/* One call of a kernel: up to four frames, one segment, some columns. */
struct nat_visit {
    const uint8_t *frame[QUAD]; /* at any byte */
    size_t vectors;
    const uint8_t *weights; /* of these columns: vector by vector, column by column */
    const uint8_t *extra;   /* of columns with float weights in the same call */
    uint64_t *extra_out[QUAD];
    void *sum;              /* lanes of this segment, or NULL */
    uint8_t *max;           /* of this segment, or NULL */
    uint64_t *out[QUAD];    /* words (int64 or double) to add each frame's columns to */
    size_t ahead;           /* bytes from these frames to those to be fetched into cache meanwhile; 0: none */
    uint32_t bias;          /* to flip the highest bits of 16-bit cells, or 0 */
    uint32_t top;           /* largest cell (uint32: pixel) of the call, as its bits */
};

/* Labels as a program: add the cells chosen by `pattern` in word `word` of a tile to the lanes of bin `bin`. */
struct nat_step {
    uint32_t bin, word, pattern;
};

struct nat_labels {
    int32_t *labels; /* of pixels; none: regions */
    int64_t regions;
    uint64_t *out;
    uint64_t *start;  /* what a row of out begins with: the bias of each region's pixels */
    size_t bins;      /* regions, twice as many for uint32 */
    size_t *tile;     /* first step of each tile, and the end of the last */
    struct nat_step *steps;
};

struct nat_segment {
    size_t vector, vectors; /* first one, and how many */
    size_t tile;            /* first one */
    size_t tail;            /* bytes, where it is the padded end */
};

/* The functions of one instruction set.  `kind` is an enum nat_pixel. */
struct nat_ops {
    const char *name;
    size_t vector[5];        /* cells of a vector by kind */
    size_t doubles;          /* cells that float columns are packed by */
    size_t quad;             /* frames of one call: this many, or 1 */
    size_t width;            /* columns of one call at most */
    int digit8, digit16;     /* largest weight */
    int spread;              /* lanes of sums are in the order of the unpack instructions */
    int prefetch;            /* even where one pass does everything */
    int mask_bits;           /* float masks are packed as bits, else as bytes 0 or 255 */
    void (*first)(int kind, size_t frames, size_t columns, struct nat_visit *visit);
    void (*more)(int kind, size_t frames, size_t columns, struct nat_visit *visit);
    void (*both)(size_t frames, size_t columns, size_t extra, struct nat_visit *visit); /* or NULL */
    void (*weighted)(size_t frames, size_t columns, struct nat_visit *visit);
    size_t lane_bytes; /* of one bin of labels; 0: rows are filled directly */
    void (*labels)(int kind, const struct nat_labels *labels, const struct nat_segment *segment,
                   const uint8_t *const *frames, size_t n, size_t cells, size_t ahead, uint8_t *lanes, uint8_t *scratch,
                   uint64_t *rows);
    void (*spill)(int kind, const struct nat_labels *labels, size_t n, uint8_t *lanes, uint64_t *rows);
    void (*squares)(int kind, const uint8_t *const *frames, size_t n, size_t cells, const double *level, uint64_t *low,
                    uint64_t *high);
    void (*fold)(double *group, double *high, double *low, size_t n);
    uint64_t (*full)(int kind, const uint8_t *frame, size_t cells);
    void (*widen)(int kind, const uint8_t *frame, float *out, size_t cells);
};

extern const struct nat_ops nat_portable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(NAT_PORTABLE_ONLY)
#define NAT_X86 1
extern const struct nat_ops nat_avx2, nat_avx512;
#endif

/* Columns of one kind of arithmetic. */
struct nat_set {
    size_t item;  /* bytes of a weight in dense */
    size_t cells; /* weights of a column */
    size_t count, room;
    uint8_t *dense;
    int64_t *sums; /* of each column's weights, padding of column 0 included */
    int *largest;  /* magnitude of each column's weights; whole numbers alone */
    size_t passes;
    size_t *width, *offset; /* of each pass: columns, and where they begin in packed */
    size_t vector;          /* cells */
    size_t unit;            /* bytes of a packed column for one vector */
    uint8_t *packed;
};

struct nat_term {
    size_t column;
    int weighted; /* in which set */
    uint64_t factor;
};

enum nat_outcome { WHOLE, WHOLE_AS_FLOAT, FLOAT };

/* One number of each frame. */
struct nat_result {
    enum nat_outcome outcome;
    uint64_t *out;
    size_t stride; /* words from row to row */
    size_t first, terms;
    uint64_t constant;
};

struct nat_quality {
    uint64_t pixels, not_finite, saturated, empty_frames;
};

struct nat_pass {
    const struct nat_ops *ops;
    int kind;
    int64_t height, width, rows, group;
    size_t pixels, cells, cell_bytes, frame_bytes;
    size_t vector, vectors, padded; /* cells of a vector, vectors of a frame, cells of all of them */
    uint32_t bias;                  /* of two cells */
    uint64_t largest;               /* magnitude of a pixel */
    void *sum, *squares, *max;      /* arrays to fill, or NULL */
    double *level;                  /* what floats are squared less, padded with zeros, or NULL */
    struct nat_set main, weighted;
    struct nat_result *results; /* number 0 is the total, for quality */
    size_t result_count, result_room;
    struct nat_term *terms;
    size_t term_count, term_room;
    struct nat_labels *labels;
    size_t label_count;
    struct nat_segment *segments;
    size_t segment_count, longest; /* vectors of the longest */
    int merged; /* floats: masks and weights in one call */
    int masks_only;
    uint8_t **bits;
    size_t bit_count;
    nat_part *parts[PARTS];
    struct nat_quality quality; /* flushed */
    pthread_mutex_t lock;       /* of the arrays, where parts add to them */
    pthread_mutex_t busy;       /* of add and flush as calls */
};

struct nat_part {
    nat_pass *pass;
    int64_t frames; /* in 32-bit lanes */
    int64_t next;   /* row after the last one, or -1 */
    void *sum;      /* int32 lanes; floats: doubles of the group in hand */
    double *sum_high, *sum_low;
    uint8_t *max;
    uint64_t *squares; /* one row, uint32: two; floats: doubles of the group in hand */
    double *squares_high, *squares_low;
    uint64_t *words; /* of a bundle */
    uint8_t *tails;
    float *widened;
    uint8_t *lanes, *scratch; /* of labels */
    struct nat_quality quality;
};

/* ---- kernels.c: life of a pass ---- */
enum nat_weight { W_BOOL, W_I8, W_U8, W_I16, W_U16, W_I32, W_U32, W_I64, W_U64, W_F64 };

nat_pass *nat_pass_new(const struct nat_ops *ops, int kind, int64_t height, int64_t width, int64_t rows);
int nat_pass_level(nat_pass *pass, const double *level);
int nat_pass_ready(nat_pass *pass);
void nat_pass_free(nat_pass *pass);
void nat_pass_flush(nat_pass *pass);
void nat_part_flush(nat_part *part);
struct nat_quality nat_pass_quality(nat_pass *pass);
void *nat_aligned(size_t bytes); /* zeroed, 64-byte aligned */

/* ---- kernels_weights.c: columns.  0, NAT_NO_MEMORY, or NAT_OVERFLOW where a sum could leave 63 bits ---- */
int nat_pass_masks_add(nat_pass *pass, const void *weights, enum nat_weight type, size_t count, uint64_t *out);
int nat_pass_moments_add(nat_pass *pass, const uint8_t *mask, uint64_t *out);
int nat_weights_begin(nat_pass *pass);
int nat_weights_pack(nat_pass *pass);
void nat_set_free(struct nat_set *set);

/* ---- kernels_labels.c ---- */
int nat_pass_labels_add(nat_pass *pass, const int32_t *labels, int64_t regions, uint64_t *out);
int nat_labels_ready(nat_pass *pass);
void nat_labels_free(nat_pass *pass);

/* ---- kernels_add.c ---- */
int nat_pass_run(nat_pass *pass, const uint8_t *frames, int64_t n, int64_t row, int threads);
void nat_part_fold(nat_part *part);

#endif
