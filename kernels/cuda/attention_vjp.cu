/* attention_vjp.cu: the gradients of attention (Dao et al. 2022, appendix B.2; Dao 2023, algorithm 2).
 *
 * The probabilities are computed again from the scores and lse, tile by tile. With z the dropout factors and
 * δ_t = Σ_s P_ts z_ts (g vᵀ)_ts = g_t · out_t (so δ needs no second pass over the keys):
 *
 *     P = exp(scale · Q Kᵀ + mask − lse)      dS = scale · P ∘ (z ∘ (g Vᵀ) − δ)
 *     dq = dS K                               dk = dSᵀ Q          dv = (P ∘ z)ᵀ g
 *
 * Two kinds of task, so that every sum has one owner: a tile of 32 queries computes its dq over ascending tiles of
 * keys, a tile of 32 keys its dk and dv over ascending heads of its group and tiles of queries. Each computes the
 * probabilities for itself: 14·T·S·D flops a head instead of 10 (half when causal), and no atomic addition. Bound by
 * shared memory. */
#include "common.cuh"
#include "philox.cuh"
#include "attention_tile.cuh"

struct gradient {
    real *dq, *dk, *dv, *delta;
    const real *g, *out, *lse;
};

/* What a query that sees nothing saved is lse = −∞; any P = exp(−∞ − lse) must be 0. */
static __device__ inline real probability(real score, real lse) { return lse == -INFINITY ? 0 : exp(score - lse); }

/* δ = g · out of one row, in all lanes of the warp. */
static __device__ inline real row_product(const real *g, const real *out, int64_t d) {
    real sum = 0;
    FOR_ROW_IN_WARP(e, d) sum = fma(g[e], out[e], sum);
    return warp_sum(sum);
}

/* ── a tile of queries: dq ──────────────────────────────────────────────────────────────────────── */

static __device__ inline void query_gradient(const gradient &y, const attention &x, int64_t b, int64_t head,
                                             int64_t query, int64_t first, chunk left, chunk right) {
    const int64_t own = query + warp_index() * OWN, kv_head = kv_head_of(x, head);
    const tile_rows q = queries_of(x, b, head, query), g = dense_rows(x, y.g, b, head, query);
    real delta[OWN], lse[OWN], one[OWN], p[OWN], dp[OWN], dq[OWN][PARTS];
    clear_tile(dq);
    for (int i = 0; i < OWN; i++) {
        bool real_query = own + i < x.t;
        int64_t row = real_query ? row_of(x, b, head, own + i) : 0;
        one[i] = 1;
        lse[i] = real_query ? y.lse[row] : -INFINITY;
        delta[i] = row_product(y.g + row * x.d, y.out + row * x.d, real_query ? x.d : 0);
        if (first == 0 && real_query && lane_index() == 0) y.delta[row] = delta[i];
    }
    const int64_t limit = visible_keys(x, b, at_most(query + TILE, x.t) - 1);
    for (int64_t tile = 0; tile < limit; tile += TILE) {
        const int64_t key = tile + lane_index();
        tile_dot(p, q, keys_of(x, b, kv_head, tile), x.d, left, right);
        tile_dot(dp, g, values_of(x, b, kv_head, tile), x.d, left, right);
        for (int i = 0; i < OWN; i++) {
            real seen = probability(masked_score(x, p[i], b, head, own + i, key), lse[i]);
            dp[i] = seen * (dp[i] * keep_factor(x, b, head, own + i, key) - delta[i]) * x.scale;
        }
        tile_accumulate(dq, dp, keys_of(x, b, kv_head, tile), first, x.d, right);
    }
    const int64_t stride = x.strides[DQ_TIME];
    store_tile(y.dq + (b * x.t + query) * stride + head * x.d, stride, dq, one, x.t - query, first, x.d);
}

/* ── a tile of keys: dk and dv ──────────────────────────────────────────────────────────────────── */

/* Adds what the TILE queries from `query` on of one head give. Here a warp owns 4 keys, and a lane stands for a
 * query. */
