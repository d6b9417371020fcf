/* quantized.c: y = x Wᵀ + b for weights in blocks of 16, 8 or 4 bits.
 *
 * Flops 2·m·n·k; bytes n·k·(64, 34, 18 or 20)/32: for one token a half, a quarter or a seventh of what float weights are.
 * With a few rows memory or widening is the bound, with hundreds the FMA units.
 *
 * Every weight is widened to the float that it stands for, and that is all: x stays as it is, and the sums are those of
 * gemm.c on the widened weights, bit by bit. So a row has the same bits alone and among many, and nothing is lost but
 * what the blocks lost when they were made.
 *
 * Widening is a shift, a mask and a fused multiply-add. The bits of a quant u of n bits go to where a float in [1, 2)
 * has its first digits: f = 1 + u/2ⁿ. With D = 2ⁿ d, which has the 11 digits of a float16,
 *
 *     Q8_0, Q4_0:  d (u − 2ⁿ⁻¹) = D f − 1.5 D     (u = q + 128; q)     at most 20 digits: exact
 *     Q4_1:        d u + m      = D (f − 1) + m                        rounded once, by m
 *
 * A weight of 16 bits, BF16, is the upper half of a float, so it is moved there.
 *
 * The order of the sums wants rows of W in the lanes of a vector, and a GGUF file has a row's quants side by side. So when
 * a matrix is made its bytes are dealt out once: 32 rows are a panel, and in each of its blocks come 32 scales and 32
 * minima where there are any, then four bytes of quants of each row, the next four, and so on. That is one stream from
 * memory, and there is nothing left to shuffle. */
#include "gemm_micro.h"
#include "threads.h"

enum scheme { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, BF16 = 30 };

#define BLOCK 32                /* weights, */
#define PANEL 32                /* and rows */
#define AHEAD 2048              /* bytes: further than the hardware looks by itself */
#define PIECE_WEIGHTS (1 << 17) /* some ten microseconds: the least that is worth waking a thread for */

#define DIGITS (REAL_BITS == 32 ? 23 : 52)      /* of a real, after the point */
#define EXPONENT_BIAS (REAL_BITS == 32 ? 127 : 1023)
#define POWER_OF_2(n) ((real_int)(EXPONENT_BIAS + (n)) << DIGITS) /* its bits */

typedef uint16_t halves __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef int32_t words __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef float singles __attribute__((vector_size(4 * VL)));

ALWAYS_INLINE int64_t header_bytes(enum scheme scheme) { return scheme == BF16 ? 0 : scheme == Q4_1 ? 4 : 2; }
ALWAYS_INLINE int64_t quant_bytes(enum scheme scheme) { return scheme == BF16 ? 64 : scheme == Q8_0 ? 32 : 16; }
ALWAYS_INLINE int64_t block_bytes(enum scheme scheme) { return header_bytes(scheme) + quant_bytes(scheme); }

/* 2ⁿ times VL float16 numbers, finite ones. Their bits, moved to where a real has them, are a real too small by the
 * difference of the two formats' biases: subnormal numbers too. */
static inline vf load_halves(const uint8_t *p, int n) {
    vi bits = __builtin_convertvector(*(const halves *)p, vi);
    vf small = (vf)((bits & 0x7fff) << (DIGITS - 10)), factor = (vf)vi_set1(POWER_OF_2(EXPONENT_BIAS - 15 + n));
    return vf_copysign(small * factor, (vf)(bits << (REAL_BITS - 16)));
}

/* VL weights: of each lane the quant that begins at bit `bit`. */
ALWAYS_INLINE vf widen(vi quants, int bit, vf scale, vf offset, enum scheme scheme) {
    if (scheme == BF16) {
        words pair = __builtin_convertvector(quants, words);
        if (bit)
            return __builtin_convertvector((singles)(pair & (int32_t)0xffff0000), vf);
        return __builtin_convertvector((singles)(pair << 16), vf);
    }
    const int bits = scheme == Q8_0 ? 8 : 4, up = DIGITS - bits - bit;
    vi digits = up >= 0 ? quants << (up & (REAL_BITS - 1)) : quants >> (-up & (REAL_BITS - 1));
    vf f = (vf)((digits & ((((real_int)1 << bits) - 1) << (DIGITS - bits))) | POWER_OF_2(0));
    return vf_fma(scheme == Q4_1 ? f - 1 : f, scale, offset);
}

