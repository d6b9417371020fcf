/* gemm.c: C = A B (+ C) (+ bias), batched, for any strides of A and B.
 *
 * Flops 2·m·n·k; bytes at least (m·k + k·n + m·n)·sizeof(real). With m, n, k in the hundreds it is bound by the FMA
 * units; with m or n of a few rows, by reading the other matrix once.
 *
 * Loops, outside in (after Van Zee and van de Geijn 2015, BLIS):
 *
 *     for each group of row panels and each span of column panels             (threads share these tasks)
 *       for each block of KC in the depth
 *         pack KC rows of B's span into panels of NR columns                  (second-level cache)
 *         for each bundle of row panels of the group: pack them               (second-level cache)
 *           for each of them, for each column panel of the span: the register tile, gemm_micro.c, added to the sums
 *
 * What is packed is used at once, by the thread that packed it, so it never goes out to the caches that cores share,
 * nobody waits for anybody. The price is that A is packed again for each span, and B for each group; choose_tasks weighs
 * the two. What only a few rows multiply is not packed at all, but read where it lies: here if its rows are dense, and
 * in gemm_few.c if its columns are (decoding one token). A product of a few columns is the transposed product's rows.
 *
 * Every choice above (sizes, tasks, packing, threads) moves work about and none changes a sum: an element of C
 * is always ((block 0 + block 1) + block 2) + … with each block of KC products one chain, then + bias, then + C.
 *
 * The elements of A and B may be rounded to a shorter format first (mixed precision), as they are packed; so then they
 * always are. Where there is a unit for bfloat16 the packing makes pairs and the tile is another (gemm_bf16.h), which
 * may add the products of a block in another order; the loops are these. */
#include "gemm_bf16.h"
#include "threads.h"

#define SPAN 16                   /* column panels a task at most: 512 KiB packed, a share of the second-level cache */
#define GROUP 256                 /* row panels a task at most */
#define BUNDLE 8                  /* row panels packed together: long runs of memory where A is transposed */
#define PANEL_SIZE (BF16_UNITS ? AMX_ROWS * KC / 2 : MR * KC + 16) /* of A, at most; of floats it is smaller */
_Static_assert(!BF16_UNITS || MR * KC + 16 <= AMX_ROWS * KC / 2, "pairs of AMX's rows take more room than floats");
#define FEW_USES 4                /* column panels; packing a row-major A costs a third of multiplying it by one */
#define SAME_SET (4096 / (int64_t)sizeof(real)) /* elements between addresses that share a set of a first-level cache */
#define COLUMNS 4096              /* of a product that keeps its old C beside the sum so far */
#define IN_PLACE (1 << 13)        /* an operand this small is as good unpacked: it fits the first-level cache, */
#define USED_ONCE (1 << 17)       /* and this small, if it is read once: it fits the second */
#define SLICE 16                  /* steps of a larger one at a time: as many pages at once */
#define PIECE_FLOPS (1 << 19)     /* a few microseconds: the least work worth waking a thread for */
#define LONG_FLOPS (1 << 27)      /* about a millisecond */
#define BATCH_FLOPS (1 << 24)     /* products smaller than this are spread over the batch, not cut up */

/* The columns now being multiplied, and how they are cut into tasks. */
struct stage {
    const struct product *product;
    int64_t column, columns;
    int64_t panel_rows, row_panels; /* A by panels: all of panel_rows rows, but the last may have fewer */
    int64_t group, groups;          /* a task multiplies `group` row panels */
    int64_t column_panels, spans;   /* by the panels of NR columns from span_begin(span) to that of the next one */
    int64_t in_place;               /* B is read where it lies, so many steps at a time; or 0, and it is packed */
    real *partial;                  /* the sums so far, partial_row apart, seen from (row 0, column): C or scratch */
    int64_t partial_row;
};

/* The spans differ by a panel at most, as their threads shall end together. */
static inline int64_t span_begin(const struct stage *s, int64_t span) { return span * s->column_panels / s->spans; }

/* ── packing ─────────────────────────────────────────────────────────────────────────────────────── */

static void round_packed(real *packed, int64_t n, enum format format) {
    for (int64_t i = 0; format && i < n; i += VL)
        vf_store(packed + i, vf_to_format(vf_load(packed + i), format));
}

/* Each element of B is used once for each row panel, and packing it costs more than that. */
static int64_t steps_in_place(const struct stage *s) {
    const struct product *x = s->product;
    int64_t block = at_most(x->k, KC) * x->b_row;
    if (x->panels || x->unpack || x->format || x->b_col != 1)
        return 0;
    if (s->row_panels > 1)
        return block <= IN_PLACE ? KC : 0;
    return block <= USED_ONCE ? KC : SLICE;
}

