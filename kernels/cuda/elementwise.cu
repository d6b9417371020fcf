/* elementwise.cu: the activations and their derivatives, each in one pass; the other elementwise kernels are CuPy's.
 *
 * A thread does an element at a time, and finds its operands by the layout (kernels.h). Bytes an element (float): 8,
 * the derivatives 12. Flops: relu 1, silu 15, gelu 30 to 60. What bounds it: memory; that is why a fused pass
 * (gelu_vjp in place of the dozen passes of its composition) pays. */
#include "common.cuh"

/* ── where the operands of element i are ────────────────────────────────────────────────────────── */

static __device__ inline int64_t layout_size(const int64_t *layout) {
    int64_t size = 1;
    for (int64_t axis = 0; axis < layout[0]; axis++) size *= layout[1 + axis];
    return size;
}

/* at[k] is where operand k has element i, counted in the order of the axes. */
template <int OPERANDS>
static __device__ inline void locate(int64_t at[OPERANDS], const int64_t *layout, int64_t i) {
    const int64_t ndim = layout[0], *shape = layout + 1, *strides = shape + ndim;
    for (int k = 0; k < OPERANDS; k++) at[k] = 0;
    for (int64_t axis = ndim - 1; axis >= 0; axis--) {
        int64_t index = axis == 0 ? i : i % shape[axis]; /* the common case, one dense axis, needs no division */
        if (axis != 0) i /= shape[axis];
        for (int k = 0; k < OPERANDS; k++) at[k] += index * strides[k * ndim + axis];
    }
}

/* The bodies of y = f(x) and dx = f(g, x). */
#define UNARY(f) \
    { \
        FOR_ELEMENTS(i, layout_size(layout)) { \
            int64_t at[2]; \
            locate<2>(at, layout, i); \
            y[at[0]] = f(x[at[1]]); \
        } \
    }
#define SLOPE(f) \
    { \
        FOR_ELEMENTS(i, layout_size(layout)) { \
            int64_t at[3]; \
            locate<3>(at, layout, i); \
            dx[at[0]] = f(g[at[1]], x[at[2]]); \
        } \
    }

/* ── y = f(x) ───────────────────────────────────────────────────────────────────────────────────── */

/* max(x, 0); NaN stays. */
static __device__ inline real relu_of(real x) { return x <= 0 ? 0 : x; }

/* σ(x) = 1/(1 + e⁻ˣ) = eˣ/(1 + eˣ): the one whose exponential is at most 1. */
static __device__ inline real sigmoid_of(real x) {
    real e = exp(-fabs(x));
    return (x < 0 ? e : (real)1) / (1 + e);
}

/* x σ(x). Hendrycks, Gimpel 2016, arXiv:1606.08415. */
static __device__ inline real silu_of(real x) { return x * sigmoid_of(x); }

/* x Φ(x), Φ the normal distribution function: the same paper, eq. 1. */
static __device__ inline real gelu_of(real x) { return x * normcdf(x); }

/* x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) = x σ(v) with v = x (TANH_1 + TANH_3 x²): the same paper, section 2. */
#define TANH_1 ((real)1.5957691216057308)  /* 2 √(2/π) */
#define TANH_3 ((real)0.07135481627260025) /* 2 √(2/π) · 0.044715 */
static __device__ inline real gelu_tanh_of(real x) { return x * sigmoid_of(x * fma(x * x, TANH_3, TANH_1)); }

KERNEL(relu)(real *y, const real *x, const int64_t *layout) UNARY(relu_of)
KERNEL(silu)(real *y, const real *x, const int64_t *layout) UNARY(silu_of)
KERNEL(gelu)(real *y, const real *x, const int64_t *layout) UNARY(gelu_of)
KERNEL(gelu_tanh)(real *y, const real *x, const int64_t *layout) UNARY(gelu_tanh_of)

/* ── dx = g f′(x) ───────────────────────────────────────────────────────────────────────────────── */

/* x, kept where the derivative has long reached its limit, so that ∞ · 0 does not arise; NaN stays. */
static __device__ inline real clamp(real x, real limit) { return x > limit ? limit : x < -limit ? -limit : x; }

static __device__ inline real relu_slope(real g, real x) { return x > 0 ? g : 0; }

/* (x σ)′ = σ (1 + x (1 − σ)), 1 − σ(x) = σ(−x) */
static __device__ inline real silu_slope(real g, real x) {
    return g * (sigmoid_of(x) * fma(clamp(x, 1000), sigmoid_of(-x), (real)1));
}

/* (x Φ)′ = Φ + x φ, φ(x) = e^(−x²/2)/√(2π) */
static __device__ inline real gelu_slope(real g, real x) {
    real near = clamp(x, 100);
    return g * fma(near, exp((real)-0.5 * near * near) * (real)0.3989422804014327, normcdf(x));
}

/* (x σ(v))′ = σ + x σ (1 − σ) v′, v′ = TANH_1 + 3 TANH_3 x² */
static __device__ inline real gelu_tanh_slope(real g, real x) {
    real near = clamp(x, 100), square = near * near, v = near * fma(square, TANH_3, TANH_1);
    return g * (sigmoid_of(v) * fma(near * sigmoid_of(-v), fma(square, 3 * TANH_3, TANH_1), (real)1));
}

KERNEL(relu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout) SLOPE(relu_slope)
KERNEL(silu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout) SLOPE(silu_slope)
KERNEL(gelu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout) SLOPE(gelu_slope)
KERNEL(gelu_tanh_vjp)(real *dx, const real *g, const real *x, const int64_t *layout) SLOPE(gelu_tanh_slope)
