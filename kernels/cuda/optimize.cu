/* optimize.cu: one pass over flat parameters for SGD, Adam(W), Adagrad and RMSprop; PyTorch's conventions. A thread
 * does an element at a time; new_* may be the same memory as the old, since an element is read and written by one
 * thread.
 *
 * Bytes an element (float): sgd 12 without momentum (p, g in, p out) and 20 with, adam 28, adagrad 20, rmsprop 20 and
 * 28. Flops: 3 to 15. What bounds it: memory; hence one pass that updates parameters and state together.
 *
 * The gradient is g/divisor · scale, rounded twice. Scalars of the step (bias corrections, decayed rates) are computed in
 * double and rounded to real, as on the CPU. An element's bits depend on its own values alone, so shards may cut the
 * parameters anywhere. */
#include "common.cuh"

/* g += λ p;  m = μ m + (1 − τ) g (m = g at step 1);  p −= η m, with Nesterov p −= η (g + μ m); without momentum
 * p −= η g, and m stays as it is. Sutskever et al. 2013, in PyTorch's form. */
KERNEL(sgd)(real *new_p, real *new_m, const real *p, const real *m, const real *g, int64_t n, double divisor,
            double scale, double lr, double momentum, double dampening, double weight_decay, int nesterov, int64_t step) {
    FOR_ELEMENTS(i, n) {
        real slope = fma((real)weight_decay, p[i], g[i] / (real)divisor * (real)scale), direction = slope;
        if (momentum != 0) {
            real moved = step == 1 ? slope : fma((real)momentum, m[i], (real)(1 - dampening) * slope);
            direction = nesterov ? fma((real)momentum, moved, slope) : moved;
            new_m[i] = moved;
        }
        new_p[i] = fma((real)-lr, direction, p[i]);
    }
}

/* g += λ p (Adam) or p −= η λ p (AdamW);  m = β₁ m + (1 − β₁) g;  v = β₂ v + (1 − β₂) g²;
 * p −= η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε).
 * Kingma, Ba 2015, arXiv:1412.6980, alg. 1; Loshchilov, Hutter 2019, arXiv:1711.05101, alg. 2. */
KERNEL(adam)(real *new_p, real *new_m, real *new_v, const real *p, const real *m, const real *v, const real *g,
             int64_t n, double divisor, double scale, double lr, double beta1, double beta2, double eps,
             double weight_decay, int decoupled, int64_t step) {
    const real rate = (real)(lr / (1 - pow(beta1, (double)step)));
    const real root_bias2 = (real)sqrt(1 - pow(beta2, (double)step));
    const real decay = decoupled ? 0 : (real)weight_decay, shrink = decoupled ? (real)(1 - lr * weight_decay) : 1;
    const real rest1 = (real)(1 - beta1), rest2 = (real)(1 - beta2);
    FOR_ELEMENTS(i, n) {
        real old = p[i], slope = fma(decay, old, g[i] / (real)divisor * (real)scale);
        real moment = fma((real)beta1, m[i], rest1 * slope), square = fma((real)beta2, v[i], rest2 * slope * slope);
        new_m[i] = moment;
        new_v[i] = square;
        new_p[i] = fma(-rate, moment / (sqrt(square) / root_bias2 + (real)eps), old * shrink);
    }
}

/* g += λ p;  s += g²;  p −= η/(1 + (t − 1) δ) · g / (√s + ε).  Duchi, Hazan, Singer 2011, fig. 1. */
KERNEL(adagrad)(real *new_p, real *new_s, const real *p, const real *s, const real *g, int64_t n, double divisor,
                double scale, double lr, double lr_decay, double eps, double weight_decay, int64_t step) {
    const real rate = (real)(lr / (1 + (double)(step - 1) * lr_decay));
    FOR_ELEMENTS(i, n) {
        real old = p[i], slope = fma((real)weight_decay, old, g[i] / (real)divisor * (real)scale);
        real square = fma(slope, slope, s[i]);
        new_s[i] = square;
        new_p[i] = fma(-rate, slope / (sqrt(square) + (real)eps), old);
    }
}

/* g += λ p;  v = α v + (1 − α) g²;  p −= η g / (√v + ε), with momentum m = μ m + g / (√v + ε), p −= η m.
 * Tieleman, Hinton 2012, lecture 6.5. There is no bias correction, so `step` goes unused. */
KERNEL(rmsprop)(real *new_p, real *new_v, real *new_m, const real *p, const real *v, const real *m, const real *g,
                int64_t n, double divisor, double scale, double lr, double alpha, double eps, double weight_decay,
                double momentum, int64_t step) {
    (void)step;
    FOR_ELEMENTS(i, n) {
        real old = p[i], slope = fma((real)weight_decay, old, g[i] / (real)divisor * (real)scale);
        real square = fma((real)alpha, v[i], (real)(1 - alpha) * slope * slope);
        real direction = slope / (sqrt(square) + (real)eps);
        new_v[i] = square;
        if (momentum != 0) {
            direction = fma((real)momentum, m[i], direction);
            new_m[i] = direction;
        }
        new_p[i] = fma((real)-lr, direction, old);
    }
}
