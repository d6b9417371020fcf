/* Attention, rung 3: tiles. The online softmax for a tile of queries and a tile of keys at a time (Dao, Fu, Ermon,
 * Rudra, Ré 2022, arXiv:2205.14135, "FlashAttention"):
 *
 *     for each tile of QUERIES queries, for each tile of KEYS keys up to the diagonal:
 *       score[s, i] = k[s] · q[i] / √d                          KEYS × QUERIES
 *       m' = max(m, max_s score)    c = exp(m − m')    p = exp(score − m')    l' = c l + Σ_s p    o' = c o + Σ_s p v[s]
 *
 * A key and a value, once loaded, serve all queries of the tile, and what they work on stays in the caches: 16 KiB of
 * scores, and q and o of the tile. All three are held with the queries side by side: q and o as (d, QUERIES), the
 * scores as (KEYS, QUERIES). A vector then is VL queries, each with its own maximum and its own sum, and no operation
 * ever goes across the lanes of a vector. That holds for the exponentials too: kernels/simd_math.h computes VL of them
 * in some 20 instructions.
 *
 * 2·t²·d flops and t²/2 exponentials for a head, plus half a tile of hidden scores on the diagonal. What bounds it: the
 * two products load a vector, and o stores one, for each multiply-add; they are rung 3 of GEMM. */
#include "simd_math.h"

enum { QUERIES = 64, KEYS = 64 };

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

struct softmax { float m[QUERIES], l[QUERIES], c[QUERIES]; };

/* to[e, i] = from[i, e] for `rows` queries, zeros for the rest of the tile. */
static void load_queries(float *to, const float *from, int64_t rows, int64_t d) {
    for (int64_t e = 0; e < d; e++)
        for (int64_t i = 0; i < QUERIES; i++)
            to[e * QUERIES + i] = i < rows ? from[i * d + e] : 0;
}

/* score[s, i] = Σ_e k[s, e] q[e, i] */
static void multiply_keys(float *restrict score, const float *restrict k, const float *restrict q, int64_t keys,
                          int64_t d) {
    for (int64_t s = 0; s < keys; s++) {
        for (int64_t i = 0; i < QUERIES; i++)
            score[s * QUERIES + i] = 0;
        for (int64_t e = 0; e < d; e++)
            for (int64_t i = 0; i < QUERIES; i++)
                score[s * QUERIES + i] += k[s * d + e] * q[e * QUERIES + i];
    }
}

/* Scores become p, and m, l, c are brought up to date. `first` is the first query less the first key: query i of the
 * tile sees the keys s ≤ first + i of this tile. */
static void step(struct softmax *x, float *score, int64_t first, int64_t keys, float scale) {
    for (int64_t i = 0; i < QUERIES; i += VL) {
        vf m = vf_load(x->m + i), old = m, sum = vf_zero();
        vi last = LANES + vi_set1((int32_t)lesser(first + i, KEYS)); /* the last key that each lane sees */
        for (int64_t s = 0; s < keys; s++) {
            vf value = vf_select(vi_set1((int32_t)s) <= last, vf_load(score + s * QUERIES + i) * vf_set1(scale),
                                 vf_set1(-INFINITY));
            vf_store(score + s * QUERIES + i, value);
            m = vf_max(m, value);
        }
        for (int64_t s = 0; s < keys; s++) {
            vf p = vf_exp(vf_load(score + s * QUERIES + i) - m);
            vf_store(score + s * QUERIES + i, p);
            sum += p;
        }
        vf c = vf_exp(old - m);
        vf_store(x->l + i, c * vf_load(x->l + i) + sum);
        vf_store(x->m + i, m);
        vf_store(x->c + i, c);
    }
}

/* o[e, i] = c[i] o[e, i] + Σ_s v[s, e] p[s, i] */
static void add_values(float *restrict o, const float *restrict v, const float *restrict p, const float *restrict c,
                       int64_t keys, int64_t d) {
    for (int64_t e = 0; e < d; e++) {
        for (int64_t i = 0; i < QUERIES; i++)
            o[e * QUERIES + i] *= c[i];
        for (int64_t s = 0; s < keys; s++)
            for (int64_t i = 0; i < QUERIES; i++)
                o[e * QUERIES + i] += v[s * d + e] * p[s * QUERIES + i];
    }
}

static void attend(float *out, const float *q, const float *k, const float *v, int64_t first, int64_t rows, int64_t d) {
    float tile[QUERIES * d], o[QUERIES * d], score[KEYS * QUERIES];
    struct softmax x;
    load_queries(tile, q + first * d, rows, d);
    for (int64_t i = 0; i < QUERIES; i++)
        x.m[i] = -INFINITY, x.l[i] = 0;
    for (int64_t i = 0; i < QUERIES * d; i++)
        o[i] = 0;
    for (int64_t key = 0, end = first + rows; key < end; key += KEYS) {
        int64_t keys = lesser(end - key, KEYS);
        multiply_keys(score, k + key * d, tile, keys, d);
        step(&x, score, first - key, keys, (float)(1 / sqrt((double)d)));
        add_values(o, v + key * d, score, x.c, keys, d);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t e = 0; e < d; e++)
            out[(first + i) * d + e] = o[e * QUERIES + i] / x.l[i];
}

void attention_tiles(float *out, const float *q, const float *k, const float *v, int64_t heads, int64_t t, int64_t d) {
    for (int64_t head = 0, at = 0; head < heads; head++, at += t * d)
        for (int64_t first = 0; first < t; first += QUERIES)
            attend(out + at, q + at, k + at, v + at, first, lesser(t - first, QUERIES), d);
}
