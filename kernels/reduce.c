/* reduce.c: sums, products and extremes along the middle axis of (outer, n, inner).
 *
 * Bytes: x once (logsumexp twice), 4 an element. Flops: 1 an element, 20 for logsumexp. What bounds it: memory.
 *
 * The order of every sum is that of tree.h, whatever inner is. inner = 1: the 16 lanes are 16 neighbours of a
 * row. inner > 1: lane l is the rows l, l + 16, … of a slab, taken for up to COLUMNS columns at a time. A long
 * axis is cut into pieces of 512 leaves, which are complete subtrees; the pieces go to the threads and are joined by
 * the same tree. */
#include "rows.h"
#include "simd_math.h"
#include "tree.h"

#define PIECE (512 * LEAF)
#define COLUMNS 256
#define COLUMN_LEVELS 32

struct reduction {
    real *y;
    const real *x;
    real *partial; /* the lanes of each piece, (outer, pieces, GROUP, inner), where there is more than one */
    int64_t n, inner, pieces;
    int64_t width, chunks; /* inner > 1: columns are taken `width` ≤ COLUMNS at a time */
};

/* What is reduced: x itself, or e^(x − m) with m the maximum, which y holds from the pass before. */
enum term { PLAIN, EXPONENTIAL };
ALWAYS_INLINE vf term_of(enum term term, vf x, vf m) { return term == PLAIN ? x : vf_exp(x - m); }

/* log Σ eˣ = m + log Σ e^(x − m). m itself where it is infinite, or NaN. */
ALWAYS_INLINE real result_of(enum term term, real total, real m) {
    if (term == PLAIN) return total;
    return isfinite(m) ? m + vf_log(vf_set1(total))[0] : m;
}

/* ── inner = 1 ──────────────────────────────────────────────────────────────────────────────────── */

ALWAYS_INLINE void reduce_rows(enum operation op, enum term term, const struct reduction *job, int64_t begin,
                               int64_t end) {
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item / job->pieces, start = item % job->pieces * PIECE, count = at_most(PIECE, job->n - start);
        const real *x = job->x + row * job->n + start;
        vf m = term == PLAIN ? vf_zero() : vf_set1(job->y[row]);
        group lanes;
#define ELEMENT(i, count) term_of(term, vf_load_any(x + (i), 1, count), m)
        ROW_LANES(op, lanes, count, ELEMENT);
#undef ELEMENT
        if (job->pieces == 1) job->y[row] = result_of(term, across(op, lanes), m[0]);
        else memcpy(job->partial + item * GROUP, &lanes, sizeof lanes);
    }
}

/* The pieces of a row, joined. */
ALWAYS_INLINE void join_rows(enum operation op, enum term term, const struct reduction *job, int64_t begin,
                             int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        tree t;
        t.top = 0, t.leaves = 0;
        for (int64_t piece = 0; piece < job->pieces; piece++) {
            group lanes;
            memcpy(&lanes, job->partial + (row * job->pieces + piece) * GROUP, sizeof lanes);
            tree_push(op, &t, lanes);
        }
        job->y[row] = result_of(term, across(op, tree_finish(op, &t)), job->y[row]);
    }
}

/* ── inner > 1 ──────────────────────────────────────────────────────────────────────────────────── */

/* tree.h's tree with GROUP × COLUMNS numbers in place of a group: lane l of column c is at l · COLUMNS + c. */
typedef struct { real (*level)[GROUP * COLUMNS]; int top; int64_t leaves; } column_tree;

static column_tree column_tree_begin(void) {
    return (column_tree){thread_scratch(SCRATCH_COLUMNS, sizeof(real[COLUMN_LEVELS][GROUP * COLUMNS])), 0, 0};
}
ALWAYS_INLINE void combine_columns(enum operation op, real *a, const real *b, int64_t columns) {
    for (int64_t c = 0; c < columns; c += VL) vf_store(a + c, combine(op, vf_load(a + c), vf_load(b + c)));
}
ALWAYS_INLINE void combine_lanes(enum operation op, real *a, const real *b, int64_t columns) {
    for (int64_t l = 0; l < GROUP * COLUMNS; l += COLUMNS) combine_columns(op, a + l, b + l, columns);
}
/* Takes the leaf that lies in level[top]. */
ALWAYS_INLINE void column_push(enum operation op, column_tree *t, int64_t columns) {
    for (int64_t carry = t->leaves++; carry & 1; carry >>= 1, t->top--)
        combine_lanes(op, t->level[t->top - 1], t->level[t->top], columns);
    t->top++;
}
ALWAYS_INLINE real *column_finish(enum operation op, column_tree *t, int64_t columns) {
    for (t->top--; t->top > 0; t->top--) combine_lanes(op, t->level[t->top - 1], t->level[t->top], columns);
    return t->level[0];
}

