/* softmax.c: softmax, its logarithm, and cross entropy, row by row; rows × n, dense.
 *
 * Bytes: softmax reads x twice and writes and rereads y; a row of n ≤ 8,192 floats stays in the first caches, so
 * memory sees 8n bytes a row, 4n for cross_entropy, 12n for the vjps. Flops: about 20 an element, most of
 * them exp. What bounds it: memory for rows that come from memory, exp otherwise. Rows are shared
 * out to the threads and never cut; each row is summed in the order of tree.h, so its bits depend on
 * the row alone.
 *
 * m = max of the row is subtracted first, so no exp overflows: softmax(x) = softmax(x − m). A row that is −∞
 * throughout, or that holds +∞ or NaN, has no softmax, and comes out as NaN. */
#include "rows.h"
#include "simd_math.h"
#include "tree.h"

struct softmax_job {
    real *y, *lse;
    const real *g, *x;
    const int64_t *target;
    int64_t n, ignore;
    real smoothing;
    int past_caches; /* y */
};

/* The largest element. A row with NaN may give anything: its exponentials are NaN in any case. */
static real row_max(const real *x, int64_t n) {
    vf largest = vf_set1((real)-INFINITY);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) largest = vf_max(largest, vf_load(x + i));
    if (i < n) largest = vf_max(largest, vf_load_n(x + i, n - i, (real)-INFINITY));
    return vf_hmax(largest);
}

static inline real log_one(real x) { return vf_log(vf_set1(x))[0]; }

/* Σ exp(x − m) */
static real row_sum_exp(const real *x, real m, int64_t n) {
    real total;
#define ELEMENT(i, count) vf_exp(vf_load_any(x + (i), 1, count) - vf_set1(m))
    ROW_SUM(total, n, ELEMENT);
#undef ELEMENT
    return total;
}

/* ── softmax ────────────────────────────────────────────────────────────────────────────────────── */

/* y = e^(x − m) / Σ e^(x − m) */
static void softmax_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real *y = job->y + row * n, total, m = row_max(x, n);
        FOR_ROW(i, count, n) vf_store_any(y + i, 1, vf_exp(vf_load_any(x + i, 1, count) - vf_set1(m)), count);
#define ELEMENT(i, count) vf_load_any(y + (i), 1, count)
        ROW_SUM(total, n, ELEMENT);
#undef ELEMENT
        FOR_ROW(i, count, n) vf_store_any(y + i, 1, vf_load_any(y + i, 1, count) / vf_set1(total), count);
    }
}
KERNEL(softmax)(real *y, const real *x, int64_t rows, int64_t n) {
    struct softmax_job job = {.y = y, .x = x, .n = n};
    parallel_for(rows, grain_of_rows(n), softmax_rows, &job);
}

/* dx = y (g − Σ g y) */
static void softmax_vjp_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *g = job->g + row * n, *y = job->x + row * n;
        real *dx = job->y + row * n, dot;
#define ELEMENT(i, count) (vf_load_any(g + (i), 1, count) * vf_load_any(y + (i), 1, count))
        ROW_SUM(dot, n, ELEMENT);
#undef ELEMENT
        FOR_RESULT(i, count, n, dx, job->past_caches) {
            vf slope = vf_load_any(g + i, 1, count) - vf_set1(dot);
            store_result(dx + i, vf_load_any(y + i, 1, count) * slope, count, job->past_caches);
        }
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n) {
    struct softmax_job job = {.y = dx, .g = g, .x = y, .n = n, .past_caches = goes_past_caches(3 * rows * n)};
    parallel_for(rows, grain_of_rows(n), softmax_vjp_rows, &job);
}

/* y = (x − m) − log Σ e^(x − m) */
static void log_softmax_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real *y = job->y + row * n, m = row_max(x, n), log_sum = log_one(row_sum_exp(x, m, n));
        FOR_RESULT(i, count, n, y, job->past_caches) {
            vf shifted = vf_load_any(x + i, 1, count) - vf_set1(m);
            store_result(y + i, shifted - vf_set1(log_sum), count, job->past_caches);
        }
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(log_softmax)(real *y, const real *x, int64_t rows, int64_t n) {
    struct softmax_job job = {.y = y, .x = x, .n = n, .past_caches = goes_past_caches(2 * rows * n)};
    parallel_for(rows, grain_of_rows(n), log_softmax_rows, &job);
}

