/* kernels.h: the C interface of the engine, and the only copy of it.
 *
 * The build reads this file twice. The compiler includes it, once with real = float and once with
 * real = double, so every body is checked against its prototype. And tools/build_backend.py hands
 * each line that starts with KERNEL or EXPORT to cffi, so Python sees exactly what C sees:
 *
 *     KERNEL(exp)(real *y, ...);    ->  void exp_f32(float *y, ...);  void exp_f64(double *y, ...);
 *     EXPORT int threads_get(void); ->  int threads_get(void);        (no element type: built once)
 *
 * Conventions. Argument order is outputs, inputs, sizes, scalars; the same order in Python and CUDA.
 * Nothing aliases except where a comment says "may be". Sizes are int64_t and may be 0. Kernels assume
 * element alignment only. A pointer marked "or NULL" may be left out (None in Python).
 *
 * Elementwise kernels take a `layout`, an int64_t record shared by all operands after broadcasting:
 *
 *     { ndim, shape[ndim], strides of operand 0 [ndim], of operand 1 [ndim], ... }
 *
 * strides count elements, are 0 along a broadcast axis, may be negative; the last axis is the innermost.
 * Operand order is the argument order (outputs first). ndim = 0 is one element. Python has already
 * merged adjacent axes where every operand allows it, so a dense operand is one axis of stride 1. */

#ifndef REAL_BITS
#define REAL_BITS 32
#endif
#include <stddef.h>
#include <stdint.h>

#undef real
#undef KERNEL
#if REAL_BITS == 32
#define real float
#define KERNEL(name) void name##_f32
#else
#define real double
#define KERNEL(name) void name##_f64
#endif
#define EXPORT extern

/* ── copy.c: y = x ── */
KERNEL(copy)(real *y, const real *x, const int64_t *layout);

/* ── elementwise.c: y = f(x), and the derivatives that are worth one pass ───────────────────────── */
KERNEL(negative)(real *y, const real *x, const int64_t *layout);
KERNEL(abs)(real *y, const real *x, const int64_t *layout);
KERNEL(sign)(real *y, const real *x, const int64_t *layout);
KERNEL(floor)(real *y, const real *x, const int64_t *layout);
KERNEL(ceil)(real *y, const real *x, const int64_t *layout);
KERNEL(round)(real *y, const real *x, const int64_t *layout);
KERNEL(square)(real *y, const real *x, const int64_t *layout);
KERNEL(sqrt)(real *y, const real *x, const int64_t *layout);
KERNEL(rsqrt)(real *y, const real *x, const int64_t *layout);
KERNEL(reciprocal)(real *y, const real *x, const int64_t *layout);
KERNEL(exp)(real *y, const real *x, const int64_t *layout);
KERNEL(expm1)(real *y, const real *x, const int64_t *layout);
KERNEL(log)(real *y, const real *x, const int64_t *layout);
KERNEL(log1p)(real *y, const real *x, const int64_t *layout);
KERNEL(sin)(real *y, const real *x, const int64_t *layout);
KERNEL(cos)(real *y, const real *x, const int64_t *layout);
KERNEL(tanh)(real *y, const real *x, const int64_t *layout);
KERNEL(sigmoid)(real *y, const real *x, const int64_t *layout);
KERNEL(erf)(real *y, const real *x, const int64_t *layout);
KERNEL(relu)(real *y, const real *x, const int64_t *layout);
KERNEL(silu)(real *y, const real *x, const int64_t *layout);
KERNEL(softplus)(real *y, const real *x, const int64_t *layout);
KERNEL(gelu)(real *y, const real *x, const int64_t *layout);       /* x Φ(x), exact, through erf       */
KERNEL(gelu_tanh)(real *y, const real *x, const int64_t *layout);  /* its tanh approximation           */
KERNEL(relu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout);   /* NaN x: dx = g·0 is not wanted; x > 0 ? g : 0 */
KERNEL(silu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout);
KERNEL(gelu_vjp)(real *dx, const real *g, const real *x, const int64_t *layout);
KERNEL(gelu_tanh_vjp)(real *dx, const real *g, const real *x, const int64_t *layout);

