/* optimize.c: one pass over flat parameters for SGD, Adam(W), Adagrad and RMSprop; PyTorch's conventions.
 *
 * Bytes an element: sgd 12 without momentum (p, g in, p out) and 20 with, adam 28, adagrad 20, rmsprop 20 and 28.
 * Flops: 3 to 15. What bounds it: memory; hence one pass that updates parameters and state together.
 *
 * The gradient comes as a sum: g is g/divisor · scale, rounded twice, as passes of their own would make it that divide
 * by the number of tokens and clip. Scalars of the step (bias corrections, decayed rates) are computed once in double
 * and rounded to real. An element's bits depend on its own values alone, so shards may cut the parameters anywhere. */
#include "rows.h"
#include <math.h>

struct update {
    real *new_p, *new_m, *new_v;
    const real *p, *m, *v, *g;
    real divisor, scale, rate, beta1, rest1, beta2, rest2, eps, decay, shrink, root_bias2;
    int nesterov, first;
    int64_t n;
};

/* Each element function is given vectors of the old values and leaves the new ones in place. new_p goes past the caches
 * where it is not p, whose lines are fetched anyway. */
#define UPDATE(name, M, V) \
    static void name##_range(void *context, int64_t begin, int64_t end) { \
        const struct update *u = context; \
        int past_caches = u->new_p != u->p && goes_past_caches((3 + 2 * M + 2 * V) * u->n); \
        int64_t count = at_most(end - begin, until_aligned(u->new_p + begin, past_caches)); \
        for (int64_t i = begin; i < end; i += count, count = end - i < VL ? end - i : VL) { \
            vf p = vf_load_any(u->p + i, 1, count), m = vf_zero(), v = vf_zero(); \
            vf g = vf_load_any(u->g + i, 1, count) / vf_set1(u->divisor) * vf_set1(u->scale); \
            if (M) m = vf_load_any(u->m + i, 1, count); \
            if (V) v = vf_load_any(u->v + i, 1, count); \
            name##_element(u, &p, &m, &v, g); \
            store_result(u->new_p + i, p, count, past_caches); \
            if (M) vf_store_any(u->new_m + i, 1, m, count); \
            if (V) vf_store_any(u->new_v + i, 1, v, count); \
        } \
        if (past_caches) vf_stream_end(); \
    }
#define UNUSED __attribute__((unused))

/* g + λ p. Not where λ = 0: an infinite parameter is not a reason for a NaN gradient. */
ALWAYS_INLINE vf decayed(const struct update *u, vf p, vf g) {
    return u->decay == 0 ? g : vf_fma(vf_set1(u->decay), p, g);
}

/* ── SGD ────────────────────────────────────────────────────────────────────────────────────────── */

/* g += λ p;  p −= η g */
ALWAYS_INLINE void sgd_plain_element(const struct update *u, vf *p, vf *m UNUSED, vf *v UNUSED, vf g) {
    g = decayed(u, *p, g);
    *p = vf_fma(vf_set1(-u->rate), g, *p);
}
UPDATE(sgd_plain, 0, 0)

/* g += λ p;  m = μ m + (1 − τ) g (m = g at step 1);  p −= η m, with Nesterov p −= η (g + μ m).
 * Sutskever et al. 2013, in PyTorch's form. */
ALWAYS_INLINE void sgd_element(const struct update *u, vf *p, vf *m, vf *v UNUSED, vf g) {
    g = decayed(u, *p, g);
    *m = u->first ? g : vf_fma(vf_set1(u->beta1), *m, vf_set1(u->rest1) * g);
    vf direction = u->nesterov ? vf_fma(vf_set1(u->beta1), *m, g) : *m;
    *p = vf_fma(vf_set1(-u->rate), direction, *p);
}
UPDATE(sgd, 1, 0)

KERNEL(sgd)(real *new_p, real *new_m, const real *p, const real *m, const real *g, int64_t n, double divisor,
            double scale, double lr, double momentum, double dampening, double weight_decay, int nesterov, int64_t step) {
    struct update u = {.new_p = new_p, .new_m = new_m, .p = p, .m = m, .g = g,
                       .n = n, .divisor = (real)divisor,
                       .scale = (real)scale, .rate = (real)lr, .beta1 = (real)momentum, .rest1 = (real)(1 - dampening),
                       .decay = (real)weight_decay, .nesterov = nesterov, .first = step == 1};
    parallel_for(n, ROWS_GRAIN, momentum == 0 ? sgd_plain_range : sgd_range, &u);
}

/* ── Adam ───────────────────────────────────────────────────────────────────────────────────────── */

/* g += λ p (Adam) or p −= η λ p (AdamW);  m = β₁ m + (1 − β₁) g;  v = β₂ v + (1 − β₂) g²;
 * p −= η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε).
 * Kingma, Ba 2015, arXiv:1412.6980, alg. 1; Loshchilov, Hutter 2019, arXiv:1711.05101, alg. 2. Of decay (λ) and
 * shrink (1 − η λ) one is in force, the other is 0 or 1. */
