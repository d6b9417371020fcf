/* simd_math_wide.h: sin, cos, pow and 1/√x, whose float results need more digits on the way than float has.
 *
 * A vector of float is computed as two vectors of double. sin and cos need it for x − n π/2, which cancels
 * the leading digits; pow for y log₂ x, whose absolute error becomes the relative error of 2^(y log₂ x);
 * 1/√x because two roundings to float, of √ and of the quotient, would cost a unit and a half. The
 * arithmetic is + and × of doubles without FMA, so pow and 1/√x give the same bits at every level.
 *
 * double goes to the C library, as in simd_math.h. */
#ifndef SIMD_MATH_WIDE_H
#define SIMD_MATH_WIDE_H
#include "simd_math.h"

#if REAL_BITS == 32

/* Adding and subtracting 1.5 · 2⁵² rounds a double to a whole number, which then stands in the low bits. */
#define ROUND_MAGIC 0x1.8p52

/* ── 1/√x ───────────────────────────────────────────────────────────────────────────────────────── */
static inline vd vd_rsqrt(vd x) {
    for (int i = 0; i < HALF_VL; i++) x[i] = __builtin_sqrt(x[i]);
    return 1.0 / x;
}
static inline vf vf_rsqrt(vf x) { return vf_narrow(vd_rsqrt(vd_low(x)), vd_rsqrt(vd_high(x))); }

/* ── sin, cos ───────────────────────────────────────────────────────────────────────────────────── */

/* x = n π/2 + r with |r| ≤ π/4, for |x| < 2²⁰. The first part of π/2 has 33 bits: n times it is exact. */
static inline vd reduce_half(vd x, vd *n) {
    *n = (x * 0x1.45f306dc9c883p-1 + ROUND_MAGIC) - ROUND_MAGIC;
    return (x - *n * 0x1.921fb544p+0) - *n * 0x1.0b4611a626331p-34;
}

/* The same for any finite |x| ≥ 2²⁰, after Payne and Hanek (1983): only those digits of 2/π matter that
 * move x · 2/π within one turn. x = m 2ᵉ; the digits from weight 2^(1−e) on, times m, are the turn modulo 4
 * as a 96-bit fixed-point number whose top two bits are the quadrant. */
static float reduce_huge(float x, int *quadrant) {
    static const uint32_t two_over_pi[] = {0, /* the digits before the point */
                                           0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0,
                                           0xDB629599, 0x3C439041, 0xFE5163AB, 0xDEBBC561};
    int exponent;
    uint64_t m = (uint64_t)(frexpf(fabsf(x), &exponent) * 0x1p24f);
    int first = exponent - 24 - 2 + 32; /* index of the first digit that matters, from the table's start */
    const uint32_t *word = two_over_pi + first / 32;
    int shift = first % 32;
    unsigned __int128 digits = 0;
    for (int i = 0; i < 4; i++) digits = digits << 32 | word[i];
    digits = digits << shift >> 32; /* 96 of them */
    unsigned __int128 turn = digits * m << 32 >> 32;
    int q = (int)((turn + ((unsigned __int128)1 << 93)) >> 94);
    double fraction = (double)((__int128)turn - ((__int128)q << 94)) * 0x1p-94;
    *quadrant = x < 0 ? -q : q;
    return (float)(x < 0 ? fraction * -0x1.921fb54442d18p+0 : fraction * 0x1.921fb54442d18p+0);
}

/* sin(r + quadrant π/2) for |r| ≤ π/4. */
static inline vf sin_of_quadrant(vf r, vi quadrant) {
    vf square = r * r;
    vf s = vf_fma(square * r, POLYNOMIAL(square, -0x1.555544p-3f, 0x1.1106bcp-7f, -0x1.991696p-13f), r);
    vf c = POLYNOMIAL(square, 1, -0.5f, 0x1.55554ap-5f, -0x1.6c0c1ap-10f, 0x1.99e0eep-16f);
    vf y = vf_select((quadrant & 1) != 0, c, s);
    return vf_from_bits(vf_bits(y) ^ ((quadrant & 2) << 30));
}

/* sin(x + shift π/2), shift = 0 or 1. */
static inline vf sin_shifted(vf x, int shift) {
    vd n_low, n_high, low = reduce_half(vd_low(x), &n_low), high = reduce_half(vd_high(x), &n_high);
    vf r = vf_narrow(low, high);
    vi quadrant = __builtin_convertvector(vf_narrow(n_low, n_high), vi);
    vi huge = vf_abs(x) >= vf_set1(0x1p20f);
    if (__builtin_expect(vi_any(huge), 0)) {
        for (int i = 0; i < VL; i++) {
            int q = 0;
            if (huge[i]) r[i] = isinf(x[i]) ? NAN : reduce_huge(x[i], &q), quadrant[i] = q;
        }
    }
    return sin_of_quadrant(r, quadrant + shift);
}
static inline vf vf_sin(vf x) { return vf_select(x == 0, x, sin_shifted(x, 0)); }
static inline vf vf_cos(vf x) { return sin_shifted(x, 1); }

