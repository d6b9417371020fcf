/* transpose.h: a VL × VL block of reals transposed in registers.
 *
 * Halve the block into four, exchange the two off the diagonal, then do the same inside each quarter: a 16 × 16
 * block takes log₂ 16 = 4 rounds of 16 two-operand shuffles. The rounds commute, so their order is free.
 * In the round for distance s, rows i and i + s (bit s of i clear) become
 *
 *     row i:     lane j of row i      where bit s of j is clear,   lane j − s of row i + s   where it is set
 *     row i + s: lane j + s of row i  where bit s of j is clear,   lane j of row i + s       where it is set  */
#ifndef TRANSPOSE_H
#define TRANSPOSE_H
#include "simd.h"

#define UPPER_LANE(j, s) ((j) & (s) ? VL + (j) - (s) : (j))
#define LOWER_LANE(j, s) ((j) & (s) ? VL + (j) : (j) + (s))
#define LANES_2(which, s) which(0, s), which(1, s)
#define LANES_4(which, s) LANES_2(which, s), which(2, s), which(3, s)
#define LANES_8(which, s) LANES_4(which, s), which(4, s), which(5, s), which(6, s), which(7, s)
#define LANES_16(which, s)                                                                                        \
    LANES_8(which, s), which(8, s), which(9, s), which(10, s), which(11, s), which(12, s), which(13, s),          \
        which(14, s), which(15, s)
#if VECTOR_BYTES / (REAL_BITS / 8) == 2
#define ALL_LANES LANES_2
#elif VECTOR_BYTES / (REAL_BITS / 8) == 4
#define ALL_LANES LANES_4
#elif VECTOR_BYTES / (REAL_BITS / 8) == 8
#define ALL_LANES LANES_8
#else
#define ALL_LANES LANES_16
#endif

#define EXCHANGE(s)                                                                                               \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) if (!(i & (s))) {                                       \
        vf upper = __builtin_shufflevector(row[i], row[i + (s)], ALL_LANES(UPPER_LANE, s));                       \
        vf lower = __builtin_shufflevector(row[i], row[i + (s)], ALL_LANES(LOWER_LANE, s));                       \
        row[i] = upper;                                                                                           \
        row[i + (s)] = lower;                                                                                     \
    }

static inline __attribute__((always_inline)) void vf_transpose(vf row[VL]) {
#if VECTOR_BYTES / (REAL_BITS / 8) >= 16
    EXCHANGE(8)
#endif
#if VECTOR_BYTES / (REAL_BITS / 8) >= 8
    EXCHANGE(4)
#endif
#if VECTOR_BYTES / (REAL_BITS / 8) >= 4
    EXCHANGE(2)
#endif
    EXCHANGE(1)
}

/* row[q] = step q of `lines` lines of x, x_line apart, `steps` steps of each: at most VL of either count, and there are
 * zeros beyond the last line. */
static inline __attribute__((always_inline)) void load_turned(vf row[VL], const real *x, int64_t x_line, int64_t lines,
                                                              int64_t steps) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
        row[i] = i < lines ? load_up_to(x + i * x_line, steps) : vf_zero();
    vf_transpose(row);
}

#endif
