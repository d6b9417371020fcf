/* gemm.c: C = A B (+ C) (+ bias), batched, for any strides of A and B.
 *
 * Flops 2·m·n·k; bytes at least (m·k + k·n + m·n)·sizeof(real). With m, n, k in the hundreds it is bound by the FMA
 * units; with m or n of a few rows, by reading the other matrix once.
 *
 * Loops, outside in (after Van Zee and van de Geijn 2015, BLIS):
 *
 *     columns of C by COLUMNS ─ keeps the partial sums of an accumulating product small
 *       depth by DEPTH, rows by PACKED_A/depth ─ the packed part of A stays in the last-level cache
 *         pack A into panels of MR rows                                           (threads share the panels)
 *         for each group of row panels and each span of column panels             (threads share these tasks)
 *           for each block of KC in the depth
 *             pack KC rows of B's span into panels of NR columns
 *             for each column panel (KC × NR: first-level cache), for each row panel of the group (KC × MR; the group:
 *             second-level cache): the register tile, gemm_micro.c; then add it to the sum so far
 *
 * A span of B is used as soon as it is packed, by the thread that packed it, so a matrix of weights that
 * only a few rows multiply (decoding one token) is read once, in order, and never written back to memory.
 * A small operand that already lies as the register tile wants it is used in place.
 *
 * Every choice above (sizes, tasks, packing, threads) moves work about and none changes a sum: an element of C
 * is always ((block 0 + block 1) + block 2) + … with each block of KC products one chain, then + bias, then + C. */
#include "gemm_micro.h"
#include "threads.h"

#define KC 256                    /* part of the definition of the result; the rest may follow the machine */
#define DEPTH (8 * KC)
#define COLUMNS 4096
#define PACKED_A (1 << 20)        /* elements of A packed at a time: 4 MiB in float */
#define GROUP_BYTES (1 << 20)     /* KC steps of a group of A: a second-level cache, or a share of the third */
#define SPAN 4                    /* column panels a task: 128 KiB packed, and 512 bytes of each row of B in one run */
#define PANELS_AT_ONCE 8          /* row panels of A packed together, for the same reason */
#define FEW_USES 4                /* column panels; packing A costs about as much as multiplying it by one of them */
#define IN_PLACE (1 << 13)        /* an operand this small is as good unpacked: it fits the first-level cache */
#define PIECE_FLOPS (1 << 19)     /* a few microseconds: the least work worth waking a thread for */
#define BATCH_FLOPS (1 << 24)     /* products smaller than this are spread over the batch, not cut up */
#define PIECE_ELEMENTS (1 << 14)  /* the least packing worth waking a thread for */

struct product {
    real *c;
    const real *a, *b, *bias;
    int64_t m, n, k, a_row, a_col, b_row, b_col, c_row;
    int accumulate;
};

/* Rows, columns and depth now being multiplied. */
struct stage {
    const struct product *product;
    int64_t row, rows, column, columns, depth, depths;
    int64_t panel_rows, row_panels; /* A by panels: all of panel_rows rows, but the last may have fewer */
    int64_t group, groups;          /* a task multiplies `group` row panels */
    int64_t span, spans;            /* by `span` panels of NR columns */
    real *packed_a;                 /* NULL: A in place */
    real *partial;                  /* the sums so far, partial_row apart, seen from (row, column): C or scratch */
    int64_t partial_row;
};

/* ── packing ─────────────────────────────────────────────────────────────────────────────────────── */

/* Where a row panel of the block of the depth at p (counted from s->depth) is packed. */
static real *packed_panel(const struct stage *s, int64_t p, int64_t panel) {
    return s->packed_a + p / KC * s->row_panels * panel_size(s->panel_rows, KC) +
           panel * panel_size(s->panel_rows, at_most(s->depths - p, KC));
}

/* Index: block of the depth × PANELS_AT_ONCE row panels. */
static void pack_a_panels(void *context, int64_t begin, int64_t end) {
    const struct stage *s = context;
    const struct product *x = s->product;
    int64_t bundles = divide_up(s->row_panels, PANELS_AT_ONCE);
    for (int64_t t = begin; t < end; t++) {
        int64_t p = t / bundles * KC, panel = t % bundles * PANELS_AT_ONCE, i = panel * s->panel_rows;
        TYPED(pack_panels)(packed_panel(s, p, panel), x->a + (s->row + i) * x->a_row + (s->depth + p) * x->a_col,
                           s->panel_rows, at_most(s->rows - i, PANELS_AT_ONCE * s->panel_rows),
                           at_most(s->depths - p, KC), x->a_row, x->a_col);
    }
}

