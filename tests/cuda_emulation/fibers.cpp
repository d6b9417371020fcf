/* fibers.cpp: the threads of a block as fibers, their schedule, barriers and shuffles. See cuda_emulation.h. */
#include "emulation.h"
#include <algorithm>
#include <numeric>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

emulated_index threadIdx, blockIdx, gridDim, blockDim;
char *stacks;
int current = -1;

enum schedule { FORWARD, BACKWARD, RANDOM }; /* who runs next: the first thread that can, the last, any */
enum state { RUNNABLE, AT_BARRIER, AT_SHUFFLE, DONE };

struct fiber {
    jmp_buf place;
    bool begun;
    state now;
    const char *file; /* of the barrier or shuffle that it waits at */
    int line;
};

struct warp {
    uint64_t slots[2][WARP]; /* what the lanes show each other; two, since a lane may be one shuffle ahead */
    int turn[WARP], waiting;
};

static fiber fibers[THREADS];
static warp warps[WARPS];
static uint32_t runnable[WARPS]; /* a bit for each thread that can go on */
static jmp_buf scheduler;
static int at_barrier, done;
static void (*kernel)(void *);
static void *kernel_context;

/* ── what a test sets and reads ─────────────────────────────────────────────────────────────────── */

static int order;
static uint64_t random_state;
static std::string skipped_file; /* the barrier that is left out */
static int skipped_line;
static std::string fault;
static std::vector<std::pair<const char *, int>> reached; /* barriers */

/* The first fault ends the launch: what a kernel does after it, such as following a pointer made of garbage, means
 * nothing. */
void report(const std::string &text) {
    if (fault.empty()) fault = text;
    if (current >= 0) _longjmp(scheduler, 1);
}

static std::string site(const char *file, int line) { return std::string(file) + ":" + std::to_string(line); }

