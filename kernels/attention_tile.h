/* attention_tile.h: what the forward and the backward pass of attention share: one tile of queries, one tile
 * of keys, and the scores between them.
 *
 * The queries of the heads that share a kv head are one list of rows r = t·group + (head within the group), so a
 * grouped-query model and a single decoded token fill the vectors as well as they can. A tile is QUERIES rows
 * of that list by KEYS keys, counted from key 0 of the sequence.
 *
 * Scores are held transposed, [key][query]: the lanes of a vector are queries. Then the maximum and the sum over
 * keys of the softmax run down the tile, without any operation across lanes. The register tile reads its left
 * operand by rows or by columns, so neither P V nor Pᵀ g needs another transposition.
 *
 * Bits. Every score is one ascending chain over d; every sum over keys goes tile by tile (KEYS is part of the
 * definition of the result), ascending within a tile. A hidden key has probability exactly 0, and adding zeros
 * changes nothing but the sign of a zero, which the last step of each pass removes. So a row's bits depend
 * neither on how queries are tiled nor on T: decoding one token gives the row that the whole sequence gives.
 * (Within a tile that a row sees in part, hidden values are multiplied by 0: an infinite one would give NaN.) */
#ifndef ATTENTION_TILE_H
#define ATTENTION_TILE_H
#include "gemm_micro.h"
#include "philox.h"
#include "simd_math.h"
#include "threads.h"

#define QUERIES 128
#define KEYS 64
#define WIDEST (QUERIES + VL)

struct attention {
    const real *q, *k, *v, *mask;
    const int64_t *lengths, *strides;
    int64_t batch, heads, kv_heads, t, s, d;
    double scale, dropout;
    int causal;
    uint64_t seed;
    uint32_t step, microbatch, site;
    real *out, *lse;              /* forward */
    real *dq, *dk, *dv, *delta;   /* backward, with what it reads: */
    const real *g, *saved_out, *saved_lse;
};

enum {
    Q_BATCH, Q_HEAD, Q_TIME, K_BATCH, K_HEAD, K_KEY, V_BATCH, V_HEAD, V_KEY, MASK_BATCH, MASK_HEAD, MASK_TIME,
    MASK_KEY, DQ_TIME, DKV_KEY
};

/* A tile of queries at work; every array is in the thread's scratch. */
struct query_tile {
    const struct attention *x;
    int64_t batch, kv_head, first, rows; /* rows first … first + rows − 1 of the list */
    int64_t columns, wide;               /* rows rounded up to vectors; the stride of the transposed tiles */
    real *q_rows;                        /* [rows][d] */
    real *q_t;                           /* [d][wide] */
    real *scores;                        /* [KEYS][wide], and so are: */
    real *mask_t, *keep_t;
    real *gathered;                      /* [QUERIES][KEYS] */
    int64_t head[QUERIES], time[QUERIES];
    int64_t row[QUERIES];                /* the place in an array (batch, T, heads) */
    int64_t drawn[QUERIES];              /* and in one of (batch, heads, T), by which dropout numbers its draws */
    int64_t limit[QUERIES];              /* the query sees keys 0 … limit − 1 */
    int partly_visible;
    real_int visible[WIDEST];            /* how many keys of the present tile each query sees */
};

static inline int64_t group_of(const struct attention *x) { return x->heads / x->kv_heads; }
static inline int64_t rows_of(const struct attention *x) { return x->t * group_of(x); }
static inline int64_t tiles_of(const struct attention *x) { return divide_up(rows_of(x), QUERIES); }

/* Query t of sequence b sees keys 0 … visible_keys − 1. */
static inline int64_t visible_keys(const struct attention *x, int64_t b, int64_t t) {
    int64_t n = x->lengths ? at_most(x->lengths[b], x->s) : x->s;
    if (x->causal)
        n = at_most(n, t + x->s - x->t + 1);
    return n < 0 ? 0 : n;
}
/* What the last row of the tile sees: the others see no more. */
static inline int64_t visible_to_tile(const struct query_tile *w) { return w->limit[w->rows - 1]; }

/* ── a product of tiles ──────────────────────────────────────────────────────────────────────────── */

/* c[i, j] = Σ_p a[i·a_row + p·a_step] b[p·b_row + j]            (add = 0),
 * or c[i, j] · factor[i] + that sum                        (add = 1; factor NULL: 1).
 * Each sum is one ascending chain over p < k. */
static void tile_product(real *c, int64_t c_row, const real *a, int64_t a_row, int64_t a_step, int64_t rows,
                         const real *b, int64_t b_row, int64_t columns, int64_t k, int add, const real *factor) {
    int64_t height = divide_up(rows, divide_up(rows, MR));
    for (int64_t j = 0; j < columns; j += NR)
        for (int64_t i = 0; i < rows; i += height) {
            real *to = c + i * c_row + j;
            struct beside old = {.partial = add ? to : NULL, .partial_row = c_row, .factor = factor ? factor + i : NULL};
            TYPED(micro_tile)(to, a + i * a_row, b + j, at_most(rows - i, height), at_most(columns - j, NR), k, c_row,
                              a_row, a_step, b_row, &old);
        }
}

