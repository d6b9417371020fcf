/* watch.cpp: who touched which address last, and whether that was ordered. See cuda_emulation.h. */
#include "emulation.h"
#include <vector>

struct visit { int block, thread, interval; }; /* interval: how many barriers lay behind the thread then */
struct cell { visit writer, readers[4]; };

struct region {
    const char *low, *high;
    std::string name;
    std::vector<cell> cells; /* one for each four bytes */
};

/* The linker knows where section cuda_shared, all __shared__ variables, begins and ends. */
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

static const visit NOBODY = {-1, -1, -1};
static const cell UNTOUCHED = {NOBODY, {NOBODY, NOBODY, NOBODY, NOBODY}};
static bool watching;
static int interval;
static region shared;
static std::vector<region> arrays; /* of the launch */

static region make_region(const char *low, size_t size, const std::string &name) {
    return {low, low + size, name, std::vector<cell>((size + 3) / 4, UNTOUCHED)};
}

void begin_watch(bool on) {
    watching = on;
    arrays.clear();
}

extern "C" void emulation_array(const char *low, size_t size, const char *name) {
    arrays.push_back(make_region(low, size, name));
}

void watch_block() {
    interval++;
    if (!__start_cuda_shared) return; /* the kernel has no shared memory */
    size_t size = (size_t)(__stop_cuda_shared - __start_cuda_shared);
    memset(__start_cuda_shared, 0xff, size); /* NaN in any floating type */
    if (watching) shared = make_region(__start_cuda_shared, size, "shared memory");
}

void watch_barrier() { interval++; }

/* What one thread does is ordered, and what lies on two sides of a barrier of one block; blocks are not. */
static bool ordered(const visit &before, const visit &now) {
    return before.block < 0 ||
           (before.block == now.block && (before.thread == now.thread || before.interval < now.interval));
}

static void race(const region &where, size_t index, const visit &a, const char *did, const visit &b, const char *does) {
    report("race on " + where.name + ", byte " + std::to_string(4 * index) + ": " + thread_name(a.block, a.thread) +
           did + thread_name(b.block, b.thread) + does + ", no barrier between");
}

static void read(region &where, size_t index, const visit &now) {
    cell &c = where.cells[index];
    if (!ordered(c.writer, now)) race(where, index, c.writer, " wrote, ", now, " reads");
    if (&where == &shared && c.writer.block < 0)
        report("hole: " + thread_name(now.block, now.thread) + " reads shared memory that nobody wrote, byte " +
               std::to_string(4 * index));
    for (visit &reader : c.readers) /* the first whose reading no later write can race with */
        if (reader.block < 0 || ordered(reader, now)) {
            reader = now;
            return;
        }
}

static void write(region &where, size_t index, const visit &now) {
    cell &c = where.cells[index];
    if (!ordered(c.writer, now)) race(where, index, c.writer, " wrote, ", now, " writes");
    for (const visit &reader : c.readers)
        if (!ordered(reader, now)) race(where, index, reader, " read, ", now, " writes");
    c = UNTOUCHED;
    c.writer = now;
}

static region *region_of(const char *p, size_t size) {
    if (p >= shared.low && p + size <= shared.high) return &shared;
    for (region &where : arrays)
        if (p >= where.low && p + size <= where.high) return &where;
    return nullptr;
}

static void touch(const void *address, size_t size, void (*how)(region &, size_t, const visit &)) {
    if (!watching || current < 0) return;
    const char *p = (const char *)address, *indices = (const char *)&threadIdx;
    if (p >= stacks && p < stacks + (size_t)THREADS * STACK) return;
    if (p >= indices - 64 && p < indices + 64) return; /* threadIdx, blockIdx, … */
    region *where = region_of(p, size);
    if (!where)
        return report("stray access: " + thread_name((int)blockIdx.x, current) + " touches " + std::to_string(size) +
                      " bytes outside every array");
    size_t first = (size_t)(p - where->low) / 4, last = (size_t)(p + size - 1 - where->low) / 4;
    for (size_t index = first; index <= last; index++) how(*where, index, {(int)blockIdx.x, current, interval});
}

/* ── the calls that the compiler put in front of every access ───────────────────────────────────── */

#define WATCH(size) \
    extern "C" void __tsan_read##size(void *p) { touch(p, size, read); } \
    extern "C" void __tsan_write##size(void *p) { touch(p, size, write); } \
    extern "C" void __tsan_unaligned_read##size(void *p) { touch(p, size, read); } \
    extern "C" void __tsan_unaligned_write##size(void *p) { touch(p, size, write); }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
extern "C" void __tsan_read_range(void *p, size_t size) { touch(p, size, read); }
extern "C" void __tsan_write_range(void *p, size_t size) { touch(p, size, write); }
extern "C" void __tsan_init() {}
