/* philox.cuh: the counter-based random generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random
 * numbers: as easy as 1, 2, 3"), the same words as on the CPU: kernels/philox.h explains it. Which word belongs to
 * which element:
 *
 *     raw bits and float   element i takes word i mod 4 of block i / 4:   u = (w >> 8) · 2⁻²⁴
 *     double               element i takes words 2 (i mod 2) and 2 (i mod 2) + 1 of block i / 2, the high half first:
 *                          u = (high · 2³² + low) >> 11, times 2⁻⁵³ */
#define EACH (128 / REAL_BITS) /* uniform numbers in a block of four words */

struct random_key {
    uint64_t seed;
    uint32_t step, microbatch, site;
};

/* Block number `block` of the stream that belongs to one random site of one training step. */
static __device__ inline void philox_block(uint32_t word[4], int64_t block, random_key key) {
    uint32_t c0 = (uint32_t)block, c1 = key.site, c2 = key.microbatch, c3 = key.step;
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t left = (uint64_t)0xD2511F53u * c0, right = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(right >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(left >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)right;
        c3 = (uint32_t)left;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

/* The uniform numbers in [0, 1) of elements EACH · block, … */
static __device__ inline void philox_uniforms(real u[EACH], int64_t block, random_key key) {
    uint32_t word[4];
    philox_block(word, block, key);
#if REAL_BITS == 32
    for (int i = 0; i < EACH; i++) u[i] = (real)(word[i] >> 8) * (real)5.9604644775390625e-8; /* 2⁻²⁴ */
#else
    for (int i = 0; i < EACH; i++)
        u[i] = (real)(((uint64_t)word[2 * i] << 32 | word[2 * i + 1]) >> 11) * 1.1102230246251565e-16; /* 2⁻⁵³ */
#endif
}

/* The uniform number of element i alone. */
static __device__ inline real philox_uniform(int64_t i, random_key key) {
    real u[EACH];
    philox_uniforms(u, i / EACH, key);
    real chosen = u[0];
    for (int j = 1; j < EACH; j++) /* not u[i % EACH], which would put u in memory */
        if (i % EACH == j) chosen = u[j];
    return chosen;
}