/* ── the tile of queries ─────────────────────────────────────────────────────────────────────────── */

/* Cuts n reals, a whole number of cache lines, off the thread's scratch. */
static inline real *take(real **scratch, int64_t n) {
    real *taken = *scratch;
    *scratch += (n + VL + 15) / 16 * 16;
    return taken;
}

static inline int64_t query_tile_size(const struct attention *x) {
    return QUERIES * x->d + WIDEST * x->d + 3 * KEYS * WIDEST + QUERIES * KEYS + 8 * (VL + 16);
}

/* Row-major rows [rows][d] to [d][wide], zeros beyond the last. */
static void transpose_rows(real *to, const struct query_tile *w, const real *rows) {
    TYPED(pack_panels)(to, rows, w->wide, w->rows, w->x->d, w->x->d, 1);
}

/* Which query each row is. (By counting: a division takes as long as a row of a small tile.) */
static void name_rows(struct query_tile *w) {
    const struct attention *x = w->x;
    int64_t group = group_of(x), head = w->kv_head * group + w->first % group, time = w->first / group;
    for (int64_t i = 0; i < w->rows; i++) {
        w->head[i] = head;
        w->time[i] = time;
        w->row[i] = (w->batch * x->t + time) * x->heads + head;
        w->drawn[i] = (w->batch * x->heads + head) * x->t + time;
        w->limit[i] = visible_keys(x, w->batch, time);
        if (++head == (w->kv_head + 1) * group)
            head -= group, time++;
    }
}

/* Takes rows first … of (batch, kv_head) to work on; returns the scratch that is left. */
static real *open_query_tile(struct query_tile *w, const struct attention *x, int64_t batch, int64_t kv_head,
                             int64_t first, real *scratch) {
    w->x = x, w->batch = batch, w->kv_head = kv_head, w->first = first;
    w->rows = at_most(rows_of(x) - first, QUERIES);
    w->columns = divide_up(w->rows, VL) * VL;
    w->wide = w->columns + VL; /* not a power of two: the rows of a tile then fall into different cache sets */
    w->q_rows = take(&scratch, QUERIES * x->d);
    w->q_t = take(&scratch, WIDEST * x->d);
    w->scores = take(&scratch, KEYS * WIDEST);
    w->mask_t = take(&scratch, KEYS * WIDEST);
    w->keep_t = take(&scratch, KEYS * WIDEST);
    w->gathered = take(&scratch, QUERIES * KEYS);
    name_rows(w);
    for (int64_t i = 0; i < w->rows; i++)
        memcpy(w->q_rows + i * x->d,
               x->q + batch * x->strides[Q_BATCH] + w->head[i] * x->strides[Q_HEAD] + w->time[i] * x->strides[Q_TIME],
               (size_t)x->d * sizeof(real));
    transpose_rows(w->q_t, w, w->q_rows);
    return scratch;
}

static const real *keys_of(const struct query_tile *w, int64_t key) {
    const int64_t *strides = w->x->strides;
    return w->x->k + w->batch * strides[K_BATCH] + w->kv_head * strides[K_HEAD] + key * strides[K_KEY];
}
static const real *values_of(const struct query_tile *w, int64_t key) {
    const int64_t *strides = w->x->strides;
    return w->x->v + w->batch * strides[V_BATCH] + w->kv_head * strides[V_HEAD] + key * strides[V_KEY];
}

/* ── the scores of a tile ────────────────────────────────────────────────────────────────────────── */

static void load_visible(struct query_tile *w, int64_t key, int64_t keys) {
    for (int64_t i = 0; i < w->columns; i++) {
        int64_t n = w->limit[at_most(i, w->rows - 1)] - key;
        w->visible[i] = (real_int)(n < 0 ? 0 : at_most(n, keys));
    }
    w->partly_visible = w->visible[0] < keys;
}

/* How many keys of the present tile the queries first … first + n − 1 see between them. Later queries see no
 * fewer, so the last one tells. What none of a register tile's queries sees is not computed. */
static inline int64_t seen_by(const struct query_tile *w, int64_t first, int64_t n) {
    return w->visible[at_most(first + n, w->columns) - 1];
}

static void load_mask(struct query_tile *w, int64_t key, int64_t keys) {
    const int64_t *strides = w->x->strides;
    for (int64_t i = 0; i < w->rows; i++) {
        const real *row = w->x->mask + w->batch * strides[MASK_BATCH] + w->head[i] * strides[MASK_HEAD] +
                          w->time[i] * strides[MASK_TIME] + key * strides[MASK_KEY];
        for (int64_t n = 0; n < keys; n++)
            w->gathered[i * KEYS + n] = row[n * strides[MASK_KEY]];
    }
    TYPED(pack_panels)(w->mask_t, w->gathered, w->wide, w->rows, keys, KEYS, 1);
}

