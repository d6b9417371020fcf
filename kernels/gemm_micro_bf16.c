/* gemm_micro_bf16.c: the register tile of gemm_micro.c on pairs of bfloat16. One instruction multiplies two pairs and
 * adds both products, each sum rounded to float; to it subnormal numbers are zeros. */
#include "gemm_bf16.h"
#if BF16_UNITS
#pragma GCC target("avx512bf16")
#define PAIRS

typedef int32_t pair __attribute__((may_alias));

/* A pair is moved as an integer: as a float it may be a NaN, which a move through arithmetic would change. */
#define EVERYWHERE(element) ((vf)_mm512_set1_epi32(*(const pair *)&(element)))
#define MULTIPLY_ADD(x, y, sum) ((vf)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)(y)))
#define MICRO_TILE micro_tile_pairs
#include "gemm_micro.c"

#else
typedef int no_such_unit; /* ISO C wants something here */
#endif