/* y = f(a, b); maximum and minimum propagate NaN as NumPy's do. Comparisons write bytes 0 and 1. */
KERNEL(add)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(subtract)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(multiply)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(divide)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(pow)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(maximum)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(minimum)(real *y, const real *a, const real *b, const int64_t *layout);
KERNEL(equal)(uint8_t *y, const real *a, const real *b, const int64_t *layout);
KERNEL(not_equal)(uint8_t *y, const real *a, const real *b, const int64_t *layout);
KERNEL(less)(uint8_t *y, const real *a, const real *b, const int64_t *layout);
KERNEL(less_equal)(uint8_t *y, const real *a, const real *b, const int64_t *layout);
KERNEL(where)(real *y, const uint8_t *condition, const real *a, const real *b, const int64_t *layout);

/* ── reduce.c, scan.c: x is dense (outer, n, inner), y is (outer, inner) ─────────────────────────── */
KERNEL(sum)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner);
KERNEL(prod)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner);
KERNEL(max)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner);   /* n > 0; NaN propagates */
KERNEL(min)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner);
KERNEL(argmax)(int64_t *y, const real *x, int64_t outer, int64_t n, int64_t inner); /* first; first NaN wins */
KERNEL(argmin)(int64_t *y, const real *x, int64_t outer, int64_t n, int64_t inner);
KERNEL(logsumexp)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner);
KERNEL(cumulative_sum)(real *y, const real *x, int64_t outer, int64_t n, int64_t inner); /* y like x */
/* partial[b] = Σ (x/divisor)² over block b of 4096 elements (the last may be short), in double. */
KERNEL(sum_squares)(double *partial, const real *x, int64_t n, double divisor);

/* ── softmax.c: rows × n, dense ──────────────────────────────────────────────────────────────────── */
KERNEL(softmax)(real *y, const real *x, int64_t rows, int64_t n);
KERNEL(softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n);
KERNEL(log_softmax)(real *y, const real *x, int64_t rows, int64_t n);
KERNEL(log_softmax_vjp)(real *dx, const real *g, const real *y, int64_t rows, int64_t n);
/* loss[r] = lse[r] − (1 − smoothing) x[r, target] − smoothing · mean(x[r]); 0 where target == ignore. */
KERNEL(cross_entropy)(real *loss, real *lse, const real *x, const int64_t *target, int64_t rows, int64_t n, int64_t ignore, double smoothing);
/* dx may be x. */
KERNEL(cross_entropy_vjp)(real *dx, const real *g, const real *x, const real *lse, const int64_t *target, int64_t rows, int64_t n, int64_t ignore, double smoothing);

/* ── norm.c: rows × n, dense; mean and rstd are (rows,) ──────────────────────────────────────────── */
KERNEL(layer_norm)(real *y, real *mean, real *rstd, const real *x, const real *weight, const real *bias, int64_t rows, int64_t n, double eps);
KERNEL(layer_norm_vjp)(real *dx, real *dweight, real *dbias, const real *g, const real *x, const real *weight, const real *mean, const real *rstd, int64_t rows, int64_t n);
KERNEL(rms_norm)(real *y, real *rstd, const real *x, const real *weight, int64_t rows, int64_t n, double eps);
KERNEL(rms_norm_vjp)(real *dx, real *dweight, const real *g, const real *x, const real *weight, const real *rstd, int64_t rows, int64_t n);

/* ── gemm.c: C = A B (+ C if accumulate) (+ bias along n), batched and strided; C's last axis is dense.
 * A[i, p] = a[i·a_row + p·a_col], B[p, j] = b[p·b_row + j·b_col], C[i, j] = c[i·c_row + j]. Batch t
 * starts at a + t·a_batch and so on; a batch stride of 0 repeats an operand. bias is (n,) or NULL.
 * Every element is the sum, in ascending order, of blocks of KC = 256 products, each block one
 * ascending chain of fused multiply-adds from zero; bias and accumulate add to the finished sum.
 * format 1 rounds the elements of A and B to bfloat16 first and 2 to float16; 0, and with double any, leaves them. Of
 * bfloat16 a block is summed in the order of the unit (gemm_bf16.c). */
