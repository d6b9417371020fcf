/* threads.c: a team of threads for each calling thread.
 *
 * A team is its caller and size − 1 workers. It is made when its caller first has enough work for two
 * threads, and ends with its caller. A job is a range [0, n) cut into pieces that are handed out by an
 * atomic counter; which thread computes which piece is a race, and may be one: threads.h says why the bits do
 * not depend on it.
 *
 * The gate is one atomic word: the number of the job, whether the job is closed, and how many workers are
 * in it. The caller opens a job, takes pieces like everybody else, closes the gate when no piece is left, and
 * waits for the workers that are inside. A worker that wakes too late finds the gate closed and is not waited
 * for, so a short job costs no more than the caller's own work. The fields of a job are written only while
 * the gate is closed and empty, and read only between entering and leaving: that is the whole argument
 * that there is no data race.
 *
 * Waiting spins for SPIN_NANOSECONDS (a wake-up from there takes under a microsecond), then sleeps on
 * a condition variable (from there it can take a hundred). Between two launches of an eager program lie tens of
 * microseconds of Python, at times hundreds: the workers stay awake over those. With more threads than processors a
 * spinning thread holds up the one it waits for, so then nobody spins.
 *
 * Linux may put a worker that it wakes on the processor of the caller that woke it, which is busy, and leave it waiting
 * there for milliseconds, beside an idle one (after a pause of a tenth of a second in more than every second job). So the
 * caller offers its processor once, and a worker that finds itself there goes elsewhere. */
#define _GNU_SOURCE
#include "threads.h"
#include "kernels.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NANOSECONDS 1000000
#define TEAM_LIMIT 1024

#define CLOSED (UINT64_C(1) << 31)
#define INSIDE (CLOSED - 1)
#define NUMBER(gate) ((uint32_t)((gate) >> 32))

struct team {
    _Alignas(64) _Atomic uint64_t gate;
    _Atomic int sleeping_workers;
    _Atomic int caller_sleeps;
    _Alignas(64) _Atomic int64_t next; /* first index that nobody has taken */
    int64_t n, piece;                  /* the job; body == NULL tells the workers to end */
    void (*body)(void *context, int64_t begin, int64_t end);
    void *context;
    int caller_processor;
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    int size;
    pthread_t workers[];
};

/* What belongs to one thread and ends with it, under a pthread key. Not in thread-local variables: those may be gone
 * when a key's destructor runs, and where the C library hands their memory to the next thread no sanitizer sees how. */
struct thread_state {
    struct team *team;
    int wanted;     /* size asked for by threads_set; 0: the default */
    int inside_job; /* a parallel_for from inside a body runs inline */
    struct { void *memory; size_t bytes; } scratch[SCRATCH_USES];
};

static _Atomic int team_members; /* over all teams of the process */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t state_key;
static int processors;
static struct thread_state *state_here(void);

/* ── processors ──────────────────────────────────────────────────────────────────────────────────── */

/* The processor time a Linux control group allows, in processors, rounded up; 0: no limit. */
static int control_group_limit(void) {
    double quota = 0, period = 0;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r"); /* version 2: "max 100000" or "150000 100000" */
    if (file) {
        if (fscanf(file, "%lf %lf", &quota, &period) != 2)
            quota = 0;
        fclose(file);
    }
    return quota > 0 && period > 0 ? (int)((quota + period - 1) / period) : 0;
}

static int count_processors(void) {
    int count = (int)sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        count = CPU_COUNT(&allowed);
#endif
    int limit = control_group_limit();
    if (limit && limit < count)
        count = limit;
    return count < 1 ? 1 : count > TEAM_LIMIT ? TEAM_LIMIT : count;
}

/* ── waiting ─────────────────────────────────────────────────────────────────────────────────────── */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* A job newer than the last one served, and still open. */
static int is_new(uint64_t gate, uint32_t served) { return !(gate & CLOSED) && NUMBER(gate) != served; }

static int is_empty(uint64_t gate) { return (gate & INSIDE) == 0; }

