/* GEMM, rung 3: blocking. Cut B into blocks that stay in the caches, and finish with one before taking the next:
 *
 *     for each block of COLUMNS columns, for each block of DEPTHS steps in k:     a block of B, 128 KiB
 *       for i:                                                              a piece of a row of C, 2 KiB
 *         for p, for j of the block:   c[i, j] += a[i, p] · b[p, j]
 *
 * A block of B is used for all m rows while it lies in the second-level cache, the piece of C for all DEPTHS steps
 * while it lies in the first. So B comes from afar once, instead of once for each row, and C once for each block of k:
 * m·n·k/DEPTHS elements. (Lam, Rothberg, Wolf 1991, "The cache performance and optimizations of blocked algorithms".)
 *
 * What bounds it now is the first-level cache. Each vector multiply-add still loads a vector of B and one of C and
 * stores one of C: three accesses to memory for one operation, where the processor offers three for two. */
#include <stdint.h>
#include <string.h>

enum { COLUMNS = 512, DEPTHS = 64 };

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

static void multiply_block(float *restrict c, const float *restrict a, const float *restrict b, int64_t m, int64_t n,
                           int64_t k, int64_t columns, int64_t depths) {
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < depths; p++)
            for (int64_t j = 0; j < columns; j++)
                c[i * n + j] += a[i * k + p] * b[p * n + j];
}

void gemm_blocking(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    memset(c, 0, (size_t)(m * n) * sizeof(float));
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int64_t p = 0; p < k; p += DEPTHS)
            multiply_block(c + j, a + p, b + p * n + j, m, n, k, lesser(n - j, COLUMNS), lesser(k - p, DEPTHS));
}
