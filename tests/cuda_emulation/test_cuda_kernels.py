"""Every CUDA kernel on the CPU, under the emulation: right, whatever the schedule; a missing barrier does not hide."""

from __future__ import annotations

import emulation
import kernel_cases
import numpy as np
import pytest
from emulation import Fault, Schedule
from kernel_cases import KernelCase

from engine.backend import cuda_source
from engine.testing import check_close

pytestmark = pytest.mark.skipif(not emulation.available(), reason=f"no C++ compiler ({emulation.COMPILER})")
CASES = kernel_cases.all_cases()
SCHEDULES = [Schedule(grid=3, watch=True), Schedule(grid=3, order="backward", watch=True),
             Schedule(grid=1, order="random", seed=1, watch=True), Schedule(grid=50, order="random", seed=2)]


def program(case: KernelCase) -> emulation.Program:
    path = cuda_source.sources()[case.kernel]
    return emulation.build(cuda_source.program(path), 8 * case.dtype.itemsize)


def launch(case: KernelCase, schedule: Schedule) -> tuple[list[np.ndarray], list[str]]:
    """The outputs, and the barriers that the kernel came to."""
    arguments = case.arguments()
    barriers = program(case).launch(case.kernel, arguments, schedule)
    return arguments[:len(case.outputs)], barriers


def test_every_kernel_has_cases() -> None:
    assert {case.kernel for case in CASES} == set(cuda_source.kernels())


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_kernel(case: KernelCase) -> None:
    """Within the bound of the reference; the same bits for every schedule and grid; no race, hole or stray access."""
    first: list[np.ndarray] = []
    for schedule in SCHEDULES:
        before = [x.copy() for x in case.inputs if isinstance(x, np.ndarray)]
        outputs, _ = launch(case, schedule)
        for x, copy in zip([x for x in case.inputs if isinstance(x, np.ndarray)], before):
            assert x.tobytes() == copy.tobytes(), "an input was changed"
        if first:
            assert [y.tobytes() for y in outputs] == [y.tobytes() for y in first], f"other bits under {schedule}"
            continue
        first = outputs
        for got, (value, bound) in zip(outputs, case.outputs):
            check_close(got, value, bound, check=repr(case), origin="the bound of its equation")


def barriers_of_kernels() -> list[tuple[str, str]]:
    """(kernel, barrier) for each __syncthreads that a kernel comes to, found by running its cases."""
    if not emulation.available():
        return []
    found: dict[tuple[str, str], None] = {}
    for case in CASES:
        if case.dtype.itemsize == 4 and "__syncthreads" in cuda_source.program(cuda_source.sources()[case.kernel]):
            for barrier in launch(case, Schedule())[1]:
                found[case.kernel, barrier] = None
    return list(found)


def test_every_missing_barrier_is_caught() -> None:
    """Each __syncthreads is left out, one at a time; some case must then fail, under the watch, in every order."""
    planted = barriers_of_kernels()
    assert len(planted) > 30
    for kernel, barrier in planted:
        cases = [case for case in CASES if case.kernel == kernel and case.dtype.itemsize == 4]
        for order in emulation.ORDERS:
            schedule = Schedule(order=order, seed=5, watch=True, skip=barrier)
            assert any(fails(case, schedule) for case in cases), f"{kernel} without {barrier}, {order}: nothing noticed"


def fails(case: KernelCase, schedule: Schedule) -> bool:
    try:
        launch(case, schedule)
    except Fault:
        return True
    return False


def test_a_missing_barrier_gives_wrong_numbers() -> None:
    """Also without the watch: some order of the threads makes the sum of a row wrong."""
    [case] = [c for c in CASES if repr(c) == "softmax-7x300-float32"]
    right, barriers = launch(case, Schedule())
    for barrier in barriers:
        orders = [Schedule(order="forward"), Schedule(order="backward"),
                  *[Schedule(order="random", seed=i) for i in range(8)]]
        results = [launch(case, s.without(barrier))[0][0].tobytes() for s in orders]
        assert any(bits != right[0].tobytes() for bits in results), f"without {barrier} every order is right"
