/* reduce.cu: Σ (x/divisor)² over blocks of 4096 elements, in double: the parts of a gradient norm. A block of threads does one.
 *
 * Bytes: 4 an element (float) in. Flops: 2 an element, in double, of which a consumer's GPU does one for every 32 or 64
 * in float. What bounds it: memory, and there double precision. The other reductions are CuPy's. */
#include "common.cuh"

#define BLOCK 4096

/* partial[b] = Σ (x/divisor)² over block b; the last may be short. */
KERNEL(sum_squares)(double *partial, const real *x, int64_t n, double divisor) {
    __shared__ double of_warp[WARPS];
    FOR_TASKS(block, divide_up(n, BLOCK)) {
        double sum = 0;
        FOR_ROW_IN_BLOCK(i, at_most(n - block * BLOCK, BLOCK)) {
            double value = x[block * BLOCK + i] / (real)divisor;
            sum = fma(value, value, sum);
        }
        sum = block_sum(sum, of_warp);
        if (threadIdx.x == 0) partial[block] = sum;
    }
}