/* The lanes of at most LEAF rows; those without a row hold nothing. */
ALWAYS_INLINE void column_leaf(enum operation op, enum term term, real *lanes, const real *x, const real *m,
                               int64_t rows, int64_t row_stride, int64_t columns) {
    for (int64_t l = 0; l < GROUP; l++)
        FOR_ROW(c, count, columns) {
            vf shift = term == PLAIN ? vf_zero() : vf_load_any(m + c, 1, count), sum = vf_set1(neutral(op));
            for (int64_t r = l; r < rows; r += GROUP)
                sum = combine(op, sum, term_of(term, vf_load_any(x + r * row_stride + c, 1, count), shift));
            vf_store(lanes + l * COLUMNS + c, sum);
        }
}

/* The lanes added across, in place. y gets the result. */
ALWAYS_INLINE void finish_columns(enum operation op, enum term term, real *y, real *lanes, int64_t columns) {
    for (int64_t half = GROUP / 2 * COLUMNS; half >= COLUMNS; half /= 2)
        for (int64_t l = 0; l < half; l += COLUMNS) combine_columns(op, lanes + l, lanes + l + half, columns);
    for (int64_t c = 0; c < columns; c++) y[c] = result_of(term, lanes[c], y[c]);
}

/* At most one leaf, all of it: the lanes stay in registers. y[c] = column c of x. */
ALWAYS_INLINE void reduce_leaf(enum operation op, enum term term, real *y, const real *x, const real *m, int64_t rows,
                               int64_t row_stride, int64_t columns) {
    int64_t used = at_most(GROUP, rows);
    FOR_ROW(c, count, columns) {
        vf lane[GROUP], shift = term == PLAIN ? vf_zero() : vf_load_any(m + c, 1, count);
        for (int64_t l = 0; l < used; l++) {
            lane[l] = term_of(term, vf_load_any(x + l * row_stride + c, 1, count), shift);
            for (int64_t r = l + GROUP; r < rows; r += GROUP)
                lane[l] = combine(op, lane[l], term_of(term, vf_load_any(x + r * row_stride + c, 1, count), shift));
        }
        for (int half = GROUP / 2; half; half /= 2)
            for (int l = 0; l < half && l + half < used; l++) lane[l] = combine(op, lane[l], lane[l + half]);
        vf_store(y + c, lane[0]);
    }
}

ALWAYS_INLINE void reduce_columns(enum operation op, enum term term, const struct reduction *job, int64_t begin,
                                  int64_t end) {
    for (int64_t item = begin; item < end; item++) {
        int64_t chunk = item % job->chunks, slab = item / job->chunks, start = slab % job->pieces * PIECE;
        int64_t outer = slab / job->pieces, column = chunk * job->width;
        int64_t columns = at_most(job->width, job->inner - column), rows = at_most(PIECE, job->n - start);
        const real *x = job->x + (outer * job->n + start) * job->inner + column;
        real *y = job->y + outer * job->inner + column;
        if (job->n <= LEAF) {
            real results[COLUMNS];
            reduce_leaf(op, term, results, x, y, rows, job->inner, columns);
            for (int64_t c = 0; c < columns; c++) y[c] = result_of(term, results[c], y[c]);
            continue;
        }
        column_tree t = column_tree_begin();
        for (int64_t row = 0; row < rows; row += LEAF) {
            column_leaf(op, term, t.level[t.top], x + row * job->inner, y, at_most(rows - row, LEAF), job->inner,
                        columns);
            column_push(op, &t, columns);
        }
        real *lanes = column_finish(op, &t, columns);
        if (job->pieces == 1)
            finish_columns(op, term, y, lanes, columns);
        else
            for (int64_t l = 0; l < GROUP; l++)
                memcpy(job->partial + (slab * GROUP + l) * job->inner + column, lanes + l * COLUMNS,
                       (size_t)columns * sizeof(real));
    }
}

