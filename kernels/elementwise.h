/* elementwise.h: how one element function becomes a kernel over any layout.
 *
 * A kernel of elementwise.c is one function from vectors to a vector. This file walks the layout (see
 * kernels.h), cuts it into runs of one axis, spreads the runs over the threads and hands each run to a
 * function of the form
 *
 *     run(p, stride, n):  n elements, operand k at p[k], p[k] + stride[k], …
 *
 * A run feeds the element function from wherever the elements lie: VL at a time, whether dense (stride 1),
 * broadcast (stride 0) or strided, and the last few in a vector that is partly empty. So an element
 * is computed by the same instructions wherever it lies, and its bits depend on nothing but its operands. */
#ifndef ELEMENTWISE_H
#define ELEMENTWISE_H
#include "simd_math_wide.h"
#include "stream.h"
#include "threads.h"

#define MAX_OPERANDS 4
#define MAX_AXES 32
#define RUN 8192         /* elements of a dense run: 32 KiB of float, some microseconds of work */
#define STRIDED_RUN 128  /* of a strided one: short, so that the next row finds its cache lines again */
#define GRAIN 16384      /* elements worth waking a thread for */
#define SHORT_AXIS 16    /* a last axis shorter than this is not worth a run of its own */
#define PAST_CACHES INT64_MIN /* the stride of a dense result that goes past the caches (stream.h) */

typedef void (*run_function)(char *const *p, const int64_t *stride, int64_t n);

/* The layout with its run axis taken out. Item t of the work is one run: t counts rows of the other axes
 * fastest, then pieces of the run axis, so that neighbouring rows share the cache lines of a strided piece. */
struct walk {
    run_function run;
    int operands, axes, past_caches;
    int64_t n, piece, rows;                            /* length of the run axis, of a run, product of the others */
    char *base[MAX_OPERANDS];
    int64_t stride[MAX_OPERANDS], bytes[MAX_OPERANDS]; /* of the run axis, in elements; size of an element */
    int64_t past[MAX_OPERANDS];                        /* stride, where the result goes past the caches */
    int64_t shape[MAX_AXES], step[MAX_OPERANDS][MAX_AXES]; /* of the other axes; steps in bytes */
};

/* Moves p to the next row, like an odometer. After the last row it stands at the first again. */
ALWAYS_INLINE void next_row(const struct walk *w, int64_t *index, char **p) {
    for (int axis = w->axes - 1; axis >= 0; axis--) {
        int wraps = ++index[axis] == w->shape[axis];
        for (int k = 0; k < w->operands; k++)
            p[k] += wraps ? w->step[k][axis] * (1 - w->shape[axis]) : w->step[k][axis];
        if (!wraps) return;
        index[axis] = 0;
    }
}

static void walk_items(void *context, int64_t begin, int64_t end) {
    const struct walk *w = context;
    int64_t row = begin % w->rows, start = begin / w->rows * w->piece, index[MAX_AXES];
    char *p[MAX_OPERANDS];
    for (int k = 0; k < w->operands; k++) p[k] = w->base[k] + start * w->stride[k] * w->bytes[k];
    for (int64_t axis = w->axes - 1, rest = row; axis >= 0; rest /= w->shape[axis--]) {
        index[axis] = rest % w->shape[axis];
        for (int k = 0; k < w->operands; k++) p[k] += index[axis] * w->step[k][axis];
    }
    for (int64_t item = begin; item < end; item++) {
        int aligned = w->past_caches && (uintptr_t)p[0] % VECTOR_BYTES == 0;
        w->run(p, aligned ? w->past : w->stride, w->n - start < w->piece ? w->n - start : w->piece);
        next_row(w, index, p);
        if (++row < w->rows) continue;
        row = 0;
        start += w->piece;
        for (int k = 0; k < w->operands; k++) p[k] += w->piece * w->stride[k] * w->bytes[k];
    }
    if (w->past_caches) vf_stream_end();
}

/* The axis that runs go along: the last one, or the longest where the last is short. */
static int choose_run_axis(const int64_t *shape, int ndim) {
    int best = ndim - 1;
    if (shape[best] < SHORT_AXIS)
        for (int axis = 0; axis < ndim; axis++)
            if (shape[axis] > shape[best]) best = axis;
    return best;
}