static void pack_a(struct stage *s) {
    int64_t few_uses = (s->product->a_col == 1 ? FEW_USES : 1) * NR;
    s->packed_a = NULL;
    if (s->columns <= few_uses || s->rows * s->depths <= IN_PLACE)
        return;
    int64_t blocks = divide_up(s->depths, KC), size = panel_size(s->panel_rows, at_most(s->depths, KC));
    s->packed_a = thread_scratch(SCRATCH_GEMM_A, (size_t)(blocks * s->row_panels * size) * sizeof(real));
    parallel_for(blocks * divide_up(s->row_panels, PANELS_AT_ONCE), 1 + PIECE_ELEMENTS / (PANELS_AT_ONCE * size),
                 pack_a_panels, s);
}

/* `columns` columns of B in one block of the depth, by panels of NR: where they are and how they are spaced. */
struct span { const real *b; int64_t panel_stride, step; };

static struct span pack_b(const struct product *x, int64_t column, int64_t columns, int64_t p, int64_t depths) {
    const real *b = x->b + p * x->b_row + column * x->b_col;
    if (x->b_col == 1 && columns % VL == 0 && depths * x->b_row <= IN_PLACE)
        return (struct span){b, NR, x->b_row};
    real *packed = thread_scratch(SCRATCH_GEMM_B, (size_t)(SPAN * panel_size(NR, KC)) * sizeof(real));
    TYPED(pack_panels)(packed, b, NR, columns, depths, x->b_col, x->b_row);
    return (struct span){packed, panel_size(NR, depths), NR};
}

/* ── the sums ────────────────────────────────────────────────────────────────────────────────────── */

/* to[i, j] = (((partial + tile) + bias) + old); each of partial, bias and old may be NULL. */
static void finish_tile(real *to, int64_t to_row, const real *tile, int64_t rows, int64_t columns,
                        const real *partial, int64_t partial_row, const real *bias, const real *old) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += VL) {
            int64_t n = columns - j;
            vf sum = vf_load(tile + i * NR + j);
            if (partial)
                sum = load_up_to(partial + i * partial_row + j, n) + sum;
            if (bias)
                sum += load_up_to(bias + j, n);
            if (old)
                sum += load_up_to(old + i * to_row + j, n);
            store_up_to(to + i * to_row + j, sum, n);
        }
}

/* The row panels first … last−1 times one panel of B, added to the sums so far. */
static void multiply_panel(const struct stage *s, int64_t first, int64_t last, const real *b, int64_t b_step,
                           int64_t column, int64_t columns, int64_t p, int64_t depths) {
    const struct product *x = s->product;
    int first_block = p == 0, last_block = p + depths == x->k;
    const real *bias = last_block && x->bias ? x->bias + column : NULL;
    int direct = first_block && !bias && !(last_block && x->accumulate) && columns % VL == 0;
    real tile[MR * NR];
    for (int64_t panel = first; panel < last; panel++) {
        int64_t i = panel * s->panel_rows, rows = at_most(s->rows - i, s->panel_rows);
        const real *a = x->a + (s->row + i) * x->a_row + p * x->a_col;
        int64_t a_row = x->a_row, a_step = x->a_col;
        if (s->packed_a) {
            a = packed_panel(s, p - s->depth, panel);
            a_row = 1;
            a_step = s->panel_rows;
        }
        real *partial = s->partial + i * s->partial_row + (column - s->column);
        real *c = x->c + (s->row + i) * x->c_row + column;
        real *to = last_block ? c : partial;
        int64_t to_row = last_block ? x->c_row : s->partial_row;
        TYPED(micro_tile)(direct ? to : tile, a, b, rows, divide_up(columns, VL), depths, direct ? to_row : NR,
                          a_row, a_step, b_step);
        if (!direct)
            finish_tile(to, to_row, tile, rows, columns, first_block ? NULL : partial, s->partial_row, bias,
                        last_block && x->accumulate ? c : NULL);
    }
}

/* Index: group of row panels × span of column panels. */
static void multiply_tasks(void *context, int64_t begin, int64_t end) {
    const struct stage *s = context;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t / s->spans * s->group, last = at_most(first + s->group, s->row_panels);
        int64_t left = t % s->spans * s->span * NR, columns = at_most(s->columns - left, s->span * NR);
        int64_t p = s->depth, stop = s->depth + s->depths;
        do { /* at least once: with k = 0 the sums are zero */
            int64_t depths = at_most(stop - p, KC);
            struct span span = pack_b(s->product, s->column + left, columns, p, depths);
            for (int64_t j = 0; j < columns; j += NR, span.b += span.panel_stride)
                multiply_panel(s, first, last, span.b, span.step, s->column + left + j, at_most(columns - j, NR), p,
                               depths);
            p += KC;
        } while (p < stop);
    }
}

/* ── one product ─────────────────────────────────────────────────────────────────────────────────── */

