/* gemm_bf16.c: numbers rounded to pairs of bfloat16, and a product of tiles of them.
 *
 * Numbers of 8 digits are multiplied in a ninth of the room that 24 digits take, so a processor has more such
 * multipliers: twice as many in a register of pairs (AVX512_BF16, Zen 4), sixteen times as many in a tile of 16 × 16
 * sums (AMX, Sapphire Rapids). Both add in float, and both want two neighbours in depth side by side. Such a pair takes
 * the place of a float, and the blocking of gemm.c moves pairs as it moves floats.
 *
 * The tile. TDPBF16PS: C (16 × 16 floats) += A (16 rows × 16 pairs) B (16 pairs × 16 columns), 16,384 flops in 16
 * cycles; for each element of C
 *
 *     even = Σ a[2q] b[2q], odd = Σ a[2q + 1] b[2q + 1] over the 16 pairs, one chain each; C ← C + (even + odd)
 *
 * and subnormal numbers are zeros. 2 × 2 tiles of C share what is loaded: two tiles of A and two of B for four
 * products, 4 · 8 cycles of loads beside 4 · 16 of arithmetic. Intel 2023, Optimization Reference Manual, ch. 20. */
#include "gemm_bf16.h"
#include "transpose.h"
#if BF16_UNITS

/* ── pairs ───────────────────────────────────────────────────────────────────────────────────────── */

#pragma GCC target("avx512bf16")

