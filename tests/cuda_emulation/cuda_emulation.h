/* cuda_emulation.h: what a .cu file needs to be compiled as C++ and run on a CPU, for tests.
 *
 * Each thread of a block is a fiber: a stack and a place to go on from. One fiber runs at a time, until it comes to a
 * barrier or a shuffle; then another one runs, chosen by the schedule. So a block of 256 threads is one ordinary
 * thread, a run is repeated exactly by its schedule, and a thread that should have waited for another can be made to
 * come too early or too late on purpose.
 *
 * Every access to memory is watched: the kernel is compiled with -fsanitize=thread, which turns each into a call, and
 * emulation.cpp, not the sanitizer, answers those calls. It reports
 *
 *     a race              two threads touch an address, one of them writing, with no barrier in between
 *     a hole              shared memory is read that no thread of the block wrote
 *     a stray access      outside the arrays of the launch, shared memory and the thread's own stack
 *     a barrier           that some threads of a block reach and others do not
 *
 * Emulated are the parts of CUDA that kernels/cuda uses: one-dimensional grids and blocks, whole warps in shuffles. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__ __attribute__((noinline, visibility("default")))
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("cuda_shared")))

struct emulated_index { unsigned x; };
extern emulated_index threadIdx, blockIdx, gridDim, blockDim;

void emulated_barrier(const char *file, int line);
uint64_t emulated_shuffle(unsigned mask, uint64_t mine, int source, const char *file, int line);
unsigned emulated_ballot(unsigned mask, bool vote, const char *file, int line);
int emulated_lane();

#define __syncthreads() emulated_barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, x, apart) emulated_shuffle_of(mask, x, emulated_lane() ^ (apart), __FILE__, __LINE__)
#define __shfl_sync(mask, x, source) emulated_shuffle_of(mask, x, (source) % 32, __FILE__, __LINE__)
#define __ballot_sync(mask, vote) emulated_ballot(mask, vote, __FILE__, __LINE__)
#define __popc(word) __builtin_popcount(word)

template <typename T>
static inline T emulated_shuffle_of(unsigned mask, T x, int source, const char *file, int line) {
    uint64_t mine = 0;
    memcpy(&mine, &x, sizeof x);
    mine = emulated_shuffle(mask, mine, source, file, line);
    memcpy(&x, &mine, sizeof x);
    return x;
}

/* Φ(x), wider than the type, so that the tail is right. */
static inline float normcdf(float x) { return (float)(0.5 * erfc(-(double)x * M_SQRT1_2)); }
static inline double normcdf(double x) { return (double)(0.5L * erfcl(-(long double)x * 0.707106781186547524400844362105L)); }

/* Runs body(context) as every thread of a grid; tests/cuda_emulation/emulation.py generates the callers. */
void emulated_grid(void (*body)(void *), void *context);
