/* simd_math.h: exp, log, erf and their relatives on whole vectors.
 *
 * float: polynomials of our own. Each function reduces its argument to a short interval, evaluates a
 * minimax polynomial there (fitted by the Remez exchange, coefficients then rounded to float one by one
 * while the others are refitted), and puts the pieces together so that the last operation makes the only
 * large rounding error. Where one rounding more would cost the last bit, a value is carried as hi + lo.
 * Muller, "Elementary Functions", 3rd ed., is the book for all of it. Measured errors: kernels/README.md.
 *
 * double: the C library, lane by lane. In this engine double is for testing, where accuracy counts. Its bits
 * are therefore those of the C library that is installed; those of float depend on the level alone. */
#ifndef SIMD_MATH_H
#define SIMD_MATH_H
#include "simd.h"
#include <math.h>

#if REAL_BITS == 32

/* Horner's rule for c[0] + c[1] x + … + c[n−1] xⁿ⁻¹; n is known when compiling, so no loop remains. One rounding a
 * term: by FMA, or, where the level has none, all in double. */
static inline vd vd_polynomial(vd x, const double *c, int n) {
    vd sum = vd_set1(c[n - 1]);
#pragma GCC unroll 16
    for (int i = n - 2; i >= 0; i--) sum = sum * x + c[i];
    return sum;
}
static inline vf vf_polynomial(vf x, const double *c, int n) {
#if defined(__FMA__) || defined(__aarch64__)
    vf sum = vf_set1((float)c[n - 1]);
#pragma GCC unroll 16
    for (int i = n - 2; i >= 0; i--) sum = vf_fma(sum, x, vf_set1((float)c[i]));
    return sum;
#else
    return vf_narrow(vd_polynomial(vd_low(x), c, n), vd_polynomial(vd_high(x), c, n));
#endif
}
#define COEFFICIENTS(...) (const double[]){__VA_ARGS__}, (int)(sizeof((const double[]){__VA_ARGS__}) / sizeof(double))
#define POLYNOMIAL(x, ...) vf_polynomial(x, COEFFICIENTS(__VA_ARGS__))
#define POLYNOMIAL_WIDE(x, ...) vd_polynomial(x, COEFFICIENTS(__VA_ARGS__))

/* ln 2 = LN2_HI + LN2_LO. LN2_HI has 9 bits, so a whole number below 2¹⁵ times it is exact without FMA. */
#define LOG2_E 0x1.715476p+0f
#define LN2_HI 0x1.63p-1f
#define LN2_LO -0x1.bd0106p-13f

/* ── exp ────────────────────────────────────────────────────────────────────────────────────────── */

/* Beyond these exp is 0 or ∞ in float. A NaN passes: vf_min and vf_max return their second operand. */
static inline vf exp_clamp(vf x) { return vf_max(vf_set1(-104), vf_min(vf_set1(89), x)); }

/* (eʳ − 1 − r)/r² for |r| ≤ ln 2 / 2, to 2⁻²⁸ of eʳ. Its errors count little, so vf_fma is good enough. */
static inline vf exp_tail(vf r) {
    vf p = vf_fma(vf_set1(0x1.6afde6p-10f), r, vf_set1(0x1.12449p-7f));
    p = vf_fma(p, r, vf_set1(0x1.555826p-5f));
    p = vf_fma(p, r, vf_set1(0x1.555482p-3f));
    return vf_fma(p, r, vf_set1(0x1.fffffcp-2f));
}

/* x + x_lo = n ln 2 + whole + small, n = round(x/ln 2), |whole + small| ≤ ln 2 / 2 (Cody and Waite: ln 2 in two parts).
 * `whole` is exact. */
typedef struct { vf n, whole, small; } exp_reduced;

static inline exp_reduced exp_reduce(vf x, vf x_lo) {
    vf n = vf_round(x * vf_set1(LOG2_E));
    return (exp_reduced){n, vf_fma(n, vf_set1(-LN2_HI), x), vf_fma(n, vf_set1(-LN2_LO), x_lo)};
}

