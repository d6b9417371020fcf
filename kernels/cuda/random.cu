/* random.cu: uniform and normal numbers, dropout, raw bits; the words of philox.cuh, the equations of kernels/random.c.
 *
 * A thread does one block of Philox: four floats or two doubles. Bytes: 4 an element out, dropout 4 in besides (float).
 * Operations an element: 25 of integers; for normal numbers 40 flops more. What bounds it: memory. */
#include "common.cuh"
#include "philox.cuh"

#define TWO_PI 6.283185307179586

/* low + u (high − low) */
KERNEL(random_uniform)(real *y, int64_t n, double low, double high, uint64_t seed, uint32_t step, uint32_t microbatch,
                       uint32_t site) {
    const random_key key = {seed, step, microbatch, site};
    const real width = (real)(high - low);
    FOR_ELEMENTS(block, divide_up(n, EACH)) {
        real u[EACH];
        philox_uniforms(u, block, key);
        for (int j = 0; j < EACH; j++)
            if (block * EACH + j < n) y[block * EACH + j] = (real)low + u[j] * width;
    }
}

/* mean + std · √(−2 log(1 − u₁)) · { cos 2πu₂, sin 2πu₂ } for elements 2j and 2j + 1. Box, Muller 1958. */
KERNEL(random_normal)(real *y, int64_t n, double mean, double std, uint64_t seed, uint32_t step, uint32_t microbatch,
                      uint32_t site) {
    const random_key key = {seed, step, microbatch, site};
    FOR_ELEMENTS(block, divide_up(n, EACH)) {
        real u[EACH];
        philox_uniforms(u, block, key);
        for (int j = 0; j < EACH; j += 2) {
            int64_t i = block * EACH + j;
            real radius = (real)std * sqrt(-2 * log(1 - u[j])), angle = (real)TWO_PI * u[j + 1];
            if (i < n) y[i] = fma(radius, cos(angle), (real)mean);
            if (i + 1 < n) y[i + 1] = fma(radius, sin(angle), (real)mean);
        }
    }
}

/* y = u ≥ p ? x/(1 − p) : 0.  Srivastava et al. 2014, in the inverted form, so evaluation needs no scale. */
KERNEL(dropout)(real *y, const real *x, int64_t n, double p, uint64_t seed, uint32_t step, uint32_t microbatch,
                uint32_t site) {
    const random_key key = {seed, step, microbatch, site};
    const real scale = (real)(1 / (1 - p));
    FOR_ELEMENTS(block, divide_up(n, EACH)) {
        real u[EACH];
        philox_uniforms(u, block, key);
        for (int j = 0; j < EACH; j++) {
            int64_t i = block * EACH + j;
            if (i < n) y[i] = u[j] >= (real)p ? x[i] * scale : 0;
        }
    }
}

#if REAL_BITS == 32 /* bits have no element type: compiled once */
EXPORT void random_bits(uint32_t *y, int64_t n, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site) {
    const random_key key = {seed, step, microbatch, site};
    FOR_ELEMENTS(block, divide_up(n, 4)) {
        uint32_t word[4];
        philox_block(word, block, key);
        for (int j = 0; j < 4; j++)
            if (block * 4 + j < n) y[block * 4 + j] = word[j];
    }
}
#endif