ALWAYS_INLINE void adam_element(const struct update *u, vf *p, vf *m, vf *v, vf g) {
    g = decayed(u, *p, g);
    *m = vf_fma(vf_set1(u->beta1), *m, vf_set1(u->rest1) * g);
    *v = vf_fma(vf_set1(u->beta2), *v, vf_set1(u->rest2) * g * g);
    vf denominator = vf_sqrt(*v) / vf_set1(u->root_bias2) + vf_set1(u->eps);
    *p = vf_fma(vf_set1(-u->rate), *m / denominator, *p * vf_set1(u->shrink));
}
UPDATE(adam, 1, 1)

KERNEL(adam)(real *new_p, real *new_m, real *new_v, const real *p, const real *m, const real *v, const real *g,
             int64_t n, double divisor, double scale, double lr, double beta1, double beta2, double eps,
             double weight_decay, int decoupled, int64_t step) {
    struct update u = {.new_p = new_p, .new_m = new_m, .new_v = new_v, .p = p, .m = m, .v = v, .g = g,
                       .n = n, .divisor = (real)divisor,
                       .scale = (real)scale,
                       .rate = (real)(lr / (1 - pow(beta1, (double)step))), .beta1 = (real)beta1,
                       .rest1 = (real)(1 - beta1), .beta2 = (real)beta2, .rest2 = (real)(1 - beta2), .eps = (real)eps,
                       .decay = decoupled ? 0 : (real)weight_decay,
                       .shrink = decoupled ? (real)(1 - lr * weight_decay) : 1,
                       .root_bias2 = (real)sqrt(1 - pow(beta2, (double)step))};
    parallel_for(n, ROWS_GRAIN, adam_range, &u);
}

/* ── Adagrad ────────────────────────────────────────────────────────────────────────────────────── */

/* g += λ p;  s += g²;  p −= η/(1 + (t − 1) δ) · g / (√s + ε).  Duchi, Hazan, Singer 2011, fig. 1. */
ALWAYS_INLINE void adagrad_element(const struct update *u, vf *p, vf *m UNUSED, vf *v, vf g) {
    g = decayed(u, *p, g);
    *v = vf_fma(g, g, *v);
    *p = vf_fma(vf_set1(-u->rate), g / (vf_sqrt(*v) + vf_set1(u->eps)), *p);
}
UPDATE(adagrad, 0, 1)

KERNEL(adagrad)(real *new_p, real *new_s, const real *p, const real *s, const real *g, int64_t n, double divisor,
                double scale, double lr, double lr_decay, double eps, double weight_decay, int64_t step) {
    struct update u = {.new_p = new_p, .new_v = new_s, .p = p, .v = s, .g = g,
                       .n = n, .divisor = (real)divisor,
                       .scale = (real)scale,
                       .rate = (real)(lr / (1 + (double)(step - 1) * lr_decay)), .eps = (real)eps,
                       .decay = (real)weight_decay};
    parallel_for(n, ROWS_GRAIN, adagrad_range, &u);
}

/* ── RMSprop ────────────────────────────────────────────────────────────────────────────────────── */

/* g += λ p;  v = α v + (1 − α) g²;  p −= η g / (√v + ε).  Tieleman, Hinton 2012, lecture 6.5. */
ALWAYS_INLINE void rmsprop_plain_element(const struct update *u, vf *p, vf *m UNUSED, vf *v, vf g) {
    g = decayed(u, *p, g);
    *v = vf_fma(vf_set1(u->beta2), *v, vf_set1(u->rest2) * g * g);
    *p = vf_fma(vf_set1(-u->rate), g / (vf_sqrt(*v) + vf_set1(u->eps)), *p);
}
UPDATE(rmsprop_plain, 0, 1)

/* The same with m = μ m + g / (√v + ε);  p −= η m. */
ALWAYS_INLINE void rmsprop_element(const struct update *u, vf *p, vf *m, vf *v, vf g) {
    g = decayed(u, *p, g);
    *v = vf_fma(vf_set1(u->beta2), *v, vf_set1(u->rest2) * g * g);
    *m = vf_fma(vf_set1(u->beta1), *m, g / (vf_sqrt(*v) + vf_set1(u->eps)));
    *p = vf_fma(vf_set1(-u->rate), *m, *p);
}
UPDATE(rmsprop, 1, 1)

KERNEL(rmsprop)(real *new_p, real *new_v, real *new_m, const real *p, const real *v, const real *m, const real *g,
                int64_t n, double divisor, double scale, double lr, double alpha, double eps, double weight_decay,
                double momentum, int64_t step) {
    (void)step; /* RMSprop has no bias correction; all optimizers share one signature */
    struct update u = {.new_p = new_p, .new_m = new_m, .new_v = new_v, .p = p, .m = m, .v = v, .g = g,
                       .n = n, .divisor = (real)divisor,
                       .scale = (real)scale, .rate = (real)lr,
                       .beta1 = (real)momentum, .beta2 = (real)alpha, .rest2 = (real)(1 - alpha), .eps = (real)eps,
                       .decay = (real)weight_decay};
    parallel_for(n, ROWS_GRAIN, momentum == 0 ? rmsprop_plain_range : rmsprop_range, &u);
}
