/* gemm_micro.c: the register tile of a matrix product, and the packing that feeds it. See gemm_micro.h. */
#include "gemm_micro.h"
#include "transpose.h"

#define PREFETCH_ROWS 8                        /* runs of memory are asked for 8 steps ahead, */
#define PREFETCH_STEPS (512 / (REAL_BITS / 8)) /* transposed lines 8 cache lines ahead */

/* ── the register tile ───────────────────────────────────────────────────────────────────────────── */

/* Inlined with constant rows and vectors, so that the loops unroll and `sum` lives in registers.
 * Flops 2·rows·vectors·VL·k, bytes from cache (rows + vectors·VL)·k·sizeof(real): bound by the FMA units, as long as
 * nothing else takes their turns.
 *
 * Three bases and the strides 1 … 4 reach the rows of A: as many address registers as the processor has to spare. Where
 * A is packed, one address does, and two steps have no arithmetic but their FMAs, since four operations start in a
 * cycle and FMAs are two of them. B comes from the second-level cache, and C from wherever it is, meanwhile. */
#define EACH_ROW _Pragma("GCC unroll 14") for (int i = 0; i < rows; i++)

static inline __attribute__((always_inline)) void ask_for_tile(int rows, const real *tile, int64_t tile_row) {
    EACH_ROW {
        __builtin_prefetch(tile, 1);
        __builtin_prefetch(tile + NR - 1, 1);
        tile += tile_row;
    }
}

#ifndef PAIRS /* gemm_micro_bf16.c, where an element is a pair, has its own */
#define EVERYWHERE vf_set1
#define MULTIPLY_ADD vf_fma
#define MICRO_TILE TYPED(micro_tile)
#endif

/* The last vector of a row, of which n elements are there. AVX-512 asks for no more at the price of a whole one. */
static inline vf load_end(const real *p, int64_t n) { return VECTOR_BYTES == 64 ? vf_load_n(p, n, 0) : load_up_to(p, n); }
static inline void store_end(real *p, vf v, int64_t n) { VECTOR_BYTES == 64 ? vf_store_n(p, v, n) : store_up_to(p, v, n); }

/* One step of the depth: the vectors at b, of which the last has `end` elements, times rows elements of A. `again` is
 * the element as well, in every other row by another name. */
#define STEP(b, end, element, again)                                                                              \
    do {                                                                                                          \
        vf left = vectors == 2 ? vf_load(b) : load_end(b, end);                                                   \
        vf right = vectors == 2 ? load_end((b) + VL, end) : vf_zero();                                            \
        EACH_ROW {                                                                                                \
            vf x = EVERYWHERE(element);                                                                           \
            sum[i][0] = MULTIPLY_ADD(x, left, sum[i][0]);                                                         \
            if (vectors == 2)                                                                                     \
                sum[i][1] = MULTIPLY_ADD(i % 2 ? EVERYWHERE(again) : x, right, sum[i][1]);                        \
        }                                                                                                         \
    } while (0)

static inline __attribute__((always_inline)) void strided_sums(int rows, int vectors, int64_t end, vf (*sum)[2],
                                                               const real *a, const real *b, int64_t k, int64_t a_row,
                                                               int64_t a_step, int64_t b_step) {
    const real *base[3] = {a, a + 5 * a_row, a + 10 * a_row};
    const int64_t row[5] = {0, a_row, 2 * a_row, 3 * a_row, 4 * a_row};
    for (int64_t p = 0; p < k; p++) {
        STEP(b, end, base[i / 5][row[i % 5]], base[i / 5][row[i % 5]]);
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++)
            base[i] += a_step;
        b += b_step;
    }
}

static inline __attribute__((always_inline)) void packed_sums(int rows, int vectors, vf (*sum)[2], const real *a,
                                                              const real *b, int64_t k) {
    const real *same = a;
    __asm__("" : "+r"(same)); /* the compiler is not to know */
    for (; k >= 2; k -= 2) {
#pragma GCC unroll 4
        for (int line = 0; line < 2 * NR; line += 64 / (REAL_BITS / 8))
            __builtin_prefetch(b + PREFETCH_ROWS * NR + line);
        STEP(b, VL, a[i], same[i]);
        STEP(b + NR, VL, a[rows + i], same[rows + i]);
        a += 2 * rows;
        same += 2 * rows;
        b += 2 * NR;
    }
    if (k)
        STEP(b, VL, a[i], same[i]);
}

static inline __attribute__((always_inline)) void load_sums(int rows, int vectors, vf (*sum)[2], const real *chain) {
    EACH_ROW {
        sum[i][0] = chain ? vf_load(chain + i * NR) : vf_zero();
        sum[i][1] = chain && vectors == 2 ? vf_load(chain + i * NR + VL) : vf_zero();
    }
}