/* Spins until the gate shows a new job (for a worker) or nobody inside (for the caller); 0: gave up. */
static int spin(struct team *team, int for_job, uint32_t served) {
    int64_t until = 0;
    while (atomic_load_explicit(&team_members, memory_order_relaxed) <= processors) {
        for (int i = 0; i < 32; i++) {
            uint64_t gate = atomic_load_explicit(&team->gate, memory_order_acquire);
            if (for_job ? is_new(gate, served) : is_empty(gate))
                return 1;
            relax();
        }
        int64_t now = nanoseconds();
        if (until == 0)
            until = now + SPIN_NANOSECONDS;
        else if (now > until)
            break;
    }
    return 0;
}

/* 1: it slept. Who sleeps announces it first and looks at the gate again; who changes the gate looks for sleepers
 * afterwards. Both in sequentially consistent order, so one of the two always sees the other. */
static int wait_for_job(struct team *team, uint32_t served) {
    if (spin(team, 1, served))
        return 0;
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleeping_workers, 1);
    while (!is_new(atomic_load(&team->gate), served))
        pthread_cond_wait(&team->wake, &team->lock);
    atomic_fetch_sub(&team->sleeping_workers, 1);
    pthread_mutex_unlock(&team->lock);
    return 1;
}

static void wait_until_empty(struct team *team) {
    if (spin(team, 0, 0))
        return;
    pthread_mutex_lock(&team->lock);
    atomic_store(&team->caller_sleeps, 1);
    while (!is_empty(atomic_load(&team->gate)))
        pthread_cond_wait(&team->done, &team->lock);
    atomic_store(&team->caller_sleeps, 0);
    pthread_mutex_unlock(&team->lock);
}

/* ── a job ───────────────────────────────────────────────────────────────────────────────────────── */

static void open_job(struct team *team) {
    uint64_t gate = atomic_load_explicit(&team->gate, memory_order_relaxed);
    atomic_store(&team->gate, (uint64_t)(NUMBER(gate) + 1) << 32);
    if (atomic_load(&team->sleeping_workers) > 0) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->lock);
        if (atomic_load_explicit(&team_members, memory_order_relaxed) <= processors)
            sched_yield();
    }
}

/* Enters the newest job if it is open; *served becomes its number either way. */
static int enter_job(struct team *team, uint32_t *served) {
    uint64_t gate = atomic_load(&team->gate);
    while (!(gate & CLOSED)) {
        if (atomic_compare_exchange_weak(&team->gate, &gate, gate + 1)) {
            *served = NUMBER(gate);
            return 1;
        }
    }
    *served = NUMBER(gate);
    return 0;
}

static void leave_job(struct team *team) {
    uint64_t before = atomic_fetch_sub(&team->gate, 1);
    if (is_empty(before - 1) && atomic_load(&team->caller_sleeps)) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_signal(&team->done);
        pthread_mutex_unlock(&team->lock);
    }
}

