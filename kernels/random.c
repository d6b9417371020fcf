/* random.c: uniform and normal numbers, dropout, raw bits; all from the Philox of philox.h, without state.
 *
 * Which word belongs to which element. Block number b of a site has the counter words
 * { b mod 2³², site, microbatch, step }, the key words { seed mod 2³², seed / 2³² }, and gives the words w[0 … 3].
 *
 *     raw bits and float   element i takes word i mod 4 of block i / 4:   u = (w >> 8) · 2⁻²⁴
 *     double               element i takes words 2 (i mod 2) and 2 (i mod 2) + 1 of block i / 2, the high half first:
 *                          u = (high · 2³² + low) >> 11, times 2⁻⁵³
 *     uniform              low + u · (high − low), in real: one product, one sum (which may round up to high)
 *     normal               elements 2j and 2j + 1 take u₁ and u₂ of these same two elements:
 *                          mean + std · √(−2 log(1 − u₁)) · { cos(2π u₂), sin(2π u₂) }, in real (Box, Muller 1958)
 *     dropout              keeps element i where u ≥ p, both in real
 *
 * Bytes: 4 an element out, dropout 4 in besides. Operations an element: 25 of integers; for normal numbers 40 flops
 * more. What bounds it: the integer multiplications of Philox, 5 an element; then memory. */
#include "philox.h"
#include "rows.h"
#include "simd_math_wide.h"

#define BLOCKS 16                                   /* computed side by side */
#define WORDS (4 * BLOCKS)                          /* a batch of words … */
#define BATCH (REAL_BITS == 32 ? WORDS : WORDS / 2) /* … and of elements */

struct random_job {
    void *y;
    const real *x;
    int64_t n;
    real a, b; /* low and high − low; mean and std; p and 1/(1 − p) */
    uint64_t seed;
    uint32_t step, microbatch, site;
};

/* ── Philox, a block a lane ─────────────────────────────────────────────────────────────────────── */
#define BLOCK_LANES (VECTOR_BYTES / 8)

/* philox_block of blocks first, first + 1, … in the 64-bit lanes of vectors. Only the lower halves count; what
 * the upper ones hold is never looked at. words gets two 64-bit halves a block, the first word lowest. */
