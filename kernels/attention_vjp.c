/* attention_vjp.c: the gradients of attention (Dao et al. 2022, appendix B.2; Dao 2023, algorithm 2).
 *
 * The probabilities are computed again from the scores and lse, tile by tile. With z the dropout factors and
 * δ_t = Σ_s P_ts z_ts (g vᵀ)_ts = g_t · out_t (so δ needs no second pass over the keys):
 *
 *     P = exp(scale · Q Kᵀ + mask − lse)      dS = scale · P ∘ (z ∘ (g Vᵀ) − δ)
 *     dq = dS K                               dk = dSᵀ Q          dv = (P ∘ z)ᵀ g
 *
 * Flops 10·T·S·D for each head (half when causal), bound by the FMA units. Sums have a fixed order: dq over
 * ascending tiles of keys, dk and dv over ascending tiles of queries. Threads share the kv heads; when there are
 * too few of those to go round, a first pass shares the tiles of queries and computes dq, a second shares the
 * tiles of keys and computes dk and dv: 14·T·S·D flops, and the same sums in the same order. */
#include "attention_tile.h"

#define PIECE_FLOPS (1 << 19)

struct gradient_tile {
    real *g_rows;                        /* [rows][d] */
    real *g_t;                           /* [d][wide] */
    real *dscores;                       /* [KEYS][wide]: first z ∘ (g Vᵀ)ᵀ, then dSᵀ */
    real *dq;                            /* [rows][d] */
    real lse[WIDEST], delta[WIDEST];
};

/* Which part of the work: tiles of queries and of keys, from … to (exclusive), and which sums. */
struct part { int64_t first_queries, last_queries, first_keys, last_keys; int want_dq, want_dkv; };

/* ── one tile of queries, one tile of keys ───────────────────────────────────────────────────────── */

/* scores become P ∘ z, dscores become dS, both transposed. */
static void softmax_gradient(struct query_tile *w, struct gradient_tile *z, int64_t keys) {
    const vf scale = vf_set1((real)w->x->scale);
    for (int64_t j = 0; j < w->columns; j += VL) {
        vf lse = vf_load(z->lse + j), delta = vf_load(z->delta + j);
        int64_t seen = seen_by(w, j, VL);
        for (int64_t i = 0; i < seen; i++) {
            int64_t at = i * w->wide + j;
            vf p = probability(score_at(w, i, j) - lse), dp = vf_load(z->dscores + at), kept = p;
            if (w->x->dropout > 0) {
                vf keep = vf_load(w->keep_t + at);
                dp *= keep;
                kept *= keep;
            }
            vf_store(w->scores + at, kept);
            vf_store(z->dscores + at, p * (dp - delta) * scale);
        }
        clear_hidden(w, w->scores, j, seen, keys);
        clear_hidden(w, z->dscores, j, seen, keys);
    }
}

/* dk or dv: to[key, :] += Σ_query tile[key, query] rows[query, :], from the first query that sees any of the keys. */
static void add_over_queries(struct query_tile *w, real *to, const real *tile, const real *rows, int64_t keys) {
    int64_t d = w->x->d, to_row = w->x->strides[DKV_KEY], first = 0;
    for (int64_t i = 0; i < keys; i += 2 * MR) {
        while (first < w->rows && w->visible[first] <= i)
            first++;
        if (first < w->rows)
            tile_product(to + i * to_row, to_row, tile + i * w->wide + first, w->wide, 1, at_most(keys - i, 2 * MR),
                         rows + first * d, d, d, w->rows - first, 1, NULL);
    }
}

static void tile_gradient(struct query_tile *w, struct gradient_tile *z, int64_t key, int64_t keys,
                          const struct part *part) {
    const struct attention *x = w->x;
    load_scores(w, key, keys);
    keys_by_queries(w, z->dscores, values_of(w, key), x->strides[V_KEY], z->g_t);
    softmax_gradient(w, z, keys);
    if (part->want_dq)
        add_over_keys(w, z->dq, z->dscores, keys_of(w, key), x->strides[K_KEY], NULL);
    if (part->want_dkv) {
        int64_t at = (w->batch * x->s + key) * x->strides[DKV_KEY] + w->kv_head * x->d;
        add_over_queries(w, x->dv + at, w->scores, z->g_rows, keys);
        add_over_queries(w, x->dk + at, z->dscores, w->q_rows, keys);
    }
}

/* ── a part of one kv head ───────────────────────────────────────────────────────────────────────── */

static int64_t gradient_size(const struct attention *x) {
    return query_tile_size(x) + 2 * QUERIES * x->d + WIDEST * x->d + KEYS * WIDEST + 8 * (VL + 16);
}

static void open_gradient_tile(struct query_tile *w, struct gradient_tile *z, real *scratch) {
    const struct attention *x = w->x;
    z->g_rows = take(&scratch, QUERIES * x->d);
    z->g_t = take(&scratch, WIDEST * x->d);
    z->dscores = take(&scratch, KEYS * WIDEST);
    z->dq = take(&scratch, QUERIES * x->d);
    memset(z->dq, 0, (size_t)(w->rows * x->d) * sizeof(real));
    for (int64_t i = 0; i < w->columns; i++) {
        int64_t row = i < w->rows ? w->row[i] : -1;
        z->lse[i] = row < 0 || x->saved_lse[row] == -INFINITY ? INFINITY : x->saved_lse[row]; /* P = 0 */
        z->delta[i] = row < 0 ? 0 : x->delta[row];
        if (row >= 0)
            memcpy(z->g_rows + i * x->d, x->g + row * x->d, (size_t)x->d * sizeof(real));
    }
    transpose_rows(z->g_t, w, z->g_rows);
}

