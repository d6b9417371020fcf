"""Bugs in what workers send and hold: gradients that leave during backward (ZeRO 2)."""

from __future__ import annotations

from tools.mutants.record import Mutant

OVERLAP = "tests/sharder/test_overlap.py"

ZERO = [
    Mutant("delivered and kept", "engine/autograd.py",
           "            del grads  #",
           "            pass  #",
           "a gradient that its receiver has dropped stays in memory while the next rule runs",
           f"{OVERLAP}::test_a_gradient_that_is_taken_and_dropped_is_freed_while_backward_goes_on"),
    Mutant("a part sent again", "engine/sharder/worker.py",
           "            have.add(shard)\n",
           "",
           "when a microbatch is computed again, a shard that has its part is sent it once more",
           f"{OVERLAP}::test_a_microbatch_that_is_given_up_is_due_and_what_left_is_not_sent_again"),
    Mutant("an identity for each part", "engine/sharder/worker.py",
           "self.leaving.get(request.microbatch) or self._new_push(request.microbatch)",
           "self._new_push(request.microbatch)",
           "the parts of one push are taken for several pushes",
           f"{OVERLAP}::test_each_shard_is_sent_its_part_when_all_of_it_is_final"),
    Mutant("gradients of a failed pass", "engine/sharder/overlap.py",
           "                parameter.grad = None",
           "                pass",
           "a microbatch that is computed again is added to what an exception left of it",
           f"{OVERLAP}::test_a_failed_pass_leaves_no_gradients_with_zero_1_either"),
    Mutant("no end of waiting parts", "engine/sharder/overlap.py",
           "WAITING = 1",
           "WAITING = 1000",
           "all gradients are held when shards are slow to acknowledge",
           f"{OVERLAP}::test_at_most_one_part_is_on_its_way_while_the_next_is_computed"),
    Mutant("parts for another partition", "engine/sharder/worker.py",
           "return begun.term != self.term or (synchronous and",
           "return (synchronous and",
           "after a new term, gradients leave for shards that own other parameters",
           f"{OVERLAP}::test_a_new_term_in_the_middle_of_a_backward_pass_makes_the_rest_void"),
]
