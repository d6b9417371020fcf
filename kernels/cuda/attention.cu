/* attention.cu: out = softmax(scale · Q Kᵀ + mask) V without the T × S matrix (Dao, Fu, Ermon, Rudra, Ré 2022,
 * arXiv:2205.14135; loop order of Dao 2023, arXiv:2307.08691; online softmax of Milakov and Gimelshein 2018,
 * arXiv:1805.02867).
 *
 * A block does a tile of 32 queries of one head, over tiles of 32 keys from key 0 on. With m the largest score so
 * far, l the sum and o the weighted sum of values relative to it:
 *
 *     m' = max(m, max_s score_s)    p_s = exp(score_s − m')    c = exp(m − m')
 *     l' = c l + Σ_s p_s            o' = c o + Σ_s p_s v_s     at the end  out = o/l,  lse = m + log l
 *
 * A warp holds 4 queries, a lane one key of each, so maximum and sum over keys are butterflies over the warp.
 *
 * Flops 4·T·S·D for each head (half of it when causal: tiles above the diagonal are skipped); heads wider than PASS
 * columns compute the scores again for every PASS. Bytes (2·T + 3·S·T/32)·D, nearly all from the caches. What bounds
 * it: shared memory, 5 reads of which feed 4 multiply-adds; no tensor cores are used. */
#include "common.cuh"
#include "philox.cuh"
#include "attention_tile.cuh"

struct softmax_state {
    real m[OWN], l[OWN], o[OWN][PARTS]; /* for each of the warp's queries; m and l the same in all lanes */
};

/* The step from m to m'; scores become p. */
static __device__ inline void softmax_step(softmax_state &z, real score[OWN]) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        real m = fmax(z.m[i], warp_max(score[i]));
        real shift = m == -INFINITY ? 0 : m; /* nothing seen: −∞ − (−∞) would be NaN, a finite shift gives p = 0 */
        real factor = exp(z.m[i] - shift);
        score[i] = exp(score[i] - shift);
        z.l[i] = fma(z.l[i], factor, warp_sum(score[i]));
        z.m[i] = m;
        for (int c = 0; c < PARTS; c++) z.o[i][c] *= factor;
    }
}

/* Columns first … first + PASS − 1 of a tile of queries. */
static __device__ inline void attend(real *out, real *lse, const attention &x, int64_t b, int64_t head, int64_t query,
                                     int64_t first, chunk left, chunk right) {
    softmax_state z;
    real p[OWN], divisor[OWN];
    for (int i = 0; i < OWN; i++) z.m[i] = -INFINITY, z.l[i] = 0;
    clear_tile(z.o);
    const int64_t own = query + warp_index() * OWN, kv_head = kv_head_of(x, head);
    const int64_t limit = visible_keys(x, b, at_most(query + TILE, x.t) - 1); /* the last query sees the most */
    for (int64_t tile = 0; tile < limit; tile += TILE) {
        const int64_t key = tile + lane_index();
        tile_dot(p, queries_of(x, b, head, query), keys_of(x, b, kv_head, tile), x.d, left, right);
        for (int i = 0; i < OWN; i++) p[i] = masked_score(x, p[i], b, head, own + i, key);
        softmax_step(z, p);
        for (int i = 0; i < OWN; i++) p[i] *= keep_factor(x, b, head, own + i, key);
        tile_accumulate(z.o, p, values_of(x, b, kv_head, tile), first, x.d, right);
    }
    for (int i = 0; i < OWN; i++) divisor[i] = z.l[i] == 0 ? 1 : z.l[i]; /* a query that sees nothing gives 0 */
    store_tile(out + row_of(x, b, head, query) * x.d, x.heads * x.d, z.o, divisor, x.t - query, first, x.d);
    for (int i = 0; i < OWN; i++)
        if (first == 0 && lane_index() == 0 && own + i < x.t) lse[row_of(x, b, head, own + i)] = z.m[i] + log(z.l[i]);
}

KERNEL(attention)(real *out, real *lse, const real *q, const real *k, const real *v, const real *mask,
                  const int64_t *lengths, int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s,
                  int64_t d, const int64_t *strides, double scale, int causal, double dropout, uint64_t seed,
                  uint32_t step, uint32_t microbatch, uint32_t site) {
    __shared__ chunk left, right;
    const attention x = {q, k, v, mask, lengths, strides, batch, heads, kv_heads, t, s, d,
                         (real)scale, causal, dropout, {seed, step, microbatch, site}};
    const int64_t tiles = divide_up(t, TILE), passes = d > PASS ? divide_up(d, PASS) : 1;
    FOR_TASKS(task, batch * heads * tiles * passes) {
        int64_t pass = task % passes, tile = task / passes % tiles, head = task / passes / tiles;
        attend(out, lse, x, head / heads, head % heads, tile * TILE, pass * PASS, left, right);
    }
}