/* 32 neighbours in depth: 16 pairs. */
static inline vf join_neighbours(vf first, vf second) {
    return (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

/* Two depths of 16 lines: a pair of each line. */
static inline vf join_depths(vf even, vf odd) {
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vf)_mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

/* The first n floats, 0 beyond them and for n ≤ 0. */
static inline vf load_first(const float *p, int64_t n) { return n > 0 ? load_up_to(p, n) : vf_zero(); }

/* Of a block of x, 16 lines by 16 pairs, of which `lines` and `depths` are there: line i, where a line is one run of
 * memory; or pair i of every line, where a depth is. `stride` lies between runs. */
ALWAYS_INLINE vf pairs_of_run(const float *x, int64_t stride, int64_t i, int along_lines, int64_t lines,
                              int64_t depths) {
    if (along_lines) {
        x += i * stride;
        return i < lines ? join_neighbours(load_first(x, depths), load_first(x + VL, depths - VL)) : vf_zero();
    }
    x += 2 * i * stride;
    return join_depths(2 * i < depths ? load_first(x, lines) : vf_zero(),
                       2 * i + 1 < depths ? load_first(x + stride, lines) : vf_zero());
}

/* The block to `to`: line after line or pair after pair, `row` apart. */
ALWAYS_INLINE void pack_block(float *to, int64_t row, int to_lines, const float *x, int64_t stride, int along_lines,
                              int64_t lines, int64_t depths) {
    vf block[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
        block[i] = pairs_of_run(x, stride, i, along_lines, lines, depths);
    if (along_lines != to_lines)
        vf_transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
        if (!to_lines || i < lines)
            vf_store(to + i * row, block[i]);
}

/* Whole blocks have their own code, without the questions. */
ALWAYS_INLINE void pack_run(float *to, int64_t row, int to_lines, const float *x, int64_t stride, int along_lines,
                            int64_t lines, int64_t depths) {
    if (lines >= VL && depths >= 2 * VL)
        pack_block(to, row, to_lines, x, stride, along_lines, VL, 2 * VL);
    else
        pack_block(to, row, to_lines, x, stride, along_lines, at_most(lines, VL), at_most(depths, 2 * VL));
}

/* Neither lines nor depths are runs. */
static void pack_strided(float *to, int64_t row, int to_lines, const float *x, int64_t x_line, int64_t x_step,
                         int64_t lines, int64_t depths) {
    float copy[VL * 2 * VL];
    lines = at_most(lines, VL), depths = at_most(depths, 2 * VL);
    for (int64_t i = 0; i < lines; i++)
        for (int64_t p = 0; p < depths; p++)
            copy[i * 2 * VL + p] = x[i * x_line + p * x_step];
    pack_block(to, row, to_lines, copy, 2 * VL, 1, lines, depths);
}

/* All blocks, along the runs of memory. Bytes 6 · lines · depths: bound by the caches, and where lines become depths, or
 * depths lines, by log₂ 16 shuffles a vector. */
ALWAYS_INLINE void pack_pairs(float *to, int to_lines, const float *x, int64_t lines, int64_t depths, int64_t x_line,
                              int64_t x_step) {
    int64_t pairs = pairs_of(depths), across = pairs / VL, down = divide_up(lines, VL);
    for (int64_t block = 0; block < down * across; block++) {
        int64_t i = VL * (x_line == 1 ? block % down : block / across);
        int64_t q = VL * (x_line == 1 ? block / down : block % across);
        float *at = to + (to_lines ? i * pairs + q : i / NR * NR * pairs + q * NR + i % NR);
        const float *from = x + i * x_line + 2 * q * x_step;
        int64_t row = to_lines ? pairs : NR, more_lines = lines - i, more_depths = depths - 2 * q;
        if (x_step == 1)
            pack_run(at, row, to_lines, from, x_line, 1, more_lines, more_depths);
        else if (x_line == 1)
            pack_run(at, row, to_lines, from, x_step, 0, more_lines, more_depths);
        else
            pack_strided(at, row, to_lines, from, x_line, x_step, more_lines, more_depths);
    }
}

void pack_pair_lines(float *to, const float *x, int64_t lines, int64_t depths, int64_t x_line, int64_t x_step) {
    pack_pairs(to, 1, x, lines, depths, x_line, x_step);
}

void pack_pair_panels(float *to, const float *x, int64_t lines, int64_t depths, int64_t x_line, int64_t x_step) {
    pack_pairs(to, 0, x, lines, depths, x_line, x_step);
}

/* ── tiles ───────────────────────────────────────────────────────────────────────────────────────── */

#define AMX __attribute__((target("amx-tile,amx-bf16")))

/* All eight tiles have 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX void amx_begin(void) { _tile_loadconfig(&TILES); }

AMX void amx_end(void) { _tile_release(); }

/* Tiles 0 … 3 are C, 4 and 5 A, 6 and 7 B: the lower two of C and 5 of more than 16 rows, 1, 3 and 7 of two vectors.
 * Pointers are in parentheses because in some compilers' headers these are macros that forget theirs. */
AMX ALWAYS_INLINE void multiply_tiles(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b,
                                      int64_t pairs, int lower, int right) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t q = 0; q < pairs; q += PAIR_BLOCK, a += PAIR_BLOCK, b += PAIR_BLOCK * NR) {
        _tile_loadd(6, b, (NR * sizeof *b));
        _tile_loadd(4, a, (a_row * sizeof *a));
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
            _tile_loadd(7, (b + VL), (NR * sizeof *b));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (lower) {
            _tile_loadd(5, (a + 16 * a_row), (a_row * sizeof *a));
            _tile_dpbf16ps(2, 5, 6);
        }
        if (lower && right)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, (c_row * sizeof *c));
    if (right)
        _tile_stored(1, (c + VL), (c_row * sizeof *c));
    if (lower)
        _tile_stored(2, (c + 16 * c_row), (c_row * sizeof *c));
    if (lower && right)
        _tile_stored(3, (c + 16 * c_row + VL), (c_row * sizeof *c));
}

/* Tiles go straight to C if nothing is beside them and they are whole, and else by way of the first-level cache. */
AMX void amx_tile(float *tile, const float *a, const float *b, int64_t rows, int64_t columns, int64_t pairs,
                  int64_t tile_row, int64_t a_row, int64_t a_step, int64_t b_step, const struct beside *beside) {
    (void)a_step, (void)b_step; /* 1 and NR */
    float sums[AMX_ROWS * NR];
    int vectors = columns > VL ? 2 : 1;
    int straight = !beside->partial && !beside->bias && rows % 16 == 0 && columns % VL == 0;
    float *c = straight ? tile : sums;
    int64_t c_row = straight ? tile_row : NR;
    if (rows > 16 && vectors == 2)
        multiply_tiles(c, c_row, a, a_row, b, pairs, 1, 1);
    else if (rows > 16)
        multiply_tiles(c, c_row, a, a_row, b, pairs, 1, 0);
    else if (vectors == 2)
        multiply_tiles(c, c_row, a, a_row, b, pairs, 0, 1);
    else
        multiply_tiles(c, c_row, a, a_row, b, pairs, 0, 0);
    for (int64_t i = 0; i < rows && !straight; i++)
        for (int64_t j = 0; j < columns; j += VL) {
            int64_t n = columns - j;
            vf sum = vf_load(sums + i * NR + j);
            if (beside->partial)
                sum = load_up_to(beside->partial + i * beside->partial_row + j, n) + sum;
            if (beside->bias)
                sum += load_up_to(beside->bias + j, n);
            store_up_to(tile + i * tile_row + j, sum, n);
        }
}

#else
typedef int no_such_unit; /* ISO C wants something here */
#endif
