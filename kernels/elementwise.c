/* elementwise.c: y = f(x), y = f(a, b), and the derivatives that are worth one pass.
 *
 * Bytes: one pass over each operand, so 8 bytes an element for a unary float kernel, 12 for a binary one, 9 for a
 * comparison. Flops an element (a vector of 16, 8 or 4 elements does them at once): 1 for arithmetic, about
 * 12 for exp, 20 for log, 30 for tanh, sigmoid and gelu_tanh, 50 for gelu and erf, 60 for sin, 120 for pow. What bounds
 * it: memory, as soon as the operands leave the second cache; inside the caches the functions from
 * log on are bound by arithmetic. That is why a fused pass (gelu_vjp in place of the dozen passes of its
 * composition) pays, and a cleverer loop does not.
 *
 * Each kernel is its element function below plus the walk of elementwise.h. */
#include "activations.h"
#include "elementwise.h"

/* ── y = f(x) ───────────────────────────────────────────────────────────────────────────────────── */

static inline vf negate(vf x) { return -x; }
static inline vf square_of(vf x) { return x * x; }
static inline vf reciprocal_of(vf x) { return vf_set1(1) / x; }

/* −1, 0 or 1; sign(±0) = 0, sign(NaN) = NaN. */
static inline vf sign_of(vf x) {
    vf one = vf_copysign(vf_set1(1), x);
    return vf_select((x < 0) | (x > 0), one, vf_select(x == 0, vf_zero(), x));
}

UNARY(negative, negate)
UNARY(abs, vf_abs)
UNARY(sign, sign_of)
UNARY(floor, vf_floor)
UNARY(ceil, vf_ceil)
UNARY(round, vf_round)
UNARY(square, square_of)
UNARY(sqrt, vf_sqrt)
UNARY(rsqrt, vf_rsqrt)
UNARY(reciprocal, reciprocal_of)
UNARY(exp, vf_exp)
UNARY(expm1, vf_expm1)
UNARY(log, vf_log)
UNARY(log1p, vf_log1p)
UNARY(sin, vf_sin)
UNARY(cos, vf_cos)
UNARY(tanh, vf_tanh)
UNARY(sigmoid, vf_sigmoid)
UNARY(erf, vf_erf)
UNARY(softplus, vf_softplus)

/* ── activations: y = f(x), and dx = g f′(x) ────────────────────────────────────────────────────── */

#define ACTIVATION(name, gradient) \
    ALWAYS_INLINE vf name##_value(vf x) { return name##_of(x).y; } \
    UNARY(name, name##_value) \
    ALWAYS_INLINE vf name##_vjp_at(char *const *p, const int64_t *stride, int64_t i, int64_t n) { \
        return gradient(LOAD(1), name##_of(LOAD(2)).slope); \
    } \
    RUN_OF(name##_vjp, 3, vf, store_at, 1) \
    KERNEL(name##_vjp)(real *dx, const real *g, const real *x, const int64_t *layout) { \
        walk_layout(layout, 3, (void *const[]){dx, (void *)g, (void *)x}, REAL_SIZES, name##_vjp_run); \
    }
ACTIVATION(relu, relu_gradient)
ACTIVATION(silu, smooth_gradient)
ACTIVATION(gelu, smooth_gradient)
ACTIVATION(gelu_tanh, smooth_gradient)

/* ── y = f(a, b) ────────────────────────────────────────────────────────────────────────────────── */

static inline vf sum_of(vf a, vf b) { return a + b; }
static inline vf difference(vf a, vf b) { return a - b; }
static inline vf product(vf a, vf b) { return a * b; }
static inline vf quotient(vf a, vf b) { return a / b; }
static inline vf maximum_of(vf a, vf b) { return vf_select((a >= b) | vf_is_nan(a), a, b); } /* NaN wins */
static inline vf minimum_of(vf a, vf b) { return vf_select((a <= b) | vf_is_nan(a), a, b); }

BINARY(add, sum_of)
BINARY(subtract, difference)
BINARY(multiply, product)
BINARY(divide, quotient)
BINARY(pow, vf_pow)
BINARY(maximum, maximum_of)
BINARY(minimum, minimum_of)

static inline vi is_equal(vf a, vf b) { return a == b; }
static inline vi is_not_equal(vf a, vf b) { return a != b; }
static inline vi is_less(vf a, vf b) { return a < b; }
static inline vi is_less_equal(vf a, vf b) { return a <= b; }

COMPARISON(equal, is_equal)
COMPARISON(not_equal, is_not_equal)
COMPARISON(less, is_less)
COMPARISON(less_equal, is_less_equal)

/* y = condition ? a : b */
ALWAYS_INLINE vf where_at(char *const *p, const int64_t *stride, int64_t i, int64_t n) {
    vi condition = load_mask((const uint8_t *)p[1] + i * stride[1], stride[1], n);
    return vf_select(condition, LOAD(2), LOAD(3));
}
RUN_OF(where, 4, vf, store_at, 1)
KERNEL(where)(real *y, const uint8_t *condition, const real *a, const real *b, const int64_t *layout) {
    const int64_t bytes[] = {sizeof(real), 1, sizeof(real), sizeof(real)};
    walk_layout(layout, 4, (void *const[]){y, (void *)condition, (void *)a, (void *)b}, bytes, where_run);
}