/* e^(x + x_lo) = 2ⁿ eʳ. Where it is 0 in float, it is not computed: a processor takes 150 cycles to find out that a
 * product underflows, and −∞ is what masks hold. */
static inline vf vf_exp_sum(vf x, vf x_lo) {
    vi vanishes = x < -104;
    exp_reduced e = exp_reduce(vf_select(vanishes, vf_zero(), vf_min(vf_set1(89), x)), x_lo);
    vf r = e.whole + e.small, p = e.whole + vf_fma(r * r, exp_tail(r), e.small);
    return vf_select(vanishes, vf_zero(), vf_ldexp(vf_set1(1) + p, e.n));
}
static inline vf vf_exp(vf x) { return vf_exp_sum(x, vf_zero()); }

/* e^(x + x_lo) = (hi + lo) 2ⁿ, to about 2⁻²⁸: for the functions that go on computing with it. */
typedef struct { vf hi, lo, n; } exp_parts;

static inline exp_parts vf_exp_parts(vf x, vf x_lo) {
    exp_reduced e = exp_reduce(exp_clamp(x), x_lo);
    vf r = e.whole + e.small, r_lo = (e.whole - r) + e.small;
    vf sum = vf_set1(1) + r, sum_lo = (vf_set1(1) - sum) + r; /* Dekker's fast two-sum, |r| < 1 */
    vf rest = sum_lo + vf_fma(r * r, exp_tail(r), r_lo);
    vf hi = sum + rest;
    return (exp_parts){hi, (sum - hi) + rest, e.n};
}

/* p of eˣ = 2ⁿ (1 + p), |p| < 0.42, to about a unit: for functions that add 2ⁿ p to something larger. */
static inline vf exp_fraction(vf x, vf *n) {
    *n = vf_round(x * vf_set1(LOG2_E));
    vf r = vf_fma(*n, vf_set1(-LN2_LO), vf_fma(*n, vf_set1(-LN2_HI), x));
    return vf_fma(r * r, exp_tail(r), r);
}

/* eˣ − 1 = 2ⁿ p + (2ⁿ − 1). It is computed as twice its half, since 2¹²⁸ is not a float. */
static inline vf vf_expm1(vf x) {
    vf n, p = exp_fraction(exp_clamp(x), &n), half = vf_ldexp(vf_set1(1), n - vf_set1(1));
    vf y = vf_fma(p, half, half - vf_set1(0.5f));
    y = vf_select(n == 0, p, y + y);
    return vf_copysign(y, x);
}

/* ── log ────────────────────────────────────────────────────────────────────────────────────────── */

/* log((1 + f) 2ᵏ) for √½ ≤ 1 + f ≤ √2: f − f²/2 + f³ P(f), to 2⁻³⁰, and k ln 2. */
static inline vf log_of(vf f, vf k) {
    vf square = f * f;
    vf cubic = POLYNOMIAL(f, 0x1.555546p-2f, -0x1.ffffeep-3f, 0x1.99a542p-3f, -0x1.5562ep-3f, 0x1.233306p-3f,
                          -0x1.fb43dcp-4f, 0x1.e64d6cp-4f, -0x1.e2e49ap-4f, 0x1.1b43aap-4f);
    vf rest = vf_fma(square * f, cubic, k * vf_set1(LN2_LO));
    rest = vf_fma(vf_set1(-0.5f), square, rest);
    vf big = k * vf_set1(LN2_HI), sum = big + f;
    return sum + ((f - (sum - big)) + rest);
}

/* |x| = m 2ᵏ with √½ ≤ m < √2, for normal x. */
#define SQRT_HALF_BITS 0x3f3504f3
static inline vf split_exponent(vf x, vf *k) {
    vi bits = vf_bits(vf_abs(x)) - vi_set1(SQRT_HALF_BITS);
    *k = __builtin_convertvector(bits >> 23, vf);
    return vf_from_bits((bits & vi_set1(0x7fffff)) + vi_set1(SQRT_HALF_BITS));
}

