/* gemm_micro.h: the two inner pieces of every matrix product here, for gemm.c and attention.c: packing a
 * panel, and multiplying two packed panels in registers. The scheme is that of Goto and van de Geijn 2008,
 * "Anatomy of high-performance matrix multiplication", in the form BLIS gave it (Van Zee and van de Geijn 2015).
 *
 * The register tile. A tile of MR × NR elements of C stays in registers while k runs: MR rows of two vectors each.
 * One step in k loads two vectors of B and multiplies them by each of MR broadcast elements of A:
 *
 *     32 registers (AVX-512, NEON): 14 × 2 sums + 2 of B + 1 of A = 31
 *     16 registers (AVX2):           6 × 2 sums + 2 of B + 1 of A = 15
 *     16 registers (SSE, no FMA):    6 × 2 sums + 2 of B + 1 of A + 1 product = 16
 *
 * A step is 2·MR fused multiply-adds and MR + 2 loads. Two of each start in a cycle, so the loads hide behind the
 * arithmetic as soon as MR > 2; and 2·MR ≥ 10 independent sums cover the 4 to 5 cycles that one FMA takes. */
#ifndef GEMM_MICRO_H
#define GEMM_MICRO_H
#include "simd.h"
#include "threads.h"

#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define MR 14
#define FEW_ROWS 8 /* of gemm_few.c, which keeps their sums in registers beside a block of VL × VL */
#else
#define MR 6
#define FEW_ROWS 4
#endif
#define NR (2 * VL)
#define KC 256 /* the sums of KC products are chains of their own: part of the definition of the result */

/* The name of a function that has a float and a double version. */
#if REAL_BITS == 32
#define TYPED(name) name##_f32
#else
#define TYPED(name) name##_f64
#endif

/* C = A B (+ bias) (+ C), and the strides of A and B; the rows of C are dense. B may be stored otherwise: in panels of NR
 * columns, k · NR apart, as pack_panels leaves them for a depth of k; or in a way that only `unpack` knows, which writes
 * `columns` columns of a block of the depth into panels of NR, panel_size(NR, depths) apart. finish, if it is not NULL,
 * gets every part of C when it is whole. */
struct finish;
struct product {
    real *c;
    const real *a, *b, *bias;
    int64_t m, n, k, a_row, a_col, b_row, b_col, c_row;
    int accumulate, turned;
    int format; /* that the elements of A and B are rounded to (short_floats.h); 0 where B is stored otherwise */
    const real *panels;
    void (*unpack)(real *packed, const struct product *x, int64_t column, int64_t columns, int64_t p, int64_t depths);
    const void *stored;
    int64_t scheme;
    const struct finish *finish;
};

/* double has no shorter format. */
#define FORMAT(format) (REAL_BITS == 32 ? (format) : 0)

/* What is computed from a part of C (rows × columns, the first at row, column) as soon as it is whole, by the thread
 * that made it and while it is in that thread's caches. */
struct finish {
    void (*part)(const struct finish *finish, const struct product *x, int64_t row, int64_t rows, int64_t column,
                 int64_t columns);
    const real *slope;
    real *h;
    int activation;
};

/* gemm.c: one product, spread over the threads. */
void TYPED(multiply_product)(const struct product *x);
/* gemm_few.c: the same for m ≤ FEW_ROWS, of a B with b_row = 1, or in panels. */
void TYPED(multiply_few)(const struct product *x);
void TYPED(multiply_few_panels)(const struct product *x);

/* gemm_few.c: to[j·to_row + i] = (sums[i·NR + j] + bias[i]) + what is there if accumulate; i < rows ≤ VL, j < columns ≤
 * NR, bias may be NULL. */
void TYPED(store_turned)(real *to, int64_t to_row, const real *sums, int64_t rows, int64_t columns, const real *bias,
                         int accumulate);

/* What is added to a finished tile while it is in registers: (partial[i·partial_row + j] + tile) + bias[j]; each of
 * the two may be NULL, and partial may be the tile's own place. If factor is not NULL, row i of partial counts factor[i]
 * times. If chain is not NULL, the sums go on from chain[i·NR + j] instead of zero. */
struct beside { const real *partial; int64_t partial_row; const real *factor, *bias, *chain; };
static const struct beside NOTHING;

/* tile[i·tile_row + j] = Σ_p a[i·a_row + p·a_step] · b[p·b_step + j], one ascending chain of FMAs from zero for
 * each element, and then what is beside it; i < rows ≤ MR, j < columns ≤ NR. Nothing beyond the last column is read or
 * written. */
typedef void tile_function(real *tile, const real *a, const real *b, int64_t rows, int64_t columns, int64_t k,
                           int64_t tile_row, int64_t a_row, int64_t a_step, int64_t b_step,
                           const struct beside *beside);
tile_function TYPED(micro_tile);

/* Packs `lines` lines of x, each k long, into panels of `width` lines, panel_size(width, k) elements apart:
 *
 *     packed[panel][p·width + i] = x[(panel·width + i)·x_line + p·x_step],  0 beyond the last line.
 *
 * Whole vectors are stored: what spills over the end of a step is overwritten by the next step, and what spills
 * over the end of a panel falls into the room that panel_size leaves behind it. */
void TYPED(pack_panels)(real *packed, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line,
                        int64_t x_step);

/* In whole cache lines, so that a panel starts on one if the first does. */
static inline int64_t panel_size(int64_t width, int64_t k) { return (width * k + VL + 15) / 16 * 16; }

#endif
