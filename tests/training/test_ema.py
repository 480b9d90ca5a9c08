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