/* `columns` columns of B in some steps of the depth, by panels of NR: where they are and how they are spaced. Read in
 * place they may be a slice of a block, whose sums so far wait in `chains`, a tile for each column panel. */
struct span { const real *b; int64_t panel_stride, step; real *chains; };

static struct span pack_b(const struct stage *s, int64_t column, int64_t columns, int64_t p, int64_t depths) {
    const struct product *x = s->product;
    if (x->panels)
        return (struct span){x->panels + column * x->k + p * NR, NR * x->k, NR, NULL};
    const real *b = x->b + p * x->b_row + column * x->b_col;
    if (s->in_place)
        return (struct span){b, NR, x->b_row, thread_scratch(SCRATCH_GEMM_B, SPAN * MR * NR * sizeof(real))};
    real *packed = thread_scratch(SCRATCH_GEMM_B, (size_t)(SPAN * panel_size(NR, KC)) * sizeof(real));
    if (in_pairs(x)) {
        pack_pair_panels(packed, b, columns, depths, x->b_col, x->b_row);
        return (struct span){packed, NR * pairs_of(depths), NR, NULL};
    }
    if (x->unpack)
        x->unpack(packed, x, column, columns, p, depths);
    else
        TYPED(pack_panels)(packed, b, NR, columns, depths, x->b_col, x->b_row);
    round_packed(packed, divide_up(columns, NR) * panel_size(NR, depths), x->format);
    return (struct span){packed, panel_size(NR, depths), NR, NULL};
}

/* Row panels of A in one block of the depth, as the register tile reads them. */
struct bundle { const real *a; int64_t panels, panel_stride, row, step; };

/* The panels from `panel` on, as many as are packed at once, at most `panels`, to multiply `columns` columns. */
static struct bundle pack_a(const struct stage *s, int64_t panel, int64_t panels, int64_t columns, int64_t p,
                            int64_t depths) {
    const struct product *x = s->product;
    int64_t height = s->panel_rows, i = panel * height, rows = x->m - i;
    const real *a = x->a + i * x->a_row + p * x->a_col;
    int whole_lines = x->a_col == 1 && x->a_row % SAME_SET; /* and of different cache sets: a tile finds them again */
    if (!x->format && (columns <= (whole_lines ? FEW_USES : 1) * NR || x->m * depths <= IN_PLACE))
        return (struct bundle){a, panels, height * x->a_row, x->a_row, x->a_col};
    panels = at_most(panels, BUNDLE);
    rows = at_most(rows, panels * height);
    real *packed = thread_scratch(SCRATCH_GEMM_A, (size_t)(BUNDLE * PANEL_SIZE) * sizeof(real));
    if (in_pairs(x)) {
        pack_pair_lines(packed, a, rows, depths, x->a_row, x->a_col);
        return (struct bundle){packed, panels, height * pairs_of(depths), pairs_of(depths), 1};
    }
    TYPED(pack_panels)(packed, a, height, rows, depths, x->a_row, x->a_col);
    round_packed(packed, panels * panel_size(height, depths), x->format);
    return (struct bundle){packed, panels, panel_size(height, depths), 1, height};
}

/* ── the sums ────────────────────────────────────────────────────────────────────────────────────── */

/* C[i, j] = old C[i, j] + sums[i, j] */
static void add_to_old(real *to, int64_t to_row, const real *sums, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += VL) {
            real *at = to + i * to_row + j;
            store_up_to(at, vf_load(sums + i * NR + j) + load_up_to(at, columns - j), columns - j);
        }
}

