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


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.2886, ema.MAX_SIGMA_REL])
def test_sigma_rel_and_gamma_are_inverse(sigma_rel):
    """By equation (3); and sigma_rel is the standard deviation of the weight tau^gamma on [0, 1]."""
    gamma = ema.gamma_of(sigma_rel)
    np.testing.assert_allclose(np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2), sigma_rel, rtol=1e-6)
    tau = (np.arange(200_000) + 0.5) / 200_000
    weight = tau**gamma / np.sum(tau**gamma)
    mean = np.sum(weight * tau)
    np.testing.assert_allclose(np.sqrt(np.sum(weight * (tau - mean) ** 2)), sigma_rel, rtol=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -1.0, 0.289, float("nan")])
def test_there_is_no_power_function_of_other_lengths(sigma_rel):
    with pytest.raises(ValueError, match="expected a number above 0 and at most 0.2887"):
        ema.gamma_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, ema.MAX_SIGMA_REL])
def test_a_power_average_weighs_by_a_power_of_the_step(sigma_rel):
    """Equation (1) over 400 steps, of parameters at random; what was before the first step has no weight."""
    rng, update = np.random.default_rng(0), ema.power(sigma_rel=sigma_rel)
    params = rng.normal(size=(400, 5))
    average = jnp.full(5, 1e3)
    for i, of_step in enumerate(params):
        average = update(average, jnp.asarray(of_step, jnp.float32), jnp.int32(i))
    weight = np.diff((np.arange(401) / 400) ** (ema.gamma_of(sigma_rel) + 1))
    np.testing.assert_allclose(average, weight @ params, atol=3e-6)


def test_a_power_average_of_a_ramp_lags_by_a_fraction_of_training():
    """Of params_t = t it tends to (gamma + 1) / (gamma + 2) t, half a step later for the sum over whole steps."""
    update, gamma = jax.jit(ema.power(sigma_rel=0.1)), ema.gamma_of(0.1)
    average = jnp.float32(0)
    for step in range(2000):
        average = update(average, jnp.float32(step + 1), jnp.int32(step))
    np.testing.assert_allclose(average, (gamma + 1) / (gamma + 2) * 2000 + 0.5, rtol=1e-4)


def test_late_weights_keep_their_digits():
    """1 - beta is (gamma + 1) / t after a million steps, to six digits: by subtraction from 1 it would have three."""
    weight = ema.power_weight(jnp.int32(10**6), gamma=15.0)
    np.testing.assert_allclose(weight, -np.expm1(16 * np.log1p(-1 / (10**6 + 1))), rtol=1e-6)


def test_an_exponential_average_is_that_of_its_decay():
    """Bit for bit what the first average of a training is."""
    average, params = jnp.arange(5.0) / 7, jnp.arange(5.0) ** 2 / 3
    for warmup in (True, False):
        got = ema.exponential(decay=0.99, warmup=warmup)(average, params, jnp.int32(3))
        decay = ema.decay_at(jnp.int32(3), decay=0.99, warmup=warmup)
        np.testing.assert_array_equal(got, ema.update(average, params, decay))
