"""Conversions between x, eps and v: definitions, round trips and the preconditioning of EDM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import prediction
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.types import Level

SHAPE = (4, 3, 3, 2)


def level(kind):
    phi = jnp.array([0.1, 0.6, 1.2, 1.5])[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi)) if kind == "vp" else Level(jnp.ones_like(phi), jnp.tan(phi))


def images(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_true_eps_and_v_give_x(x64, kind):
    """z = alpha x + sigma eps, v = alpha eps - sigma x: every parametrisation of the truth is the truth."""
    lvl, x, eps = level(kind), images(0), images(1)
    z = lvl.alpha * x + lvl.sigma * eps
    v = lvl.alpha * eps - lvl.sigma * x
    np.testing.assert_allclose(prediction.x_from_x(x, z, lvl), x, rtol=0, atol=0)
    np.testing.assert_allclose(prediction.x_from_eps(eps, z, lvl), x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(prediction.x_from_v(v, z, lvl), x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(prediction.eps_from_x(x, z, lvl), eps, rtol=0, atol=1e-12)
    np.testing.assert_allclose(prediction.v_from_x(x, z, lvl), v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("name", ["eps", "v"])
def test_round_trips(x64, kind, name):
    """x -> eps -> x and x -> v -> x for an x that has nothing to do with z."""
    lvl, x, z = level(kind), images(2), images(3)
    there, back = getattr(prediction, f"{name}_from_x"), getattr(prediction, f"x_from_{name}")
    np.testing.assert_allclose(back(there(x, z, lvl), z, lvl), x, rtol=0, atol=1e-12)


def test_weights_of_the_squared_errors(x64):
    """|eps - eps'|^2 = SNR |x - x'|^2 and |v - v'|^2 = (SNR + 1) |x - x'|^2."""
    lvl, x, other, z = level("vp"), images(0), images(1), images(2)

    def squared(convert):
        return jnp.square(convert(x, z, lvl) - convert(other, z, lvl))

    np.testing.assert_allclose(squared(prediction.eps_from_x), lvl.snr * (x - other) ** 2, rtol=1e-10)
    np.testing.assert_allclose(squared(prediction.v_from_x), (lvl.snr + 1) * (x - other) ** 2, rtol=1e-10)


def edm_coefficients(sigma, sigma_data):
    """Reads c_skip, c_out, c_in, c_noise off the function by probing it with networks."""
    lvl = Level(jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), sigma))
    one = jnp.ones((1, 1, 1, 1))
    seen = {}

    def network(z, c_noise):
        seen.update(c_in=float(z[0, 0, 0, 0]), c_noise=float(c_noise[0, 0, 0, 0]))
        return jnp.ones_like(z)

    total = prediction.edm_preconditioned(network, one, lvl, sigma_data=sigma_data)
    skip = prediction.edm_preconditioned(lambda z, _: jnp.zeros_like(z), one, lvl, sigma_data=sigma_data)
    return float(skip[0, 0, 0, 0]), float((total - skip)[0, 0, 0, 0]), seen["c_in"], seen["c_noise"]


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_unit_variance_of_input_and_target(x64, sigma, sigma_data):
    """c_in^2 (sigma^2 + sigma_data^2) = 1, and the network's target (x - c_skip z) / c_out has variance 1."""
    c_skip, c_out, c_in, c_noise = edm_coefficients(sigma, sigma_data)
    assert c_in**2 * (sigma**2 + sigma_data**2) == pytest.approx(1, rel=1e-12)
    assert ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1, rel=1e-9)
    assert c_noise == pytest.approx(np.log(sigma) / 4, rel=1e-12)


def test_edm_limits(x64):
    """sigma -> 0: c_skip = 1, c_out = 0, so D(z) = z; sigma -> infinity: c_skip = 0, c_out = sigma_data."""
    assert edm_coefficients(1e-9, 0.5)[:2] == pytest.approx((1, 0), abs=2e-9)
    assert edm_coefficients(1e9, 0.5)[:2] == pytest.approx((0, 0.5), abs=2e-9)


def test_edm_without_a_network_is_the_gaussian_denoiser(x64):
    """c_skip z is E[x | z] for data N(0, sigma_data^2)."""
    lvl, z = level("ve"), images(0)
    oracle = gaussian_oracle(lambda t: lvl, 0.25)
    actual = prediction.edm_preconditioned(lambda z, _: jnp.zeros_like(z), z, lvl, sigma_data=0.5)
    np.testing.assert_allclose(actual, oracle(z, jnp.zeros(4)), rtol=1e-12)