static __device__ inline void add_queries(real dk[OWN][PARTS], real dv[OWN][PARTS], const gradient &y,
                                          const attention &x, int64_t b, int64_t head, int64_t tile, int64_t query,
                                          int64_t first, chunk left, chunk right, real delta[TILE]) {
    const int64_t own = tile + warp_index() * OWN, kv_head = kv_head_of(x, head), mine = query + lane_index();
    const tile_rows q = queries_of(x, b, head, query), g = dense_rows(x, y.g, b, head, query);
    real p[OWN], dp[OWN];
    tile_dot(p, keys_of(x, b, kv_head, tile), q, x.d, left, right);
    tile_dot(dp, values_of(x, b, kv_head, tile), g, x.d, left, right);
    for (int i = 0; i < OWN; i++) { /* each warp four queries' δ, for all to read */
        int64_t at = query + warp_index() * OWN + i, row = at < x.t ? row_of(x, b, head, at) : 0;
        real product = row_product(y.g + row * x.d, y.out + row * x.d, at < x.t ? x.d : 0);
        if (lane_index() == 0) delta[warp_index() * OWN + i] = product;
    }
    __syncthreads(); /* all 32 are there; the barriers of the products keep the next tile's from them */
    real lse = mine < x.t ? y.lse[row_of(x, b, head, mine)] : -INFINITY;
    for (int i = 0; i < OWN; i++) {
        real keep = keep_factor(x, b, head, mine, own + i);
        real seen = probability(masked_score(x, p[i], b, head, mine, own + i), lse);
        p[i] = seen * keep;
        dp[i] = seen * (dp[i] * keep - delta[lane_index()]) * x.scale;
    }
    tile_accumulate(dv, p, g, first, x.d, right);
    tile_accumulate(dk, dp, q, first, x.d, right);
}

static __device__ inline void key_gradient(const gradient &y, const attention &x, int64_t b, int64_t kv_head,
                                           int64_t tile, int64_t first, chunk left, chunk right, real delta[TILE]) {
    real dk[OWN][PARTS], dv[OWN][PARTS];
    const real one[OWN] = {1, 1, 1, 1};
    const int64_t group = x.heads / x.kv_heads;
    clear_tile(dk);
    clear_tile(dv);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t query = 0; query < x.t; query += TILE)
            if (tile < visible_keys(x, b, at_most(query + TILE, x.t) - 1))
                add_queries(dk, dv, y, x, b, head, tile, query, first, left, right, delta);
    const int64_t stride = x.strides[DKV_KEY], at = (b * x.s + tile) * stride + kv_head * x.d;
    store_tile(y.dk + at, stride, dk, one, x.s - tile, first, x.d);
    store_tile(y.dv + at, stride, dv, one, x.s - tile, first, x.d);
}

KERNEL(attention_vjp)(real *dq, real *dk, real *dv, real *delta, const real *g, const real *q, const real *k,
                      const real *v, const real *out, const real *lse, const real *mask, const int64_t *lengths,
                      int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s, int64_t d,
                      const int64_t *strides, double scale, int causal, double dropout, uint64_t seed, uint32_t step,
                      uint32_t microbatch, uint32_t site) {
    __shared__ chunk left, right;
    __shared__ real tile_delta[TILE];
    const attention x = {q, k, v, mask, lengths, strides, batch, heads, kv_heads, t, s, d,
                         (real)scale, causal, dropout, {seed, step, microbatch, site}};
    const gradient y = {dq, dk, dv, delta, g, out, lse};
    const int64_t query_tiles = divide_up(t, TILE), key_tiles = divide_up(s, TILE), passes = divide_up(d, PASS);
    const int64_t of_queries = batch * heads * query_tiles * passes, of_keys = batch * kv_heads * key_tiles * passes;
    FOR_TASKS(task, of_queries + of_keys) {
        bool is_query = task < of_queries;
        int64_t n = is_query ? task : task - of_queries, pass = n % passes * PASS;
        int64_t tiles = is_query ? query_tiles : key_tiles, tile = n / passes % tiles * TILE, head = n / passes / tiles;
        if (is_query)
            query_gradient(y, x, head / heads, head % heads, tile, pass, left, right);
        else
            key_gradient(y, x, head / kv_heads, head % kv_heads, tile, pass, left, right, tile_delta);
    }
}