/* Tasks as large as the caches like them, but enough for every thread: first by narrower spans, which costs
 * nothing but reading A again, then by smaller groups, for each of which B is packed again. */
static void choose_tasks(struct stage *s) {
    int64_t threads = threads_get(), wanted = threads == 1 ? 1 : 4 * threads;
    int64_t column_panels = divide_up(s->columns, NR);
    int64_t limit = GROUP_BYTES / (KC * (int64_t)sizeof(real) * s->panel_rows);
    s->groups = divide_up(s->row_panels, limit);
    s->spans = at_most(column_panels, divide_up(wanted, s->groups));
    s->span = at_most(SPAN, divide_up(column_panels, s->spans));
    s->spans = divide_up(column_panels, s->span);
    if (s->groups * s->spans < wanted)
        s->groups = at_most(divide_up(wanted, s->spans), divide_up(s->row_panels, 4));
    s->group = divide_up(s->row_panels, s->groups);
    s->groups = divide_up(s->row_panels, s->group);
}

static void multiply_stage(struct stage *s) {
    int64_t panels = divide_up(s->rows, MR); /* panels of equal height: 64 rows are 13 + 13 + 13 + 13 + 12 */
    s->panel_rows = divide_up(s->rows, panels);
    s->row_panels = divide_up(s->rows, s->panel_rows);
    choose_tasks(s);
    pack_a(s);
    int64_t task_flops = 1 + 2 * s->group * s->panel_rows * s->span * NR * s->depths;
    parallel_for(s->groups * s->spans, 1 + (PIECE_FLOPS - 1) / task_flops, multiply_tasks, s);
}

static void multiply_product(const struct product *x) {
    int64_t rows_at_once = at_most(x->m, PACKED_A / (x->k < DEPTH ? x->k + 1 : DEPTH) / MR * MR);
    int in_scratch = x->accumulate && x->k > KC; /* C must keep its old value until the sum is finished */
    struct stage s = {.product = x};
    for (s.column = 0; s.column < x->n; s.column += COLUMNS)
        for (s.row = 0; s.row < x->m; s.row += rows_at_once) {
            s.columns = at_most(x->n - s.column, COLUMNS);
            s.rows = at_most(x->m - s.row, rows_at_once);
            s.partial = x->c + s.row * x->c_row + s.column;
            s.partial_row = x->c_row;
            if (in_scratch) {
                s.partial_row = divide_up(s.columns, NR) * NR;
                s.partial = thread_scratch(SCRATCH_GEMM_PARTIAL, (size_t)(s.rows * s.partial_row) * sizeof(real));
            }
            s.depth = 0;
            do {
                s.depths = at_most(x->k - s.depth, DEPTH);
                multiply_stage(&s);
                s.depth += DEPTH;
            } while (s.depth < x->k);
        }
}

/* ── the batch ───────────────────────────────────────────────────────────────────────────────────── */

struct batch {
    struct product product;
    int64_t a_batch, b_batch, c_batch;
};

static void multiply_batch(void *context, int64_t begin, int64_t end) {
    const struct batch *batch = context;
    for (int64_t t = begin; t < end; t++) {
        struct product x = batch->product;
        x.a += t * batch->a_batch;
        x.b += t * batch->b_batch;
        x.c += t * batch->c_batch;
        multiply_product(&x);
    }
}

/* A column times … is a row times …: with n = 1 and C dense, Cᵀ = Bᵀ Aᵀ has its vectors along m. */
static void transpose_product(struct batch *batch) {
    struct product *x = &batch->product, old = *x;
    x->a = old.b, x->a_row = old.b_col, x->a_col = old.b_row;
    x->b = old.a, x->b_row = old.a_col, x->b_col = old.a_row;
    x->m = 1, x->n = old.m;
    int64_t a_batch = batch->a_batch;
    batch->a_batch = batch->b_batch;
    batch->b_batch = a_batch;
}

KERNEL(gemm)(real *c, const real *a, const real *b, const real *bias, int64_t batch, int64_t m, int64_t n, int64_t k,
             int64_t a_batch, int64_t a_row, int64_t a_col, int64_t b_batch, int64_t b_row, int64_t b_col,
             int64_t c_batch, int64_t c_row, int accumulate) {
    struct batch x = {{c, a, b, bias, m, n, k, a_row, a_col, b_row, b_col, c_row, accumulate},
                      a_batch, b_batch, c_batch};
    if (m <= 0 || n <= 0)
        return;
    if (n == 1 && m > 1 && c_row == 1 && !bias)
        transpose_product(&x);
    double flops = 2.0 * (double)m * (double)n * (double)k;
    if (flops >= BATCH_FLOPS || batch == 1)
        multiply_batch(&x, 0, batch);
    else
        parallel_for(batch, 1 + (int64_t)(PIECE_FLOPS / (flops + 1000)), multiply_batch, &x);
}