static inline __attribute__((always_inline)) void store_sums(int rows, int vectors, int64_t end, vf (*sum)[2],
                                                             real *tile, int64_t tile_row,
                                                             const struct beside *beside) {
    const real *partial = beside->partial;
    int last = vectors - 1;
    if (partial)
        EACH_ROW {
            vf factor = beside->factor ? vf_set1(beside->factor[i]) : vf_zero();
            vf left = vectors == 2 ? vf_load(partial) : vf_zero(), right = load_end(partial + last * VL, end);
            if (vectors == 2)
                sum[i][0] = beside->factor ? vf_fma(left, factor, sum[i][0]) : left + sum[i][0];
            sum[i][last] = beside->factor ? vf_fma(right, factor, sum[i][last]) : right + sum[i][last];
            partial += beside->partial_row;
        }
    if (beside->bias) {
        vf left = vectors == 2 ? vf_load(beside->bias) : vf_zero(), right = load_end(beside->bias + last * VL, end);
        EACH_ROW {
            if (vectors == 2)
                sum[i][0] += left;
            sum[i][last] += right;
        }
    }
    EACH_ROW {
        if (vectors == 2)
            vf_store(tile, sum[i][0]);
        store_end(tile + last * VL, sum[i][last], end);
        tile += tile_row;
    }
}

typedef void micro_function(real *tile, const real *a, const real *b, int64_t end, int64_t k, int64_t tile_row,
                            int64_t a_row, int64_t a_step, int64_t b_step, const struct beside *beside);

#define STRIDED(rows, vectors)                                                                                    \
    static void strided_##rows##_##vectors(real *tile, const real *a, const real *b, int64_t end, int64_t k,      \
                                           int64_t tile_row, int64_t a_row, int64_t a_step, int64_t b_step,       \
                                           const struct beside *beside) {                                         \
        vf sum[rows][2];                                                                                          \
        ask_for_tile(rows, tile, tile_row);                                                                       \
        load_sums(rows, vectors, sum, beside->chain);                                                             \
        strided_sums(rows, vectors, end, sum, a, b, k, a_row, a_step, b_step);                                    \
        store_sums(rows, vectors, end, sum, tile, tile_row, beside);                                              \
    }
#define PACKED(rows, vectors)                                                                                     \
    static void packed_##rows##_##vectors(real *tile, const real *a, const real *b, int64_t end, int64_t k,       \
                                          int64_t tile_row, int64_t a_row, int64_t a_step, int64_t b_step,        \
                                          const struct beside *beside) {                                          \
        (void)end, (void)a_row, (void)a_step, (void)b_step;                                                       \
        vf sum[rows][2] = {{{0}}};                                                                                \
        ask_for_tile(rows, tile, tile_row);                                                                       \
        packed_sums(rows, vectors, sum, a, b, k);                                                                 \
        store_sums(rows, vectors, VL, sum, tile, tile_row, beside);                                               \
    }
#ifdef PAIRS /* whose A is lines, one behind the other */
#define MICRO_PAIR(rows) STRIDED(rows, 1) STRIDED(rows, 2)
#define NAMES(rows) {{strided_##rows##_1, strided_##rows##_2}}
#else
#define MICRO_PAIR(rows) STRIDED(rows, 1) STRIDED(rows, 2) PACKED(rows, 1) PACKED(rows, 2)
#define NAMES(rows) {{strided_##rows##_1, strided_##rows##_2}, {packed_##rows##_1, packed_##rows##_2}}
#endif

MICRO_PAIR(1) MICRO_PAIR(2) MICRO_PAIR(3) MICRO_PAIR(4) MICRO_PAIR(5) MICRO_PAIR(6)
#if MR == 14
MICRO_PAIR(7) MICRO_PAIR(8) MICRO_PAIR(9) MICRO_PAIR(10) MICRO_PAIR(11) MICRO_PAIR(12) MICRO_PAIR(13) MICRO_PAIR(14)
#endif

static micro_function *const micro[MR][2][2] = {
    NAMES(1),  NAMES(2),  NAMES(3),  NAMES(4),  NAMES(5),  NAMES(6),
#if MR == 14
    NAMES(7),  NAMES(8),  NAMES(9),  NAMES(10), NAMES(11), NAMES(12), NAMES(13), NAMES(14),
#endif
};

