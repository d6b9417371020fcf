/* Attention, rung 4: register tiles. Rung 3 with both products at the speed of a matrix product. They have one form,
 *
 *     c[r, i] += Σ_p a[r, p] b[p, i]          i: the queries of the tile, QUERIES elements from row to row of c and b
 *
 *     scores:   r = key,      p = e,     a[r, p] = k[r, p]     b = q      c = score
 *     values:   r = e,        p = key,   a[r, p] = v[p, r]     b = p      c = o
 *
 * so one register tile of ROWS rows by two vectors serves both, as in rung 5 of GEMM: per step two loads of b and ROWS
 * of a for 2·ROWS fused multiply-adds, and c is loaded and stored once. b needs no packing, since it was written in
 * this order and lies in the caches; a is read by any two strides, so V need not be transposed.
 *
 * 2·t²·d flops and t²/2 exponentials for a head. Bound by the arithmetic units; at d = 64 a quarter of the time goes
 * into the exponentials. (Dao 2023, arXiv:2307.08691, "FlashAttention-2", has the loops in this order.)
 *
 * What the engine's kernels/attention_tile.h and attention.c do beyond this: register tiles of the diagonal that no
 * query sees are skipped as well; threads; masks, lengths, dropout, heads that share keys; and the backward pass. */
#include "simd_math.h"

#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif
enum { QUERIES = 64, KEYS = 64 };

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

struct softmax { float m[QUERIES], l[QUERIES]; };

/* to[e, i] = from[i, e] for `rows` queries, zeros for the rest of the tile. */
static void load_queries(float *to, const float *from, int64_t rows, int64_t d) {
    for (int64_t e = 0; e < d; e++)
        for (int64_t i = 0; i < QUERIES; i++)
            to[e * QUERIES + i] = i < rows ? from[i * d + e] : 0;
}

/* c[r, i] += Σ_p a[r·a_row + p·a_step] b[p, i] for `rows` rows, a constant, and two vectors of i. */
ALWAYS_INLINE void multiply_tile(float *c, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t steps,
                                 int rows) {
    vf sum[ROWS][2] = {{{0}}};
    for (int64_t p = 0; p < steps; p++, a += a_step, b += QUERIES) {
        vf left = vf_load(b), right = vf_load(b + VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf x = vf_set1(a[r * a_row]);
            sum[r][0] = vf_fma(x, left, sum[r][0]);
            sum[r][1] = vf_fma(x, right, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, c += QUERIES) {
        vf_store(c, vf_load(c) + sum[r][0]);
        vf_store(c + VL, vf_load(c + VL) + sum[r][1]);
    }
}

/* The same for any number of rows and all queries. */
static void multiply(float *c, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t steps,
                     int64_t rows) {
    for (int64_t i = 0; i < QUERIES; i += 2 * VL) {
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            multiply_tile(c + r * QUERIES + i, a + r * a_row, a_row, a_step, b + i, steps, ROWS);
        for (; r < rows; r++)
            multiply_tile(c + r * QUERIES + i, a + r * a_row, a_row, a_step, b + i, steps, 1);
    }
}

/* Scores become p, m, l and c are brought up to date, and o is scaled by c. `first` is the first query less the first
 * key: query i of the tile sees the keys s ≤ first + i of this tile. */
static void step(struct softmax *x, float *o, float *score, int64_t first, int64_t keys, int64_t d, float scale) {
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
        for (int64_t e = 0; e < d; e++)
            vf_store(o + e * QUERIES + i, c * vf_load(o + e * QUERIES + i));
        vf_store(x->l + i, c * vf_load(x->l + i) + sum);
        vf_store(x->m + i, m);
    }
}

static void attend(float *out, const float *q, const float *k, const float *v, int64_t first, int64_t rows, int64_t d) {
    float tile[QUERIES * d], o[QUERIES * d], score[KEYS * QUERIES];
    struct softmax x;
    load_queries(tile, q + first * d, rows, d);
    for (int64_t i = 0; i < QUERIES; i++)
        x.m[i] = -INFINITY, x.l[i] = 0;
    memset(o, 0, sizeof o);
    for (int64_t key = 0, end = first + rows; key < end; key += KEYS) {
        int64_t keys = lesser(end - key, KEYS);
        memset(score, 0, sizeof score);
        multiply(score, k + key * d, d, 1, tile, d, keys);
        step(&x, o, score, first - key, keys, d, (float)(1 / sqrt((double)d)));
        multiply(o, v + key * d, 1, d, score, keys, d);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t e = 0; e < d; e++)
            out[(first + i) * d + e] = o[e * QUERIES + i] / x.l[i];
}

void attention_register_tiles(float *out, const float *q, const float *k, const float *v, int64_t heads, int64_t t,
                              int64_t d) {
    for (int64_t head = 0, at = 0; head < heads; head++, at += t * d)
        for (int64_t first = 0; first < t; first += QUERIES)
            attend(out + at, q + at, k + at, v + at, first, lesser(t - first, QUERIES), d);
}
