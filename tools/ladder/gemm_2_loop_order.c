/* GEMM, rung 2: the loop order. The same three loops, the one over j inside:
 *
 *     for i, for p:   c[i, :] += a[i, p] · b[p, :]
 *
 * The same 2·m·n·k flops in the same order for each element of C, so the same bits as rung 1. But now the inner loop
 * runs along a row of B and a row of C: every byte of a cache line is used, the prefetcher sees a straight run, and
 * the elements of C are independent sums, so the compiler may compute a whole vector of them at once. (`restrict`
 * promises it that C overlaps neither A nor B.)
 *
 * What bounds it now is moving data. Each multiply-add reads an element of B, reads one of C and writes it back, and
 * B, read from end to end for each row of C, comes from as far away as it is large: k·n·4 bytes for 2·k·n flops. */
#include <stdint.h>
#include <string.h>

void gemm_loop_order(float *restrict c, const float *restrict a, const float *restrict b, int64_t m, int64_t n,
                     int64_t k) {
    memset(c, 0, (size_t)(m * n) * sizeof(float));
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++)
                c[i * n + j] += a[i * k + p] * b[p * n + j];
}