void MICRO_TILE(real *tile, const real *a, const real *b, int64_t rows, int64_t columns, int64_t k, int64_t tile_row,
                int64_t a_row, int64_t a_step, int64_t b_step, const struct beside *beside) {
    int vectors = columns > VL ? 2 : 1, packed = a_row == 1 && a_step == rows && b_step == NR && columns % VL == 0;
    micro[rows - 1][packed][vectors - 1](tile, a, b, columns - (vectors - 1) * VL, k, tile_row, a_row, a_step, b_step,
                                         beside);
}

#ifndef PAIRS

/* ── packing ─────────────────────────────────────────────────────────────────────────────────────── */

/* One step: n elements, then zeros up to width. */
static inline void pack_step(real *to, const real *from, int64_t width, int64_t n) {
    for (int64_t i = 0; i < width; i += VL)
        vf_store(to + i, n > i ? load_up_to(from + i, n - i) : vf_zero());
}

/* The lines lie side by side in x: each step in k is one run of memory, dealt out to the panels. */
static inline __attribute__((always_inline)) void pack_rows(real *packed, const real *x, int64_t width,
                                                            int64_t lines, int64_t k, int64_t x_step) {
    int64_t stride = panel_size(width, k), whole = lines / width * width;
    for (int64_t p = 0; p < k; p++) {
        const real *from = x + p * x_step;
        real *to = packed + p * width;
        for (int64_t i = 0; i < lines; i += 64 / (REAL_BITS / 8))
            __builtin_prefetch(from + PREFETCH_ROWS * x_step + i);
        for (int64_t line = 0; line < whole; line += width, from += width, to += stride)
            pack_step(to, from, width, width);
        if (whole < lines)
            pack_step(to, from, width, lines - whole);
    }
}

/* VL lines of x, VL steps of each, become VL steps of the panel. Not inlined: the compiler would carry all
 * 2·VL addresses through the loops around it. */
static __attribute__((noinline)) void transpose_whole(real *to, int64_t width, const real *x, int64_t x_line) {
    vf block[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
        block[i] = vf_load(x + i * x_line);
        __builtin_prefetch(x + i * x_line + PREFETCH_STEPS);
    }
    vf_transpose(block);
#pragma GCC unroll 16
    for (int q = 0; q < VL; q++)
        vf_store(to + q * width, block[q]);
}

/* The same for `lines` lines and `steps` steps, either of them at most VL. */
static __attribute__((noinline)) void transpose_part(real *to, int64_t width, const real *x, int64_t x_line,
                                                     int64_t lines, int64_t steps) {
    vf block[VL];
    load_turned(block, x, x_line, lines, steps);
#pragma GCC unroll 16
    for (int q = 0; q < VL; q++)
        if (q < steps)
            vf_store(to + q * width, block[q]);
}

/* Each line is contiguous in x. The last VL lines of a panel go first, so that what they spill over the end of
 * a step is overwritten by the first ones of the next; they may be lines of the next panel, and need not be zero. */
static void pack_transposed(real *packed, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line) {
    for (int64_t line = 0; line < lines; line += width, packed += panel_size(width, k)) {
        int64_t here = at_most(lines - line, width);
        for (int64_t p = 0; p < k; p += VL)
            for (int64_t i = (width - 1) / VL * VL; i >= 0; i -= VL) {
                const real *from = x + (line + i) * x_line + p;
                if (lines - line - i >= VL && k - p >= VL)
                    transpose_whole(packed + p * width + i, width, from, x_line);
                else
                    transpose_part(packed + p * width + i, width, from, x_line, here - i, k - p);
            }
    }
}

static void pack_strided(real *packed, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line,
                         int64_t x_step) {
    for (int64_t line = 0; line < lines; line += width, packed += panel_size(width, k))
        for (int64_t p = 0; p < k; p++)
            for (int64_t i = 0; i < width; i++)
                packed[p * width + i] = i < lines - line ? x[(line + i) * x_line + p * x_step] : 0;
}

/* Bytes 2·lines·k·sizeof(real), no flops: bound by memory when x is large, else by the shuffles (log₂ VL of them
 * for each vector of a transposed line). */
void TYPED(pack_panels)(real *packed, const real *x, int64_t width, int64_t lines, int64_t k, int64_t x_line,
                        int64_t x_step) {
    if (x_line == 1 && width == NR)
        pack_rows(packed, x, NR, lines, k, x_step); /* a constant width unrolls */
    else if (x_line == 1 && width == MR)
        pack_rows(packed, x, MR, lines, k, x_step);
    else if (x_line == 1)
        pack_rows(packed, x, width, lines, k, x_step);
    else if (x_step == 1)
        pack_transposed(packed, x, width, lines, k, x_line);
    else
        pack_strided(packed, x, width, lines, k, x_line, x_step);
}

#endif
