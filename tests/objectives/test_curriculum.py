"""Curricula: the tables of the papers, exact integers, and tracing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.objectives.curriculum import cm_grid_points, cm_target_decay, ict_grid_points, teacher_steps


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


@pytest.mark.parametrize("step, expected", [(0, 2), (200_000, 76), (400_000, 107), (800_000, 151), (10**9, 151)])
def test_grid_points_of_consistency_training(step, expected):
    """s0 = 2, s1 = 150, K = 800 000: ceil(sqrt(k / K (151^2 - 2^2) + 2^2) - 1) + 1, evaluated by hand."""
    grow = jax.jit(lambda k: cm_grid_points(k, start=2, end=150, num_steps=800_000))
    assert int(grow(jnp.int32(step))) == int(cm_grid_points(step, start=2, end=150, num_steps=800_000)) == expected


@pytest.mark.parametrize("start, end, num_steps", [(2, 150, 151**2 - 4), (2, 9, 1000), (3, 3, 10), (2, 200, 777)])
def test_grid_points_are_exact_at_every_step(start, end, num_steps):
    """The least N with N^2 K >= k (s1 + 1)^2 + (K - k) s0^2, in integers, squares among them, for all k."""
    squares = [k * (end + 1) ** 2 + (num_steps - k) * start**2 for k in range(num_steps + 1)]
    expected = [math.isqrt(-(-square // num_steps) - 1) + 1 for square in squares]
    grow = jax.vmap(lambda k: cm_grid_points(k, start=start, end=end, num_steps=num_steps))
    np.testing.assert_array_equal(grow(jnp.arange(num_steps + 1)), expected)


def test_decay_of_the_target_network():
    """mu(k) = exp(s0 log(mu0) / N(k)): mu0 at N = s0, its s0 / N-th power after; 0 is no average at all."""
    assert float(cm_target_decay(5, start=2, start_decay=0.0)) == 0.0
    assert float(cm_target_decay(2, start=2, start_decay=0.9)) == pytest.approx(0.9, rel=1e-6)
    assert float(cm_target_decay(jnp.int32(151), start=2, start_decay=0.9)) == pytest.approx(0.9 ** (2 / 151), rel=1e-6)
    assert float(cm_target_decay(201, start=2, start_decay=0.95)) == pytest.approx(0.95 ** (2 / 201), rel=1e-6)


def test_grid_points_of_improved_training():
    """s0 = 10, s1 = 1280, K = 400 000: doubles every 50 000 steps, 11 to 1281, and stays there."""
    grow = jax.jit(lambda k: ict_grid_points(k, start=10, end=1280, num_steps=400_000))
    for stage, expected in enumerate((11, 21, 41, 81, 161, 321, 641, 1281, 1281)):
        for step in (50_000 * stage, 50_000 * stage + 49_999):
            assert int(grow(jnp.int32(step))) == expected
            assert int(ict_grid_points(step, start=10, end=1280, num_steps=400_000)) == expected
    assert int(grow(jnp.int32(2**31 - 1))) == 1281


@pytest.mark.parametrize("start, end", [(3, 20), (2, 5)])
def test_grid_points_of_improved_training_that_do_not_divide(start, end):
    """K' = floor(K / (log2 floor(s1 / s0) + 1)) is cut off, and so is the last doubling at s1."""
    values = [int(ict_grid_points(k, start=start, end=end, num_steps=100)) for k in range(0, 140, 3)]
    stage = math.floor(100 / (math.log2(end // start) + 1))
    assert values == [min(start * 2 ** (k // stage), end) + 1 for k in range(0, 140, 3)]


def test_impossible_curricula_are_named():
    """Ends before starts, and fewer steps than stages."""
    with pytest.raises(ValueError, match="start=5 and end=4 grid points"):
        cm_grid_points(0, start=5, end=4, num_steps=10)
    with pytest.raises(ValueError, match="start=0 and end=4 intervals"):
        ict_grid_points(0, start=0, end=4, num_steps=10)
    with pytest.raises(ValueError, match="num_steps=7"):
        ict_grid_points(0, start=10, end=1280, num_steps=7)
