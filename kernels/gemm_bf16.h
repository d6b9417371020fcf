/* gemm_bf16.h: products of numbers in bfloat16 on units made for them. */
#ifndef GEMM_BF16_H
#define GEMM_BF16_H
#include "gemm_micro.h"
#include "short_floats.h"

/* The unit that multiplies bfloat16: that of float, on numbers that were rounded; AVX-512's dot product of pairs; or
 * AMX, whose registers are tiles. The numbers are kernels.h's. */
enum bf16_unit { BF16_BY_FMA, BF16_BY_DOT, BF16_BY_AMX };
extern int bf16_unit_in_use; /* machine.c */

/* Whether the compiler knows them; whether the processor has them is asked at import. Clang has not been tried. */
#if defined(__x86_64__) && defined(__linux__) && VECTOR_BYTES == 64 && __GNUC__ >= 12 && !defined(__clang__)
#define BF16_UNITS (REAL_BITS == 32)
#else
#define BF16_UNITS 0
#endif

#define AMX_ROWS 32   /* of C at once: 2 × 2 tiles of 16 rows by 16 columns */
#define PAIR_BLOCK 16 /* pairs in a row of a tile */

/* Depths in pairs, in whole blocks: two numbers of bfloat16, the earlier one in the lower half, in place of a float. */
static inline int64_t pairs_of(int64_t depths) { return divide_up(depths, 2 * PAIR_BLOCK) * PAIR_BLOCK; }

#if BF16_UNITS
/* Rounds `lines` lines of x, each `depths` long, to pairs, with zeros beyond the last depth:
 *
 *     pack_pair_lines:   to[line · pairs + q]                               for A
 *     pack_pair_panels:  to[(line / NR · pairs + q) · NR + line % NR]       for B
 *
 * In lines beyond the last, up to 16, there may be anything: they are multiplied, and what they give is not kept. */
void pack_pair_lines(float *to, const float *x, int64_t lines, int64_t depths, int64_t x_line, int64_t x_step);
void pack_pair_panels(float *to, const float *x, int64_t lines, int64_t depths, int64_t x_line, int64_t x_step);

/* micro_tile of gemm_micro.h where elements of A and B are pairs, from these two. amx_tile takes up to AMX_ROWS rows
 * and reads A in sixteens; it stands between amx_begin and amx_end of the same thread. */
tile_function micro_tile_pairs, amx_tile;
void amx_begin(void);
void amx_end(void);

static inline enum bf16_unit unit_of(const struct product *x) {
    return x->format == BFLOAT16 ? (enum bf16_unit)bf16_unit_in_use : BF16_BY_FMA;
}
static inline tile_function *tile_of(enum bf16_unit unit) {
    return unit == BF16_BY_AMX ? amx_tile : unit == BF16_BY_DOT ? micro_tile_pairs : TYPED(micro_tile);
}
#else
static inline void pack_pair_lines(real *to, const real *x, int64_t lines, int64_t depths, int64_t x_line,
                                   int64_t x_step) {
    (void)to, (void)x, (void)lines, (void)depths, (void)x_line, (void)x_step;
}
static inline void pack_pair_panels(real *to, const real *x, int64_t lines, int64_t depths, int64_t x_line,
                                    int64_t x_step) {
    (void)to, (void)x, (void)lines, (void)depths, (void)x_line, (void)x_step;
}
static inline void amx_begin(void) {}
static inline void amx_end(void) {}
static inline enum bf16_unit unit_of(const struct product *x) { return (void)x, BF16_BY_FMA; }
static inline tile_function *tile_of(enum bf16_unit unit) { return (void)unit, TYPED(micro_tile); }
#endif
static inline int in_pairs(const struct product *x) { return unit_of(x) != BF16_BY_FMA; }

#endif