/* cos(2πu) and sin(2πu) for 0 ≤ u < 1: the quadrant is taken off u before π comes in, so nothing is lost. */
static inline void vf_turn(vf u, vf *cosine, vf *sine) {
    vf quarters = vf_round(u * vf_set1(4));
    vf r = (u - quarters * vf_set1(0.25f)) * vf_set1(0x1.921fb6p+2f);
    vi quadrant = __builtin_convertvector(quarters, vi);
    *cosine = sin_of_quadrant(r, quadrant + 1);
    *sine = sin_of_quadrant(r, quadrant);
}

/* ── pow ────────────────────────────────────────────────────────────────────────────────────────── */

/* log₂ x of x ≥ 0, to 2⁻³⁶: x = m 2ᵏ, log₂ m = s P(s²) with s = (m − 1)/(m + 1). */
static inline vd vd_log2(vd x) {
    const int64_t sqrt_half = 0x3fe6a09e667f3bcd; /* as bits */
    vl bits = (vl)x - sqrt_half;
    vd k = (vd)((bits >> 52) + (vl)vd_set1(ROUND_MAGIC)) - ROUND_MAGIC;
    vd m = (vd)((bits & 0xfffffffffffff) + sqrt_half);
    vd s = (m - 1) / (m + 1);
    vd log2_m = s * POLYNOMIAL_WIDE(s * s, 0x1.71547652bee99p+1, 0x1.ec709d12165e5p-1, 0x1.27778068ecf76p-1,
                                    0x1.a58d4fec0b112p-2, 0x1.5cec41b2db113p-2);
    vd finite = vd_select(x == 0, vd_set1(-INFINITY), k + log2_m);
    return vd_select(x < INFINITY, finite, x);
}

/* 2ᵛ to 2⁻³⁴: v = n + f, |f| ≤ ½. Beyond ±1000 a float has long overflowed or vanished. */
static inline vd vd_exp2(vd v) {
    vd near = vd_select(v > 1000, vd_set1(1000), vd_select(v < -1000, vd_set1(-1000), v));
    vd shifted = near + ROUND_MAGIC, f = near - (shifted - ROUND_MAGIC);
    vd p = POLYNOMIAL_WIDE(f, 0x1.ffffffffabbb6p-1, 0x1.62e42ff11623fp-1, 0x1.ebfbe0a4bf5aep-3,
                           0x1.c6b08aaf31984p-5, 0x1.3b29dc404d501p-7, 0x1.5d8a708503431p-10,
                           0x1.446a2037e3044p-13, 0x1.fe17891f05629p-17);
    return vd_select(v == v, (vd)((vl)p + ((vl)shifted << 52)), v);
}

/* aᵇ = ±2^(b log₂ |a|), with the special cases of the C standard (Annex F.9.4.4). */
static inline vf vf_pow(vf a, vf b) {
    vf one = vf_set1(1), size = vf_abs(a), half = b * vf_set1(0.5f);
    vf y = vf_narrow(vd_exp2(vd_low(b) * vd_log2(vd_low(size))), vd_exp2(vd_high(b) * vd_log2(vd_high(size))));
    vi whole = vf_floor(b) == b, odd = whole & (vf_floor(half) != half), negative = vf_bits(a) < 0;
    y = vf_from_bits(vf_bits(y) ^ (odd & negative & vi_set1(SIGN_BIT)));
    y = vf_select((a < 0) & (a > -INFINITY) & ~whole, vf_set1(NAN), y);
    vi is_one = (a == 1) | (b == 0) | ((a == -1) & (vf_abs(b) == INFINITY));
    return vf_select(is_one, one, y);
}

#else

LANES_OF(vf_sin, sin)
LANES_OF(vf_cos, cos)
static inline void vf_turn(vf u, vf *cosine, vf *sine) {
    *cosine = vf_cos(u * 0x1.921fb54442d18p+2);
    *sine = vf_sin(u * 0x1.921fb54442d18p+2);
}
static inline vf vf_rsqrt(vf x) { return 1 / vf_sqrt(x); }
static inline vf vf_pow(vf a, vf b) {
    for (int i = 0; i < VL; i++) a[i] = pow(a[i], b[i]);
    return a;
}

#endif
#endif