static void store_dq(const struct query_tile *w, const struct gradient_tile *z) {
    const struct attention *x = w->x;
    for (int64_t i = 0; i < w->rows; i++)
        memcpy(x->dq + (w->batch * x->t + w->time[i]) * x->strides[DQ_TIME] + w->head[i] * x->d, z->dq + i * x->d,
               (size_t)x->d * sizeof(real));
}

static void gradient_part(const struct attention *x, int64_t head, const struct part *part) {
    real *scratch = thread_scratch(SCRATCH_ATTENTION, (size_t)gradient_size(x) * sizeof(real));
    if (part->want_dkv) {
        int64_t batch = head / x->kv_heads * x->s, kv_head = head % x->kv_heads;
        for (int64_t key = part->first_keys * KEYS; key < at_most(part->last_keys * KEYS, x->s); key++) {
            int64_t at = (batch + key) * x->strides[DKV_KEY] + kv_head * x->d;
            memset(x->dk + at, 0, (size_t)x->d * sizeof(real));
            memset(x->dv + at, 0, (size_t)x->d * sizeof(real));
        }
    }
    for (int64_t n = part->first_queries; n < part->last_queries; n++) {
        struct query_tile w;
        struct gradient_tile z;
        real *rest = open_query_tile(&w, x, head / x->kv_heads, head % x->kv_heads, n * QUERIES, scratch);
        open_gradient_tile(&w, &z, rest);
        int64_t limit = visible_to_tile(&w);
        for (int64_t key = part->first_keys * KEYS; key < at_most(limit, part->last_keys * KEYS); key += KEYS)
            tile_gradient(&w, &z, key, at_most(limit - key, KEYS), part);
        if (part->want_dq)
            store_dq(&w, &z);
    }
}

/* ── the three ways to share the work ────────────────────────────────────────────────────────────── */

static int64_t key_tiles(const struct attention *x) { return divide_up(x->s, KEYS); }

static void gradients_by_head(void *context, int64_t begin, int64_t end) {
    const struct attention *x = context;
    struct part all = {0, tiles_of(x), 0, key_tiles(x), 1, 1};
    for (int64_t n = begin; n < end; n++)
        gradient_part(x, n, &all);
}

static void gradients_by_queries(void *context, int64_t begin, int64_t end) {
    const struct attention *x = context;
    for (int64_t n = begin; n < end; n++) {
        int64_t tile = n % tiles_of(x);
        struct part one = {tile, tile + 1, 0, key_tiles(x), 1, 0};
        gradient_part(x, n / tiles_of(x), &one);
    }
}

static void gradients_by_keys(void *context, int64_t begin, int64_t end) {
    const struct attention *x = context;
    for (int64_t n = begin; n < end; n++) {
        int64_t tile = n % key_tiles(x);
        struct part one = {0, tiles_of(x), tile, tile + 1, 0, 1};
        gradient_part(x, n / key_tiles(x), &one);
    }
}

/* δ = Σ_d g · out for each row of (batch, T, heads). */
static void row_products(void *context, int64_t begin, int64_t end) {
    const struct attention *x = context;
    for (int64_t row = begin; row < end; row++) {
        vf sum = vf_zero();
        for (int64_t e = row * x->d; e < (row + 1) * x->d; e += VL) {
            int64_t n = (row + 1) * x->d - e;
            sum = vf_fma(load_up_to(x->g + e, n), load_up_to(x->saved_out + e, n), sum);
        }
        x->delta[row] = vf_sum(sum);
    }
}

KERNEL(attention_vjp)(real *dq, real *dk, real *dv, real *delta, const real *g, const real *q, const real *k,
                      const real *v, const real *out, const real *lse, const real *mask, const int64_t *lengths,
                      int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s, int64_t d,
                      const int64_t *strides, double scale, int causal, double dropout, uint64_t seed, uint32_t step,
                      uint32_t microbatch, uint32_t site) {
    struct attention x = {
        .dq = dq, .dk = dk, .dv = dv, .delta = delta, .g = g, .saved_out = out, .saved_lse = lse, .q = q, .k = k,
        .v = v, .mask = mask, .lengths = lengths, .strides = strides, .batch = batch, .heads = heads,
        .kv_heads = kv_heads, .t = t, .s = s, .d = d, .scale = scale, .causal = causal, .dropout = dropout,
        .seed = seed, .step = step, .microbatch = microbatch, .site = site,
    };
    int64_t tasks = batch * kv_heads, threads = threads_get();
    if (tasks <= 0 || d <= 0)
        return;
    parallel_for(batch * heads * t, 1 + PIECE_FLOPS / (8 * d), row_products, &x);
    double flops = 10.0 * (double)rows_of(&x) * (double)s * (double)d;
    int64_t few = 1 + (int64_t)(PIECE_FLOPS / (flops + 1000));
    /* Five products a tile in one pass, but some threads idle in the last round; or seven in two passes. */
    if (5 * divide_up(tasks, threads) * threads <= 7 * tasks || tasks * flops < 4 * PIECE_FLOPS) {
        parallel_for(tasks, few, gradients_by_head, &x);
    } else {
        parallel_for(tasks * tiles_of(&x), 1, gradients_by_queries, &x);
        parallel_for(tasks * key_tiles(&x), 1, gradients_by_keys, &x);
    }
}