/* Row panel `panel`, at a, times the span of B, added to the sums so far. */
static void multiply_panel(const struct stage *s, int64_t panel, const real *a, const struct bundle *bundle,
                           const struct span *span, int64_t column, int64_t columns, int64_t p, int64_t depths) {
    const struct product *x = s->product;
    int last = p + depths == x->k, whole = last || (p + depths) % KC == 0;
    int through_tile = last && (x->accumulate || x->turned);
    int64_t row = panel * s->panel_rows, rows = at_most(x->m - row, s->panel_rows), steps = depths;
    real *partial = s->partial + row * s->partial_row + (column - s->column), tile[(BF16_UNITS ? AMX_ROWS : MR) * NR];
    tile_function *multiply = tile_of(unit_of(x));
    if (in_pairs(x))
        steps = divide_up(depths, 2);
    for (int64_t j = 0; j < columns; j += NR) {
        int64_t width = at_most(columns - j, NR);
        real *chain = whole && p % KC == 0 ? NULL : span->chains + j * MR;
        struct beside beside = {.chain = p % KC ? chain : NULL};
        if (whole && p >= KC)
            beside.partial = partial + j, beside.partial_row = s->partial_row;
        if (last && x->bias && !x->turned)
            beside.bias = x->bias + column + j;
        real *c = x->c + (x->turned ? row + (column + j) * x->c_row : row * x->c_row + column + j);
        real *to = !whole ? chain : through_tile ? tile : last ? c : partial + j;
        int64_t to_row = !whole || through_tile ? NR : last ? x->c_row : s->partial_row;
        multiply(to, a, span->b + j / NR * span->panel_stride, rows, width, steps, to_row, bundle->row, bundle->step,
                 span->step, &beside);
        if (through_tile && x->turned)
            TYPED(store_turned)(c, x->c_row, tile, rows, width, x->bias ? x->bias + row : NULL, x->accumulate);
        else if (through_tile)
            add_to_old(c, x->c_row, tile, rows, width);
    }
}

static void finish_panel(const struct product *x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    if (x->finish)
        x->finish->part(x->finish, x, row, at_most(x->m - row, rows), column, columns);
}

/* Index: group of row panels × span of column panels. */
static void multiply_tasks(void *context, int64_t begin, int64_t end) {
    const struct stage *s = context;
    const struct product *x = s->product;
    int64_t k = x->k;
    if (unit_of(x) == BF16_BY_AMX)
        amx_begin();
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t / s->spans * s->group, last = at_most(first + s->group, s->row_panels);
        int64_t left = span_begin(s, t % s->spans) * NR, right = span_begin(s, t % s->spans + 1) * NR;
        int64_t columns = at_most(right, s->columns) - left, p = 0;
        left += s->column;
        do { /* at least once: with k = 0 the sums are zero */
            int64_t depths = at_most(k - p, s->in_place ? s->in_place : KC);
            struct span span = pack_b(s, left, columns, p, depths);
            for (int64_t panel = first; panel < last;) {
                struct bundle bundle = pack_a(s, panel, last - panel, columns, p, depths);
                for (int64_t i = 0; i < bundle.panels; i++, panel++) {
                    multiply_panel(s, panel, bundle.a + i * bundle.panel_stride, &bundle, &span, left, columns, p,
                                   depths);
                    if (p + depths == k)
                        finish_panel(x, panel * s->panel_rows, s->panel_rows, left, columns);
                }
            }
            p += depths;
        } while (p < k);
    }
    if (unit_of(x) == BF16_BY_AMX)
        amx_end();
}

/* ── one product ─────────────────────────────────────────────────────────────────────────────────── */

/* Tasks as large as the caches like them, but one for every thread, and two where there is time to even out their
 * speeds; of a few, as many for each. Of the time that a task of w column panels and h row panels multiplies, packing A
 * takes 0.6/w and B 1/h. */
static void choose_tasks(struct stage *s) {
    int64_t threads = threads_get(), column_panels = divide_up(s->columns, NR);
    int long_work = 2.0 * (double)s->product->m * (double)s->columns * (double)s->product->k > LONG_FLOPS;
    int64_t wanted = threads > 1 && long_work ? 2 * threads : threads;
    s->column_panels = column_panels;
    s->spans = divide_up(column_panels, in_pairs(s->product) ? 2 * SPAN : SPAN); /* half the room */
    s->groups = divide_up(s->row_panels, GROUP);
    while (s->groups * s->spans < wanted) {
        int64_t width = divide_up(column_panels, s->spans), height = divide_up(s->row_panels, s->groups);
        if (width > 1 && (5 * width > 3 * height || height < 8))
            s->spans = at_most(2 * s->spans, column_panels);
        else if (height >= 8)
            s->groups *= 2;
        else
            break;
    }
    while (s->groups * s->spans % threads && s->groups * s->spans < 4 * threads && 2 * s->spans <= column_panels)
        s->spans++;
    s->group = divide_up(s->row_panels, s->groups);
    s->groups = divide_up(s->row_panels, s->group);
}

