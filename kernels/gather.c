/* gather.c: embedding lookup and its gradient, rotary position embedding.
 *
 * Bytes: embedding reads and writes 4n a token; its vjp writes the whole table once (4n a vocabulary row) and
 * then reads 8n and writes 4n a token; rope reads and writes 4d a row. Flops: none, 1 an element, 3 an element. What
 * bounds it: memory, for embedding its latency where rows are short. */
#include "rows.h"
#include <math.h>

struct embedding_job {
    real *y;
    const real *x;
    const int64_t *index;
    int64_t count, vocabulary, n;
};

static inline int in_table(const struct embedding_job *job, int64_t index) {
    return index >= 0 && index < job->vocabulary;
}

/* y[i] = weight[index[i]]; an index outside the table gives a row of NaN. */
static void embedding_rows(void *context, int64_t begin, int64_t end) {
    const struct embedding_job *job = context;
    int64_t n = job->n;
    for (int64_t i = begin; i < end; i++) {
        if (in_table(job, job->index[i]))
            memcpy(job->y + i * n, job->x + job->index[i] * n, (size_t)n * sizeof *job->y);
        else
            for (int64_t j = 0; j < n; j++) job->y[i * n + j] = (real)NAN;
    }
}
KERNEL(embedding)(real *y, const real *weight, const int64_t *index, int64_t count, int64_t vocabulary, int64_t n) {
    struct embedding_job job = {y, weight, index, count, vocabulary, n};
    parallel_for(count, grain_of_rows(n), embedding_rows, &job);
}

static void clear_table(void *context, int64_t begin, int64_t end) {
    const struct embedding_job *job = context;
    memset(job->y + begin, 0, (size_t)(end - begin) * sizeof *job->y);
}

/* dweight[index[i]] += g[i] for ascending i. A thread owns a range of columns: frequent tokens would crowd a range
 * of rows, and every sum keeps its order. */
static void embedding_vjp_columns(void *context, int64_t begin, int64_t end) {
    const struct embedding_job *job = context;
    for (int64_t i = 0; i < job->count; i++) {
        if (!in_table(job, job->index[i])) continue;
        real *sum = job->y + job->index[i] * job->n;
        const real *g = job->x + i * job->n;
        for (int64_t j = begin; j < end; j++) sum[j] += g[j];
    }
}
KERNEL(embedding_vjp)(real *dweight, const real *g, const int64_t *index, int64_t count, int64_t vocabulary, int64_t n)
                      {
    struct embedding_job job = {dweight, g, index, count, vocabulary, n};
    parallel_for(vocabulary * n, 8 * ROWS_GRAIN, clear_table, &job);
    int64_t columns = count > 0 ? 1 + (ROWS_GRAIN - 1) / count : n; /* worth a thread; whole cache lines of them */
    parallel_for(n, (columns + 63) / 64 * 64, embedding_vjp_columns, &job);
}

/* ── rope ───────────────────────────────────────────────────────────────────────────────────────── */

struct rope_job {
    real *y;
    const real *x, *cosine, *sine;
    int64_t t, d;
    int interleaved;
};

/* Each pair (a, b) of a row turns by its position's angle: a cos − b sin, b cos + a sin.
 * Su et al. 2021, arXiv:2104.09864, eq. 34. The gradient is the same with −sine. */
static void rope_rows(void *context, int64_t begin, int64_t end) {
    const struct rope_job *job = context;
    int64_t half = job->d / 2, stride = job->interleaved ? 2 : 1, partner = job->interleaved ? 1 : half;
    for (int64_t row = begin; row < end; row++) {
        const real *x = job->x + row * job->d;
        const real *cosine = job->cosine + row % job->t * half, *sine = job->sine + row % job->t * half;
        real *y = job->y + row * job->d;
        FOR_ROW(i, count, half) {
            vf a = vf_load_any(x + i * stride, stride, count), b = vf_load_any(x + partner + i * stride, stride, count);
            vf c = vf_load_any(cosine + i, 1, count), s = vf_load_any(sine + i, 1, count);
            vf_store_any(y + i * stride, stride, vf_fma(a, c, -(b * s)), count);
            vf_store_any(y + partner + i * stride, stride, vf_fma(b, c, a * s), count);
        }
    }
}
KERNEL(rope)(real *y, const real *x, const real *cosine, const real *sine, int64_t outer, int64_t t, int64_t d,
             int interleaved) {
    struct rope_job job = {y, x, cosine, sine, t, d, interleaved};
    parallel_for(outer * t, grain_of_rows(d), rope_rows, &job);
}