/* A result goes past the caches if it is large and dense, and its lines are not fetched as an operand's. Operands are
 * dense too; the last one may be one number a run. */
static void plan_result(struct walk *w) {
    int dense = 1, suits = w->stride[0] == 1 && w->bytes[0] == sizeof(real);
    w->past[0] = PAST_CACHES;
    for (int k = 1; k < w->operands; k++) {
        int one_number = w->stride[k] == 0 && k == 2 && w->operands == 3;
        suits &= (w->stride[k] == 1 || one_number) && w->base[k] != w->base[0];
        dense += w->stride[k] == 1;
        w->past[k] = w->stride[k];
    }
    w->past_caches = suits && goes_past_caches(dense * w->n * w->rows);
}

static void walk_layout(const int64_t *layout, int operands, void *const *base, const int64_t *bytes,
                        run_function run) {
    int ndim = (int)layout[0];
    const int64_t *shape = layout + 1, *strides = shape + ndim; /* operand k: strides + k·ndim */
    if (ndim <= 1 && (ndim == 0 || shape[0] <= RUN)) { /* one run: nothing to prepare */
        static const int64_t none[MAX_OPERANDS] = {0};
        run((char *const *)base, ndim ? strides : none, ndim ? shape[0] : 1);
        return;
    }
    struct walk w;
    w.run = run, w.operands = operands, w.axes = 0, w.rows = 1, w.piece = RUN;
    int run_axis = choose_run_axis(shape, ndim);
    w.n = shape[run_axis];
    for (int axis = 0; axis < ndim; axis++) {
        if (axis == run_axis) continue;
        for (int k = 0; k < operands; k++) w.step[k][w.axes] = strides[k * ndim + axis] * bytes[k];
        w.shape[w.axes++] = shape[axis];
        w.rows *= shape[axis];
    }
    for (int k = 0; k < operands; k++) {
        w.base[k] = base[k];
        w.bytes[k] = bytes[k];
        w.stride[k] = strides[k * ndim + run_axis];
        if (w.stride[k] != 0 && w.stride[k] != 1 && w.rows > 1) w.piece = STRIDED_RUN;
    }
    if (w.n == 0 || w.rows == 0) return;
    plan_result(&w);
    int64_t pieces = (w.n + w.piece - 1) / w.piece, longest = w.n < w.piece ? w.n : w.piece;
    parallel_for(pieces * w.rows, 1 + (GRAIN - 1) / longest, walk_items, &w);
}

/* ── Operands of a run: n ≤ VL elements at p. ───────────────────────────────────────────────────── */
typedef uint8_t byte_lanes __attribute__((vector_size(VL)));

/* Bytes as a mask: a lane is all ones where the byte is not 0. */
ALWAYS_INLINE vi load_mask(const uint8_t *p, int64_t stride, int64_t n) {
    byte_lanes lanes = {0};
    if (stride == 1 && n == VL) memcpy(&lanes, p, VL);
    else
        for (int64_t i = 0; i < n; i++) lanes[i] = p[i * stride];
    return __builtin_convertvector(lanes, vi) != 0;
}
/* A mask as bytes 0 and 1, elements i … i + n − 1 of a run of them. */
ALWAYS_INLINE void store_mask(char *run, int64_t i, int64_t stride, vi mask, int64_t n) {
    byte_lanes lanes = __builtin_convertvector(mask & 1, byte_lanes);
    uint8_t *p = (uint8_t *)run + i * stride;
    if (stride == 1 && n == VL) memcpy(p, &lanes, VL);
    else
        for (int64_t e = 0; e < n; e++) p[e * stride] = lanes[e];
}

/* v as elements i … i + n − 1 of a run of results. */
ALWAYS_INLINE void store_at(char *run, int64_t i, int64_t stride, vf v, int64_t n) {
    real *y = (real *)run + i * (stride == PAST_CACHES ? 1 : stride);
    if (stride == PAST_CACHES) store_result(y, v, n, 1);
    else vf_store_any(y, stride, v, n);
}

/* ── Kernels from element functions ─────────────────────────────────────────────────────────────── */