void TYPED(multiply_product)(const struct product *x) {
    int few = x->m <= FEW_ROWS && !x->format && (x->panels || x->b_row == 1);
    if (few) {
        x->panels ? TYPED(multiply_few_panels)(x) : TYPED(multiply_few)(x);
        finish_panel(x, 0, x->m, 0, x->n);
        return;
    }
    int in_scratch = (x->accumulate || x->turned) && x->k > KC; /* C keeps its old value until the sum is finished */
    int64_t panels = divide_up(x->m, MR), width = in_scratch ? COLUMNS : x->n;
    struct stage s = {.product = x};
    s.panel_rows = divide_up(x->m, panels); /* panels of equal height: 64 rows are 13 + 13 + 13 + 13 + 12 */
    if (unit_of(x) == BF16_BY_AMX)
        s.panel_rows = AMX_ROWS;
    s.row_panels = divide_up(x->m, s.panel_rows);
    s.in_place = steps_in_place(&s);
    for (s.column = 0; s.column < x->n; s.column += width) {
        s.columns = at_most(x->n - s.column, width);
        s.partial = x->c + s.column;
        s.partial_row = x->c_row;
        if (in_scratch) {
            s.partial_row = divide_up(s.columns, NR) * NR;
            s.partial = thread_scratch(SCRATCH_GEMM_PARTIAL, (size_t)(x->m * s.partial_row) * sizeof(real));
        }
        choose_tasks(&s);
        int64_t task_flops = 1 + 2 * s.group * s.panel_rows * divide_up(s.column_panels, s.spans) * NR * x->k;
        parallel_for(s.groups * s.spans, 1 + (PIECE_FLOPS - 1) / task_flops, multiply_tasks, &s);
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
        TYPED(multiply_product)(&x);
    }
}

/* With few columns Cᵀ = Bᵀ Aᵀ has its vectors along m. */
static void turn_product(struct batch *batch) {
    struct product *x = &batch->product, old = *x;
    x->a = old.b, x->a_row = old.b_col, x->a_col = old.b_row;
    x->b = old.a, x->b_row = old.a_col, x->b_col = old.a_row;
    x->m = old.n, x->n = old.m, x->turned = 1;
    int64_t a_batch = batch->a_batch;
    batch->a_batch = batch->b_batch;
    batch->b_batch = a_batch;
}

KERNEL(gemm)(real *c, const real *a, const real *b, const real *bias, int64_t batch, int64_t m, int64_t n, int64_t k,
             int64_t a_batch, int64_t a_row, int64_t a_col, int64_t b_batch, int64_t b_row, int64_t b_col,
             int64_t c_batch, int64_t c_row, int accumulate, int format) {
    struct batch x = {{.c = c, .a = a, .b = b, .bias = bias, .m = m, .n = n, .k = k, .a_row = a_row, .a_col = a_col,
                       .b_row = b_row, .b_col = b_col, .c_row = c_row, .accumulate = accumulate,
                       .format = FORMAT(format)},
                      a_batch, b_batch, c_batch};
    if (m <= 0 || n <= 0)
        return;
    if (n < m && n <= VL / 2 && !x.product.format)
        turn_product(&x);
    double flops = 2.0 * (double)m * (double)n * (double)k;
    if (flops >= BATCH_FLOPS || batch == 1)
        multiply_batch(&x, 0, batch);
    else
        parallel_for(batch, 1 + (int64_t)(PIECE_FLOPS / (flops + 1000)), multiply_batch, &x);
}

/* ── a B that was packed before ──────────────────────────────────────────────────────────────────── */

struct packing { real *panels; const real *weight; int64_t n, k, row, column; };

/* Index: panel of NR columns. */
static void pack_weight_panels(void *context, int64_t begin, int64_t end) {
    const struct packing *x = context;
    for (int64_t j = begin; j < end; j++)
        TYPED(pack_panels)(x->panels + j * NR * x->k, x->weight + j * NR * x->row, NR, at_most(x->n - j * NR, NR), x->k,
                           x->row, x->column);
}

KERNEL(pack_weight)(real *panels, const real *weight, int64_t n, int64_t k, int64_t row, int64_t column) {
    struct packing x = {panels, weight, n, k, row, column};
    parallel_for(divide_up(n, NR), 1 + IN_PLACE / (1 + k), pack_weight_panels, &x);
}

KERNEL(packed_linear)(real *y, const real *x, const real *panels, const real *bias, int64_t m, int64_t n, int64_t k) {
    struct product product = {.c = y, .a = x, .panels = panels, .bias = bias, .m = m, .n = n, .k = k, .a_row = k,
                              .a_col = 1, .c_row = n};
    if (m > 0 && n > 0)
        TYPED(multiply_product)(&product);
}
