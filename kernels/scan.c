/* scan.c: what goes along an axis of (outer, n, inner) in order: positions of extremes, running sums, and the
 * sum of squares of a flat array.
 *
 * Bytes: argmax reads x once; cumulative_sum reads and writes, 8 an element; sum_squares reads once. Flops: 1 to 3 an
 * element. What bounds it: memory; sum_squares, as much the divider; cumulative_sum of a single row, the latency of one
 * addition an element. */
#include "rows.h"
#include <math.h>

#define PIECE 65536
#define COLUMNS 256
#define SQUARES_BLOCK 4096
#define SQUARES_LANES 16

struct scan {
    real *y;
    int64_t *position, *partial; /* partial: the first extreme of each piece of a row */
    double *squares;
    const real *x;
    int64_t n, inner, pieces, chunks;
    real divisor;
};

/* Whether b, which comes later than a, takes its place: a greater (less) element, or the first NaN. */
ALWAYS_INLINE int beats(int greatest, real b, real a) { return (greatest ? b > a : b < a) || (b != b && a == a); }

/* ── argmax, argmin ─────────────────────────────────────────────────────────────────────────────── */

/* Position of the first extreme of a row, or of its first NaN. Vectors in which nothing beats the best so far,
 * almost all of them, are passed over. */
ALWAYS_INLINE int64_t first_extreme(int greatest, const real *x, int64_t n) {
    int64_t best = 0;
    FOR_ROW(i, count, n) {
        vf v = count == VL ? vf_load(x + i) : vf_load_n(x + i, count, x[best]), top = vf_set1(x[best]);
        if (!vi_any((greatest ? v > top : v < top) | vf_is_nan(v))) continue;
        for (int64_t j = i; j < i + count; j++)
            if (beats(greatest, x[j], x[best])) best = j;
    }
    return best;
}

ALWAYS_INLINE void extreme_rows(int greatest, const struct scan *job, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
        int64_t start = item % job->pieces * PIECE;
        const real *x = job->x + item / job->pieces * job->n + start;
        job->partial[item] = start + first_extreme(greatest, x, at_most(PIECE, job->n - start));
    }
}

ALWAYS_INLINE void extreme_columns(int greatest, const struct scan *job, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
        int64_t outer = item / job->chunks, column = item % job->chunks * COLUMNS;
        int64_t columns = at_most(COLUMNS, job->inner - column);
        const real *x = job->x + outer * job->n * job->inner + column;
        int64_t *position = job->position + outer * job->inner + column;
        real best[COLUMNS];
        memcpy(best, x, (size_t)columns * sizeof *best);
        memset(position, 0, (size_t)columns * sizeof *position);
        for (int64_t i = 1; i < job->n; i++)
            for (int64_t c = 0; c < columns; c++)
                if (beats(greatest, x[i * job->inner + c], best[c])) {
                    best[c] = x[i * job->inner + c];
                    position[c] = i;
                }
    }
}

static void max_rows(void *job, int64_t begin, int64_t end) { extreme_rows(1, job, begin, end); }
static void min_rows(void *job, int64_t begin, int64_t end) { extreme_rows(0, job, begin, end); }
static void max_columns(void *job, int64_t begin, int64_t end) { extreme_columns(1, job, begin, end); }
static void min_columns(void *job, int64_t begin, int64_t end) { extreme_columns(0, job, begin, end); }

static void extremes(int greatest, int64_t *y, const real *x, int64_t outer, int64_t n, int64_t inner) {
    struct scan job = {.position = y, .x = x, .n = n, .inner = inner, .pieces = (n + PIECE - 1) / PIECE,
                       .chunks = (inner + COLUMNS - 1) / COLUMNS};
    if (inner != 1) {
        parallel_for(outer * job.chunks, grain_of_rows(n * at_most(inner, COLUMNS)),
                     greatest ? max_columns : min_columns, &job);
        return;
    }
    job.partial = job.pieces == 1 ? y : thread_scratch(SCRATCH_ROWS, (size_t)(outer * job.pieces) * sizeof *y);
    parallel_for(outer * job.pieces, grain_of_rows(at_most(n, PIECE)), greatest ? max_rows : min_rows, &job);
    for (int64_t row = 0; job.pieces > 1 && row < outer; row++) {
        int64_t best = job.partial[row * job.pieces];
        for (int64_t piece = 1; piece < job.pieces; piece++) {
            int64_t position = job.partial[row * job.pieces + piece];
            if (beats(greatest, x[row * n + position], x[row * n + best])) best = position;
        }
        y[row] = best;
    }
}
KERNEL(argmax)(int64_t *y, const real *x, int64_t outer, int64_t n, int64_t inner) {
    extremes(1, y, x, outer, n, inner);
}
KERNEL(argmin)(int64_t *y, const real *x, int64_t outer, int64_t n, int64_t inner) {
    extremes(0, y, x, outer, n, inner);
}

/* ── cumulative_sum ─────────────────────────────────────────────────────────────────────────────── */

/* y[i] = x[0] + … + x[i], added in ascending order in double and rounded where it is stored. */
static void running_sums(void *context, int64_t begin, int64_t end) {
    const struct scan *job = context;
    for (int64_t item = begin; item < end; item++) {
        int64_t outer = item / job->chunks, column = item % job->chunks * COLUMNS;
        int64_t columns = at_most(COLUMNS, job->inner - column), offset = outer * job->n * job->inner + column;
        double sum[COLUMNS], alone = -0.0; /* −0 + x = x */
        for (int64_t i = 0; job->inner == 1 && i < job->n; i++)
            job->y[offset + i] = (real)(alone += (double)job->x[offset + i]);
        if (job->inner == 1) continue;
        for (int64_t c = 0; c < columns; c++) sum[c] = -0.0;
        for (int64_t i = 0; i < job->n; i++, offset += job->inner)
            for (int64_t c = 0; c < columns; c++) job->y[offset + c] = (real)(sum[c] += (double)job->x[offset + c]);
    }
}
KERNEL(cumulative_sum)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) {
    struct scan job = {.y = y, .x = x, .n = n, .inner = inner, .chunks = (inner + COLUMNS - 1) / COLUMNS};
    parallel_for(outer * job.chunks, grain_of_rows(n * at_most(inner, COLUMNS)), running_sums, &job);
}

/* ── sum_squares ────────────────────────────────────────────────────────────────────────────────── */

ALWAYS_INLINE double square(real x) { return (double)x * (double)x; }

/* Σ (x/divisor)² of one block in double: element i to lane i mod 16, ascending; the lanes in halves. */
static void square_blocks(void *context, int64_t begin, int64_t end) {
    const struct scan *job = context;
    for (int64_t block = begin; block < end; block++) {
        const real *x = job->x + block * SQUARES_BLOCK;
        int64_t count = at_most(SQUARES_BLOCK, job->n - block * SQUARES_BLOCK), i = 0;
        double lanes[SQUARES_LANES] = {0};
        for (; i + SQUARES_LANES <= count; i += SQUARES_LANES)
            for (int l = 0; l < SQUARES_LANES; l++) lanes[l] += square(x[i + l] / job->divisor);
        for (int l = 0; i < count; i++, l++) lanes[l] += square(x[i] / job->divisor);
        for (int half = SQUARES_LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
        job->squares[block] = lanes[0];
    }
}
KERNEL(sum_squares)(double *partial, const real *x, int64_t n, double divisor) {
    struct scan job = {.squares = partial, .x = x, .n = n, .divisor = (real)divisor};
    parallel_for((n + SQUARES_BLOCK - 1) / SQUARES_BLOCK, 2, square_blocks, &job);
}
