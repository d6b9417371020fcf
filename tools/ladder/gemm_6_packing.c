/* GEMM, rung 6: packing. Copy what the register tile will read into the order in which it reads it:
 *
 *     for each block of COLUMNS columns, for each block of DEPTHS steps in k:
 *       pack that block of B: panels of WIDTH columns, each step's WIDTH elements side by side     384 KiB, L2 cache
 *       for each panel of ROWS rows of A:
 *         pack it, each step's ROWS elements side by side                                           14 KiB, L1 cache
 *         for each panel of B:   the register tile
 *
 * Copying costs 2·4 bytes for each element and no flops, and an element of B is then used m times, one of A COLUMNS
 * times. What it buys: a tile reads two straight runs of memory, which the prefetcher follows; they fill whole cache
 * lines, use every set of the cache evenly and lie in few pages; and the loads need no address but two counters. An
 * edge is filled up with zeros while packing, so every tile is a whole one. (Goto and van de Geijn 2008, "Anatomy of
 * high-performance matrix multiplication".)
 *
 * Bound by the arithmetic units, at last. What the engine's kernels/gemm.c and gemm_micro.c do beyond this: tiles of
 * fewer rows at the edge, so that nothing is multiplied by zeros; asking for memory ahead of the tile; transposing A by
 * shuffles instead of element by element; small matrices without packing; operands of any stride. */
#include "simd.h"

#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define ROWS 14
#else
#define ROWS 6
#endif
#define WIDTH (2 * VL)
#define COLUMNS (12 * WIDTH)
#define DEPTHS 256

static int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

/* packed[p·ROWS + i] = a[i, p], 0 for i ≥ rows. */
static void pack_a(float *packed, const float *a, int64_t a_row, int64_t rows, int64_t depths) {
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t p = 0; p < depths; p++)
            packed[p * ROWS + i] = i < rows ? a[i * a_row + p] : 0;
}

/* packed[panel][p·WIDTH + j] = b[p, panel·WIDTH + j], 0 beyond the last column. */
static void pack_b(float *packed, const float *b, int64_t b_row, int64_t columns, int64_t depths) {
    for (int64_t panel = 0; panel < columns; panel += WIDTH, packed += WIDTH * depths)
        for (int64_t p = 0; p < depths; p++)
            for (int64_t j = 0; j < WIDTH; j += VL) {
                int64_t n = lesser(columns - panel - j, VL);
                vf_store(packed + p * WIDTH + j, n > 0 ? vf_load_any(b + p * b_row + panel + j, 1, n) : vf_zero());
            }
}

/* c += A B for packed panels. */
static void multiply_tile(float *c, const float *a, const float *b, int64_t c_row, int64_t rows, int64_t columns,
                          int64_t depths) {
    vf sum[ROWS][2] = {{{0}}};
    for (int64_t p = 0; p < depths; p++, a += ROWS, b += WIDTH) {
        vf left = vf_load(b), right = vf_load(b + VL);
#pragma GCC unroll 14
        for (int i = 0; i < ROWS; i++) {
            vf x = vf_set1(a[i]);
            sum[i][0] = vf_fma(x, left, sum[i][0]);
            sum[i][1] = vf_fma(x, right, sum[i][1]);
        }
    }
    float tile[ROWS][WIDTH]; /* rows of sums that a loop can count */
#pragma GCC unroll 14
    for (int i = 0; i < ROWS; i++) {
        vf_store(tile[i], sum[i][0]);
        vf_store(tile[i] + VL, sum[i][1]);
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            c[i * c_row + j] += tile[i][j];
}

/* C = A B for matrices whose rows lie c_row, a_row and b_row elements apart. */
static void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t m,
                     int64_t n, int64_t k) {
    static _Thread_local _Alignas(64) float packed_a[ROWS * DEPTHS], packed_b[COLUMNS * DEPTHS];
    for (int64_t i = 0; i < m; i++)
        memset(c + i * c_row, 0, (size_t)n * sizeof(float));
    for (int64_t column = 0; column < n; column += COLUMNS)
        for (int64_t p = 0; p < k; p += DEPTHS) {
            int64_t columns = lesser(n - column, COLUMNS), depths = lesser(k - p, DEPTHS);
            pack_b(packed_b, b + p * b_row + column, b_row, columns, depths);
            for (int64_t i = 0; i < m; i += ROWS) {
                int64_t rows = lesser(m - i, ROWS);
                pack_a(packed_a, a + i * a_row + p, a_row, rows, depths);
                for (int64_t j = 0; j < columns; j += WIDTH)
                    multiply_tile(c + i * c_row + column + j, packed_a, packed_b + j * depths, c_row, rows,
                                  lesser(columns - j, WIDTH), depths);
            }
        }
}

void gemm_packing(float *c, const float *a, const float *b, int64_t m, int64_t n, int64_t k) {
    multiply(c, n, a, k, b, n, m, n, k);
}
