/* simd.h: one vector type for every instruction set.
 *
 * `vf` is VECTOR_BYTES of real, `vi` the same bytes as signed integers of the same lane width, VL the
 * number of lanes. Arithmetic and comparison are the compiler's own operators (GCC and Clang vector
 * extensions): a + b, a * b, a < b; a comparison gives a `vi` mask, all ones in the lanes where it
 * holds. This file adds what the operators cannot say, and it is the only one with intrinsics.
 *
 * An element's bits must not depend on the lane, vector or tail it falls in. So there are no scalar
 * twins: the tail of a row goes through the same vector code with vf_load_n and vf_store_n. */
#ifndef SIMD_H
#define SIMD_H
#include "kernels.h"
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif
#define VL (VECTOR_BYTES / (REAL_BITS / 8))

#define ALWAYS_INLINE static inline __attribute__((always_inline))

#if REAL_BITS == 32
typedef int32_t real_int;
#else
typedef int64_t real_int;
#endif
typedef real vf __attribute__((vector_size(VECTOR_BYTES)));
typedef real_int vi __attribute__((vector_size(VECTOR_BYTES)));
typedef real vf_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BITS / 8), may_alias));

/* Lane i holds i. */
#if VECTOR_BYTES / (REAL_BITS / 8) == 2
#define LANES ((vi){0, 1})
#elif VECTOR_BYTES / (REAL_BITS / 8) == 4
#define LANES ((vi){0, 1, 2, 3})
#elif VECTOR_BYTES / (REAL_BITS / 8) == 8
#define LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#endif

/* X86(max)(a, b) is the intrinsic of this width and type; NEON(vmaxq)(a, b) likewise. */
#define PASTE3(a, b, c) a##b##c
#define JOIN3(a, b, c) PASTE3(a, b, c)
#if defined(__x86_64__)
#if VECTOR_BYTES == 16
#define X86_PREFIX _mm_
#elif VECTOR_BYTES == 32
#define X86_PREFIX _mm256_
#else
#define X86_PREFIX _mm512_
#endif
#if REAL_BITS == 32
#define X86(name) JOIN3(X86_PREFIX, name, _ps)
#define VECTOR_MASK __mmask16
#else
#define X86(name) JOIN3(X86_PREFIX, name, _pd)
#define VECTOR_MASK __mmask8
#endif
#elif defined(__aarch64__)
#if REAL_BITS == 32
#define NEON(name) JOIN3(name, _, f32)
#else
#define NEON(name) JOIN3(name, _, f64)
#endif
#endif

static inline vf vf_set1(real x) { return x - (vf){0}; } /* x − 0 keeps −0; x + 0 would not */
static inline vf vf_zero(void) { return (vf){0}; }
static inline vi vi_set1(real_int x) { return x - (vi){0}; }

/* mask ? a : b, lane by lane. A lane of mask is all ones or all zeros, as comparisons give. */
static inline vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vi vi_select(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }

/* ── Memory. Pointers need the alignment of one element only. ───────────────────────────────────── */
static inline vf vf_load(const real *p) { return *(const vf_unaligned *)p; }
static inline void vf_store(real *p, vf v) { *(vf_unaligned *)p = v; }

/* Stores past the caches: memory is not read before it is written, and the caches keep what they have. p is aligned
 * to VECTOR_BYTES. Before another thread may look, vf_stream_end() waits until such stores have arrived. */
