/* norm.c: layer norm and RMS norm over the last axis; rows × n, dense, with their gradients.
 *
 * Bytes: forward 8n a row (x in, y out), backward 12n (g and x in, dx out), as long as a row stays in the
 * first cache between its passes; weight and bias stay there too. Flops: forward about 8 an element, backward
 * 14. What bounds it: memory. Rows are shared out to the threads; sums within a row go in the order of tree.h.
 *
 * The gradients of weight and bias are sums over rows. Blocks of BLOCK_ROWS rows each add up their own, row
 * by row, and the blocks are then added in ascending order: constant blocks, so the same bits for any number
 * of threads. */
#include "rows.h"
#include "tree.h"
#include <math.h>

#define BLOCK_ROWS 32

struct norm_job {
    real *y, *mean, *rstd; /* y is dx in the vjps */
    const real *g, *x, *weight, *bias;
    real *dweight, *dbias; /* of each block: (blocks, n) */
    int64_t rows, n;
    double eps;
    int past_caches; /* y */
};

static inline real inverse_root(real variance, double eps) { return (real)(1 / sqrt((double)variance + eps)); }

/* ── layer norm ─────────────────────────────────────────────────────────────────────────────────── */

/* μ = Σ x / n, σ² = Σ (x − μ)² / n, y = weight (x − μ) / √(σ² + ε) + bias.
 * Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3. */