/* Where a vector of rows of W has its blocks, and which of a panel's rows they are. */
struct lanes {
    const uint8_t *block;
    int64_t lane;
};

/* At step p, rows `row` … row + VL − 1. Beyond the last panel the last one is repeated. */
ALWAYS_INLINE struct lanes lanes_at(const struct product *x, int64_t row, int64_t p, enum scheme scheme) {
    int64_t panel = at_most(row, x->n - 1) / PANEL, block = panel * (x->k / BLOCK) + p / BLOCK;
    return (struct lanes){(const uint8_t *)x->stored + block * PANEL * block_bytes(scheme), row % PANEL};
}

/* The 32 steps of a block, in ascending order, for `vectors` vectors of rows of W, at most WIDE: adds
 * x[i·x_row + step] · weights to sum[i], i < rows; or with rows = 0 writes the weights of each step to `to`. */
#define WIDE 4
ALWAYS_INLINE void walk_block(const struct lanes *at, int vectors, enum scheme scheme, int rows, vf (*sum)[WIDE],
                              const real *x, int64_t x_row, real *to) {
    vf scale[WIDE], offset[WIDE];
    for (int v = 0; v < vectors; v++) {
        const uint8_t *head = at[v].block + 2 * at[v].lane;
        scale[v] = scheme == BF16 ? vf_zero() : load_halves(head, scheme == Q8_0 ? 8 : 4);
        offset[v] = scheme == Q4_1 ? load_halves(head + 2 * PANEL, 0) : scale[v] * (real)-1.5;
    }
    const int a_word = scheme == BF16 ? 2 : 4, bits = 32 / a_word;
#define HALF(half)                                                                                                \
    for (int64_t w = 0; w < quant_bytes(scheme) / 4; w++) {                                                       \
        vi quants[WIDE];                                                                                          \
        for (int v = 0; v < vectors; v++) {                                                                       \
            const uint8_t *four = at[v].block + PANEL * (header_bytes(scheme) + 4 * w) + 4 * at[v].lane;          \
            __builtin_prefetch(four + AHEAD);                                                                     \
            quants[v] = __builtin_convertvector(*(const words *)four, vi);                                        \
            if (scheme == Q8_0) /* signed bytes q as q + 128 */                                                   \
                quants[v] ^= (int32_t)0x80808080;                                                                 \
        }                                                                                                         \
        _Pragma("GCC unroll 4") for (int i = 0; i < a_word; i++, x++) {                                           \
            for (int v = 0; v < vectors; v++) {                                                                   \
                vf weight = widen(quants[v], bits * i + 4 * half, scale[v], offset[v], scheme);                   \
                if (!rows)                                                                                        \
                    vf_store(to + v * VL, weight);                                                                \
                _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++)                                      \
                    sum[row][v] = vf_fma(vf_set1(x[row * x_row]), weight, sum[row][v]);                           \
            }                                                                                                     \
            to += rows ? 0 : vectors * VL;                                                                        \
        }                                                                                                         \
    }
    HALF(0) /* of 4-bit quants the lower halves of bytes are the first 16 weights of a block */
    if (scheme == Q4_0 || scheme == Q4_1)
        HALF(1)
}

/* ── a few rows ──────────────────────────────────────────────────────────────────────────────────── */

/* Vectors of columns at once: so many that their chains hide the latency of the additions. */
#define VECTORS(rows) ((rows) == 1 ? WIDE : 2)

/* Columns j … j + VECTORS · VL − 1 of y, as far as there are: for each block of KC steps a chain from zero, then the
 * bias. */