static int processor_here(void) {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Called inside a job, by a worker that was woken for it. It may run anywhere again as soon as it has moved. */
static void leave_callers_processor(const struct team *team) {
    int here = processor_here();
    if (here < 0 || here != team->caller_processor)
        return;
#ifdef __linux__
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    others = allowed;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

static void take_pieces(struct team *team) {
    int64_t begin;
    while ((begin = atomic_fetch_add_explicit(&team->next, team->piece, memory_order_relaxed)) < team->n) {
        int64_t end = begin + team->piece < team->n ? begin + team->piece : team->n;
        team->body(team->context, begin, end);
    }
}

static void *worker(void *argument) {
    struct team *team = argument;
    uint32_t served = 0;
    state_here()->inside_job = 1;
    for (;;) {
        int slept = wait_for_job(team, served);
        if (!enter_job(team, &served))
            continue;
        if (!team->body)
            return NULL;
        if (slept)
            leave_callers_processor(team);
        take_pieces(team);
        leave_job(team);
    }
}

/* ── a team's life ───────────────────────────────────────────────────────────────────────────────── */

/* NULL when no worker could be started; the caller then works alone. */
static struct team *team_begin(int size) {
    size_t bytes = sizeof(struct team) + (size_t)(size - 1) * sizeof(pthread_t);
    struct team *team = NULL;
    if (posix_memalign((void **)&team, 64, bytes))
        return NULL;
    atomic_init(&team->gate, CLOSED);
    atomic_init(&team->sleeping_workers, 0);
    atomic_init(&team->caller_sleeps, 0);
    atomic_init(&team->next, 0);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    pthread_cond_init(&team->done, NULL);
    team->size = 1;
    sigset_t all, before; /* signals belong to the threads that Python knows */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team->size < size && pthread_create(&team->workers[team->size - 1], NULL, worker, team) == 0)
        team->size++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    atomic_fetch_add(&team_members, team->size);
    return team;
}

static void team_end(struct team *team) {
    team->body = NULL;
    open_job(team);
    for (int i = 0; i < team->size - 1; i++)
        pthread_join(team->workers[i], NULL);
    atomic_fetch_sub(&team_members, team->size);
    pthread_mutex_destroy(&team->lock);
    pthread_cond_destroy(&team->wake);
    pthread_cond_destroy(&team->done);
    free(team);
}

static void state_end(void *argument) {
    struct thread_state *state = argument;
    if (state->team)
        team_end(state->team);
    for (int i = 0; i < SCRATCH_USES; i++)
        if (state->scratch[i].memory)
            memory_release(state->scratch[i].memory, state->scratch[i].bytes);
    free(state);
}

/* Only the forking thread lives on in the child: no team has workers there. The memory of the teams is
 * left alone, since the locks in it may have been held by threads that are gone. */
static void after_fork_in_child(void) {
    atomic_store(&team_members, 0);
    struct thread_state *state = pthread_getspecific(state_key);
    if (state) {
        state->team = NULL;
        state->inside_job = 0;
    }
}

static void initialize(void) {
    processors = count_processors();
    pthread_key_create(&state_key, state_end);
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static void fail(const char *what, size_t bytes) {
    fprintf(stderr, "engine kernels: out of memory: %zu bytes for %s\n", bytes, what);
    abort();
}

static struct thread_state *state_here(void) {
    pthread_once(&once, initialize);
    struct thread_state *state = pthread_getspecific(state_key);
    if (!state) {
        state = calloc(1, sizeof *state);
        if (!state || pthread_setspecific(state_key, state))
            fail("a thread's state", sizeof *state);
    }
    return state;
}

/* ── what the kernels and Python call ────────────────────────────────────────────────────────────── */

int threads_get(void) {
    int wanted = state_here()->wanted;
    return wanted ? wanted : processors;
}

/* n < 1 asks for the default again: the processors this process may use. */
void threads_set(int n) {
    struct thread_state *state = state_here();
    state->wanted = n < 1 ? 0 : n > TEAM_LIMIT ? TEAM_LIMIT : n;
    if (state->team && state->team->size != threads_get()) {
        team_end(state->team);
        state->team = NULL;
    }
}

void parallel_for(int64_t n, int64_t grain, void (*body)(void *context, int64_t begin, int64_t end), void *context) {
    if (n <= 0)
        return;
    struct thread_state *state = state_here();
    int size = state->wanted ? state->wanted : processors;
    if (n <= grain || state->inside_job || size == 1) {
        body(context, 0, n);
        return;
    }
    if (!state->team && !(state->team = team_begin(size))) {
        body(context, 0, n);
        return;
    }
    struct team *team = state->team;
    int64_t pieces_each = (n + grain - 1) / grain / (4 * team->size); /* four a thread even out unequal pieces */
    team->n = n;
    team->piece = pieces_each > 1 ? pieces_each * grain : grain;
    team->body = body;
    team->context = context;
    team->caller_processor = processor_here();
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    state->inside_job = 1;
    open_job(team);
    take_pieces(team);
    atomic_fetch_or(&team->gate, CLOSED);
    wait_until_empty(team);
    state->inside_job = 0;
}

void *thread_scratch(enum scratch_use use, size_t bytes) {
    struct thread_state *state = state_here();
    if (state->scratch[use].bytes < bytes) {
        if (state->scratch[use].memory)
            memory_release(state->scratch[use].memory, state->scratch[use].bytes);
        state->scratch[use].bytes = bytes + bytes / 4; /* a slowly growing need does not move each time */
        state->scratch[use].memory = memory_reserve(state->scratch[use].bytes);
        if (!state->scratch[use].memory)
            fail("a kernel's scratch", state->scratch[use].bytes);
    }
    return state->scratch[use].memory;
}
