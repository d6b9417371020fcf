/* emulation.h: what fibers.cpp and watch.cpp know of each other. */
#pragma once
#include "cuda_emulation.h"
#include <string>

enum { THREADS = 256, WARP = 32, WARPS = THREADS / WARP, STACK = 128 << 10 };

extern char *stacks;            /* THREADS of STACK bytes, one after the other */
extern int current;             /* the thread that runs, −1 for none */

std::string thread_name(int block, int thread);
void report(const std::string &text);

void begin_watch(bool on);      /* of a launch, whose arrays are made known next */
void watch_block();             /* a block begins: its shared memory means nothing yet */
void watch_barrier();           /* all threads of the block have met */