static inline void vf_stream(real *p, vf v) {
#if defined(__x86_64__)
    X86(stream)(p, v);
#else
    vf_store(p, v);
#endif
}
static inline void vf_stream_end(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* Lanes 0 … n−1 from p, the others = fill; nothing beyond p[n−1] is touched. 0 ≤ n ≤ VL. */
static inline vf vf_load_n(const real *p, int64_t n, real fill) {
#if VECTOR_BYTES == 64
    return X86(mask_loadu)(vf_set1(fill), (VECTOR_MASK)((1u << n) - 1), p);
#elif VECTOR_BYTES == 32
    vi first_n = LANES < vi_set1((real_int)n);
    return vf_select(first_n, X86(maskload)(p, (__m256i)first_n), vf_set1(fill));
#else
    vf v = vf_set1(fill);
    for (int i = 0; i < VL; i++)
        if (i < n) v[i] = p[i];
    return v;
#endif
}
static inline void vf_store_n(real *p, vf v, int64_t n) {
#if VECTOR_BYTES == 64
    X86(mask_storeu)(p, (VECTOR_MASK)((1u << n) - 1), v);
#elif VECTOR_BYTES == 32
    X86(maskstore)(p, (__m256i)(LANES < vi_set1((real_int)n)), v);
#else
    for (int i = 0; i < VL; i++)
        if (i < n) p[i] = v[i];
#endif
}

/* The first n reals of a vector, or all of it when n ≥ VL. */
static inline vf load_up_to(const real *p, int64_t n) { return n >= VL ? vf_load(p) : vf_load_n(p, n, 0); }
static inline void store_up_to(real *p, vf v, int64_t n) {
    if (n >= VL)
        vf_store(p, v);
    else
        vf_store_n(p, v, n);
}

/* Lanes 0 … n−1 from p[0], p[stride], p[2 stride] …; the other lanes are 0. */
static inline vf vf_load_strided(const real *p, int64_t stride, int64_t n) {
    real lanes[VL] = {0};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i * stride];
    return vf_load(lanes);
}
static inline void vf_store_strided(real *p, int64_t stride, vf v, int64_t n) {
    real lanes[VL];
    vf_store(lanes, v);
    for (int64_t i = 0; i < n; i++) p[i * stride] = lanes[i];
}

/* Whatever the stride: dense, broadcast (0) or strided. Where stride and n are constants, one instruction. */
ALWAYS_INLINE vf vf_load_any(const real *p, int64_t stride, int64_t n) {
    if (stride == 1) return n == VL ? vf_load(p) : vf_load_n(p, n, 0);
    return stride == 0 ? vf_set1(*p) : vf_load_strided(p, stride, n);
}
ALWAYS_INLINE void vf_store_any(real *p, int64_t stride, vf v, int64_t n) {
    if (stride != 1) vf_store_strided(p, stride, v, n);
    else if (n == VL) vf_store(p, v);
    else vf_store_n(p, v, n);
}

/* ── Arithmetic ─────────────────────────────────────────────────────────────────────────────────── */

/* a · b + c. One rounding where the level has the instruction (v3, v4, NEON); two on x86-64-v2, which
 * has none. Results are reproducible bit for bit within a level, not between levels. */
