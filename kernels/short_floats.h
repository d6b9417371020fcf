/* short_floats.h: floats rounded to the numbers of a shorter format, and still floats.
 *
 *               sign, exponent, digits    largest      smallest normal     spacing at 1
 *     bfloat16  1, 8, 7                   3.4e38       1.2e-38             2^-7
 *     float16   1, 5, 10                  65504        6.1e-5              2^-10
 *
 * To the nearest, ties to even; beyond the largest to infinity; NaN stays NaN. Where the format has subnormal numbers
 * and a float has none, x + c − c rounds to a fixed spacing: the sum's last digit is 2^-24 for c = 0.5. */
#ifndef SHORT_FLOATS_H
#define SHORT_FLOATS_H
#include "simd.h"

enum format { FLOAT32, BFLOAT16, FLOAT16 }; /* of the elements of a product; the numbers are kernels.h's */

#if REAL_BITS == 32
typedef uint32_t unsigned_bits __attribute__((vector_size(VECTOR_BYTES))); /* which may wrap: of a NaN they do */

/* All but the last `digits` binary digits, rounded: a carry may move up into the exponent, as it should. */
static inline vi vi_round_digits(vi bits, int digits) {
    const unsigned_bits none = {0}, up_to_half = none + ((1u << (digits - 1)) - 1), kept = none + -(1u << digits);
    unsigned_bits x = (unsigned_bits)bits, odd = (x >> digits) & (none + 1u);
    return (vi)((x + up_to_half + odd) & kept);
}

static inline vf vf_to_bfloat16(vf x) {
    return vf_select(vf_is_nan(x), x, vf_from_bits(vi_round_digits(vf_bits(x), 16)));
}

static inline vf vf_to_float16(vf x) {
    vf size = vf_abs(x), half = vf_set1(0.5f);
    vf rounded = vf_select(size < vf_set1(0x1p-14f), (size + half) - half,
                           vf_from_bits(vi_round_digits(vf_bits(size), 13)));
    rounded = vf_select(rounded > vf_set1(65504), vf_set1(__builtin_inff()), rounded);
    return vf_select(vf_is_nan(x), x, vf_copysign(rounded, x));
}

static inline vf vf_to_format(vf x, enum format format) {
    return format == BFLOAT16 ? vf_to_bfloat16(x) : format == FLOAT16 ? vf_to_float16(x) : x;
}
#else
static inline vf vf_to_format(vf x, enum format format) { (void)format; return x; }
#endif

#endif