/* keep_t = 1/(1 − p) where the uniform number of this (batch, head, t, s) is ≥ p, else 0. */
static void load_dropout(struct query_tile *w, int64_t key, int64_t keys) {
    enum { EACH = REAL_BITS / 32, BLOCKS = KEYS * EACH / 4 + 1 }; /* a double takes two words of a block of four */
    const struct attention *x = w->x;
    const real keep = (real)(1 / (1 - x->dropout)), p = (real)x->dropout;
    for (int64_t i = 0; i < w->rows; i++) {
        uint32_t words[4 * BLOCKS];
        int64_t first = (w->drawn[i] * x->s + key) * EACH;
        const uint32_t *word = words + first % 4;
        for (int64_t block = 0; block < BLOCKS; block++)
            philox_block(words + 4 * block, first / 4 + block, x->seed, x->step, x->microbatch, x->site);
        for (int64_t n = 0; n < keys; n++) {
#if REAL_BITS == 32
            real uniform = philox_uniform_f32(word[n]);
#else
            real uniform = philox_uniform_f64(word[2 * n], word[2 * n + 1]);
#endif
            w->gathered[i * KEYS + n] = uniform >= p ? keep : 0;
        }
    }
    TYPED(pack_panels)(w->keep_t, w->gathered, w->wide, w->rows, keys, KEYS, 1);
}

/* to[key, query] = Σ_d rows[key, d] right[d, query], for the keys that are seen. */
static void keys_by_queries(struct query_tile *w, real *to, const real *rows, int64_t rows_stride,
                            const real *right) {
    for (int64_t j = 0; j < w->columns; j += NR)
        if (seen_by(w, j, NR))
            tile_product(to + j, w->wide, rows, rows_stride, 1, seen_by(w, j, NR), right + j, w->wide,
                         at_most(w->columns - j, NR), w->x->d, 0, NULL);
}

/* to[query, :] = factor · to[query, :] + Σ_key tile[key, query] rows[key, :]: the output, or dq. */
static void add_over_keys(struct query_tile *w, real *to, const real *tile, const real *rows, int64_t rows_stride,
                          const real *factor) {
    int64_t height = divide_up(w->rows, divide_up(w->rows, MR));
    for (int64_t i = 0; i < w->rows; i += height) {
        int64_t n = at_most(w->rows - i, height);
        tile_product(to + i * w->x->d, w->x->d, tile + i, 1, w->wide, n, rows, rows_stride, w->x->d, seen_by(w, i, n),
                     1, factor ? factor + i : NULL);
    }
}

/* A tile's rows n … keys − 1 for the queries j … j + VL − 1, which see none of those keys. */
static inline void clear_hidden(const struct query_tile *w, real *tile, int64_t j, int64_t n, int64_t keys) {
    for (int64_t i = n; i < keys; i++)
        vf_store(tile + i * w->wide + j, vf_zero());
}

/* Everything about the keys key … key + keys − 1 that the softmax needs: scores = K Qᵀ, mask, dropout. */
static void load_scores(struct query_tile *w, int64_t key, int64_t keys) {
    const struct attention *x = w->x;
    load_visible(w, key, keys);
    keys_by_queries(w, w->scores, keys_of(w, key), x->strides[K_KEY], w->q_t);
    if (x->mask)
        load_mask(w, key, keys);
    if (x->dropout > 0)
        load_dropout(w, key, keys);
}

/* scale · qᵀk + mask, −∞ where hidden, for key i of the tile and the queries j … j + VL − 1. */
static inline vf score_at(const struct query_tile *w, int64_t i, int64_t j) {
    vf score = vf_load(w->scores + i * w->wide + j) * vf_set1((real)w->x->scale);
    if (w->x->mask)
        score += vf_load(w->mask_t + i * w->wide + j);
    if (w->partly_visible) {
        vi visible;
        memcpy(&visible, w->visible + j, sizeof visible);
        score = vf_select(vi_set1((real_int)i) < visible, score, vf_set1(-INFINITY));
    }
    return score;
}

/* eˣ for x ≤ 0, with 0 where it would be subnormal. A processor takes 150 cycles for a subnormal result, and
 * hidden keys, at −∞, would ask for one each; and beside a largest probability of at least 1/S, 10⁻³⁸ is nothing. */
static inline vf probability(vf x) {
    const vf least = vf_set1(REAL_BITS == 32 ? -87 : -708);
    return vf_select(x < least, vf_zero(), vf_exp(vf_max(least, x)));
}

#endif