KERNEL(gemm)(real *c, const real *a, const real *b, const real *bias, int64_t batch, int64_t m, int64_t n, int64_t k, int64_t a_batch, int64_t a_row, int64_t a_col, int64_t b_batch, int64_t b_row, int64_t b_col, int64_t c_batch, int64_t c_row, int accumulate, int format);
/* y (m, n) = x (m, k) Wᵀ + bias, all dense, with the bits of gemm, for a W (n, k) that is only read from then on.
 * pack_weight leaves panels of c = 2 · vector_bytes()/sizeof(real) rows, ⌈n/c⌉ · k · c numbers:
 * panels[j][p][i] = weight[(j·c + i)·row + p·column], 0 beyond row n. */
KERNEL(pack_weight)(real *panels, const real *weight, int64_t n, int64_t k, int64_t row, int64_t column);
KERNEL(packed_linear)(real *y, const real *x, const real *panels, const real *bias, int64_t m, int64_t n, int64_t k);

/* ── gemm_activation.c: all dense; activation f: 0 relu, 1 silu, 2 gelu, 3 gelu_tanh. Bits as of gemm and then f. ── */
/* h (m, n) = f(z), slope = f′(z) or NULL, with z = x (m, k) Wᵀ + bias for W (n, k). */
KERNEL(linear_activation)(real *h, real *slope, const real *x, const real *weight, const real *bias, int64_t m, int64_t n, int64_t k, int activation, int format);
/* dz (m, n) = (g (m, k) W) ∘ f′(z) for W (k, n): what the gradient of y = f(z) Wᵀ is in z. */
KERNEL(linear_activation_vjp)(real *dz, const real *g, const real *weight, const real *slope, int64_t m, int64_t n, int64_t k, int activation, int format);

/* ── quantized.c: the same for a W of quantised blocks. 32 weights of a row are a block: a scale d (and with Q4_1
 * a minimum m) in float16, then quants. scheme is GGUF's number: 2 Q4_0, d(q − 8); 3 Q4_1, d q + m; 8 Q8_0, d q with signed
 * bytes q; 30 BF16, which has no scale, and for quants the upper halves of floats. Of 4-bit quants byte i holds weight i in its lower half and weight i + 16 in the upper. k is a multiple of 32,
 * d and m are finite. 32 rows are a panel, rows beyond n anything finite: for each block d of every row, m of every row,
 * bytes 0 … 3 of every row's quants, bytes 4 … 7 and so on. */
KERNEL(quantized_linear)(real *y, const real *x, const uint8_t *panels, const real *bias, int64_t m, int64_t n, int64_t k, int scheme);

/* ── attention.c: softmax(scale · Q Kᵀ + mask) V, tiled; nothing of size T × S is ever held.
 * q: (batch, T, heads, D); k, v: (batch, S, kv_heads, D), heads a multiple of kv_heads; the last axis is
 * dense, the others go by strides = { q: b,h,t; k: b,h,s; v: b,h,s; mask: b,h,t,s; dq: t; dk and dv: s }; out is
 * dense and shaped as q, and so are the gradients but for the distance from one time to the next; lse is (batch, T, heads). mask is added to the scores, or NULL. lengths[b]
 * is how many keys of sequence b are real (a key beyond is as if not there), or NULL for all S. causal:
 * query t sees key s where s ≤ t + (S − T). A row that sees nothing gives zeros and lse = −inf. Dropout
 * multiplies the probabilities by keep/(1 − p), Philox site as below, index ((b·heads + h)·T + t)·S + s. */
KERNEL(attention)(real *out, real *lse, const real *q, const real *k, const real *v, const real *mask, const int64_t *lengths, int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s, int64_t d, const int64_t *strides, double scale, int causal, double dropout, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);
/* delta is scratch of (batch, T, heads). */
KERNEL(attention_vjp)(real *dq, real *dk, real *dv, real *delta, const real *g, const real *q, const real *k, const real *v, const real *out, const real *lse, const real *mask, const int64_t *lengths, int64_t batch, int64_t heads, int64_t kv_heads, int64_t t, int64_t s, int64_t d, const int64_t *strides, double scale, int causal, double dropout, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);

