/* All kernels on frames that begin at every byte of a vector: the same bits from each, and nothing for the sanitizers to
 * say.  Prints how many passes were compared.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { HEIGHT = 7, WIDTH = 67, PIXELS = HEIGHT * WIDTH, FRAMES = 21, REGIONS = 5, MASKS = 3 };

struct found {
    uint64_t sum[2 * PIXELS], squares[2 * PIXELS], masks[FRAMES * MASKS], weights[FRAMES], moments[FRAMES * 3];
    uint64_t labels[FRAMES * REGIONS];
    uint32_t max[PIXELS];
};

static void *given(void *made)
{
    if (!made)
        abort();
    return made;
}

static void reduce(const struct nat_ops *ops, int kind, const uint8_t *frames, struct found *found)
{
    static uint8_t mask[MASKS * PIXELS];
    static double weights[PIXELS];
    static int32_t labels[PIXELS];
    for (int p = 0; p < PIXELS; p++) {
        for (int k = 0; k < MASKS; k++)
            mask[k * PIXELS + p] = p % (k + 2) == 0;
        weights[p] = p % 3 - 0.25;
        labels[p] = p % (REGIONS + 1) - 1;
    }
    memset(found, 0, sizeof *found);
    nat_pass *pass = given(nat_pass_new(ops, kind, HEIGHT, WIDTH, FRAMES));
    pass->sum = found->sum;
    pass->squares = found->squares;
    pass->max = found->max;
    if (nat_pass_masks_add(pass, mask, W_BOOL, MASKS, found->masks) ||
        nat_pass_masks_add(pass, weights, W_F64, 1, found->weights) ||
        nat_pass_labels_add(pass, labels, REGIONS, found->labels) ||
        nat_pass_moments_add(pass, NULL, found->moments) || nat_pass_ready(pass) ||
        nat_add(pass, given(nat_pass_part(pass, 0)), frames, pass->frame_bytes, FRAMES, 0))
        abort();
    nat_pass_flush(pass);
    nat_pass_free(pass);
}

static int compare(const struct nat_ops *ops)
{
    static struct found right, found;
    static const size_t bytes[] = {1, 2, 4, 2, 4};
    int compared = 0;
    for (int kind = NAT_U8; kind <= NAT_F32; kind++) {
        size_t whole = FRAMES * PIXELS * bytes[kind];
        for (size_t at = 0; at < 64; at++, compared++) {
            /* to the byte, so that reading beyond the last frame is seen */
            uint8_t *room = given(malloc(at + whole)), *frames = room + at;
            for (size_t i = 0; i < FRAMES * PIXELS; i++) {
                float number = (float)(i * 2654435761u % 1001) - 500;
                uint32_t value = (uint32_t)(i * 2654435761u);
                memcpy(frames + i * bytes[kind], kind == NAT_F32 ? (void *)&number : (void *)&value, bytes[kind]);
            }
            reduce(ops, kind, frames, at ? &found : &right);
            if (at && memcmp(&found, &right, sizeof found)) {
                fprintf(stderr, "%s: kind %d at byte %zu\n", ops->name, kind, at);
                exit(1);
            }
            free(room);
        }
    }
    return compared;
}

int main(void)
{
    int compared = compare(&nat_portable);
#ifdef NAT_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        compared += compare(&nat_avx2);
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        compared += compare(&nat_avx512);
#endif
    printf("%d\n", compared);
    return 0;
}
