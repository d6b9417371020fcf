/* activations.h: the activations of networks, y = f(x) and slope = f′(x), for elementwise.c and gemm_activation.c.
 *
 * Each is one function that gives both, since they have their exponential in common. Who wants one of the two calls it
 * with the other unused, and the compiler leaves out what only that needed. */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H
#include "simd_math_wide.h"

typedef struct { vf y, slope; } activated;

/* x within ±limit, for where a function has long reached its limit: ∞ · 0 must not arise on the way. NaN stays. */
static inline vf clamp(vf x, real limit) { return vf_max(vf_set1(-limit), vf_min(vf_set1(limit), x)); }

/* max(x, 0). A NaN stays, and its slope is 0. */
ALWAYS_INLINE activated relu_of(vf x) {
    return (activated){vf_select(x <= 0, vf_zero(), x), vf_select(x > 0, vf_set1(1), vf_zero())};
}

/* x σ(x), and σ (1 + x (1 − σ)). Hendrycks and Gimpel 2016, arXiv:1606.08415; also called swish. */
ALWAYS_INLINE activated silu_of(vf x) {
    sigmoid_parts s = vf_sigmoid_parts(x < 0, vf_exp(-vf_abs(x)));
    vf sum = s.part + s.rest, inverse = vf_set1(1) / sum;
    return (activated){x * s.part / sum,
                       s.part * inverse * vf_fma(clamp(x, 1000), s.rest * inverse, vf_set1(1))};
}

/* x Φ(x), Φ the normal distribution function, and Φ + x φ, φ(x) = e^(−x²/2)/√(2π). The same paper. */
ALWAYS_INLINE activated gelu_of(vf x) {
    vf bell, cdf = vf_normal_cdf(x, &bell);
    return (activated){x * cdf, vf_fma(clamp(x, 100), bell * vf_set1((real)0.3989422804014327), cdf)};
}

/* x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) = x σ(v) with v = TANH_1 x + TANH_3 x³: the same paper, section 2. And
 * σ (1 + x (1 − σ) v′), v′ = TANH_1 + 3 TANH_3 x². */
#define TANH_1 1.5957691216057308  /* 2 √(2/π) */
#define TANH_3 0.07135481627260025 /* 2 √(2/π) · 0.044715 */
ALWAYS_INLINE activated gelu_tanh_of(vf x) {
    vf size = vf_min(vf_set1(REAL_BITS == 32 ? 13 : 30), vf_abs(x)), near = vf_copysign(size, x); /* z is 0 there */
    sigmoid_parts s = vf_sigmoid_parts(x < 0, vf_exp_minus_cubic(size, TANH_1, TANH_3));
    vf sum = s.part + s.rest, inverse = vf_set1(1) / sum;
    vf v_slope = vf_fma(size * size, vf_set1((real)(3 * TANH_3)), vf_set1((real)TANH_1));
    return (activated){x * s.part / sum,
                       s.part * inverse * vf_fma(near * (s.rest * inverse), v_slope, vf_set1(1))};
}

/* dx from g and the slope. That of relu is chosen, not multiplied: 0 where the slope is, whatever g is. */
ALWAYS_INLINE vf relu_gradient(vf g, vf slope) { return vf_select(slope > 0, g, vf_zero()); }
ALWAYS_INLINE vf smooth_gradient(vf g, vf slope) { return g * slope; }

#endif
