"""The exponential moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.training import ema


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (10**6, 0.99)])
def test_warm_up_is_one_plus_step_over_ten_plus_step(step, expected):
    """min(decay, (1 + step) / (10 + step))."""
    np.testing.assert_allclose(ema.decay_at(jnp.int32(step), decay=0.99, warmup=True), expected, rtol=1e-6)


def test_without_warm_up_the_decay_is_constant():
    """`decay` at every step."""
    assert {float(ema.decay_at(jnp.int32(step), decay=0.5, warmup=False)) for step in (0, 7)} == {0.5}


def test_constant_parameters_are_a_fixed_point():
    """The average of what does not change is that, whatever the decay."""
    params = {"a": jnp.arange(6.0).reshape(2, 3) / 7}
    for decay in (0.0, 0.3, 0.999, 1.0):
        average = ema.update(params, params, jnp.float32(decay))
        np.testing.assert_allclose(average["a"], params["a"], rtol=1e-6)


def test_update_is_the_convex_combination():
    """decay * average + (1 - decay) * params, per leaf."""
    average, params = {"a": jnp.zeros(3)}, {"a": jnp.ones(3)}
    got = ema.update(average, params, jnp.float32(0.75))
    assert jax.tree.structure(got) == jax.tree.structure(params)
    np.testing.assert_allclose(got["a"], 0.25, rtol=1e-6)


def test_bias_corrected_average_weighs_by_age():
    """After n updates it is sum mu^age params / sum mu^age: the first update is a copy, whatever was before."""
    rng = np.random.default_rng(0)
    for decay in (0.0, 0.5, 0.9999):
        values, average = rng.normal(size=20), jnp.float32(1e3)
        for i, value in enumerate(values):
            decay_i = ema.bias_corrected_decay(jnp.int32(i), decay=decay)
            average = ema.update(average, jnp.float32(value), decay_i)
            weights = decay ** np.arange(i, -1, -1.0)
            expected = np.sum(weights * values[: i + 1]) / np.sum(weights)
            np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_bias_correction_fades(decay):
    """1 - (1 - mu) / (1 - mu^i): 0 at first, `decay` at last, traced too."""
    correct = jax.jit(lambda step: ema.bias_corrected_decay(step, decay=decay))
    assert float(correct(jnp.int32(0))) == 0
    np.testing.assert_allclose(correct(jnp.int32(10**6)), decay, rtol=1e-6)
    np.testing.assert_allclose(correct(jnp.int32(1)), decay / (1 + decay), rtol=1e-5)
