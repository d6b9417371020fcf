/* GEMM, rung 1: the triple loop. C = A B as it stands in the textbook, one dot product for each element of C:
 *
 *     c[i, j] = Σ_p a[i, p] b[p, j]              A is (m, k), B is (k, n), C is (m, n), dense, row by row
 *
 * Flops 2·m·n·k on (m·k + k·n + m·n)·4 bytes: hundreds of flops for every byte that must come from memory, so a matrix
 * product could keep the arithmetic units busy all the time. This one does not, for two reasons:
 *
 *   - `sum` is one chain. An addition waits for the one before it, 4 cycles, although the processor could start two
 *     vectors of 16 multiply-adds in every cycle. The compiler may not cut the chain up: that would change the
 *     rounding.
 *   - b[p, j] walks down a column. Every step touches another cache line and uses 4 of its 64 bytes; once a column's
 *     lines no longer fit the first-level cache (k > 512), each of them is fetched anew for every j.
 *
 * Bound by the latency of an addition in small matrices, by cache misses in large ones. */
#include <stdint.h>

void gemm_triple_loop(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t p = 0; p < k; p++)
                sum += a[i * k + p] * b[p * n + j];
            c[i * n + j] = sum;
        }
}
