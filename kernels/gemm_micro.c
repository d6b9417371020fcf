/* gemm_micro.c: the register tile of a matrix product, and the packing that feeds it. See gemm_micro.h. */
#include "gemm_micro.h"
#include "transpose.h"

/* ── the register tile ───────────────────────────────────────────────────────────────────────────── */

/* Inlined with constant rows and vectors, so that the loops unroll and `sum` lives in registers.
 * Flops 2·rows·vectors·VL·k, bytes from cache (rows + vectors·VL)·k·sizeof(real): bound by the FMA units. */
static inline __attribute__((always_inline)) void multiply(int rows, int vectors, real *tile, const real *a,
                                                           const real *b, int64_t k, int64_t tile_row,
                                                           int64_t a_step, int64_t b_step) {
    vf sum[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
        sum[i][0] = sum[i][1] = vf_zero();
    for (int64_t p = 0; p < k; p++) {
        vf left = vf_load(b), right = vectors == 2 ? vf_load(b + VL) : vf_zero();
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            vf x = vf_set1(a[i]);
            sum[i][0] = vf_fma(x, left, sum[i][0]);
            if (vectors == 2)
                sum[i][1] = vf_fma(x, right, sum[i][1]);
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++) {
        vf_store(tile + i * tile_row, sum[i][0]);
        if (vectors == 2)
            vf_store(tile + i * tile_row + VL, sum[i][1]);
    }
}

typedef void micro_function(real *tile, const real *a, const real *b, int64_t k, int64_t tile_row, int64_t a_step,
                            int64_t b_step);

#define MICRO(rows)                                                                                               \
    static void micro_##rows##_1(real *tile, const real *a, const real *b, int64_t k, int64_t tile_row,           \
                                 int64_t a_step, int64_t b_step) {                                                \
        multiply(rows, 1, tile, a, b, k, tile_row, a_step, b_step);                                               \
    }                                                                                                             \
    static void micro_##rows##_2(real *tile, const real *a, const real *b, int64_t k, int64_t tile_row,           \
                                 int64_t a_step, int64_t b_step) {                                                \
        multiply(rows, 2, tile, a, b, k, tile_row, a_step, b_step);                                               \
    }
#define MICRO_PAIR(rows) {micro_##rows##_1, micro_##rows##_2}

MICRO(1) MICRO(2) MICRO(3) MICRO(4) MICRO(5) MICRO(6)
#if MR == 14
MICRO(7) MICRO(8) MICRO(9) MICRO(10) MICRO(11) MICRO(12) MICRO(13) MICRO(14)
#endif

static micro_function *const micro[MR][2] = {
    MICRO_PAIR(1),  MICRO_PAIR(2),  MICRO_PAIR(3),  MICRO_PAIR(4),  MICRO_PAIR(5),  MICRO_PAIR(6),
#if MR == 14
    MICRO_PAIR(7),  MICRO_PAIR(8),  MICRO_PAIR(9),  MICRO_PAIR(10), MICRO_PAIR(11), MICRO_PAIR(12),
    MICRO_PAIR(13), MICRO_PAIR(14),
#endif
};

void TYPED(micro_tile)(real *tile, const real *a, const real *b, int64_t rows, int64_t vectors, int64_t k,
                       int64_t tile_row, int64_t a_step, int64_t b_step) {
    micro[rows - 1][vectors - 1](tile, a, b, k, tile_row, a_step, b_step);
}

/* ── packing ─────────────────────────────────────────────────────────────────────────────────────── */

static inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

/* The lines of the panel lie side by side in x: copy row after row. Whole vectors are stored; what
 * spills over the end of a row of the panel is overwritten by the next row. */
static void pack_rows(real *panel, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_step) {
    for (int64_t p = 0; p < k; p++)
        for (int64_t i = 0; i < width; i += VL) {
            int64_t n = at_most(lines - i, VL);
            const real *from = x + p * x_step + i;
            vf_store(panel + p * width + i, n == VL ? vf_load(from) : n > 0 ? vf_load_n(from, n, 0) : vf_zero());
        }
}

/* Each line of the panel is contiguous in x: transpose VL × VL blocks. The last group of lines goes first, so
 * that what it spills over the end of a row is overwritten by the first group of the next row. */
static void pack_transposed(real *panel, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line) {
    for (int64_t p = 0; p < k; p += VL) {
        int64_t steps = at_most(k - p, VL);
        for (int64_t i = (width - 1) / VL * VL; i >= 0; i -= VL) {
            vf block[VL];
#pragma GCC unroll 16
            for (int r = 0; r < VL; r++) {
                const real *from = x + (i + r) * x_line + p;
                block[r] = i + r >= lines ? vf_zero() : steps == VL ? vf_load(from) : vf_load_n(from, steps, 0);
            }
            vf_transpose(block);
#pragma GCC unroll 16
            for (int q = 0; q < VL; q++)
                if (q < steps)
                    vf_store(panel + (p + q) * width + i, block[q]);
        }
    }
}

static void pack_strided(real *panel, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line,
                         int64_t x_step) {
    for (int64_t p = 0; p < k; p++)
        for (int64_t i = 0; i < width; i++)
            panel[p * width + i] = i < lines ? x[i * x_line + p * x_step] : 0;
}

/* Bytes 2·width·k·sizeof(real), no flops: bound by memory when x is large, else by the shuffles. */
void TYPED(pack_panel)(real *panel, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line,
                       int64_t x_step) {
    if (x_line == 1)
        pack_rows(panel, x, width, lines, k, x_step);
    else if (x_step == 1)
        pack_transposed(panel, x, width, lines, k, x_line);
    else
        pack_strided(panel, x, width, lines, k, x_line, x_step);
}