static inline vf vf_log(vf x) {
    vi subnormal = x < vf_set1(0x1p-126f);
    vf k, m = split_exponent(vf_select(subnormal, x * vf_set1(0x1p25f), x), &k);
    k = k - vf_select(subnormal, vf_set1(25), vf_zero());
    vf y = log_of(m - vf_set1(1), k);
    vf special = vf_select(x == 0, vf_set1(-INFINITY), vf_select(x < 0, vf_set1(NAN), x)); /* else +∞ or NaN */
    return vf_select((x > 0) & (x < INFINITY), y, special);
}

/* log(1 + x): u = 1 + x rounded, c what the rounding lost, log(u + c) with f = (u + c) 2⁻ᵏ − 1. */
static inline vf vf_log1p(vf x) {
    vf one = vf_set1(1), u = one + x;
    vf back = u - one, c = (one - (u - back)) + (x - back); /* Knuth's two-sum */
    vf k, m = split_exponent(u, &k);
    vf f = (m - one) + vf_ldexp(c, -k);
    vf y = log_of(f, k);
    vf special = vf_select(x == -1, vf_set1(-INFINITY), vf_select(x < -1, vf_set1(NAN), x));
    return vf_copysign(vf_select((x > -1) & (x < INFINITY), y, special), x);
}

/* ── sigmoid, tanh, softplus ────────────────────────────────────────────────────────────────────── */

/* σ(x) = 1/(1 + e⁻ˣ) = e^(−|x|)/(1 + e^(−|x|)) for x < 0: neither overflows. With e^(−|x|) = (hi + lo) 2ⁿ, the quotient
 * y = top/sum is corrected by (top − y sum)/sum. The remainder is exact but for what lo adds, and so small that a line
 * within 0.043 of 1/sum, 1 ≤ sum ≤ 2, serves for the second division. */
static inline vf vf_sigmoid(vf x) {
    exp_reduced e = exp_reduce(vf_max(vf_set1(-104), -vf_abs(x)), vf_zero());
    vf r = e.whole + e.small, p = r + vf_fma(r * r, exp_tail(r), (e.whole - r) + e.small); /* eʳ − 1 */
    vf one = vf_set1(1), hi = one + p, lo = (one - hi) + p;
    vf z = vf_ldexp(hi, e.n), sum = one + z, sum_lo = ((one - sum) + z) + vf_ldexp(lo, e.n);
    vi negative = x < 0;
    vf top = vf_select(negative, hi, one), top_lo = vf_select(negative, lo, vf_zero()), y = top / sum;
    vf remainder = vf_fma_once(-y, sum, top) + vf_fma(-y, sum_lo, top_lo);
    y = vf_fma(remainder, vf_fma(vf_set1(-0.5f), sum, vf_set1(1.457f)), y);
    return vf_ldexp(y, vf_select(negative, e.n, vf_zero()));
}

/* σ(x) = part/(part + rest), 1 − σ = rest/(part + rest), from z = e^(−|x|): one of the two is 1, the other z. With a z to
 * about a unit, they are for functions with σ as a factor, whose bounds leave room for that. */
typedef struct { vf part, rest; } sigmoid_parts;

ALWAYS_INLINE sigmoid_parts vf_sigmoid_parts(vi negative, vf z) {
    vf one = vf_set1(1);
    return (sigmoid_parts){vf_select(negative, z, one), vf_select(negative, one, z)};
}

/* 2^(v + v_lo), v + v_lo ≤ 0 and |v_lo| small: n = round(v), and 2ᶠ = 1 + f P(f) for the rest, |f| ≤ ½, to 2⁻²⁸. */
ALWAYS_INLINE vf vf_exp2_sum(vf v, vf v_lo) {
    vi vanishes = v < -150; /* as in vf_exp_sum */
    v = vf_select(vanishes, vf_zero(), v);
    vf n = vf_round(v), f = (v - n) + v_lo;
    vf p = POLYNOMIAL(f, 0x1.62e43p-1f, 0x1.ebfbdcp-3f, 0x1.c6af7cp-5f, 0x1.3b2dep-7f, 0x1.5f082ep-10f, 0x1.416b52p-13f);
    return vf_select(vanishes, vf_zero(), vf_ldexp(vf_fma(f, p, vf_set1(1)), n));
}