/* ── gather.c ────────────────────────────────────────────────────────────────────────────────────── */
KERNEL(embedding)(real *y, const real *weight, const int64_t *index, int64_t count, int64_t vocabulary, int64_t n);
/* dweight (vocabulary, n) is overwritten; row index[i] collects g[i] in ascending i. */
KERNEL(embedding_vjp)(real *dweight, const real *g, const int64_t *index, int64_t count, int64_t vocabulary, int64_t n);
/* x, y: (outer, t, d) dense; cos, sin: (t, d/2). Pairs are (i, i + d/2), or (2i, 2i + 1) if interleaved. */
KERNEL(rope)(real *y, const real *x, const real *cosine, const real *sine, int64_t outer, int64_t t, int64_t d, int interleaved);

/* ── random.c: Philox4x32-10 (Salmon et al. 2011). key = seed; counter = (index/4, site, microbatch, step),
 * word index%4. So an element's value depends on nothing but its logical index and the site's key.
 * uniform = (bits >> 8) · 2⁻²⁴ for float, in [0, 1); for double, two words give 53 bits (counter index/2).
 * normal: Box–Muller on the pair of uniforms of its pair of elements. Keep where uniform ≥ p. */
KERNEL(random_uniform)(real *y, int64_t n, double low, double high, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);
KERNEL(random_normal)(real *y, int64_t n, double mean, double std, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);
KERNEL(dropout)(real *y, const real *x, int64_t n, double p, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);
EXPORT void random_bits(uint32_t *y, int64_t n, uint64_t seed, uint32_t step, uint32_t microbatch, uint32_t site);

/* ── optimize.c: one pass over flat parameters; new_* may be the same as the old. step counts from 1. The gradient
 * is g/divisor · scale, rounded twice. ── */
KERNEL(sgd)(real *new_p, real *new_m, const real *p, const real *m, const real *g, int64_t n, double divisor, double scale, double lr, double momentum, double dampening, double weight_decay, int nesterov, int64_t step);
KERNEL(adam)(real *new_p, real *new_m, real *new_v, const real *p, const real *m, const real *v, const real *g, int64_t n, double divisor, double scale, double lr, double beta1, double beta2, double eps, double weight_decay, int decoupled, int64_t step);
KERNEL(adagrad)(real *new_p, real *new_s, const real *p, const real *s, const real *g, int64_t n, double divisor, double scale, double lr, double lr_decay, double eps, double weight_decay, int64_t step);
KERNEL(rmsprop)(real *new_p, real *new_v, real *new_m, const real *p, const real *v, const real *m, const real *g, int64_t n, double divisor, double scale, double lr, double alpha, double eps, double weight_decay, double momentum, int64_t step);

/* ── threads.c: a team of threads for each calling thread ────────────────────────────────────────── */
EXPORT void threads_set(int n);     /* size of the calling thread's team, itself included */
EXPORT int threads_get(void);

/* ── machine.c: what the build and the processor are ─────────────────────────────────────────────── */
EXPORT int level_supported(int level);  /* 2, 3, 4: x86-64-v2, v3, v4; 1: NEON. Asked before one is chosen. */
EXPORT int vector_bytes(void);
/* The unit that multiplies bfloat16 from now on: 0 that of float, 1 AVX-512's dot product of pairs, 2 AMX: the best that the
 * processor, the build and the system have, at most `wanted`; wanted = −1: the fastest. Asked before there are products. */
EXPORT int bf16_unit(int wanted);
EXPORT const char *compiler(void);
EXPORT void *memory_reserve(size_t bytes);  /* 64-byte aligned, huge pages where offered; NULL if refused */
EXPORT void memory_release(void *p, size_t bytes);
/* Independent fused multiply-adds in float, on the calling thread's whole team: flops done. For the measured peak. */
EXPORT double peak_flops_run(int64_t iterations);
/* Reads bytes of x and sums them, for the measured read bandwidth. */
EXPORT double read_bandwidth_run(const float *x, int64_t n);
/* Copies n floats past the caches, for the measured copy bandwidth. */
EXPORT void copy_bandwidth_run(float *to, const float *from, int64_t n);
