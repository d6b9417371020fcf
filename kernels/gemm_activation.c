/* gemm_activation.c: a matrix product, and an activation or its derivative as soon as a part of it is made.
 *
 * The network of a Transformer block is two products with an activation f between them (feed_forward.py). As passes of
 * their own f and f′ take a third of the products' time, since both need an exponential and a division or two, and
 * the arrays are the widest of the model, larger than the caches. So
 *
 *     forward:   z = x Wᵀ + bias, h = f(z), slope = f′(z)    both from one exponential; z itself is not kept
 *     backward:  dz = (g W) ∘ slope                          one multiplication
 *
 * and each happens to a panel of rows when it is made, by the thread that made it, in that thread's second-level cache.
 * Memory sees the write of slope and h, and backward one read of slope and the write of dz. */
#include "activations.h"
#include "gemm_micro.h"

enum { RELU, SILU, GELU, GELU_TANH };

#define EACH_VECTOR                                                                                               \
    for (int64_t i = row; i < row + rows; i++)                                                                    \
        for (int64_t at = i * x->n + column, end = at + columns; at < end; at += VL)

/* h = f(C), and C ← f′(C) unless C is h. */
#define ACTIVATE(f)                                                                                               \
    EACH_VECTOR {                                                                                                 \
        activated z = f(load_up_to(c + at, end - at));                                                            \
        store_up_to(h + at, z.y, end - at);                                                                       \
        if (c != h)                                                                                               \
            store_up_to(c + at, z.slope, end - at);                                                               \
    }
static void activate(const struct finish *finish, const struct product *x, int64_t row, int64_t rows, int64_t column,
                     int64_t columns) {
    real *h = finish->h, *c = x->c;
    switch (finish->activation) {
    case RELU: ACTIVATE(relu_of) break;
    case SILU: ACTIVATE(silu_of) break;
    case GELU: ACTIVATE(gelu_of) break;
    default: ACTIVATE(gelu_tanh_of)
    }
}

/* C ← dz for the slope and dh = C. */
#define MULTIPLY(gradient)                                                                                        \
    EACH_VECTOR store_up_to(c + at, gradient(load_up_to(c + at, end - at), load_up_to(slope + at, end - at)), end - at);
static void multiply_by_slope(const struct finish *finish, const struct product *x, int64_t row, int64_t rows,
                              int64_t column, int64_t columns) {
    const real *slope = finish->slope;
    real *c = x->c;
    if (finish->activation == RELU)
        MULTIPLY(relu_gradient)
    else
        MULTIPLY(smooth_gradient)
}

KERNEL(linear_activation)(real *h, real *slope, const real *x, const real *weight, const real *bias, int64_t m,
                          int64_t n, int64_t k, int activation, int format) {
    struct finish finish = {.part = activate, .h = h, .activation = activation};
    struct product product = {.c = slope ? slope : h, .a = x, .b = weight, .bias = bias, .m = m, .n = n, .k = k,
                              .a_row = k, .a_col = 1, .b_row = 1, .b_col = k, .c_row = n, .format = FORMAT(format),
                              .finish = &finish};
    if (m > 0 && n > 0)
        TYPED(multiply_product)(&product);
}

KERNEL(linear_activation_vjp)(real *dz, const real *g, const real *weight, const real *slope, int64_t m, int64_t n,
                              int64_t k, int activation, int format) {
    struct finish finish = {.part = multiply_by_slope, .slope = slope, .activation = activation};
    struct product product = {.c = dz, .a = g, .b = weight, .m = m, .n = n, .k = k, .a_row = k, .a_col = 1, .b_row = n,
                              .b_col = 1, .c_row = n, .format = FORMAT(format), .finish = &finish};
    if (m > 0 && n > 0)
        TYPED(multiply_product)(&product);
}
