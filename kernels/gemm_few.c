/* gemm_few.c: a few rows times a matrix whose columns lie dense in memory: y = x Wᵀ for one token or a small batch of
 * them, and a matrix times a vector.
 *
 * Flops 2·m·n·k, bytes k·n·sizeof(real): every weight is read once for at most FEW_ROWS uses, so memory is the bound,
 * and packing, which reads, writes and reads again, costs more than the product. Instead VL columns at a time pass
 * through registers: a block of VL × VL is loaded by columns and transposed (transpose.h), after which each of its
 * vectors is a row of B, as the register tile would have it. The shuffles of a block take 64 cycles for the 1 KiB of a
 * 16 × 16 block, 40 GB/s at 2.5 GHz: still more than one core reads.
 *
 * The sums are those of gemm.c: blocks of KC, each one ascending chain of FMAs from zero. So a row has the bits that
 * it has among many. */
#include "gemm_micro.h"
#include "threads.h"
#include "transpose.h"

#define AHEAD (512 / (REAL_BITS / 8)) /* columns are asked for 8 cache lines ahead */
#define PIECE_BYTES (1 << 18)         /* some ten microseconds: the least that is worth waking a thread for */

/* Steps 0 … steps − 1 of `columns` columns of B: block[q] is step q of all, zeros beyond the last column. */
static inline __attribute__((always_inline)) void load_block(vf block[VL], const real *b, int64_t b_col,
                                                             int64_t columns, int64_t steps) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
        block[i] = i < columns ? load_up_to(b + i * b_col, steps) : vf_zero();
        if (i < columns)
            __builtin_prefetch(b + i * b_col + AHEAD);
    }
    vf_transpose(block);
}

void TYPED(store_turned)(real *to, int64_t to_row, const real *sums, int64_t rows, int64_t columns, const real *bias,
                         int accumulate) {
    vf block[VL], plus = bias ? load_up_to(bias, rows) : vf_zero();
    for (int64_t j = 0; j < columns; j += VL) {
        load_turned(block, sums + j, NR, rows, VL);
#pragma GCC unroll 16
        for (int q = 0; q < VL; q++, to += to_row) {
            if (j + q >= columns)
                return;
            vf sum = bias ? block[q] + plus : block[q];
            if (accumulate)
                sum += load_up_to(to, rows);
            store_up_to(to, sum, rows);
        }
    }
}

/* Columns j … j + columns − 1 of C, columns ≤ VL. */
static inline __attribute__((always_inline)) void multiply_columns(const struct product *x, int rows, int64_t j,
                                                                   int64_t columns) {
    const real *b = x->b + j * x->b_col, *a = x->a;
    vf total[rows];
    int64_t p = 0, end;
    do { /* at least once: with k = 0 the sums are zero */
        vf sum[rows], block[VL];
        int64_t q = p;
        end = at_most(x->k, p + KC);
        for (int i = 0; i < rows; i++)
            sum[i] = vf_zero();
        for (; q + VL <= end; q += VL, b += VL) {
            load_block(block, b, x->b_col, columns, VL);
#pragma GCC unroll 16
            for (int step = 0; step < VL; step++, a += x->a_col)
#pragma GCC unroll 8
                for (int i = 0; i < rows; i++)
                    sum[i] = vf_fma(vf_set1(a[i * x->a_row]), block[step], sum[i]);
        }
        if (q < end) {
            load_block(block, b, x->b_col, columns, end - q);
            for (int step = 0; step < end - q; step++, a += x->a_col)
                for (int i = 0; i < rows; i++)
                    sum[i] = vf_fma(vf_set1(a[i * x->a_row]), block[step], sum[i]);
        }
        for (int i = 0; i < rows; i++)
            total[i] = p == 0 ? sum[i] : total[i] + sum[i];
        p = end;
    } while (p < x->k);
    if (x->turned) {
        real sums[FEW_ROWS * NR];
        for (int i = 0; i < rows; i++)
            vf_store(sums + i * NR, total[i]);
        TYPED(store_turned)(x->c + j * x->c_row, x->c_row, sums, rows, columns, x->bias, x->accumulate);
        return;
    }
    for (int i = 0; i < rows; i++) {
        real *to = x->c + i * x->c_row + j;
        if (x->bias)
            total[i] += load_up_to(x->bias + j, columns);
        if (x->accumulate)
            total[i] += load_up_to(to, columns);
        store_up_to(to, total[i], columns);
    }
}

#define ROWS(n)                                                                                                   \
    static void columns_##n(const struct product *x, int64_t j, int64_t columns) {                                \
        if (columns == VL)                                                                                        \
            multiply_columns(x, n, j, VL);                                                                        \
        else                                                                                                      \
            multiply_columns(x, n, j, columns);                                                                   \
    }
ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#if FEW_ROWS == 8
ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#endif

static void (*const columns_of[FEW_ROWS])(const struct product *, int64_t, int64_t) = {
    columns_1, columns_2, columns_3, columns_4,
#if FEW_ROWS == 8
    columns_5, columns_6, columns_7, columns_8,
#endif
};

/* Index: VL columns. */
static void multiply_vectors(void *context, int64_t begin, int64_t end) {
    const struct product *x = context;
    for (int64_t v = begin; v < end; v++)
        columns_of[x->m - 1](x, v * VL, at_most(x->n - v * VL, VL));
}

void TYPED(multiply_few)(const struct product *x) {
    int64_t bytes = 1 + VL * x->k * (int64_t)sizeof(real);
    parallel_for(divide_up(x->n, VL), 1 + (PIECE_BYTES - 1) / bytes, multiply_vectors, (void *)x);
}

/* ── a B in panels ───────────────────────────────────────────────────────────────────────────────── */

/* Weights that were packed when a model was loaded are one stream from memory, without shuffles. Index: panel. */
static void multiply_panels(void *context, int64_t begin, int64_t end) {
    const struct product *x = context;
    for (int64_t j = begin; j < end; j++) {
        real *to = x->c + j * NR, tile[FEW_ROWS * NR];
        int64_t columns = at_most(x->n - j * NR, NR), p = 0;
        do { /* at least once: with k = 0 the sums are zero */
            int64_t depths = at_most(x->k - p, KC);
            struct beside beside = {.partial = p ? tile : NULL, .partial_row = NR};
            TYPED(micro_tile)(tile, x->a + p * x->a_col, x->panels + (j * x->k + p) * NR, x->m, NR, depths, NR, x->a_row,
                              x->a_col, NR, &beside);
            p += KC;
        } while (p < x->k);
        for (int64_t i = 0; i < x->m; i++)
            for (int64_t q = 0; q < columns; q += VL) {
                vf sum = vf_load(tile + i * NR + q);
                if (x->bias)
                    sum += load_up_to(x->bias + j * NR + q, columns - q);
                store_up_to(to + i * x->c_row + q, sum, columns - q);
            }
    }
}

void TYPED(multiply_few_panels)(const struct product *x) {
    struct product few = *x; /* its rows side by side, as the register tile has them fastest */
    if (x->m > 1) {
        real *rows = thread_scratch(SCRATCH_GEMM_A, (size_t)panel_size(x->m, x->k) * sizeof(real));
        TYPED(pack_panels)(rows, x->a, x->m, x->m, x->k, x->a_row, x->a_col);
        few.a = rows;
    }
    few.a_row = 1, few.a_col = x->m;
    int64_t bytes = 1 + NR * x->k * (int64_t)sizeof(real);
    parallel_for(divide_up(x->n, NR), 1 + (PIECE_BYTES - 1) / bytes, multiply_panels, &few);
}
