/* machine.c: what the build and the processor are, memory from the operating system, and the two roofs
 * under which every kernel works: flops per second and bytes per second. */
#define _GNU_SOURCE
#include "gemm_bf16.h"
#include <sys/mman.h>

/* ── the processor and the build ─────────────────────────────────────────────────────────────────── */

/* Whether this processor, and the operating system that saves its registers, runs code of a level. */
int level_supported(int level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int v2 = __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") &&
             __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    int v3 = v2 && __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    return level == 2 ? v2 : level == 3 ? v3 : level == 4 ? v4 : 0;
#elif defined(__aarch64__)
    return level == 1; /* every 64-bit ARM processor has NEON */
#else
    (void)level;
    return 0;
#endif
}

int vector_bytes(void) { return VECTOR_BYTES; }

const char *compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

/* ── the unit for bfloat16 ───────────────────────────────────────────────────────────────────────── */

#if BF16_UNITS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int has_bit(unsigned leaf, unsigned subleaf, int in_edx, int bit) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx) && ((in_edx ? edx : eax) >> bit & 1);
}

/* Registers of 8 KiB a thread: Linux saves them for a process that has asked, and from then on the stack of a signal
 * handler needs as much more. It refuses where a thread has set aside one that is too small. */
static int system_allows_tiles(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* A Zen 4 starts a dot product in each cycle, twice the work of its FMAs; a Sapphire Rapids one in two cycles, half. */
static int dot_is_fast(void) { return !__builtin_cpu_is("intel"); }

static int best_bf16_unit(void) {
    if (!level_supported(4) || !has_bit(7, 1, 0, 5)) /* AVX512_BF16, whose conversions both need */
        return BF16_BY_FMA;
    int amx = has_bit(7, 0, 1, 22) && has_bit(7, 0, 1, 24); /* AMX-BF16, AMX-TILE */
    return amx && system_allows_tiles() ? BF16_BY_AMX : BF16_BY_DOT;
}
#else
static int dot_is_fast(void) { return 0; }
static int best_bf16_unit(void) { return BF16_BY_FMA; }
#endif

int bf16_unit_in_use;

int bf16_unit(int wanted) {
    int best = best_bf16_unit();
    if (wanted < 0)
        wanted = best == BF16_BY_DOT && !dot_is_fast() ? BF16_BY_FMA : best;
    return bf16_unit_in_use = (int)at_most(wanted, best);
}

/* ── memory ──────────────────────────────────────────────────────────────────────────────────────── */

#define HUGE_PAGE ((size_t)2 << 20)

static void *map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

/* A huge page must start at a multiple of its size: map more than asked for and give back both ends. */
static void *map_huge(size_t bytes) {
    char *all = map(bytes + HUGE_PAGE);
    if (!all)
        return NULL;
    char *start = (char *)(((uintptr_t)all + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    size_t before = (size_t)(start - all);
    if (before)
        munmap(all, before);
    munmap(start + bytes, HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(start, bytes, MADV_HUGEPAGE); /* a wish: where it is refused, small pages serve */
#endif
    return start;
}

/* Both functions must see the same length: whole pages of the largest size in use. */
static size_t whole_pages(size_t bytes) { return (bytes + 65535) & ~(size_t)65535; }

void *memory_reserve(size_t bytes) {
    if (bytes == 0 || bytes > SIZE_MAX / 2)
        return NULL;
    bytes = whole_pages(bytes);
    return bytes >= HUGE_PAGE ? map_huge(bytes) : map(bytes);
}

void memory_release(void *p, size_t bytes) {
    if (p)
        munmap(p, whole_pages(bytes));
}

/* ── the two roofs ───────────────────────────────────────────────────────────────────────────────── */

/* An FMA takes 4 to 5 cycles and two start in each, so 10 independent chains keep the units busy; 12 chains
 * and the two constants fit 16 registers. On x86-64-v2 a multiplication and an addition stand for the FMA. */
#define CHAINS 12
#define PIECES 64

struct peak { int64_t steps; float *sink; };

static void multiply_add_chains(void *context, int64_t begin, int64_t end) {
    struct peak *peak = context;
    for (int64_t piece = begin; piece < end; piece++) {
        vf chain[CHAINS], half = vf_set1(0.5f), one = vf_set1(1.0f);
        for (int c = 0; c < CHAINS; c++)
            chain[c] = vf_set1((float)c);
        for (int64_t step = 0; step < peak->steps; step++)
#pragma GCC unroll 12
            for (int c = 0; c < CHAINS; c++)
                chain[c] = vf_fma(chain[c], half, one);
        for (int c = 1; c < CHAINS; c++)
            chain[0] += chain[c];
        peak->sink[piece] = vf_sum(chain[0]);
    }
}

double peak_flops_run(int64_t iterations) {
    int64_t pieces = (int64_t)PIECES * threads_get();
    float *sink = thread_scratch(SCRATCH_ROWS, (size_t)pieces * sizeof(float));
    struct peak peak = {(iterations + PIECES - 1) / PIECES, sink};
    parallel_for(pieces, 1, multiply_add_chains, &peak);
    return (double)pieces * (double)peak.steps * CHAINS * VL * 2;
}

struct reading { const float *x; int64_t n; double sums[PIECES]; };

static void read_pieces(void *context, int64_t begin, int64_t end) {
    struct reading *reading = context;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t i = reading->n * piece / PIECES, stop = reading->n * (piece + 1) / PIECES;
        vf sum[8] = {vf_zero()};
        for (; i + 8 * VL <= stop; i += 8 * VL)
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++)
                sum[c] += vf_load(reading->x + i + c * VL);
        for (; i < stop; i += VL)
            sum[0] += vf_load_n(reading->x + i, stop - i < VL ? stop - i : VL, 0);
        for (int c = 1; c < 8; c++)
            sum[0] += sum[c];
        reading->sums[piece] = vf_sum(sum[0]);
    }
}

double read_bandwidth_run(const float *x, int64_t n) {
    struct reading reading = {x, n, {0}};
    parallel_for(PIECES, 1, read_pieces, &reading);
    double sum = 0;
    for (int piece = 0; piece < PIECES; piece++)
        sum += reading.sums[piece];
    return sum;
}

struct copying { float *to; const float *from; int64_t n; };

static void copy_pieces(void *context, int64_t begin, int64_t end) {
    struct copying *copying = context;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t i = copying->n * piece / PIECES, stop = copying->n * (piece + 1) / PIECES;
        for (; i < stop && (uintptr_t)(copying->to + i) % VECTOR_BYTES; i++)
            copying->to[i] = copying->from[i];
        for (; i + VL <= stop; i += VL)
            vf_stream(copying->to + i, vf_load(copying->from + i));
        for (; i < stop; i++)
            copying->to[i] = copying->from[i];
    }
    vf_stream_end();
}

void copy_bandwidth_run(float *to, const float *from, int64_t n) {
    struct copying copying = {to, from, n};
    parallel_for(PIECES, 1, copy_pieces, &copying);
}
