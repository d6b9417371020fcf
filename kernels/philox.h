/* philox.h: the counter-based random generator Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel
 * random numbers: as easy as 1, 2, 3", section 4.2). Ten rounds of a small Feistel-like network turn a
 * 128-bit counter and a 64-bit key into 128 random bits; there is no state, so any element of any stream
 * can be computed first, last, twice, or on any thread. Known answer: key 0, counter 0 gives
 * 6627e8d5 e169c58d bc57ac4c 9b00dbd8. Cost: 20 multiplications (32 × 32 → 64 bits) a block of 4 words. */
#ifndef PHILOX_H
#define PHILOX_H
#include <stdint.h>

static inline void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t left = (uint64_t)0xD2511F53u * c0, right = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(right >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(left >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)right;
        c3 = (uint32_t)left;
        k0 += 0x9E3779B9u; /* the golden ratio and √3 − 1: a Weyl sequence of round keys */
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Block number `block` of the stream that belongs to one random site of one training step. */
static inline void philox_block(uint32_t out[4], int64_t block, uint64_t seed, uint32_t step, uint32_t microbatch,
                                uint32_t site) {
    const uint32_t counter[4] = {(uint32_t)block, site, microbatch, step};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    philox4x32(counter, key, out);
}

/* Uniform in [0, 1): 24 bits of one word, 53 bits of two. Both are exact multiples of the last place. */
static inline float philox_uniform_f32(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }

static inline double philox_uniform_f64(uint32_t high, uint32_t low) {
    return (double)((((uint64_t)high << 32) | low) >> 11) * 0x1p-53;
}

#endif
