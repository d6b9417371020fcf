/* norm.cu: layer norm and RMS norm over the last axis; rows × n, dense, with their gradients.
 *
 * A warp does a row, so its sums need no shared memory and no barrier. The gradients of weight and bias are sums over
 * rows: there a block does a tile of COLUMNS columns, LANES threads taking every LANES-th row of it; eight neighbouring
 * floats are one sector of 32 bytes, the smallest piece that memory delivers.
 *
 * Bytes: forward 8n a row (x in, y out), backward 20n (g and x in twice, dx out), float, as long as a row stays in
 * the first cache between its passes. Flops: forward about 8 an element, backward 14. What bounds it: memory. */
#include "common.cuh"

#define COLUMNS 8
#define LANES (THREADS / COLUMNS)

static __device__ inline real inverse_root(real variance,
                                           double eps) { return (real)(1 / sqrt((double)variance + eps)); }

/* The sums of LANES partial sums for each of COLUMNS columns, in a tree; sums[0] holds them at the end. */
static __device__ inline void add_lanes(real sums[LANES][COLUMNS], int lane, int column) {
    __syncthreads(); /* every lane has written its own */
    for (int half = LANES / 2; half > 0; half /= 2) {
        if (lane < half) sums[lane][column] += sums[lane + half][column];
        __syncthreads(); /* this level is complete before the next one reads it */
    }
}

/* ── layer norm ─────────────────────────────────────────────────────────────────────────────────── */

/* μ = Σ x / n, σ² = Σ (x − μ)² / n, y = weight (x − μ) / √(σ² + ε) + bias.
 * Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3. */
KERNEL(layer_norm)(real *y, real *mean, real *rstd, const real *x, const real *weight, const real *bias, int64_t rows,
                   int64_t n, double eps) {
    FOR_TASKS(task, divide_up(rows, WARPS)) {
        int64_t row = task * WARPS + warp_index();
        if (row >= rows) continue; /* the whole warp: nobody waits for it */
        const real *from = x + row * n;
        real total = 0, squares = 0;
        FOR_ROW_IN_WARP(i, n) total += from[i];
        real center = warp_sum(total) / (real)n;
        FOR_ROW_IN_WARP(i, n) squares = fma(from[i] - center, from[i] - center, squares);
        real scale = inverse_root(warp_sum(squares) / (real)n, eps);
        FOR_ROW_IN_WARP(i, n) y[row * n + i] = fma((from[i] - center) * scale, weight[i], bias[i]);
        if (lane_index() == 0) {
            mean[row] = center;
            rstd[row] = scale;
        }
    }
}

/* With h = (x − μ) rstd and p = g weight: dx = rstd (p − mean(p) − h mean(p h)). */
static __device__ inline void layer_norm_row_vjp(real *dx, const real *g, const real *x, const real *weight,
                                                 real center, real scale, int64_t n) {
    real sum_p = 0, sum_ph = 0;
    FOR_ROW_IN_WARP(i, n) {
        real p = g[i] * weight[i];
        sum_p += p;
        sum_ph = fma(p, (x[i] - center) * scale, sum_ph);
    }
    real mean_p = warp_sum(sum_p) / (real)n, mean_ph = warp_sum(sum_ph) / (real)n;
    FOR_ROW_IN_WARP(i, n) {
        real h = (x[i] - center) * scale;
        dx[i] = fma(h, -mean_ph, g[i] * weight[i] - mean_p) * scale;
    }
}

/* dweight = Σ g h and dbias = Σ g over the rows. The first tasks are eight rows of dx each, the others a tile of
 * columns. */
KERNEL(layer_norm_vjp)(real *dx, real *dweight, real *dbias, const real *g, const real *x, const real *weight,
                       const real *mean, const real *rstd, int64_t rows, int64_t n) {
    __shared__ real of_weight[LANES][COLUMNS], of_bias[LANES][COLUMNS];
    const int64_t row_tasks = divide_up(rows, WARPS);
    FOR_TASKS(task, row_tasks + divide_up(n, COLUMNS)) {
        if (task < row_tasks) {
            int64_t row = task * WARPS + warp_index(), at = row * n;
            if (row < rows) layer_norm_row_vjp(dx + at, g + at, x + at, weight, mean[row], rstd[row], n);
            continue;
        }
        int column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
        int64_t i = (task - row_tasks) * COLUMNS + column;
        real sum_weight = 0, sum_bias = 0;
        for (int64_t row = lane; row < rows && i < n; row += LANES) {
            real slope = g[row * n + i];
            sum_weight = fma(slope, (x[row * n + i] - mean[row]) * rstd[row], sum_weight);
            sum_bias += slope;
        }
        of_weight[lane][column] = sum_weight;
        of_bias[lane][column] = sum_bias;
        add_lanes(of_weight, lane, column);
        add_lanes(of_bias, lane, column);
        if (lane == 0 && i < n) {
            dweight[i] = of_weight[0][column];
            dbias[i] = of_bias[0][column];
        }
    }
}

/* ── RMS norm ───────────────────────────────────────────────────────────────────────────────────── */

/* y = weight x / √(mean(x²) + ε). Zhang, Sennrich 2019, arXiv:1910.07467, eq. 4. */
KERNEL(rms_norm)(real *y, real *rstd, const real *x, const real *weight, int64_t rows, int64_t n, double eps) {
    FOR_TASKS(task, divide_up(rows, WARPS)) {
        int64_t row = task * WARPS + warp_index();
        if (row >= rows) continue;
        const real *from = x + row * n;
        real squares = 0;
        FOR_ROW_IN_WARP(i, n) squares = fma(from[i], from[i], squares);
        real scale = inverse_root(warp_sum(squares) / (real)n, eps);
        FOR_ROW_IN_WARP(i, n) y[row * n + i] = from[i] * scale * weight[i];
        if (lane_index() == 0) rstd[row] = scale;
    }
}

/* With h = x rstd and p = g weight: dx = rstd (p − h mean(p h)). */
static __device__ inline void rms_norm_row_vjp(real *dx, const real *g, const real *x, const real *weight, real scale,
                                               int64_t n) {
    real sum_ph = 0;
    FOR_ROW_IN_WARP(i, n) sum_ph = fma(g[i] * weight[i], x[i] * scale, sum_ph);
    real mean_ph = warp_sum(sum_ph) / (real)n;
    FOR_ROW_IN_WARP(i, n) dx[i] = fma(x[i] * scale, -mean_ph, g[i] * weight[i]) * scale;
}

/* dweight = Σ g h over the rows; tasks as in layer_norm_vjp. */
KERNEL(rms_norm_vjp)(real *dx, real *dweight, const real *g, const real *x, const real *weight, const real *rstd,
                     int64_t rows, int64_t n) {
    __shared__ real of_weight[LANES][COLUMNS];
    const int64_t row_tasks = divide_up(rows, WARPS);
    FOR_TASKS(task, row_tasks + divide_up(n, COLUMNS)) {
        if (task < row_tasks) {
            int64_t row = task * WARPS + warp_index(), at = row * n;
            if (row < rows) rms_norm_row_vjp(dx + at, g + at, x + at, weight, rstd[row], n);
            continue;
        }
        int column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
        int64_t i = (task - row_tasks) * COLUMNS + column;
        real sum = 0;
        for (int64_t row = lane; row < rows && i < n; row += LANES)
            sum = fma(g[row * n + i], x[row * n + i] * rstd[row], sum);
        of_weight[lane][column] = sum;
        add_lanes(of_weight, lane, column);
        if (lane == 0 && i < n) dweight[i] = of_weight[0][column];
    }
}
