/* Disjoint regions of a frame as a program of vector additions. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

static size_t word_cells(const nat_pass *pass)
{
    return 4 / pass->cell_bytes;
}

int nat_pass_labels_add(nat_pass *pass, const int32_t *labels, int64_t regions, uint64_t *out)
{
    struct nat_labels *all = realloc(pass->labels, (pass->label_count + 1) * sizeof *all);
    if (!all)
        return NAT_NO_MEMORY;
    pass->labels = all;
    struct nat_labels *set = &all[pass->label_count++];
    const size_t halves = pass->kind == NAT_U32 ? 2 : 1;
    *set = (struct nat_labels){.regions = regions, .out = out, .bins = (size_t)regions * halves};
    set->labels = malloc(pass->pixels * sizeof *set->labels);
    set->start = calloc((size_t)regions + 1, sizeof *set->start);
    if (!set->labels || !set->start)
        return NAT_NO_MEMORY;
    memcpy(set->labels, labels, pass->pixels * sizeof *set->labels);
    uint64_t bias = pass->kind == NAT_U16 ? BIAS : pass->kind == NAT_U32 ? BIAS * (uint64_t)65537 : 0;
    if (pass->ops->lane_bytes) /* else pixels are added as they are */
        for (size_t p = 0; p < pass->pixels; p++)
            if (labels[p] >= 0)
                set->start[labels[p]] += bias;
    pass->masks_only = 0;
    return NAT_OK;
}

/* Bin of a cell, or -1. */
static int64_t bin_of(const nat_pass *pass, const struct nat_labels *set, size_t cell)
{
    if (cell >= pass->cells)
        return -1;
    if (pass->kind != NAT_U32)
        return set->labels[cell];
    int64_t label = set->labels[cell / 2];
    return label < 0 ? -1 : 2 * label + (int64_t)(cell & 1);
}

struct planned {
    struct nat_step step;
    uint32_t turn; /* how many steps of its tile went to the same bin before */
};

static int in_turn(const void *a, const void *b)
{
    const struct planned *x = a, *y = b;
    if (x->turn != y->turn)
        return x->turn < y->turn ? -1 : 1;
    if (x->step.word != y->step.word)
        return x->step.word < y->step.word ? -1 : 1;
    return x->step.bin < y->step.bin ? -1 : x->step.bin > y->step.bin;
}

/* Steps of one word: cells of the same bin together.  Returns how many. */
static size_t plan_word(const nat_pass *pass, const struct nat_labels *set, size_t cell, uint32_t word,
                        struct planned *out)
{
    size_t found = 0, per = word_cells(pass);
    for (size_t c = 0; c < per; c++) {
        int64_t bin = bin_of(pass, set, cell + c);
        if (bin < 0)
            continue;
        size_t i = 0;
        while (i < found && out[i].step.bin != (uint32_t)bin)
            i++;
        if (i == found)
            out[found++] = (struct planned){{(uint32_t)bin, word, 0}, 0};
        out[i].step.pattern |= (uint32_t)1 << c * 8 * pass->cell_bytes;
    }
    return found;
}

/* Steps of one tile, in an order that keeps steps of one bin apart: each waits for the one before it. */
static size_t plan_tile(const nat_pass *pass, const struct nat_labels *set, size_t cell, size_t words, uint32_t *turns,
                        struct planned *out)
{
    size_t count = 0;
    for (size_t w = 0; w < words; w++)
        count += plan_word(pass, set, cell + w * word_cells(pass), (uint32_t)w, out + count);
    for (size_t i = 0; i < count; i++)
        out[i].turn = turns[out[i].step.bin]++;
    for (size_t i = 0; i < count; i++)
        turns[out[i].step.bin] = 0;
    qsort(out, count, sizeof *out, in_turn);
    return count;
}

static int plan(const nat_pass *pass, struct nat_labels *set, size_t tiles)
{
    struct planned planned[TILE * 4];
    uint32_t *turns = calloc(set->bins + 1, sizeof *turns);
    set->tile = calloc(tiles + 1, sizeof *set->tile);
    set->steps = malloc((pass->cells + 1) * sizeof *set->steps);
    if (!turns || !set->tile || !set->steps) {
        free(turns);
        return NAT_NO_MEMORY;
    }
    size_t count = 0, tile = 0;
    for (size_t s = 0; s < pass->segment_count; s++) {
        const struct nat_segment *segment = &pass->segments[s];
        size_t cell = segment->vector * pass->vector, words = segment->vectors * pass->vector / word_cells(pass);
        for (size_t w = 0; w < words; w += TILE) {
            size_t found = plan_tile(pass, set, cell + w * word_cells(pass), words - w < TILE ? words - w : TILE, turns,
                                     planned);
            for (size_t i = 0; i < found; i++)
                set->steps[count++] = planned[i].step;
            set->tile[++tile] = count;
        }
    }
    free(turns);
    return NAT_OK;
}

/* Number the tiles of the segments, and plan the steps of each. */
int nat_labels_ready(nat_pass *pass)
{
    size_t tiles = 0;
    for (size_t s = 0; s < pass->segment_count; s++) {
        pass->segments[s].tile = tiles;
        tiles += (pass->segments[s].vectors * pass->vector / word_cells(pass) + TILE - 1) / TILE;
    }
    int error = NAT_OK;
    for (size_t i = 0; !error && pass->ops->lane_bytes && i < pass->label_count; i++)
        error = plan(pass, &pass->labels[i], tiles);
    return error;
}

void nat_labels_free(nat_pass *pass)
{
    for (size_t i = 0; i < pass->label_count; i++) {
        free(pass->labels[i].labels);
        free(pass->labels[i].start);
        free(pass->labels[i].tile);
        free(pass->labels[i].steps);
    }
    free(pass->labels);
}