std::string thread_name(int block, int thread) {
    return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

extern "C" void emulation_start(int grid, int how, uint64_t seed, int watch, const char *skip_file, int skip_line) {
    gridDim.x = (unsigned)grid;
    blockDim.x = THREADS;
    order = how;
    random_state = seed * 2 + 1;
    skipped_file = skip_file;
    skipped_line = skip_line;
    fault = "";
    reached.clear();
    begin_watch(watch);
}

/* What was wrong, empty if nothing; the barriers that were reached, a line each. */
extern "C" const char *emulation_report() { return fault.c_str(); }
extern "C" const char *emulation_barriers() {
    static std::string lines;
    lines = "";
    for (const auto &place : reached) lines += site(place.first, place.second) + "\n";
    return lines.c_str();
}

static uint64_t random_number() { /* xorshift64*: Marsaglia 2003, Vigna 2016 */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 2685821657736338717u;
}

/* ── fibers ─────────────────────────────────────────────────────────────────────────────────────── */

static void leave() {
    runnable[current / WARP] &= ~(1u << current % WARP);
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

/* A fiber lives on after its thread is done: the same thread of the next block goes on in it. */
static void run_fiber() {
    for (;;) {
        kernel(kernel_context);
        fibers[current].now = DONE;
        done++;
        leave();
    }
}

/* A new stack is made with ucontext; from then on setjmp and longjmp, which ask nothing of the system, switch. */
static void begin_fiber(int thread) {
    static ucontext_t fresh, here;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stacks + (size_t)thread * STACK;
    fresh.uc_stack.ss_size = STACK;
    fresh.uc_link = nullptr;
    makecontext(&fresh, run_fiber, 0);
    swapcontext(&here, &fresh);
}

static void resume(int thread) {
    current = thread;
    threadIdx.x = (unsigned)thread;
    if (_setjmp(scheduler) == 0) {
        if (fibers[thread].begun) _longjmp(fibers[thread].place, 1);
        fibers[thread].begun = true;
        begin_fiber(thread);
    }
    current = -1;
}

static void wait_at(state why, const char *file, int line) {
    fiber &self = fibers[current];
    self.now = why;
    self.file = file;
    self.line = line;
    leave();
}

/* ── barriers, shuffles and votes ───────────────────────────────────────────────────────────────── */

void emulated_barrier(const char *file, int line) {
    std::pair<const char *, int> place(file, line);
    if (std::find(reached.begin(), reached.end(), place) == reached.end()) reached.push_back(place);
    if (line == skipped_line && skipped_file == file) return;
    at_barrier++;
    wait_at(AT_BARRIER, file, line);
}

int emulated_lane() { return current % WARP; }

/* Shows `mine` to the other lanes; returns what all of them show. A shuffle orders no accesses to memory. */
static const uint64_t *show(unsigned mask, uint64_t mine, const char *file, int line) {
    warp &w = warps[current / WARP];
    int turn = w.turn[current % WARP]++ % 2;
    if (mask != 0xffffffffu) report("shuffle at " + site(file, line) + " names part of a warp");
    w.slots[turn][current % WARP] = mine;
    w.waiting++;
    wait_at(AT_SHUFFLE, file, line);
    return w.slots[turn];
}

uint64_t emulated_shuffle(unsigned mask, uint64_t mine, int source, const char *file, int line) {
    return show(mask, mine, file, line)[source];
}

unsigned emulated_ballot(unsigned mask, bool vote, const char *file, int line) {
    const uint64_t *votes = show(mask, vote, file, line);
    unsigned word = 0;
    for (int lane = 0; lane < WARP; lane++) word |= (unsigned)votes[lane] << lane;
    return word;
}

/* Lets threads first … first + count − 1 go on, which wait for each other; they must wait at the same line. */
static void release(int first, int count) {
    for (int i = first; i < first + count; i++) {
        if (fibers[i].line != fibers[first].line || strcmp(fibers[i].file, fibers[first].file) != 0)
            report(thread_name((int)blockIdx.x, i) + " waits at " + site(fibers[i].file, fibers[i].line) + ", thread " +
                   std::to_string(first) + " at " + site(fibers[first].file, fibers[first].line));
        fibers[i].now = RUNNABLE;
        runnable[i / WARP] |= 1u << i % WARP;
    }
}

static void release_those_who_met(int thread) {
    warp &w = warps[thread / WARP];
    if (w.waiting == WARP) {
        w.waiting = 0;
        release(thread / WARP * WARP, WARP);
    }
    if (at_barrier == THREADS) {
        at_barrier = 0;
        watch_barrier();
        release(0, THREADS);
    }
}

/* ── the schedule ───────────────────────────────────────────────────────────────────────────────── */

static int choose() {
    int start = order == RANDOM ? (int)(random_number() % THREADS) : 0;
    for (int i = 0; i <= WARPS; i++) { /* the warp where the search began comes last once more, for its lower lanes */
        int w = order == BACKWARD ? (WARPS - 1 - i) & (WARPS - 1) : (start / WARP + i) % WARPS;
        uint32_t bits = runnable[w] & (i == 0 ? ~0u << start % WARP : ~0u);
        if (bits) return w * WARP + (order == BACKWARD ? 31 - __builtin_clz(bits) : __builtin_ctz(bits));
    }
    return -1;
}

static void report_who_waits() {
    for (int i = 0; i < THREADS; i++)
        if (fibers[i].now == AT_BARRIER || fibers[i].now == AT_SHUFFLE)
            return report("divergence: " + thread_name((int)blockIdx.x, i) + " waits for ever at " +
                          site(fibers[i].file, fibers[i].line));
}

static void run_block(int block) {
    blockIdx.x = (unsigned)block;
    at_barrier = done = 0;
    memset(warps, 0, sizeof warps);
    memset(runnable, 0xff, sizeof runnable);
    for (fiber &f : fibers) {
        f.begun = f.begun && f.now == DONE; /* not one that a fault stopped half-way */
        f.now = RUNNABLE;
    }
    watch_block();
    while (done < THREADS && fault.empty()) {
        int thread = choose();
        if (thread < 0) return report_who_waits();
        resume(thread);
        release_those_who_met(thread);
    }
}

void emulated_grid(void (*body)(void *), void *context) {
    if (!stacks)
        stacks = (char *)mmap(nullptr, (size_t)THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    kernel = body;
    kernel_context = context;
    std::vector<int> blocks(gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (order == BACKWARD) std::reverse(blocks.begin(), blocks.end());
    if (order == RANDOM)
        for (size_t i = blocks.size(); i > 1; i--) std::swap(blocks[i - 1], blocks[random_number() % i]);
    for (int block : blocks)
        if (fault.empty()) run_block(block);
}
