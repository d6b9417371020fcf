/* tree.h: the order in which this project adds up n numbers.
 *
 * It is a function of n alone, the same at every level, for every arrangement in memory and any number of threads:
 *
 *     lanes    element i belongs to lane i mod 16; the 16 elements of a step are a `group`
 *     leaves   a lane adds 8 elements one after another: a leaf is 8 groups, 128 elements
 *     tree     leaves are added in pairs, pairs in pairs, and so on
 *     across   at last lane l is added to lane l + 8, then + 4, + 2, + 1
 *
 * The rounding error grows like log n (Higham, "Accuracy and Stability of Numerical Algorithms", section
 * 4.2), and there are enough independent chains to keep the adders busy. The tree is built as a binary counter
 * counts: pushing leaf number b merges as many finished subtrees as b has trailing ones. So 2ᵏ leaves
 * are always a complete subtree, and a long row can be cut there and handed to different threads.
 *
 * Products and extremes go the same way. `operation` is a constant wherever it is used: the compiler makes a
 * function of its own for each. */
#ifndef TREE_H
#define TREE_H
#include "simd.h"
#include <math.h>

#define GROUP 16
#define GROUP_VECTORS (GROUP / VL)
#define LEAF (8 * GROUP)
#define TREE_LEVELS 48

typedef struct { vf v[GROUP_VECTORS]; } group;
typedef struct { group level[TREE_LEVELS]; int top; int64_t leaves; } tree;
enum operation { SUM, PRODUCT, MAXIMUM, MINIMUM };

/* The element that changes nothing: x + (−0) = x for every x, which x + 0 is not for −0. */
ALWAYS_INLINE real neutral(enum operation op) {
    return op == SUM ? (real)-0.0 : op == PRODUCT ? 1 : op == MAXIMUM ? (real)-INFINITY : (real)INFINITY;
}

/* a op b. A NaN on either side wins (vf_max and vf_min give their second operand where one is), and of two zeros a. */
ALWAYS_INLINE vf combine(enum operation op, vf a, vf b) {
    switch (op) {
    case SUM: return a + b;
    case PRODUCT: return a * b;
    case MAXIMUM: return vf_select(vf_is_nan(b), b, vf_max(b, a));
    default: return vf_select(vf_is_nan(b), b, vf_min(b, a));
    }
}
ALWAYS_INLINE real combine_one(enum operation op, real a, real b) {
    switch (op) {
    case SUM: return a + b;
    case PRODUCT: return a * b;
    case MAXIMUM: return b > a || b != b ? b : a;
    default: return b < a || b != b ? b : a;
    }
}
ALWAYS_INLINE group combine_groups(enum operation op, group a, group b) {
    for (int k = 0; k < GROUP_VECTORS; k++) a.v[k] = combine(op, a.v[k], b.v[k]);
    return a;
}

ALWAYS_INLINE void tree_push(enum operation op, tree *t, group leaf) {
    for (int64_t carry = t->leaves++; carry & 1; carry >>= 1) leaf = combine_groups(op, t->level[--t->top], leaf);
    t->level[t->top++] = leaf;
}
ALWAYS_INLINE group tree_finish(enum operation op, tree *t) {
    group lanes = t->level[--t->top];
    while (t->top) lanes = combine_groups(op, t->level[--t->top], lanes);
    return lanes;
}
ALWAYS_INLINE real across(enum operation op, group g) {
    real lanes[GROUP];
    for (int k = 0; k < GROUP_VECTORS; k++) vf_store(lanes + k * VL, g.v[k]);
#pragma GCC unroll 4
    for (int half = GROUP / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = combine_one(op, lanes[i], lanes[i + half]);
    return lanes[0];
}

ALWAYS_INLINE vf squared(vf v) { return v * v; }

/* The first n lanes of v, `other` in the rest. */
ALWAYS_INLINE vf vf_keep_n(vf v, int64_t n, real other) {
    return vf_select(LANES < vi_set1((real_int)n), v, vf_set1(other));
}

/* lanes = the 16 lanes of a row of n elements. ELEMENT(i, count) gives the vector of elements
 * i … i + count − 1, count ≤ VL; what it has in the other vector lanes is ignored. */
#define ROW_LANES(op, lanes, n, ELEMENT) \
    do { \
        tree row_tree; \
        row_tree.top = 0, row_tree.leaves = 0; \
        int64_t at = 0; \
        for (; at + LEAF <= (n); at += LEAF) { \
            group leaf; \
            for (int k = 0; k < GROUP_VECTORS; k++) leaf.v[k] = ELEMENT(at + k * VL, VL); \
            for (int64_t step = at + GROUP; step < at + LEAF; step += GROUP) \
                for (int k = 0; k < GROUP_VECTORS; k++) \
                    leaf.v[k] = combine(op, leaf.v[k], ELEMENT(step + k * VL, VL)); \
            tree_push(op, &row_tree, leaf); \
        } \
        if (at < (n) || at == 0) { \
            group leaf; \
            for (int k = 0; k < GROUP_VECTORS; k++) leaf.v[k] = vf_set1(neutral(op)); \
            for (int k = 0; at < (n); at += VL, k = (k + 1) % GROUP_VECTORS) { \
                int64_t left = (n) - at; \
                vf v = left >= VL ? ELEMENT(at, VL) : vf_keep_n(ELEMENT(at, left), left, neutral(op)); \
                leaf.v[k] = combine(op, leaf.v[k], v); \
            } \
            tree_push(op, &row_tree, leaf); \
        } \
        (lanes) = tree_finish(op, &row_tree); \
    } while (0)

/* total = Σ ELEMENT over a row of n elements. */
#define ROW_SUM(total, n, ELEMENT) \
    do { \
        group row_lanes; \
        ROW_LANES(SUM, row_lanes, n, ELEMENT); \
        (total) = across(SUM, row_lanes); \
    } while (0)

#endif