/* dx = g − e^y Σ g */
static void log_softmax_vjp_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *g = job->g + row * n, *y = job->x + row * n;
        real *dx = job->y + row * n, total;
#define ELEMENT(i, count) vf_load_any(g + (i), 1, count)
        ROW_SUM(total, n, ELEMENT);
#undef ELEMENT
        FOR_RESULT(i, count, n, dx, job->past_caches) {
            vf probability = vf_exp(vf_load_any(y + i, 1, count)), gradient = vf_load_any(g + i, 1, count);
            store_result(dx + i, vf_fma(probability, vf_set1(-total), gradient), count, job->past_caches);
        }
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(log_softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n) {
    struct softmax_job job = {.y = dx, .g = g, .x = y, .n = n, .past_caches = goes_past_caches(3 * rows * n)};
    parallel_for(rows, grain_of_rows(n), log_softmax_vjp_rows, &job);
}

/* ── cross entropy ──────────────────────────────────────────────────────────────────────────────── */

/* loss = log Σ e^(x − m) − (1 − smoothing)(x[target] − m) − smoothing · mean(x − m): the equation of kernels.h with m
 * taken out of every term, so that a small loss among large logits keeps its digits. smoothing = 0 must not
 * touch the mean, since 0 · ∞ is NaN where logits are masked by −∞. A target outside the row gives NaN. */
static real row_loss(const real *x, real m, real log_sum, int64_t target, int64_t n, real smoothing) {
    if (target < 0 || target >= n) return (real)NAN;
    real shift = isinf(m) ? 0 : m, hit = x[target] - shift;
    real loss = log_sum + (m - shift);
    if (smoothing == 0) return loss - hit;
    real total;
#define ELEMENT(i, count) (vf_load_any(x + (i), 1, count) - vf_set1(shift))
    ROW_SUM(total, n, ELEMENT);
#undef ELEMENT
    return loss - (1 - smoothing) * hit - smoothing * (total / (real)n);
}

static void cross_entropy_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real m = row_max(x, n), sum = row_sum_exp(x, isinf(m) ? 0 : m, n);
        real log_sum = isinf(m) ? (sum != sum ? sum : 0) : log_one(sum); /* m = ±∞ is the answer itself, but for NaN */
        job->lse[row] = m + log_sum;
        int64_t target = job->target[row];
        job->y[row] = target == job->ignore ? 0 : row_loss(x, m, log_sum, target, n, job->smoothing);
    }
}
KERNEL(cross_entropy)(real *loss, real *lse, const real *x, const int64_t *target, int64_t rows, int64_t n,
                      int64_t ignore, double smoothing) {
    struct softmax_job job = {loss, lse, NULL, x, target, n, ignore, (real)smoothing, 0};
    parallel_for(rows, grain_of_rows(n), cross_entropy_rows, &job);
}

/* dx = g (e^(x − lse) − (1 − smoothing)[i = target] − smoothing / n); dx may be x. */
static void cross_entropy_vjp_rows(void *context, int64_t begin, int64_t end) {
    const struct softmax_job *job = context;
    int64_t n = job->n;
    real share = job->smoothing / (real)n, hit = 1 - job->smoothing;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * n;
        real *dx = job->y + row * n, g = job->g[row], lse = job->lse[row];
        int64_t target = job->target[row];
        if (target == job->ignore) {
            memset(dx, 0, (size_t)n * sizeof *dx);
            continue;
        }
        int in_row = target >= 0 && target < n;
        real at_target = in_row ? x[target] : 0;
        FOR_RESULT(i, count, n, dx, job->past_caches) {
            vf probability = vf_exp(vf_load_any(x + i, 1, count) - vf_set1(lse));
            store_result(dx + i, vf_set1(g) * (probability - vf_set1(share)), count, job->past_caches);
        }
        if (in_row)
            dx[target] = g * (vf_exp(vf_set1(at_target - lse))[0] - share - hit);
    }
    if (job->past_caches) vf_stream_end();
}
KERNEL(cross_entropy_vjp)(real *dx, const real *g, const real *x, const real *lse, const int64_t *target, int64_t rows,
                          int64_t n, int64_t ignore, double smoothing) {
    int past_caches = dx != x && goes_past_caches(2 * rows * n);
    struct softmax_job job = {dx, (real *)lse, g, x, target, n, ignore, (real)smoothing, past_caches};
    parallel_for(rows, grain_of_rows(n), cross_entropy_vjp_rows, &job);
}
