/* attention_tile.cuh: the two products that attention and its gradient are made of, on tiles of 32 × 32.
 *
 * A tile has TILE = 32 rows on either side: queries and keys. Warp w owns rows OWN·w … OWN·w + 3 of the one side, and
 * lane j stands for row j of the other, so a thread holds OWN = 4 of the tile's 1024 numbers:
 *
 *     tile_dot:          score[i] = Σ_e a[OWN·w + i][e] · b[j][e]                     (scores of queries with keys)
 *     tile_accumulate:   o[i][c] += Σ_j weight_j[i] · b[j][first + 32c + lane]         (weighted sums of values)
 *
 * Both bring 32 columns at a time of their operands to shared memory, where every number is then used 32 times, and
 * keep their sums in registers. Rows of shared memory are 33 wide, so that the 32 lanes reading a column meet 32
 * banks. */
#define TILE 32
#define OWN (TILE / WARPS)
#define PARTS 4               /* 32-column parts of the sums that a thread holds: 16 registers for each sum */
#define PASS (PARTS * TILE)   /* columns that a pass over the keys computes; wider heads take several */

typedef real chunk[TILE][TILE + 1];

/* Rows of an operand: the first, how many there are (the tile's others count as zeros), and how far apart. */
struct tile_rows {
    const real *first;
    int64_t count, stride;
};

/* Columns column … column + 31 of the rows, zeros beyond row `count` and column d. A warp reads 32 neighbours of a
 * row. */
static __device__ inline void load_chunk(chunk to, tile_rows rows, int64_t column, int64_t d) {
    for (int i = 0; i < OWN; i++) {
        int row = i * WARPS + warp_index();
        bool inside = row < rows.count && column + lane_index() < d;
        to[row][lane_index()] = inside ? rows.first[row * rows.stride + column + lane_index()] : 0;
    }
}

/* score[i] = Σ_e a[OWN·warp + i][e] · b[lane][e], one ascending chain. */
static __device__ inline void tile_dot(real score[OWN], tile_rows a, tile_rows b, int64_t d, chunk left, chunk right) {
    for (int i = 0; i < OWN; i++) score[i] = 0;
    for (int64_t column = 0; column < d; column += TILE) {
        load_chunk(left, a, column, d);
        load_chunk(right, b, column, d);
        __syncthreads(); /* both chunks are there */
#pragma unroll 4
        for (int e = 0; e < TILE; e++)
            for (int i = 0; i < OWN; i++)
                score[i] = fma(left[warp_index() * OWN + i][e], right[lane_index()][e], score[i]);
        __syncthreads(); /* all are done with them */
    }
}

/* o[i][c] += Σ_j weight[i] of lane j · b[j][first + 32c + lane], one ascending chain. */
static __device__ inline void tile_accumulate(real o[OWN][PARTS], const real weight[OWN], tile_rows b, int64_t first,
                                              int64_t d, chunk right) {
#pragma unroll
    for (int c = 0; c < PARTS; c++) {
        if (first + c * TILE >= d) continue; /* the same for all threads */
        load_chunk(right, b, first + c * TILE, d);
        __syncthreads();
#pragma unroll 4
        for (int j = 0; j < TILE; j++)
            for (int i = 0; i < OWN; i++)
                o[i][c] = fma(__shfl_sync(WHOLE_WARP, weight[i], j), right[j][lane_index()], o[i][c]);
        __syncthreads();
    }
}

/* to[OWN·warp + i][first + 32c + lane] = o[i][c] / divisor[i], for the first `count` rows of d, `stride` apart. */
static __device__ inline void store_tile(real *to, int64_t stride, const real o[OWN][PARTS], const real divisor[OWN],
                                         int64_t count, int64_t first, int64_t d) {
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        for (int i = 0; i < OWN; i++) {
            int64_t row = warp_index() * OWN + i, column = first + c * TILE + lane_index();
            if (row < count && column < d) to[row * stride + column] = o[i][c] / divisor[i];
        }
}