/* The pieces of a slab, joined. */
ALWAYS_INLINE void join_columns(enum operation op, enum term term, const struct reduction *job, int64_t begin,
                                int64_t end) {
    for (int64_t item = begin; item < end; item++) {
        int64_t outer = item / job->chunks, column = item % job->chunks * job->width;
        int64_t columns = at_most(job->width, job->inner - column);
        column_tree t = column_tree_begin();
        for (int64_t piece = 0; piece < job->pieces; piece++) {
            const real *partial = job->partial + (outer * job->pieces + piece) * GROUP * job->inner + column;
            for (int64_t l = 0; l < GROUP; l++)
                memcpy(t.level[t.top] + l * COLUMNS, partial + l * job->inner, (size_t)columns * sizeof(real));
            column_push(op, &t, columns);
        }
        real *lanes = column_finish(op, &t, columns);
        finish_columns(op, term, job->y + outer * job->inner + column, lanes, columns);
    }
}

/* ── The kernels ────────────────────────────────────────────────────────────────────────────────── */

typedef void (*job_function)(void *context, int64_t begin, int64_t end);

static void fill(real *y, int64_t count, real value) {
    for (int64_t i = 0; i < count; i++) y[i] = value;
}

/* Runs one of the two ways above: over all items, then, where the axis was cut, over all results. */
static void reduce(real *y, const real *x, int64_t outer, int64_t n, int64_t inner, real empty,
                   const job_function step[4]) {
    if (n == 0) fill(y, outer * inner, empty);
    if (outer * n * inner == 0) return;
    /* Columns are dealt out evenly, so that no thread waits for one that has more of them. */
    int64_t pieces = divide_up(n, PIECE), chunks = divide_up(inner, COLUMNS), threads = threads_get();
    if (outer * pieces * chunks < threads)
        chunks = at_most(divide_up(threads, outer * pieces), divide_up(inner, 2 * GROUP));
    int64_t width = divide_up(divide_up(inner, chunks), GROUP) * GROUP;
    chunks = divide_up(inner, width);
    struct reduction job = {y, x, NULL, n, inner, pieces, width, chunks};
    if (pieces > 1)
        job.partial = thread_scratch(SCRATCH_ROWS, (size_t)(outer * pieces * GROUP * inner) * sizeof(real));
    const job_function *way = inner == 1 ? step : step + 2;
    int64_t grain = grain_of_rows(at_most(n, PIECE) * at_most(inner, width));
    parallel_for(outer * pieces * chunks, grain, way[0], &job);
    if (pieces > 1) parallel_for(outer * chunks, 1, way[1], &job);
}

#define REDUCTION(name, op, term, empty) \
    static void name##_rows(void *job, int64_t begin, int64_t end) { reduce_rows(op, term, job, begin, end); } \
    static void name##_join_rows(void *job, int64_t begin, int64_t end) { join_rows(op, term, job, begin, end); } \
    static void name##_columns(void *job, int64_t begin, int64_t end) { reduce_columns(op, term, job, begin, end); } \
    static void name##_join_columns(void *job, int64_t begin, int64_t end) { \
        join_columns(op, term, job, begin, end); \
    } \
    static void name##_reduce(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) { \
        const job_function steps[4] = {name##_rows, name##_join_rows, name##_columns, name##_join_columns}; \
        reduce(y, x, outer, n, inner, empty, steps); \
    }
REDUCTION(sum, SUM, PLAIN, 0)
REDUCTION(prod, PRODUCT, PLAIN, 1)
REDUCTION(max, MAXIMUM, PLAIN, (real)-INFINITY)
REDUCTION(min, MINIMUM, PLAIN, (real)INFINITY)
REDUCTION(sum_exp, SUM, EXPONENTIAL, (real)-INFINITY)

/* y = Σ x, Π x, max x, min x over n. An empty sum is 0, an empty product 1. */
KERNEL(sum)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) { sum_reduce(y, x, outer, n, inner); }
KERNEL(prod)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) { prod_reduce(y, x, outer, n, inner); }
KERNEL(max)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) { max_reduce(y, x, outer, n, inner); }
KERNEL(min)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) { min_reduce(y, x, outer, n, inner); }

/* y = log Σ eˣ over n, −∞ where n = 0: one pass for the maximum, one for the sum. */
KERNEL(logsumexp)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner) {
    max_reduce(y, x, outer, n, inner);
    sum_exp_reduce(y, x, outer, n, inner);
}
