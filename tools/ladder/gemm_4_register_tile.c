/* GEMM, rung 4: the register tile. Keep a small tile of C in registers while k runs:
 *
 *     for each tile of ROWS × COLUMNS of C:
 *       sum[ROWS][COLUMNS] = 0                                                    in registers
 *       for p:   sum[i][j] += a[i, p] · b[p, j]                                   all i, j of the tile
 *       c += sum
 *
 * A step in p loads COLUMNS elements of B and ROWS of A and does ROWS·COLUMNS multiply-adds with them; C is not touched
 * at all. With 4 rows of 3 vectors that is 7 loads for 12 operations, where rung 3 had 24 loads and 12 stores. (The
 * larger the tile, the better the ratio; the number of registers is the limit.) The 12 vectors of sums are also 12
 * independent chains, enough to hide the latency of each. k is cut into blocks of DEPTHS, so that the rows of B that
 * the next tile in the same columns needs are still in the caches.
 *
 * It is written so that the compiler can see the tile: sizes are constants, and a tile at the edge goes through the
 * same function with sizes that are not. What bounds it is what the compiler makes of it: whether `sum` really lives
 * in registers, and a multiplication and an addition where the processor has one instruction for both. */
#include <stdint.h>
#include <string.h>

enum { ROWS = 4, COLUMNS = 3 * VECTOR_BYTES / 4, DEPTHS = 256 };

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

static inline __attribute__((always_inline)) void multiply_tile(float *restrict c, const float *restrict a,
                                                                const float *restrict b, int64_t n, int64_t k,
                                                                int64_t rows, int64_t columns, int64_t depths) {
    float sum[ROWS][COLUMNS];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            sum[i][j] = 0;
    for (int64_t p = 0; p < depths; p++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++)
                sum[i][j] += a[i * k + p] * b[p * n + j];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            c[i * n + j] += sum[i][j];
}

void gemm_register_tile(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    memset(c, 0, (size_t)(m * n) * sizeof(float));
    for (int64_t p = 0; p < k; p += DEPTHS)
        for (int64_t j = 0; j < n; j += COLUMNS)
            for (int64_t i = 0; i < m; i += ROWS) {
                int64_t rows = lesser(m - i, ROWS), columns = lesser(n - j, COLUMNS), depths = lesser(k - p, DEPTHS);
                float *tile = c + i * n + j;
                if (rows == ROWS && columns == COLUMNS)
                    multiply_tile(tile, a + i * k + p, b + p * n + j, n, k, ROWS, COLUMNS, depths);
                else
                    multiply_tile(tile, a + i * k + p, b + p * n + j, n, k, rows, columns, depths);
            }
}
