/* stream.h: results that go past the caches.
 *
 * A cache line that is stored to is fetched first, so a result moves its bytes twice. A pass over more than the caches
 * hold leaves none of its result there for the next one, and had better write it to memory at once, in whole lines,
 * which are not fetched: of relu 8 bytes an element move then instead of 12 (18 GB/s before, 28 now; README.md has the
 * others). Softmax, which computes a row in place and then writes it all at once, took longer, and does not. */
#ifndef STREAM_H
#define STREAM_H
#include "simd.h"

#define CACHES (1 << 24) /* bytes that a pass may read and write, and yet its result be found in the caches */

static inline int goes_past_caches(int64_t elements_moved) { return elements_moved > CACHES / (int64_t)sizeof(real); }

/* Elements until a whole vector of y is aligned, so that it can be streamed; a vector where nothing is to be. */
static inline int64_t until_aligned(const real *y, int past_caches) {
    return past_caches ? VL - (int64_t)((uintptr_t)y / sizeof(real) % VL) : VL;
}

/* y = v, of which `count` elements count; a whole vector of a result that goes past the caches is aligned. */
ALWAYS_INLINE void store_result(real *y, vf v, int64_t count, int past_caches) {
    if (past_caches && count == VL) vf_stream(y, v);
    else vf_store_any(y, 1, v, count);
}

#endif