/* e^(−x (c1 + c3 x²)) for x ≥ 0 with c1 + c3 x² < 22, c1 and c3 positive. An error of the exponent counts as often as it
 * has units, so that every product and sum is kept with what its rounding lost; as a power of two, −x (a + b x²), since
 * that is taken apart exactly. a is split at 2⁻¹⁹, of which every sum below 32 is a multiple: a − sum is exact. */
ALWAYS_INLINE vf vf_exp_minus_cubic(vf x, double c1, double c3) {
    const double a = -0x1.71547652b82fep+0 * c1, b = -0x1.71547652b82fep+0 * c3, a_split = (a + 0x1.8p33) - 0x1.8p33;
    vf a_hi = vf_set1((float)a_split), a_lo = vf_set1((float)(a - a_split));
    vf b_hi = vf_set1((float)b), b_lo = vf_set1((float)(b - (float)b));
    vf square = x * x, square_lo = vf_fma_once(x, x, -square);
    vf sum = vf_fma(b_hi, square, a_hi);
    vf sum_lo = vf_fma_once(b_hi, square, a_hi - sum) + vf_fma(b_hi, square_lo, vf_fma(b_lo, square, a_lo));
    vf y = x * sum;
    return vf_exp2_sum(y, vf_fma(x, sum_lo, vf_fma_once(x, sum, -y)));
}

/* Below 0.95: x + x³ P(x²). Above: 1 − 2/(1 + e^2|x|), where e^2|x| = 2ⁿ (1 + p) comes into the sum unrounded, as
 * (1 + 2ⁿ) + 2ⁿ p; the quotient is at most 0.26, and its error so much less than the result's. Beyond 10 it is 1. */
static inline vf vf_tanh(vf x) {
    vf a = vf_min(vf_set1(10), vf_abs(x)), square = a * a, one = vf_set1(1);
    vf near = POLYNOMIAL(square, -0x1.555548p-2f, 0x1.110dfep-3f, -0x1.b9a0bcp-5f, 0x1.61b2cep-6f, -0x1.0a0e96p-7f,
                         0x1.40aa7ep-9f, -0x1.a9803ep-12f);
    near = vf_fma_once(a * square, near, a);
    vf n, p = exp_fraction(a + a, &n), power = vf_ldexp(one, n);
    vf far = one - vf_set1(2) / vf_fma(p, power, one + power);
    return vf_copysign(vf_select(a < vf_set1(0.95f), near, far), x);
}

/* log(1 + eˣ) = max(x, 0) + log1p(e^(−|x|)) */
static inline vf vf_softplus(vf x) { return vf_max(x, vf_zero()) + vf_log1p(vf_exp(-vf_abs(x))); }

/* ── erf and the normal distribution ────────────────────────────────────────────────────────────── */

/* e^(a²/2) Φ(−a) for 0 ≤ a ≤ 14.3, the scaled tail of the normal distribution: P((a − k)/(a + k))/(a + k)
 * after Shepherd and Laframboise (1981). The reciprocal is kept as hi + lo because its error would count three
 * times. k has few bits, so that sum − k is exact, and makes P's constant term a float almost exactly. */
static inline vf scaled_normal_tail(vf a) {
    vf k = vf_set1(0x1.c28p+1f), one = vf_set1(1), sum = a + k, sum_lo = a - (sum - k);
    vf inverse = one / sum;
    vf inverse_lo = -inverse * vf_fma(inverse, sum_lo, vf_fma_once(inverse, sum, -one));
    vf t = vf_fma_once(vf_set1(-2) * k, inverse, one) - (k + k) * inverse_lo;
    vf p = POLYNOMIAL(t, 0x1.7d6514p-1f, -0x1.22885p-1f, 0x1.461f66p-2f, -0x1.e6b20ap-4f, 0x1.34dfdap-6f,
                      0x1.95cac6p-8f, -0x1.b0b0a4p-9f, -0x1.948deap-12f, 0x1.d96a88p-12f, 0x1.fff2dp-15f,
                      -0x1.e824ecp-16f);
    return vf_fma_once(p, inverse, p * inverse_lo);
}

