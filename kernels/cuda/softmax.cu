/* softmax.cu: softmax, its logarithm, and cross entropy, row by row; rows × n, dense. A block does a row.
 *
 * Bytes: softmax and its logarithm 8n a row, cross_entropy 4n, the vjps 12n (float), as long as a row stays in the
 * caches between the passes over it: up to some 30,000 floats in a multiprocessor's first, beyond in the second.
 * Flops: about 20 an element, most of them exp. What bounds it: memory. A row of fewer than 256 elements leaves
 * threads idle.
 *
 * m = max of the row is subtracted first, so no exp overflows: softmax(x) = softmax(x − m). A row that is −∞
 * throughout, or that holds +∞ or NaN, has no softmax, and comes out as NaN. */
#include "common.cuh"

/* The largest of a row, NaN if there is one; −∞ for n = 0. */
static __device__ inline real row_max(const real *x, int64_t n, real *of_warp) {
    real m = -INFINITY;
    FOR_ROW_IN_BLOCK(i, n) m = larger(m, x[i]);
    return block_max(m, of_warp);
}

/* Σ e^(x − m) */
static __device__ inline real row_sum_exp(const real *x, real m, int64_t n, real *of_warp) {
    real sum = 0;
    FOR_ROW_IN_BLOCK(i, n) sum += exp(x[i] - m);
    return block_sum(sum, of_warp);
}

/* ── softmax ────────────────────────────────────────────────────────────────────────────────────── */

/* y = e^(x − m) / Σ e^(x − m) */
KERNEL(softmax)(real *y, const real *x, int64_t rows, int64_t n) {
    __shared__ real of_warp[WARPS];
    FOR_TASKS(row, rows) {
        const real *from = x + row * n;
        real m = row_max(from, n, of_warp), sum = row_sum_exp(from, m, n, of_warp);
        FOR_ROW_IN_BLOCK(i, n) y[row * n + i] = exp(from[i] - m) / sum;
    }
}

/* dx = y (g − Σ g y) */
KERNEL(softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n) {
    __shared__ real of_warp[WARPS];
    FOR_TASKS(row, rows) {
        const real *slope = g + row * n, *p = y + row * n;
        real dot = 0;
        FOR_ROW_IN_BLOCK(i, n) dot = fma(slope[i], p[i], dot);
        dot = block_sum(dot, of_warp);
        FOR_ROW_IN_BLOCK(i, n) dx[row * n + i] = p[i] * (slope[i] - dot);
    }
}

/* y = (x − m) − log Σ e^(x − m) */
KERNEL(log_softmax)(real *y, const real *x, int64_t rows, int64_t n) {
    __shared__ real of_warp[WARPS];
    FOR_TASKS(row, rows) {
        const real *from = x + row * n;
        real m = row_max(from, n, of_warp), log_sum = log(row_sum_exp(from, m, n, of_warp));
        FOR_ROW_IN_BLOCK(i, n) y[row * n + i] = (from[i] - m) - log_sum;
    }
}

/* dx = g − e^y Σ g */
KERNEL(log_softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n) {
    __shared__ real of_warp[WARPS];
    FOR_TASKS(row, rows) {
        const real *slope = g + row * n, *log_p = y + row * n;
        real total = 0;
        FOR_ROW_IN_BLOCK(i, n) total += slope[i];
        total = block_sum(total, of_warp);
        FOR_ROW_IN_BLOCK(i, n) dx[row * n + i] = fma(exp(log_p[i]), -total, slope[i]);
    }
}

/* ── cross entropy ──────────────────────────────────────────────────────────────────────────────── */

/* loss = log Σ e^(x − m) − (1 − smoothing)(x[target] − m) − smoothing · mean(x − m): the equation of kernels.h with m
 * taken out of every term, so that a small loss among large logits keeps its digits. smoothing = 0 must not touch the
 * mean, since 0 · ∞ is NaN where logits are masked by −∞. A target outside the row gives NaN. */
KERNEL(cross_entropy)(real *loss, real *lse, const real *x, const int64_t *target, int64_t rows, int64_t n,
                      int64_t ignore, double smoothing) {
    __shared__ real of_warp[WARPS];
    const real uniform = (real)smoothing;
    FOR_TASKS(row, rows) {
        const real *from = x + row * n;
        real m = row_max(from, n, of_warp), shift = isinf(m) ? 0 : m;
        real sum = row_sum_exp(from, shift, n, of_warp), log_sum = isinf(m) ? 0 : log(sum); /* m = ±∞ is its own lse */
        real rest = 0; /* Σ (x − m) */
        if (uniform != 0) {
            FOR_ROW_IN_BLOCK(i, n) rest += from[i] - shift;
            rest = block_sum(rest, of_warp);
        }
        if (threadIdx.x != 0) continue; /* no barrier follows before the next row's first */
        int64_t hit = target[row];
        real excess = log_sum + (m - shift);
        lse[row] = m + log_sum;
        if (hit == ignore)
            loss[row] = 0;
        else if (hit < 0 || hit >= n)
            loss[row] = NAN;
        else if (uniform == 0)
            loss[row] = excess - (from[hit] - shift);
        else
            loss[row] = excess - (1 - uniform) * (from[hit] - shift) - uniform * (rest / (real)n);
    }
}

/* dx = g (e^(x − lse) − (1 − smoothing)[i = target] − smoothing / n) */
KERNEL(cross_entropy_vjp)(real *dx, const real *g, const real *x, const real *lse, const int64_t *target, int64_t rows,
                          int64_t n, int64_t ignore, double smoothing) {
    const real share = (real)smoothing / (real)n, whole = 1 - (real)smoothing;
    FOR_TASKS(row, rows) {
        int64_t hit = target[row];
        FOR_ROW_IN_BLOCK(i, n) {
            real slope = exp(x[row * n + i] - lse[row]) - share;
            if (i == hit) slope -= whole;
            dx[row * n + i] = hit == ignore ? 0 : g[row] * slope;
        }
    }
}