static __device__ inline void clear_tile(real o[OWN][PARTS]) {
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        for (int i = 0; i < OWN; i++) o[i][c] = 0;
}

/* ── the arguments, and what they say about one query and one key ───────────────────────────────── */

enum {
    Q_BATCH, Q_HEAD, Q_TIME, K_BATCH, K_HEAD, K_KEY, V_BATCH, V_HEAD, V_KEY,
    MASK_BATCH, MASK_HEAD, MASK_TIME, MASK_KEY, DQ_TIME, DKV_KEY
};

struct attention {
    const real *q, *k, *v, *mask;
    const int64_t *lengths, *strides;
    int64_t batch, heads, kv_heads, t, s, d;
    real scale;
    int causal;
    double dropout;
    random_key key;
};

static __device__ inline int64_t kv_head_of(const attention &x, int64_t head) { return head / (x.heads / x.kv_heads); }

/* The TILE queries from `query` on of one head, and the TILE keys or values from `key` on of one key head. */
static __device__ inline tile_rows queries_of(const attention &x, int64_t b, int64_t head, int64_t query) {
    const real *first = x.q + b * x.strides[Q_BATCH] + head * x.strides[Q_HEAD] + query * x.strides[Q_TIME];
    return {first, x.t - query, x.strides[Q_TIME]};
}
static __device__ inline tile_rows keys_of(const attention &x, int64_t b, int64_t kv_head, int64_t key) {
    const real *first = x.k + b * x.strides[K_BATCH] + kv_head * x.strides[K_HEAD] + key * x.strides[K_KEY];
    return {first, x.s - key, x.strides[K_KEY]};
}
static __device__ inline tile_rows values_of(const attention &x, int64_t b, int64_t kv_head, int64_t key) {
    const real *first = x.v + b * x.strides[V_BATCH] + kv_head * x.strides[V_HEAD] + key * x.strides[V_KEY];
    return {first, x.s - key, x.strides[V_KEY]};
}
/* The place of a query in an array (batch, T, heads), dense like the output without its last axis. */
static __device__ inline int64_t row_of(const attention &x, int64_t b, int64_t head, int64_t query) {
    return (b * x.t + query) * x.heads + head;
}
/* The same rows of an operand that is dense like the output: (batch, T, heads, D). */
static __device__ inline tile_rows dense_rows(const attention &x, const real *operand, int64_t b, int64_t head,
                                              int64_t query) {
    return {operand + row_of(x, b, head, query) * x.d, x.t - query, x.heads * x.d};
}

/* Query t of sequence b sees keys 0 … visible_keys − 1; a query beyond the last sees none. */
static __device__ inline int64_t visible_keys(const attention &x, int64_t b, int64_t query) {
    if (query >= x.t) return 0;
    int64_t n = x.lengths ? at_most(x.lengths[b], x.s) : x.s;
    if (x.causal) n = at_most(n, query + x.s - x.t + 1);
    return n < 0 ? 0 : n;
}

/* scale · qᵀk + mask, −∞ where hidden. */
static __device__ inline real masked_score(const attention &x, real dot, int64_t b, int64_t head, int64_t query,
                                           int64_t key) {
    if (key >= visible_keys(x, b, query)) return -INFINITY;
    const int64_t *n = x.strides;
    real score = dot * x.scale;
    if (x.mask)
        score += x.mask[b * n[MASK_BATCH] + head * n[MASK_HEAD] + query * n[MASK_TIME] + key * n[MASK_KEY]];
    return score;
}

/* 1/(1 − p) where the uniform number of this (batch, head, t, s) is ≥ p, else 0. */
static __device__ inline real keep_factor(const attention &x, int64_t b, int64_t head, int64_t query, int64_t key) {
    if (!(x.dropout > 0)) return 1;
    real u = philox_uniform(((b * x.heads + head) * x.t + query) * x.s + key, x.key);
    return u >= (real)x.dropout ? (real)(1 / (1 - x.dropout)) : 0;
}