static inline vf vf_fma(vf a, vf b, vf c) {
#if defined(__FMA__)
    return X86(fmadd)(a, b, c);
#elif defined(__aarch64__)
    return NEON(vfmaq)(c, a, b);
#else
    return a * b + c;
#endif
}
/* The same for one element, rounded as a lane of vf_fma is. */
static inline real fma1(real a, real b, real c) {
#if defined(__FMA__) || defined(__aarch64__)
    return REAL_BITS == 32 ? (real)__builtin_fmaf((float)a, (float)b, (float)c) : (real)__builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

static inline vi vf_bits(vf v) { return (vi)v; }    /* the same bits as integers, */
static inline vf vf_from_bits(vi v) { return (vf)v; } /* and back */
static inline vi vf_is_nan(vf v) { return v != v; }

#define SIGN_BIT ((real_int)(REAL_BITS == 32 ? INT32_MIN : INT64_MIN))
static inline vf vf_abs(vf v) { return (vf)((vi)v & ~vi_set1(SIGN_BIT)); }
static inline vf vf_copysign(vf magnitude, vf sign) {
    return (vf)(((vi)magnitude & ~vi_set1(SIGN_BIT)) | ((vi)sign & vi_set1(SIGN_BIT)));
}

/* a > b ? a : b, so b where either is NaN: what x86's instruction does, on every machine. */
static inline vf vf_max(vf a, vf b) {
#if defined(__x86_64__)
    return X86(max)(a, b);
#else
    return vf_select(a > b, a, b);
#endif
}
static inline vf vf_min(vf a, vf b) {
#if defined(__x86_64__)
    return X86(min)(a, b);
#else
    return vf_select(a < b, a, b);
#endif
}

static inline vf vf_sqrt(vf v) {
#if defined(__x86_64__)
    return X86(sqrt)(v);
#else
    return NEON(vsqrtq)(v);
#endif
}

/* To an integral value: to the nearest (ties to even), down, up. */
#if defined(__x86_64__) && VECTOR_BYTES == 64
#define X86_ROUND(v, mode) X86(roundscale)(v, (mode) | _MM_FROUND_NO_EXC)
#else
#define X86_ROUND(v, mode) X86(round)(v, (mode) | _MM_FROUND_NO_EXC)
#endif
#if defined(__x86_64__)
static inline vf vf_round(vf v) { return X86_ROUND(v, _MM_FROUND_TO_NEAREST_INT); }
static inline vf vf_floor(vf v) { return X86_ROUND(v, _MM_FROUND_TO_NEG_INF); }
static inline vf vf_ceil(vf v) { return X86_ROUND(v, _MM_FROUND_TO_POS_INF); }
#else
static inline vf vf_round(vf v) { return NEON(vrndnq)(v); }
static inline vf vf_floor(vf v) { return NEON(vrndmq)(v); }
static inline vf vf_ceil(vf v) { return NEON(vrndpq)(v); }
#endif

#if REAL_BITS == 32
/* ── Through double: vd has the bytes of vf and half as many lanes ──────────────────────────────── */
#define HALF_VL (VL / 2)
typedef double vd __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t vl __attribute__((vector_size(VECTOR_BYTES)));

static inline vd vd_set1(double x) { return x - (vd){0}; }
static inline vd vd_select(vl mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }

/* The first and the second half of v as doubles, and back, each lane rounded to the nearest float. */
#if defined(__x86_64__) && VECTOR_BYTES == 64
static inline vd vd_low(vf v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
static inline vd vd_high(vf v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
static inline vf vf_narrow(vd low, vd high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
#elif defined(__x86_64__) && VECTOR_BYTES == 32
static inline vd vd_low(vf v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
static inline vd vd_high(vf v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
static inline vf vf_narrow(vd low, vd high) { return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)); }
#elif defined(__x86_64__)
static inline vd vd_low(vf v) { return _mm_cvtps_pd(v); }
static inline vd vd_high(vf v) { return _mm_cvtps_pd(_mm_movehl_ps(v, v)); }
static inline vf vf_narrow(vd low, vd high) { return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)); }
#else
static inline vd vd_low(vf v) { return vcvt_f64_f32(vget_low_f32(v)); }
static inline vd vd_high(vf v) { return vcvt_high_f64_f32(v); }
static inline vf vf_narrow(vd low, vd high) { return vcvt_high_f32_f64(vcvt_f32_f64(low), high); }
#endif

/* a · b + c with one rounding at every level: on x86-64-v2 through double, which holds the product exactly,
 * at some eight times the cost of vf_fma. vf_fma_once(a, b, −c) is the rounding error of c ≈ a · b. */
static inline vf vf_fma_once(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__aarch64__)
    return vf_fma(a, b, c);
#else
    return vf_narrow(vd_low(a) * vd_low(b) + vd_low(c), vd_high(a) * vd_high(b) + vd_high(c));
#endif
}

/* v · 2ⁿ, n a whole number in −252 … 252, rounded once, subnormal results included. */
static inline vf vf_ldexp(vf v, vf n) {
#if VECTOR_BYTES == 64
    return _mm512_scalef_ps(v, n);
#else
    vi whole = __builtin_convertvector(n, vi), half = whole >> 1; /* 2ⁿ itself need not be a normal float */
    vf first = (vf)((half + 127) << 23), second = (vf)((whole - half + 127) << 23);
    return v * first * second;
#endif
}
#endif

/* ── Across the lanes. A fixed tree: lane i with lane i + VL/2, then i + VL/4 … ──────────────────── */
static inline real vf_sum(vf v) {
    real lanes[VL];
    vf_store(lanes, v);
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
/* The largest and the smallest lane; meaningless if a lane is NaN. */
static inline real vf_hmax(vf v) {
    real lanes[VL];
    vf_store(lanes, v);
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}
static inline real vf_hmin(vf v) { return -vf_hmax(-v); }

/* Whether any lane of a mask is set. */
static inline int vi_any(vi mask) {
#if VECTOR_BYTES == 64 && REAL_BITS == 32
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif VECTOR_BYTES == 64
    return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif defined(__x86_64__)
    return X86(movemask)((vf)mask) != 0;
#else
    real_int any = 0;
    for (int i = 0; i < VL; i++) any |= mask[i];
    return any != 0;
#endif
}

/* ── Wide multiplication: `vu` is lanes of 64 bits ──────────────────────────────────────────────── */
typedef uint64_t vu __attribute__((vector_size(VECTOR_BYTES)));

/* (a mod 2³²) · b in full, 64 bits. */
static inline vu vu_multiply_low(vu a, uint32_t b) {
    vu factor = (vu){0} + (uint64_t)b;
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (vu)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (vu)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__x86_64__)
    return (vu)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
    return (a & 0xffffffffu) * factor;
#endif
}

#endif
