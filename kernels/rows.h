/* rows.h: what the kernels over dense rows (softmax.c, norm.c, gather.c, optimize.c) have in common. */
#ifndef ROWS_H
#define ROWS_H
#include "stream.h"
#include "threads.h"

#define ROWS_GRAIN 8192 /* elements worth waking a thread for */

/* Rows of n elements worth waking a thread for. */
static inline int64_t grain_of_rows(int64_t n) { return n > 0 ? 1 + (ROWS_GRAIN - 1) / n : ROWS_GRAIN; }

/* for i = 0, VL, 2 VL … below n, with count = VL except in the last round, which takes what is left. */
#define FOR_ROW(i, count, n) \
    for (int64_t i = 0, count = (n) < VL ? (n) : VL; i < (n); i += VL, count = (n) - i < VL ? (n) - i : VL)

/* The same for results at y: where they go past the caches, the first round ends where y is aligned (stream.h). */
#define FOR_RESULT(i, count, n, y, past_caches) \
    for (int64_t i = 0, count = at_most(n, until_aligned(y, past_caches)); i < (n); \
         i += count, count = (n) - i < VL ? (n) - i : VL)

#endif
