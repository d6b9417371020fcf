/* attention.c: out = softmax(scale · Q Kᵀ + mask) V without the T × S matrix (Dao, Fu, Ermon, Rudra, Ré 2022,
 * arXiv:2205.14135; loop order of Dao 2023, arXiv:2307.08691; online softmax of Milakov and Gimelshein 2018,
 * arXiv:1805.02867).
 *
 * For a tile of queries, over tiles of keys from key 0 on, with m the largest score so far, l the sum and o the
 * weighted sum of values relative to it:
 *
 *     m' = max(m, max_s score_s)    p_s = exp(score_s − m')    c = exp(m − m')
 *     l' = c l + Σ_s p_s            o' = c o + Σ_s p_s v_s     at the end  out = o/l,  lse = m + log l
 *
 * Flops 4·T·S·D for each head (half of it when causal: tiles above the diagonal are skipped), exponentials
 * T·S; bytes (2·T + 2·S·T/QUERIES)·D. Bound by the FMA units, the exponentials being a quarter of the time at
 * D = 64; decoding one token is bound by reading the keys and values once. Threads share the tiles of queries. */
#include "attention_tile.h"

#define PIECE_FLOPS (1 << 19)

struct softmax_state {
    real m[WIDEST], l[WIDEST], factor[WIDEST]; /* for each query of the tile: m, l, and c of the last step */
    real *o;                                   /* [rows][d] */
};

/* The step from m to m' for the queries j … j + VL − 1; scores become p. */
static void softmax_step(struct query_tile *w, struct softmax_state *z, int64_t j, int64_t keys) {
    vf old = vf_load(z->m + j), m = old, l = vf_zero();
    int64_t seen = seen_by(w, j, VL);
    for (int64_t i = 0; i < seen; i++) {
        vf score = score_at(w, i, j);
        vf_store(w->scores + i * w->wide + j, score);
        m = vf_max(score, m);
    }
    /* Nothing seen yet: −∞ − (−∞) would be NaN, and any finite shift gives p = 0. */
    vf shift = vf_select(m == -INFINITY, vf_zero(), m), factor = probability(old - shift);
    for (int64_t i = 0; i < seen; i++) {
        vf p = probability(vf_load(w->scores + i * w->wide + j) - shift);
        vf_store(w->scores + i * w->wide + j, p);
        l += p;
    }
    clear_hidden(w, w->scores, j, seen, keys);
    vf_store(z->m + j, m);
    vf_store(z->factor + j, factor);
    vf_store(z->l + j, vf_fma(vf_load(z->l + j), factor, l));
}

static void drop(struct query_tile *w, int64_t keys) {
    for (int64_t i = 0; i < keys; i++)
        for (int64_t j = 0; j < w->columns; j += VL) {
            real *p = w->scores + i * w->wide + j;
            vf_store(p, vf_load(p) * vf_load(w->keep_t + i * w->wide + j));
        }
}

static void begin_softmax(struct query_tile *w, struct softmax_state *z) {
    for (int64_t i = 0; i < w->columns; i++)
        z->m[i] = -INFINITY, z->l[i] = 0;
    memset(z->o, 0, (size_t)(w->rows * w->x->d) * sizeof(real));
}

static void end_softmax(struct query_tile *w, struct softmax_state *z) {
    const struct attention *x = w->x;
    for (int64_t j = 0; j < w->columns; j += VL) /* where l = 0: −∞ + −∞ */
        vf_store(z->m + j, vf_load(z->m + j) + vf_log(vf_load(z->l + j)));
    for (int64_t i = 0; i < w->rows; i++) {
        int64_t row = w->row[i];
        real l = z->l[i] == 0 ? 1 : z->l[i];
        x->lse[row] = z->m[i];
        for (int64_t e = 0; e < x->d; e += VL) { /* + 0 makes −0 and 0 one: see attention_tile.h */
            vf o = load_up_to(z->o + i * x->d + e, x->d - e) / vf_set1(l) + vf_zero();
            store_up_to(x->out + row * x->d + e, o, x->d - e);
        }
    }
}

/* Index: (batch · kv_heads + kv_head) · tiles + tile of queries. */
static void attend(void *context, int64_t begin, int64_t end) {
    const struct attention *x = context;
    for (int64_t n = begin; n < end; n++) {
        struct query_tile w;
        struct softmax_state z;
        size_t size = (size_t)(query_tile_size(x) + QUERIES * x->d + VL + 16);
        int64_t head = n / tiles_of(x), first = n % tiles_of(x) * QUERIES;
        z.o = open_query_tile(&w, x, head / x->kv_heads, head % x->kv_heads, first,
                              thread_scratch(SCRATCH_ATTENTION, size * sizeof(real)));
        begin_softmax(&w, &z);
        for (int64_t key = 0, limit = visible_to_tile(&w); key < limit; key += KEYS) {
            int64_t keys = at_most(limit - key, KEYS);
            load_scores(&w, key, keys);
            for (int64_t j = 0; j < w.columns; j += VL)
                softmax_step(&w, &z, j, keys);
            if (x->dropout > 0)
                drop(&w, keys);
            add_over_keys(&w, z.o, w.scores, values_of(&w, key), x->strides[V_KEY], z.factor);
        }
        end_softmax(&w, &z);
    }
}

KERNEL(attention)(real *out, real *lse, const real *q, const real *k, const real *v, const real *mask,
                  const int64_t *lengths, int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s,
                  int64_t d, const int64_t *strides, double scale, int causal, double dropout, uint64_t seed,
                  uint32_t step, uint32_t microbatch, uint32_t site) {
    struct attention x = {
        .out = out, .lse = lse, .q = q, .k = k, .v = v, .mask = mask, .lengths = lengths, .strides = strides,
        .batch = batch, .heads = heads, .kv_heads = kv_heads, .t = t, .s = s, .d = d, .scale = scale,
        .causal = causal, .dropout = dropout, .seed = seed, .step = step, .microbatch = microbatch, .site = site,
    };
    if (batch <= 0 || heads <= 0 || t <= 0)
        return;
    /* One query takes as long as a vector of them. */
    double queries = (double)(divide_up(at_most(rows_of(&x), QUERIES), VL) * VL);
    double tile_flops = 4.0 * queries * (double)s * (double)d;
    parallel_for(batch * kv_heads * tiles_of(&x), 1 + (int64_t)(PIECE_FLOPS / (tile_flops + 1000)), attend, &x);
}