ALWAYS_INLINE void multiply_columns(const struct product *x, int rows, int64_t j, enum scheme scheme) {
    const int vectors = VECTORS(rows);
    struct lanes at[WIDE];
    for (int v = 0; v < vectors; v++)
        at[v] = lanes_at(x, j + v * VL, 0, scheme);
    vf total[FEW_ROWS][WIDE] = {{{0}}};
    for (int64_t p = 0; p < x->k;) {
        int64_t first = p, end = at_most(x->k, p + KC);
        vf sum[FEW_ROWS][WIDE] = {{{0}}};
        for (; p < end; p += BLOCK) {
            walk_block(at, vectors, scheme, rows, sum, x->a + p, x->a_row, NULL);
            for (int v = 0; v < vectors; v++)
                at[v].block += PANEL * block_bytes(scheme);
        }
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++)
                total[i][v] = first ? total[i][v] + sum[i][v] : sum[i][v];
    }
    for (int i = 0; i < rows; i++)
        for (int64_t v = 0; v < vectors && j + v * VL < x->n; v++) {
            int64_t column = j + v * VL, columns = x->n - column;
            vf y = total[i][v];
            if (x->bias)
                y += load_up_to(x->bias + column, columns);
            store_up_to(x->c + i * x->c_row + column, y, columns);
        }
}

typedef void columns_function(const struct product *x, int64_t j);

#define COLUMNS(rows, scheme)                                                                                     \
    static void columns_##rows##_##scheme(const struct product *x, int64_t j) { multiply_columns(x, rows, j, scheme); }
#define EACH(rows) COLUMNS(rows, Q4_0) COLUMNS(rows, Q4_1) COLUMNS(rows, Q8_0) COLUMNS(rows, BF16)
#define NAMES(rows) {columns_##rows##_Q4_0, columns_##rows##_Q4_1, columns_##rows##_Q8_0, columns_##rows##_BF16}
EACH(1) EACH(2) EACH(3) EACH(4)
#if FEW_ROWS == 8
EACH(5) EACH(6) EACH(7) EACH(8)
#endif

static columns_function *const columns_of[FEW_ROWS][4] = {
    NAMES(1), NAMES(2), NAMES(3), NAMES(4),
#if FEW_ROWS == 8
    NAMES(5), NAMES(6), NAMES(7), NAMES(8),
#endif
};

/* Index: VECTORS · VL columns of y. */
static void multiply_few_rows(void *context, int64_t begin, int64_t end) {
    const struct product *x = context;
    int which = x->scheme == Q4_0 ? 0 : x->scheme == Q4_1 ? 1 : x->scheme == Q8_0 ? 2 : 3;
    columns_function *columns = columns_of[x->m - 1][which];
    for (int64_t j = begin; j < end; j++)
        columns(x, j * VECTORS(x->m) * VL);
}

/* ── many rows: what gemm.c asks for when it packs B ─────────────────────────────────────────────── */

ALWAYS_INLINE void unpack_columns(real *to, const struct product *x, int64_t column, int64_t p, int64_t depths,
                                  enum scheme scheme) {
    struct lanes at[WIDE] = {lanes_at(x, column, p, scheme), lanes_at(x, column + VL, p, scheme)};
    for (int64_t end = p + depths; p < end; p += BLOCK, to += BLOCK * NR) {
        walk_block(at, 2, scheme, 0, NULL, NULL, 0, to);
        at[0].block += PANEL * block_bytes(scheme);
        at[1].block += PANEL * block_bytes(scheme);
    }
}

static void unpack_panels(real *packed, const struct product *x, int64_t column, int64_t columns, int64_t p,
                          int64_t depths) {
    for (int64_t end = column + columns; column < end; column += NR, packed += panel_size(NR, depths)) {
        switch (x->scheme) {
        case Q4_0: unpack_columns(packed, x, column, p, depths, Q4_0); break;
        case Q4_1: unpack_columns(packed, x, column, p, depths, Q4_1); break;
        case Q8_0: unpack_columns(packed, x, column, p, depths, Q8_0); break;
        default: unpack_columns(packed, x, column, p, depths, BF16);
        }
    }
}

KERNEL(quantized_linear)(real *y, const real *x, const uint8_t *panels, const real *bias, int64_t m, int64_t n, int64_t k,
                         int scheme) {
    struct product product = {.c = y, .a = x, .bias = bias, .m = m, .n = n, .k = k, .a_row = k, .a_col = 1, .c_row = n,
                              .unpack = unpack_panels, .stored = panels, .scheme = scheme};
    if (m <= 0 || n <= 0)
        return;
    if (m <= FEW_ROWS)
        parallel_for(divide_up(n, VECTORS(m) * VL), 1 + PIECE_WEIGHTS / (1 + VECTORS(m) * VL * k), multiply_few_rows,
                     &product);
    else
        TYPED(multiply_product)(&product);
}
