/* GEMM, rung 5: vectors. The register tile, written in the machine's own vectors (kernels/simd.h: `vf` is VL floats):
 *
 *     left, right = b[p, 0 … VL−1], b[p, VL … 2·VL−1]
 *     sum[i][0] = a[i, p] · left  + sum[i][0]          one fused multiply-add for VL elements, one rounding
 *     sum[i][1] = a[i, p] · right + sum[i][1]          for all ROWS rows
 *
 * Nothing is left to the compiler's judgement but the names of the registers, and they are counted: of 32 (AVX-512,
 * NEON) 14 rows × 2 sums + 2 of B + 1 of A = 31; of 16 (AVX2) 6 × 2 + 2 + 1 = 15. The fused multiply-add does in one
 * instruction what were two. Rows that stick out over the end of A repeat its last row, columns that stick out load as
 * zeros; neither is stored.
 *
 * Per step ROWS + 2 loads for 2·ROWS multiply-adds: the arithmetic units are the bound now, as long as the operands are
 * in the first-level cache. They are not: a tile reads 14 rows of A and 256 rows of B, each in a place of its own, a
 * cache line or two from each. The lines of a column of tiles may fall into the same few cache sets, they lie in
 * hundreds of pages, and no prefetcher follows. That is what bounds it. */
#include "simd.h"

#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define ROWS 14
#else
#define ROWS 6
#endif
#define COLUMNS (2 * VL)
#define DEPTHS 256

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

/* The vector at p, of which n elements are there. */
ALWAYS_INLINE vf load(const float *p, int64_t n) { return n >= VL ? vf_load(p) : vf_load_n(p, n > 0 ? n : 0, 0); }

ALWAYS_INLINE void add_to(float *p, vf sum, int64_t n) {
    if (n > 0)
        vf_store_any(p, 1, sum + load(p, n), lesser(n, VL));
}

ALWAYS_INLINE void multiply_tile(float *c, const float *a, const float *b, int64_t n, int64_t k, int64_t rows,
                                 int64_t columns, int64_t depths) {
    vf sum[ROWS][2] = {{{0}}};
    const float *row[ROWS];
    for (int i = 0; i < ROWS; i++)
        row[i] = a + lesser(i, rows - 1) * k;
    for (int64_t p = 0; p < depths; p++) {
        vf left = load(b + p * n, columns), right = load(b + p * n + VL, columns - VL);
#pragma GCC unroll 14
        for (int i = 0; i < ROWS; i++) {
            vf x = vf_set1(row[i][p]);
            sum[i][0] = vf_fma(x, left, sum[i][0]);
            sum[i][1] = vf_fma(x, right, sum[i][1]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; i++)
        if (i < rows) {
            add_to(c + i * n, sum[i][0], columns);
            add_to(c + i * n + VL, sum[i][1], columns - VL);
        }
}

void gemm_vectors(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    memset(c, 0, (size_t)(m * n) * sizeof(float));
    for (int64_t p = 0; p < k; p += DEPTHS)
        for (int64_t j = 0; j < n; j += COLUMNS)
            for (int64_t i = 0; i < m; i += ROWS) {
                int64_t rows = lesser(m - i, ROWS), columns = lesser(n - j, COLUMNS), depths = lesser(k - p, DEPTHS);
                float *tile = c + i * n + j;
                if (columns == COLUMNS)
                    multiply_tile(tile, a + i * k + p, b + p * n + j, n, k, rows, COLUMNS, depths);
                else
                    multiply_tile(tile, a + i * k + p, b + p * n + j, n, k, rows, columns, depths);
            }
}