/* Makes name_run out of name_at(p, stride, i, n), the results (of type `lanes`) of elements i … i + n − 1 of a run, and
 * store(run, i, stride, results, n). Two vectors are computed before either is stored, and the build lets the compiler
 * take their instructions in turns: most of a function is one chain, each link waiting for the one before. The strides
 * that matter are written out as constants, so that each has a loop of its own without decisions. may_stream: where
 * the result is real numbers, which may go past the caches. */
#define RUN_OF(name, operands, lanes, store, may_stream) \
    ALWAYS_INLINE void name##_span(char *const *p, const int64_t *stride, int64_t n) { \
        int64_t i = 0; \
        for (; i + 2 * VL <= n; i += 2 * VL) { \
            lanes first = name##_at(p, stride, i, VL), second = name##_at(p, stride, i + VL, VL); \
            store(p[0], i, stride[0], first, VL); \
            store(p[0], i + VL, stride[0], second, VL); \
        } \
        for (; i < n; i += VL) store(p[0], i, stride[0], name##_at(p, stride, i, at_most(n - i, VL)), at_most(n - i, VL)); \
    } \
    static void name##_run(char *const *p, const int64_t *stride, int64_t n) { \
        static const int64_t dense[] = {1, 1, 1, 1}, scalar_right[] = {1, 1, 0}, scalar_left[] = {1, 0, 1}; \
        static const int64_t past[] = {PAST_CACHES, 1, 1, 1}, past_right[] = {PAST_CACHES, 1, 0}; \
        if (memcmp(stride, dense, operands * sizeof *dense) == 0) name##_span(p, dense, n); \
        else if (may_stream && stride[0] == PAST_CACHES && operands == 3 && stride[2] == 0) \
            name##_span(p, past_right, n); \
        else if (may_stream && stride[0] == PAST_CACHES) name##_span(p, past, n); \
        else if (operands == 3 && memcmp(stride, scalar_right, sizeof scalar_right) == 0) \
            name##_span(p, scalar_right, n); \
        else if (operands == 3 && memcmp(stride, scalar_left, sizeof scalar_left) == 0) \
            name##_span(p, scalar_left, n); \
        else name##_span(p, stride, n); \
    }

#define REAL_AT(k) ((real *)p[k] + i * stride[k])
#define LOAD(k) vf_load_any(REAL_AT(k), stride[k], n)
#define REAL_SIZES ((const int64_t[]){sizeof(real), sizeof(real), sizeof(real), sizeof(real)})

/* y = f(x) */
#define UNARY_RUN(name, f) \
    ALWAYS_INLINE vf name##_at(char *const *p, const int64_t *stride, int64_t i, int64_t n) { return f(LOAD(1)); } \
    RUN_OF(name, 2, vf, store_at, 1)
#define UNARY(name, f) \
    UNARY_RUN(name, f) \
    KERNEL(name)(real *y, const real *x, const int64_t *layout) { \
        walk_layout(layout, 2, (void *const[]){y, (void *)x}, REAL_SIZES, name##_run); \
    }

/* y = f(a, b) */
#define BINARY(name, f) \
    ALWAYS_INLINE vf name##_at(char *const *p, const int64_t *stride, int64_t i, int64_t n) { \
        return f(LOAD(1), LOAD(2)); \
    } \
    RUN_OF(name, 3, vf, store_at, 1) \
    KERNEL(name)(real *y, const real *a, const real *b, const int64_t *layout) { \
        walk_layout(layout, 3, (void *const[]){y, (void *)a, (void *)b}, REAL_SIZES, name##_run); \
    }

/* y = f(a, b) as bytes, f giving a mask */
#define COMPARISON(name, f) \
    ALWAYS_INLINE vi name##_at(char *const *p, const int64_t *stride, int64_t i, int64_t n) { \
        return f(LOAD(1), LOAD(2)); \
    } \
    RUN_OF(name, 3, vi, store_mask, 0) \
    KERNEL(name)(uint8_t *y, const real *a, const real *b, const int64_t *layout) { \
        const int64_t bytes[] = {1, sizeof(real), sizeof(real)}; \
        walk_layout(layout, 3, (void *const[]){y, (void *)a, (void *)b}, bytes, name##_run); \
    }

#endif
