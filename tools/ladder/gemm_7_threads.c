/* GEMM, rung 7: threads. Cut C into blocks of rows × columns; each block is a product of its own, rung 6, for whichever
 * thread is free:
 *
 *     C[block of rows, block of columns] = A[block of rows, :] · B[:, block of columns]
 *
 * No two threads write the same element and none waits for another. Only C is cut, never k, so each sum is computed as
 * one thread would compute it: the bits do not depend on the number of threads, on who takes which block, or on how
 * large a block is. Smaller blocks share the work more evenly; larger ones pack less, since each packs its own rows of
 * A and its own columns of B: of the time spent multiplying, copying B is 1/(rows/ROWS) and copying A about half a
 * panel in columns/WIDTH.
 *
 * Twice the flops a second for two cores, as long as each has its own second-level cache and the memory feeds both. The
 * team of threads is the engine's: kernels/threads.c. What kernels/gemm.c does beyond this: blocks whose shape follows
 * the matrix and the number of threads, and batches of small products. */
#include "threads.h"
#include "gemm_6_packing.c"

#define BLOCK_ROWS (14 * ROWS)
#define BLOCK_COLUMNS COLUMNS

struct product { float *c; const float *a, *b; int64_t m, n, k; };

static int64_t blocks_across(const struct product *x) { return divide_up(x->n, BLOCK_COLUMNS); }
static int64_t blocks_down(const struct product *x) { return divide_up(x->m, BLOCK_ROWS); }

/* The blocks begin … end − 1, counted along the rows of blocks. */
static void multiply_blocks(void *context, int64_t begin, int64_t end) {
    const struct product *x = context;
    for (int64_t block = begin; block < end; block++) {
        int64_t i = block / blocks_across(x) * BLOCK_ROWS, j = block % blocks_across(x) * BLOCK_COLUMNS;
        multiply(x->c + i * x->n + j, x->n, x->a + i * x->k, x->k, x->b + j, x->n, at_most(x->m - i, BLOCK_ROWS),
                 at_most(x->n - j, BLOCK_COLUMNS), x->k);
    }
}

void gemm_threads(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    struct product x = {c, a, b, m, n, k};
    parallel_for(blocks_down(&x) * blocks_across(&x), 1, multiply_blocks, &x);
}