/* Φ(x), the normal distribution function, and e^(−x²/2). The square is taken exactly, as a sum of two:
 * in the tail an error of half a unit in x²/2 would show as up to 50 units in the exponential. */
static inline vf vf_normal_cdf(vf x, vf *bell) {
    vf a = vf_min(vf_set1(15), vf_abs(x)), square = a * a;
    exp_parts e = vf_exp_parts(vf_set1(-0.5f) * square, vf_set1(-0.5f) * vf_fma_once(a, a, -square));
    vf scaled = scaled_normal_tail(a), tail = vf_ldexp(vf_fma_once(e.hi, scaled, e.lo * scaled), e.n);
    *bell = vf_ldexp(e.hi, e.n);
    return vf_select(x < 0, tail, vf_set1(1) - tail);
}

/* Below 1.09: x + x P(x² − 5/8); from the middle of the interval the polynomial's own roundings count least, and what
 * the rounding of x² lost is put back through P′ ≈ −¼. Above: 1 − 2 Φ(−√2 |x|). */
static inline vf vf_erf(vf x) {
    vf a = vf_min(vf_set1(10), vf_abs(x)), square = a * a, square_lo = vf_fma_once(a, a, -square);
    vf p = POLYNOMIAL(square - vf_set1(0.625f), -0x1.1868dep-4f, -0x1.0c56e4p-2f, 0x1.2a7904p-4f, -0x1.107180p-6f,
                      0x1.9c5344p-9f, -0x1.089e46p-11f, 0x1.33a6acp-14f, -0x1.43a288p-17f);
    vf near = vf_fma(a, vf_fma(square_lo, vf_set1(-0.25f), p), a);
    exp_parts e = vf_exp_parts(-square, -square_lo);
    vf tail = vf_ldexp(e.hi * scaled_normal_tail(a * vf_set1(0x1.6a09e6p+0f)), e.n);
    return vf_copysign(vf_select(a < vf_set1(1.09f), near, vf_fma(vf_set1(-2), tail, vf_set1(1))), x);
}

#else

/* The C library's f on each lane. */
#define LANES_OF(name, f) \
    static inline vf name(vf x) { \
        for (int i = 0; i < VL; i++) x[i] = f(x[i]); \
        return x; \
    }
LANES_OF(vf_exp, exp)
LANES_OF(vf_expm1, expm1)
LANES_OF(vf_log, log)
LANES_OF(vf_log1p, log1p)
LANES_OF(vf_tanh, tanh)
LANES_OF(vf_erf, erf)
LANES_OF(vf_erfc, erfc)

/* The formulas of the float half above; there they are explained. */
typedef struct { vf part, rest; } sigmoid_parts;
static inline sigmoid_parts vf_sigmoid_parts(vi negative, vf z) {
    vf one = vf_set1(1);
    return (sigmoid_parts){vf_select(negative, z, one), vf_select(negative, one, z)};
}
static inline vf vf_sigmoid(vf x) {
    sigmoid_parts s = vf_sigmoid_parts(x < 0, vf_exp(-vf_abs(x)));
    return s.part / (s.part + s.rest);
}
static inline vf vf_exp_minus_cubic(vf x, double c1, double c3) { return vf_exp(-x * (c1 + c3 * (x * x))); }
static inline vf vf_softplus(vf x) { return vf_max(x, vf_zero()) + vf_log1p(vf_exp(-vf_abs(x))); }
static inline vf vf_normal_cdf(vf x, vf *bell) {
    *bell = vf_exp(-0.5 * x * x);
    return 0.5 * vf_erfc(x * -0x1.6a09e667f3bcdp-1);
}

#endif
#endif
