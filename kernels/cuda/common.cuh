/* common.cuh: what the CUDA kernels share; read this first.
 *
 * KERNEL(softmax)(real *y, …) is the kernel softmax of kernels.h, word for word: outputs, inputs, sizes, scalars.
 * Each file is compiled twice, with REAL_BITS = 32 and 64, into softmax_f32 and softmax_f64. Pointers are addresses
 * on the GPU.
 *
 * The grid. A block has THREADS threads, eight warps of 32. The work of a kernel is a number of tasks (a row, a tile, a
 * block of elements), and block b of the grid does tasks b, b + gridDim.x, b + 2 gridDim.x, … So a launch needs no
 * sizes of its own, and any grid gives the same result.
 *
 * The same bits every time. An output element belongs to one thread or one block; sums within a block are fixed trees
 * over threads, sums within a thread ascend; nothing is added atomically. So a result depends on the operands and on
 * the sizes, not on the grid, the GPU's occupancy or the order in which its blocks happen to run. Compiled with
 * -fmad=false, so a multiply-add is rounded once where the source says fma, and twice elsewhere.
 *
 * Shared memory is read by other threads only after __syncthreads(), and overwritten only after another one: tests take
 * out each of them, one at a time, and see the race found (tests/cuda_emulation). */
#ifdef __CUDACC_RTC__ /* compiled at run time: there are no headers */
#define uint8_t unsigned char
#define int64_t long long
#define uint32_t unsigned int
#define uint64_t unsigned long long
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <math.h>
#include <stdint.h>
#endif

#define THREADS 256
#define WARP 32
#define WARPS (THREADS / WARP)
#define WHOLE_WARP 0xffffffffu

#ifndef REAL_BITS
#define REAL_BITS 32
#endif
#if REAL_BITS == 32
#define real float
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name##_f32
#else
#define real double
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name##_f64
#endif
#define EXPORT extern "C" __global__

/* A block's tasks; all threads of the grid over n elements; the threads of a block, or of a warp, over a row of n. */
#define FOR_TASKS(task, tasks) for (int64_t task = blockIdx.x; task < (tasks); task += gridDim.x)
#define FOR_ELEMENTS(i, n) \
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < (n); i += (int64_t)gridDim.x * THREADS)
#define FOR_ROW_IN_BLOCK(i, n) for (int64_t i = threadIdx.x; i < (n); i += THREADS)
#define FOR_ROW_IN_WARP(i, n) for (int64_t i = lane_index(); i < (n); i += WARP)

static __device__ inline int lane_index() { return threadIdx.x % WARP; }
static __device__ inline int warp_index() { return threadIdx.x / WARP; }
static __device__ inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
static __device__ inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

/* The larger one; NaN if either is (fmax would drop it). */
static __device__ inline real larger(real a, real b) { return a > b || a != a ? a : b; }

/* ── sums and maxima over threads ───────────────────────────────────────────────────────────────── */

/* Over a warp, in a butterfly: after step s every lane holds the sum of 2ˢ lanes, after five that of all 32. Addition
 * is commutative, so all lanes arrive at the same bits. */
template <typename T>
static __device__ inline T warp_sum(T x) {
    for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, apart);
    return x;
}

static __device__ inline real warp_max(real x) {
    for (int apart = WARP / 2; apart > 0; apart /= 2) x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, apart));
    return x;
}

/* Over a block: each warp's sum goes to shared memory, and every thread adds the eight in the same order. */
template <typename T>
static __device__ inline T block_sum(T x, T *of_warp) {
    x = warp_sum(x);
    if (lane_index() == 0) of_warp[warp_index()] = x;
    __syncthreads(); /* all eight are there */
    T total = of_warp[0];
    for (int w = 1; w < WARPS; w++) total += of_warp[w];
    __syncthreads(); /* all have read them: of_warp may be used again */
    return total;
}

static __device__ inline real block_max(real x, real *of_warp) {
    x = warp_max(x);
    if (lane_index() == 0) of_warp[warp_index()] = x;
    __syncthreads();
    real largest = of_warp[0];
    for (int w = 1; w < WARPS; w++) largest = larger(largest, of_warp[w]);
    __syncthreads();
    return largest;
}