static void layer_norm_rows(void *context, int64_t begin, int64_t end) {
    const struct norm_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real *y = job->y + row * n, total, squares;
#define ELEMENT(i, count) vf_load_any(x + (i), 1, count)
        ROW_SUM(total, n, ELEMENT);
#undef ELEMENT
        real mean = total / (real)n;
#define ELEMENT(i, count) squared(vf_load_any(x + (i), 1, count) - vf_set1(mean))
        ROW_SUM(squares, n, ELEMENT);
#undef ELEMENT
        real rstd = inverse_root(squares / (real)n, job->eps);
        FOR_RESULT(i, count, n, y, job->past_caches) {
            vf standard = (vf_load_any(x + i, 1, count) - vf_set1(mean)) * vf_set1(rstd);
            vf weight = vf_load_any(job->weight + i, 1, count), bias = vf_load_any(job->bias + i, 1, count);
            store_result(y + i, vf_fma(standard, weight, bias), count, job->past_caches);
        }
        job->mean[row] = mean;
        job->rstd[row] = rstd;
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(layer_norm)(real *y, real *mean, real *rstd, const real *x, const real *weight, const real *bias, int64_t rows,
                   int64_t n, double eps) {
    struct norm_job job = {.y = y, .mean = mean, .rstd = rstd, .x = x, .weight = weight, .bias = bias, .n = n,
                           .eps = eps, .past_caches = goes_past_caches(2 * rows * n)};
    parallel_for(rows, grain_of_rows(n), layer_norm_rows, &job);
}

/* dx of one row, adding to dweight and dbias (n each). With h = (x − μ) rstd and p = g weight:
 * dx = rstd (p − mean(p) − h mean(p h)), dweight += g h, dbias += g. */
static void layer_norm_vjp_row(const struct norm_job *job, int64_t row, real *dweight, real *dbias) {
    int64_t n = job->n;
    const real *g = job->g + row * n, *x = job->x + row * n, *weight = job->weight;
    real *dx = job->y + row * n, mean = job->mean[row], rstd = job->rstd[row], sum_p, sum_ph;
#define P(i, count) (vf_load_any(g + (i), 1, count) * vf_load_any(weight + (i), 1, count))
#define H(i, count) ((vf_load_any(x + (i), 1, count) - vf_set1(mean)) * vf_set1(rstd))
#define PH(i, count) (P(i, count) * H(i, count))
    ROW_SUM(sum_p, n, P);
    ROW_SUM(sum_ph, n, PH);
    vf mean_p = vf_set1(sum_p / (real)n), mean_ph = vf_set1(sum_ph / (real)n);
    FOR_RESULT(i, count, n, dx, job->past_caches) {
        vf h = H(i, count), gradient = vf_load_any(g + i, 1, count);
        vf slope = vf_fma(h, -mean_ph, P(i, count) - mean_p);
        store_result(dx + i, slope * vf_set1(rstd), count, job->past_caches);
        vf_store_any(dweight + i, 1, vf_fma(gradient, h, vf_load_any(dweight + i, 1, count)), count);
        vf_store_any(dbias + i, 1, gradient + vf_load_any(dbias + i, 1, count), count);
    }
#undef PH
#undef H
#undef P
}

static void layer_norm_vjp_blocks(void *context, int64_t begin, int64_t end) {
    const struct norm_job *job = context;
    for (int64_t block = begin; block < end; block++) {
        real *dweight = job->dweight + block * job->n, *dbias = job->dbias + block * job->n;
        memset(dweight, 0, (size_t)job->n * sizeof *dweight);
        memset(dbias, 0, (size_t)job->n * sizeof *dbias);
        for (int64_t row = block * BLOCK_ROWS; row < (block + 1) * BLOCK_ROWS && row < job->rows; row++)
            layer_norm_vjp_row(job, row, dweight, dbias);
    }
    if (job->past_caches) vf_stream_end();
}

/* ── RMS norm ───────────────────────────────────────────────────────────────────────────────────── */

/* y = weight x / √(mean(x²) + ε). Zhang, Sennrich 2019, arXiv:1910.07467, eq. 4. */
static void rms_norm_rows(void *context, int64_t begin, int64_t end) {
    const struct norm_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real *y = job->y + row * n, squares;
#define ELEMENT(i, count) squared(vf_load_any(x + (i), 1, count))
        ROW_SUM(squares, n, ELEMENT);
#undef ELEMENT
        real rstd = inverse_root(squares / (real)n, job->eps);
        FOR_RESULT(i, count, n, y, job->past_caches) {
            vf standard = vf_load_any(x + i, 1, count) * vf_set1(rstd);
            store_result(y + i, standard * vf_load_any(job->weight + i, 1, count), count, job->past_caches);
        }
        job->rstd[row] = rstd;
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(rms_norm)(real *y, real *rstd, const real *x, const real *weight, int64_t rows, int64_t n, double eps) {
    struct norm_job job = {.y = y, .rstd = rstd, .x = x, .weight = weight, .n = n, .eps = eps,
                           .past_caches = goes_past_caches(2 * rows * n)};
    parallel_for(rows, grain_of_rows(n), rms_norm_rows, &job);
}

/* With h = x rstd and p = g weight: dx = rstd (p − h mean(p h)), dweight += g h. */
static void rms_norm_vjp_row(const struct norm_job *job, int64_t row, real *dweight) {
    int64_t n = job->n;
    const real *g = job->g + row * n, *x = job->x + row * n, *weight = job->weight;
    real *dx = job->y + row * n, rstd = job->rstd[row], sum_ph;
#define P(i, count) (vf_load_any(g + (i), 1, count) * vf_load_any(weight + (i), 1, count))
#define H(i, count) (vf_load_any(x + (i), 1, count) * vf_set1(rstd))
#define PH(i, count) (P(i, count) * H(i, count))
    ROW_SUM(sum_ph, n, PH);
    vf mean_ph = vf_set1(sum_ph / (real)n);
    FOR_RESULT(i, count, n, dx, job->past_caches) {
        vf h = H(i, count);
        store_result(dx + i, vf_fma(h, -mean_ph, P(i, count)) * vf_set1(rstd), count, job->past_caches);
        vf sum = vf_fma(vf_load_any(g + i, 1, count), h, vf_load_any(dweight + i, 1, count));
        vf_store_any(dweight + i, 1, sum, count);
    }
#undef PH
#undef H
#undef P
}

static void rms_norm_vjp_blocks(void *context, int64_t begin, int64_t end) {
    const struct norm_job *job = context;
    for (int64_t block = begin; block < end; block++) {
        real *dweight = job->dweight + block * job->n;
        memset(dweight, 0, (size_t)job->n * sizeof *dweight);
        for (int64_t row = block * BLOCK_ROWS; row < (block + 1) * BLOCK_ROWS && row < job->rows; row++)
            rms_norm_vjp_row(job, row, dweight);
    }
    if (job->past_caches) vf_stream_end();
}

/* ── Over the blocks ────────────────────────────────────────────────────────────────────────────── */

struct block_sums {
    real *y;
    const real *partial;
    int64_t blocks, n;
};

/* y = Σ over blocks, in ascending order; a thread owns a range of columns. */
static void add_blocks(void *context, int64_t begin, int64_t end) {
    const struct block_sums *job = context;
    memcpy(job->y + begin, job->partial + begin, (size_t)(end - begin) * sizeof *job->y);
    for (int64_t block = 1; block < job->blocks; block++) {
        const real *partial = job->partial + block * job->n;
        for (int64_t i = begin; i < end; i++) job->y[i] += partial[i];
    }
}

static void sum_of_blocks(real *y, const real *partial, int64_t blocks, int64_t n) {
    struct block_sums job = {y, partial, blocks, n};
    if (blocks == 0) memset(y, 0, (size_t)n * sizeof *y);
    else parallel_for(n, 1 + (ROWS_GRAIN - 1) / blocks, add_blocks, &job);
}

KERNEL(layer_norm_vjp)(real *dx, real *dweight, real *dbias, const real *g, const real *x, const real *weight,
                       const real *mean, const real *rstd, int64_t rows, int64_t n) {
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    real *partial = thread_scratch(SCRATCH_ROWS, (size_t)(2 * blocks * n) * sizeof *partial);
    struct norm_job job = {.y = dx, .mean = (real *)mean, .rstd = (real *)rstd, .g = g, .x = x, .weight = weight,
                           .dweight = partial, .dbias = partial + blocks * n, .rows = rows, .n = n,
                           .past_caches = goes_past_caches(3 * rows * n)};
    parallel_for(blocks, grain_of_rows(n * BLOCK_ROWS), layer_norm_vjp_blocks, &job);
    sum_of_blocks(dweight, job.dweight, blocks, n);
    sum_of_blocks(dbias, job.dbias, blocks, n);
}
KERNEL(rms_norm_vjp)(real *dx, real *dweight, const real *g, const real *x, const real *weight, const real *rstd,
                     int64_t rows, int64_t n) {
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    real *partial = thread_scratch(SCRATCH_ROWS, (size_t)(blocks * n) * sizeof *partial);
    struct norm_job job = {.y = dx, .rstd = (real *)rstd, .g = g, .x = x, .weight = weight, .dweight = partial,
                           .rows = rows, .n = n, .past_caches = goes_past_caches(3 * rows * n)};
    parallel_for(blocks, grain_of_rows(n * BLOCK_ROWS), rms_norm_vjp_blocks, &job);
    sum_of_blocks(dweight, partial, blocks, n);
}
