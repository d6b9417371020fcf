"""Property tests of a hand-written gradient: hypothesis draws the input, the engine's autograd is the judge.

Run it with pytest, or as a script. Needs: pip install 'shardgrad[testing]'
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as eg


def softmax_cross_entropy(logits: np.ndarray, target: int) -> tuple[float, np.ndarray]:
    """The function under test: -log softmax(logits)[target] and its gradient, in plain NumPy."""
    shifted = logits - logits.max()
    total = np.exp(shifted).sum()
    gradient = np.exp(shifted) / total
    gradient[target] -= 1
    return float(np.log(total) - shifted[target]), gradient


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    size = draw(st.integers(1, 20))
    logits = draw(st.lists(st.floats(-50, 50), min_size=size, max_size=size))
    return np.array(logits), draw(st.integers(0, size - 1))


@settings(deadline=None)  # what is tested is the numbers, not the time
@given(problems())
def test_value_and_gradient(problem: tuple[np.ndarray, int]) -> None:
    logits, target = problem
    x = eg.tensor(logits, dtype=eg.float64, requires_grad=True)
    loss = eg.cross_entropy(x, eg.tensor(target))
    (expected,) = eg.grad(loss, [x])
    value, gradient = softmax_cross_entropy(logits, target)
    # Logits differ by at most 100, so a probability has a relative error of about 100 roundings of 1.1e-16.
    assert abs(value - loss.item()) <= 1e-12 * max(1.0, abs(value))
    assert np.allclose(gradient, expected.numpy(), rtol=0, atol=2e-14)


@given(problems(), st.floats(-100, 100))
def test_a_constant_added_to_all_logits_changes_nothing(problem: tuple[np.ndarray, int], constant: float) -> None:
    logits, target = problem
    value, _ = softmax_cross_entropy(logits, target)
    moved, _ = softmax_cross_entropy(logits + constant, target)
    assert abs(value - moved) <= 1e-12 * max(1.0, abs(constant))


if __name__ == "__main__":
    test_value_and_gradient()
    test_a_constant_added_to_all_logits_changes_nothing()
    print("200 random problems: value and gradient agree with the engine")
