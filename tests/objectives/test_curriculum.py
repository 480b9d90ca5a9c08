"""The number of teacher steps: end points, log-linearity, and tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.objectives.curriculum import teacher_steps


@pytest.mark.parametrize("step, expected", [
    (0, 64), (25_000, 135.3), (50_000, 286.2), (75_000, 605.3), (100_000, 1280), (1_000_000, 1280),
])
def test_schedule_of_the_paper(step, expected):
    """exp(log 64 + min(i / 100000, 1) (log 1280 - log 64)), evaluated by hand."""
    actual = teacher_steps(step, start=64.0, end=1280.0, anneal_steps=100_000)
    assert float(actual) == pytest.approx(expected, abs=0.06)
    traced = jax.jit(lambda i: teacher_steps(i, start=64.0, end=1280.0, anneal_steps=100_000))(jnp.int32(step))
    assert float(traced) == pytest.approx(expected, abs=0.06)


def test_equal_ratios():
    """Log-linear: equal increments of the iteration multiply N by equal factors."""
    values = np.array([float(teacher_steps(i, start=5.0, end=80.0, anneal_steps=4)) for i in range(5)])
    np.testing.assert_allclose(values, 5 * 2.0 ** np.arange(5), rtol=1e-6)


@pytest.mark.parametrize("step", [0, 7])
def test_no_annealing(step):
    """anneal_steps = 0 is `end` from the first step on; start = end is constant."""
    assert float(teacher_steps(step, start=64.0, end=256.0, anneal_steps=0)) == pytest.approx(256, rel=1e-6)
    assert float(teacher_steps(step, start=256.0, end=256.0, anneal_steps=10)) == pytest.approx(256, rel=1e-6)
