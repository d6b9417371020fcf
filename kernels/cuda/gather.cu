/* gather.cu: embedding lookup and its gradient, rotary position embedding.
 *
 * Bytes (float): embedding reads and writes 4n a token; its vjp writes the whole table once and then reads 8n and
 * writes 4n a token, and reads the indices once for every THREADS rows of the table (from the second cache); rope
 * reads and writes 4d a row. Flops: none, 1 an element, 3 an element. What bounds it: memory. */
#include "common.cuh"

/* y[i] = weight[index[i]]; an index outside the table gives a row of NaN. A warp does a token. */
KERNEL(embedding)(real *y, const real *weight, const int64_t *index, int64_t count, int64_t vocabulary, int64_t n) {
    FOR_TASKS(task, divide_up(count, WARPS)) {
        int64_t i = task * WARPS + warp_index();
        if (i >= count) continue;
        int64_t row = index[i];
        bool known = row >= 0 && row < vocabulary;
        FOR_ROW_IN_WARP(j, n) y[i * n + j] = known ? weight[row * n + j] : (real)NAN;
    }
}

/* ── the gradient of embedding ──────────────────────────────────────────────────────────────────── */

struct found_tokens { /* which of the THREADS tokens at hand fall into the block's rows, in ascending order */
    int of_warp[WARPS];
    int row[THREADS];
    int64_t token[THREADS];
};

/* Gathers the tokens of the threads with mine != 0, and returns how many they are. A thread's place is the number of
 * such threads before it: in its own warp by a vote, in the warps before by their counts. */
static __device__ inline int gather_tokens(found_tokens *found, bool mine, int row, int64_t token) {
    uint32_t votes = __ballot_sync(WHOLE_WARP, mine), before = votes & ((1u << lane_index()) - 1);
    if (lane_index() == 0) found->of_warp[warp_index()] = __popc(votes);
    __syncthreads(); /* all counts are there */
    int place = __popc(before), total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp_index()) place += found->of_warp[w];
        total += found->of_warp[w];
    }
    if (mine) {
        found->row[place] = row;
        found->token[place] = token;
    }
    __syncthreads(); /* the list is complete */
    return total;
}

/* dweight[index[i]] += g[i] for ascending i. A block owns THREADS rows of the table and looks at all tokens, THREADS
 * at a time. Element e of the block's rows belongs to thread e mod THREADS, which zeroes it and adds every token's
 * share to it: so each sum has one owner and an ascending order, for long rows (all threads work on one token) as for
 * short ones (each on its own). */
KERNEL(embedding_vjp)(real *dweight, const real *g, const int64_t *index, int64_t count, int64_t vocabulary,
                      int64_t n) {
    __shared__ found_tokens found;
    FOR_TASKS(task, divide_up(vocabulary, THREADS)) {
        const int64_t first = task * THREADS, rows = at_most(vocabulary - first, THREADS);
        real *table = dweight + first * n;
        FOR_ROW_IN_BLOCK(e, rows * n) table[e] = 0;
        for (int64_t start = 0; start < count; start += THREADS) {
            int64_t token = start + threadIdx.x, row = token < count ? index[token] - first : -1;
            int total = gather_tokens(&found, row >= 0 && row < rows, (int)row, token);
            for (int k = 0; k < total; k++) {
                int64_t at = found.row[k] * n, skip = (threadIdx.x + THREADS - at % THREADS) % THREADS;
                for (int64_t j = skip; j < n; j += THREADS) table[at + j] += g[found.token[k] * n + j];
            } /* the counting of the next tokens keeps their list from being written before all are done with this one */
        }
    }
}

/* ── rope ───────────────────────────────────────────────────────────────────────────────────────── */

/* Each pair (a, b) of a row turns by its position's angle: a cos − b sin, b cos + a sin. Su et al. 2021,
 * arXiv:2104.09864, eq. 34. The gradient is the same with −sine. A warp does a row. */
KERNEL(rope)(real *y, const real *x, const real *cosine, const real *sine, int64_t outer, int64_t t, int64_t d,
             int interleaved) {
    const int64_t half = d / 2, apart = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
    FOR_TASKS(task, divide_up(outer * t, WARPS)) {
        int64_t row = task * WARPS + warp_index();
        if (row >= outer * t) continue;
        int64_t angles = row % t * half, at = row * d;
        FOR_ROW_IN_WARP(i, half) {
            real a = x[at + i * apart], b = x[at + partner + i * apart], c = cosine[angles + i], s = sine[angles + i];
            y[at + i * apart] = fma(a, c, -(b * s));
            y[at + partner + i * apart] = fma(b, c, a * s);
        }
    }
}
