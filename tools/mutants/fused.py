"""Bugs in what is computed behind a matrix product, and where one product stands for several maps."""

from __future__ import annotations

from tools.mutants.record import Mutant

TESTS = "tests/test_feed_forward.py"
PARTS = f"{TESTS}::test_it_has_the_bits_of_its_three_parts"
JOINED = f"{TESTS}::test_attention_over_one_array_has_the_bits_of_attention_over_three"

FUSED = [
    Mutant("activation before the last block", "kernels/gemm.c",
           "if (p + depths == k)\n                        finish_panel(",
           "if (p == 0)\n                        finish_panel(",
           "f is applied to the first 256 products, and the others are added to its derivative",
           PARTS),
    Mutant("activation of few rows", "kernels/gemm.c",
           "        finish_panel(x, 0, x->m, 0, x->n);\n", "        finish_panel(x, 0, x->m, 0, x->n - 1);\n",
           "of a few rows the last column of h is what was there before",
           PARTS),
    Mutant("relu times its slope", "kernels/gemm_activation.c",
           "MULTIPLY(relu_gradient)", "MULTIPLY(smooth_gradient)",
           "where x < 0 an infinite gradient of relu becomes NaN instead of 0",
           f"{TESTS}::test_relu_keeps_what_is_hidden_hidden"),
    Mutant("keys' gradients densely", "kernels/attention_vjp.c",
           "to_row = w->x->strides[DKV_KEY]", "to_row = w->x->kv_heads * d",
           "in an array that holds queries, keys and values the gradients of keys land among the queries'",
           JOINED),
    Mutant("keys' gradients as queries'", "engine/ops/attention.py",
           "gradients=(dq, dk))", "gradients=(dq, dq))",
           "with fewer key heads than heads the gradients of keys are written too far apart",
           "tests/ops/test_gradients.py::test_kernel_vjp[scaled_dot_product_attention]"),
    Mutant("joined maps backward", "engine/ops/matmul.py",
           "gemm(k, flat_g, _stacked(k, weights))", "gemm(k, flat_g, _stacked(k, weights[::-1]))",
           "the gradient of queries goes through the matrix of values",
           f"{TESTS}::test_joined_maps_are_three"),
    Mutant("bias of the first product", "engine/ops/feed_forward.py",
           "dup_bias = column_sums(k, dz) if needs[3]", "dup_bias = column_sums(k, dz) if needs[1]",
           "a bias whose weights are frozen has no gradient",
           f"{TESTS}::test_what_nobody_wants_is_not_computed"),
    Mutant("fused over a subclass", "engine/nn/layers.py",
           "type(m) is Linear and", "isinstance(m, Linear) and",
           "a map that overrides forward is taken for its weight",
           f"{TESTS}::test_self_attention_is_one_product_unless_a_map_is_replaced "
           f"{TESTS}::test_the_network_is_one_op_unless_a_map_is_replaced"),
]
