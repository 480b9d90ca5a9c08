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


def edm_coefficients(sigma, sigma_data, u_0=0.0):
    """c_skip, c_out and c_in of a level with alpha = 1, read off by what constant networks give."""
    lvl, one = Level(jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), sigma)), jnp.ones((1, 1, 1, 1))
    skip, total = (
        prediction.x_from_edm(output, one, lvl, u_0=u_0, sigma_data=sigma_data) for output in (jnp.zeros_like(one), one)
    )
    c_in = prediction.c_in(lvl, sigma_data=sigma_data)
    return tuple(float(c[0, 0, 0, 0]) for c in (skip, total - skip, c_in))


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_unit_variance_of_input_and_target(x64, sigma, sigma_data):
    """c_in^2 (sigma^2 + sigma_data^2) = 1, and the network's target (x - c_skip z) / c_out has variance 1."""
    c_skip, c_out, c_in = edm_coefficients(sigma, sigma_data)
    assert c_in**2 * (sigma**2 + sigma_data**2) == pytest.approx(1, rel=1e-12)
    assert ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1, rel=1e-9)


def test_edm_limits(x64):
    """sigma -> 0: c_skip = 1, c_out = 0, so D(z) = z; sigma -> infinity: c_skip = 0, c_out = sigma_data."""
    assert edm_coefficients(1e-9, 0.5)[:2] == pytest.approx((1, 0), abs=2e-9)
    assert edm_coefficients(1e9, 0.5)[:2] == pytest.approx((0, 0.5), abs=2e-9)


def test_edm_without_a_network_is_the_gaussian_denoiser(x64):
    """c_skip z is E[x | z] for data N(0, sigma_data^2)."""
    lvl, z = level("ve"), images(0)
    oracle = gaussian_oracle(lambda t: lvl, 0.25)
    actual = prediction.x_from_edm(jnp.zeros_like(z), z, lvl, sigma_data=0.5)
    np.testing.assert_allclose(actual, oracle(z, jnp.zeros(4)), rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.5, 80.0])
def test_preconditioning_of_a_consistency_model(x64, sigma):
    """C1 of the paper: c_skip = 1 and c_out = 0 at the smallest sigma, elsewhere its formulas."""
    c_skip, c_out, _ = edm_coefficients(sigma, 0.5, u_0=0.002)
    assert c_skip == pytest.approx(0.25 / ((sigma - 0.002) ** 2 + 0.25), rel=1e-12)
    assert c_out == pytest.approx(0.5 * (sigma - 0.002) / np.sqrt(sigma**2 + 0.25), rel=1e-12)
    if sigma == 0.002:
        assert (c_skip, c_out) == (1, 0)


@pytest.mark.parametrize("u_0", [0.0, 0.05])
def test_preconditioned_networks_are_the_same_on_levels_of_either_kind(x64, u_0):
    """The input c_in z and x_hat depend on z / alpha and sigma / alpha: scaling a level and its z changes nothing."""
    vp, output, z_vp = level("vp"), images(0), images(1)
    ve, z_ve = Level(jnp.ones_like(vp.alpha), vp.sigma / vp.alpha), z_vp / vp.alpha
    np.testing.assert_allclose(prediction.c_in(ve) * z_ve, prediction.c_in(vp) * z_vp, rtol=1e-12)
    x_vp, x_ve = (prediction.x_from_edm(output, z, lvl, u_0=u_0) for z, lvl in ((z_vp, vp), (z_ve, ve)))
    np.testing.assert_allclose(x_ve, x_vp, rtol=1e-9)
