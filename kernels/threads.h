/* threads.h: how a kernel spreads its work, whatever the number of threads. */
#ifndef THREADS_H
#define THREADS_H
#include <stddef.h>
#include <stdint.h>

/* Calls body(context, begin, end) for disjoint ranges that cover [0, n). Ranges are handed out in
 * multiples of `grain` (≥ 1), the smallest piece worth waking a thread for; n ≤ grain runs inline.
 *
 * The rule that makes the bits independent of the thread count: body may write only what belongs to
 * its own indices, and must compute index i in the same way whatever range it came in. A reduction
 * therefore parallelises over its outputs, or over constant-size blocks whose partial results a
 * second, sequential pass combines in index order. */
void parallel_for(int64_t n, int64_t grain, void (*body)(void *context, int64_t begin, int64_t end), void *context);

/* How ranges are cut: the end of a piece, and the number of pieces. */
static inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
static inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

/* Memory of the calling thread that stays its own until it ends: 64-byte aligned, at least `bytes` long,
 * its contents undefined after each call. One buffer for each use, so that a kernel that calls another
 * keeps its own. Ends the process with one line if the machine refuses the memory. */
enum scratch_use {
    SCRATCH_GEMM_A, SCRATCH_GEMM_B, SCRATCH_GEMM_PARTIAL, SCRATCH_ATTENTION, SCRATCH_ROWS, SCRATCH_COLUMNS,
    SCRATCH_USES
};
void *thread_scratch(enum scratch_use use, size_t bytes);

#endif