static void blocks_in_lanes(uint64_t *words, int64_t first, const struct random_job *job) {
    vu c0 = (vu){0} + (uint64_t)first, c1 = (vu){0} + (uint64_t)job->site;
    vu c2 = (vu){0} + (uint64_t)job->microbatch, c3 = (vu){0} + (uint64_t)job->step;
    for (int l = 0; l < BLOCK_LANES; l++) c0[l] += (uint64_t)l;
    uint32_t k0 = (uint32_t)job->seed, k1 = (uint32_t)(job->seed >> 32);
    for (int round = 0; round < 10; round++) {
        vu left = vu_multiply_low(c0, 0xD2511F53u), right = vu_multiply_low(c2, 0xCD9E8D57u);
        c0 = (right >> 32) ^ c1 ^ (uint64_t)k0;
        c2 = (left >> 32) ^ c3 ^ (uint64_t)k1;
        c1 = right;
        c3 = left;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    vu low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
    for (int l = 0; l < BLOCK_LANES; l++) {
        words[2 * l] = low[l];
        words[2 * l + 1] = high[l];
    }
}

static void words_of_batch(uint32_t words[WORDS], int64_t batch, const struct random_job *job) {
    uint64_t halves[2 * BLOCKS];
    for (int l = 0; l < BLOCKS; l += BLOCK_LANES) blocks_in_lanes(halves + 2 * l, batch * BLOCKS + l, job);
    for (int i = 0; i < 2 * BLOCKS; i++) {
        words[2 * i] = (uint32_t)halves[i];
        words[2 * i + 1] = (uint32_t)(halves[i] >> 32);
    }
}

/* The uniforms of elements batch · BATCH …; how many of them exist. */
static int64_t uniforms_of_batch(real u[BATCH], int64_t batch, const struct random_job *job) {
    uint32_t words[WORDS];
    words_of_batch(words, batch, job);
    for (int i = 0; i < BATCH; i++)
#if REAL_BITS == 32
        u[i] = philox_uniform_f32(words[i]);
#else
        u[i] = philox_uniform_f64(words[2 * i], words[2 * i + 1]);
#endif
    return job->n - batch * BATCH < BATCH ? job->n - batch * BATCH : BATCH;
}

static void for_batches(void (*body)(void *job, int64_t begin, int64_t end), struct random_job *job) {
    parallel_for((job->n + BATCH - 1) / BATCH, ROWS_GRAIN / BATCH, body, job);
}

/* ── The kernels ────────────────────────────────────────────────────────────────────────────────── */

static void uniform_batches(void *context, int64_t begin, int64_t end) {
    const struct random_job *job = context;
    for (int64_t batch = begin; batch < end; batch++) {
        real u[BATCH], *y = (real *)job->y + batch * BATCH;
        int64_t count = uniforms_of_batch(u, batch, job);
        for (int64_t i = 0; i < count; i++) y[i] = job->a + u[i] * job->b;
    }
}
KERNEL(random_uniform)(real *y, int64_t n, double low, double high, uint64_t seed, uint32_t step, uint32_t microbatch,
                       uint32_t site) {
    struct random_job job = {y, NULL, n, (real)low, (real)(high - low), seed, step, microbatch, site};
    for_batches(uniform_batches, &job);
}

static void normal_batches(void *context, int64_t begin, int64_t end) {
    const struct random_job *job = context;
    for (int64_t batch = begin; batch < end; batch++) {
        real u[BATCH], u1[BATCH / 2], u2[BATCH / 2];
        int64_t count = uniforms_of_batch(u, batch, job);
        for (int j = 0; j < BATCH / 2; j++) u1[j] = u[2 * j], u2[j] = u[2 * j + 1];
        for (int j = 0; j < BATCH / 2; j += VL) {
            vf cosine, sine, mean = vf_set1(job->a);
            vf radius = vf_set1(job->b) * vf_sqrt(vf_set1(-2) * vf_log(vf_set1(1) - vf_load(u1 + j)));
            vf_turn(vf_load(u2 + j), &cosine, &sine);
            vf_store(u1 + j, vf_fma(radius, cosine, mean));
            vf_store(u2 + j, vf_fma(radius, sine, mean));
        }
        real *y = (real *)job->y + batch * BATCH;
        for (int64_t i = 0; i < count; i++) y[i] = i % 2 ? u2[i / 2] : u1[i / 2];
    }
}
KERNEL(random_normal)(real *y, int64_t n, double mean, double std, uint64_t seed, uint32_t step, uint32_t microbatch,
                      uint32_t site) {
    struct random_job job = {y, NULL, n, (real)mean, (real)std, seed, step, microbatch, site};
    for_batches(normal_batches, &job);
}

/* y = u ≥ p ? x/(1 − p) : 0.  Srivastava et al. 2014, in the inverted form, so evaluation needs no scale. */
static void dropout_batches(void *context, int64_t begin, int64_t end) {
    const struct random_job *job = context;
    for (int64_t batch = begin; batch < end; batch++) {
        real u[BATCH], *y = (real *)job->y + batch * BATCH;
        const real *x = job->x + batch * BATCH;
        int64_t count = uniforms_of_batch(u, batch, job);
        for (int64_t i = 0; i < count; i++) y[i] = u[i] >= job->a ? x[i] * job->b : 0;
    }
}
KERNEL(dropout)(real *y, const real *x, int64_t n, double p, uint64_t seed, uint32_t step, uint32_t microbatch,
                uint32_t site) {
    struct random_job job = {y, x, n, (real)p, (real)(1 / (1 - p)), seed, step, microbatch, site};
    for_batches(dropout_batches, &job);
}

#if REAL_BITS == 32 /* bits have no element type: compiled once */
static void bit_batches(void *context, int64_t begin, int64_t end) {
    const struct random_job *job = context;
    for (int64_t batch = begin; batch < end; batch++) {
        uint32_t words[WORDS];
        int64_t left = job->n - batch * WORDS;
        words_of_batch(words, batch, job);
        memcpy((uint32_t *)job->y + batch * WORDS, words, (size_t)(left < WORDS ? left : WORDS) * sizeof *words);
    }
}
void random_bits(uint32_t *y, int64_t n, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site) {
    struct random_job job = {y, NULL, n, 0, 0, seed, step, microbatch, site};
    for_batches(bit_batches, &job);
}
#endif
