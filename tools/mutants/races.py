"""Data races in the thread pool: results may be right for years. The thread sanitizer should notice."""

from __future__ import annotations

from tools.mutants.record import Mutant

TESTS = ("tests/test_survivors.py::test_jobs_that_follow_each_other_at_once "
         "tests/test_survivors.py::test_no_piece_of_a_job_is_left_out")
FILE = "kernels/threads.c"

RACES = [
    Mutant("race: a job is opened", FILE,
           "atomic_store(&team->gate, (uint64_t)(NUMBER(gate) + 1) << 32);",
           "atomic_store_explicit(&team->gate, (uint64_t)(NUMBER(gate) + 1) << 32, memory_order_relaxed);",
           "the release store that publishes a job is relaxed: a worker may see the gate before the job",
           TESTS, "thread"),
    Mutant("race: a job is left", FILE,
           "uint64_t before = atomic_fetch_sub(&team->gate, 1);",
           "uint64_t before = atomic_fetch_sub_explicit(&team->gate, 1, memory_order_relaxed);",
           "a worker's writes are not released: the caller may go on without seeing them",
           TESTS, "thread"),
    Mutant("race: pieces are counted", FILE,
           "while ((begin = atomic_fetch_add_explicit(&team->next, team->piece, memory_order_relaxed)) < team->n) {",
           "while ((begin = *(int64_t *)&team->next) < team->n) {\n"
           "        *(int64_t *)&team->next = begin + team->piece;",
           "two threads may take the same piece",
           TESTS, "thread"),
]
