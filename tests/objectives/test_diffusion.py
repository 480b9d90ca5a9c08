"""The diffusion objective: its minimiser, its value for known errors, and its times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mscm.diffusion import schedule
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.objectives import distance
from mscm.objectives.diffusion import diffusion_loss, lognormal_times, stratified_times

X = jax.random.uniform(jax.random.key(0), (8, 4, 4, 2), minval=-1.0)
KEY = jax.random.key(1)


def test_perfect_denoiser_has_no_loss():
    """x_hat = x gives exactly 0."""
    loss, _ = diffusion_loss(lambda z_t, t: X, schedule.cosine, X, KEY)
    np.testing.assert_array_equal(loss, np.zeros(8))


def test_constant_error_costs_snr_plus_one():
    """x_hat = x + e: v-MSE is (SNR + 1) e^2 = e^2 / sigma^2 at the log-SNR that the metrics report."""
    loss, metrics = diffusion_loss(lambda z_t, t: X + 0.1, schedule.cosine, X, KEY)
    np.testing.assert_allclose(loss, 0.01 * (1 + np.exp(metrics["logsnr"])), rtol=1e-4)


def test_noisy_image_and_time_belong_together():
    """The denoiser receives alpha_t x + sigma_t eps with eps ~ N(0, I) at the t it is told, one per stratum."""
    x, seen = jnp.full((64, 16, 16, 1), 0.5), {}

    def denoiser(z_t, t):
        seen.update(z_t=z_t, t=t)
        return x

    _, metrics = diffusion_loss(denoiser, schedule.cosine, x, KEY)
    lvl_t = schedule.cosine(seen["t"])
    eps = (seen["z_t"] - lvl_t.alpha * x) / lvl_t.sigma
    np.testing.assert_array_equal(np.floor(seen["t"] * 64), np.arange(64))
    np.testing.assert_allclose(metrics["logsnr"], lvl_t.logsnr[:, 0, 0, 0])
    # One mean and one variance per image, of 256 numbers: 5 standard errors.
    np.testing.assert_allclose(jnp.mean(eps, axis=(1, 2, 3)), 0, atol=5 / 16)
    np.testing.assert_allclose(jnp.var(eps, axis=(1, 2, 3)), 1, atol=5 * np.sqrt(2 / 256))


def test_posterior_mean_is_the_minimiser():
    """E[x | z] costs Var[x | z] / sigma^2 = v / (alpha^2 v + sigma^2), and both neighbours cost more."""
    x = 0.5 * jax.random.normal(jax.random.key(2), (64, 16, 16, 1))
    oracle = gaussian_oracle(schedule.cosine, 0.25)

    def loss(scale):
        return diffusion_loss(lambda z_t, t: scale * oracle(z_t, t), schedule.cosine, x, KEY)

    per_example, metrics = loss(1.0)
    alpha_square = 1 / (1 + np.exp(-np.asarray(metrics["logsnr"])))
    expected = 0.25 / (alpha_square * 0.25 + 1 - alpha_square)
    np.testing.assert_allclose(per_example / expected, 1, atol=5 * np.sqrt(2 / 256))
    assert jnp.mean(per_example) < min(jnp.mean(loss(0.9)[0]), jnp.mean(loss(1.1)[0]))


def test_one_number_per_example():
    """Losses and metrics are per example, and other examples change nothing."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25)
    loss, metrics = diffusion_loss(denoiser, schedule.cosine, X, KEY)
    mates, _ = diffusion_loss(denoiser, schedule.cosine, X.at[1:].mul(-3.0), KEY)
    assert loss.shape == metrics["logsnr"].shape == (8,)
    np.testing.assert_allclose(mates[0], loss[0], rtol=1e-5)


def test_distance_is_the_callers():
    """Another distance sees the same residual and level."""
    robust = functools.partial(distance.pseudo_huber, epsilon=0.0)
    denoiser = gaussian_oracle(schedule.cosine, 0.25)
    squared, _ = diffusion_loss(denoiser, schedule.cosine, X, KEY)
    rooted, _ = diffusion_loss(denoiser, schedule.cosine, X, KEY, distance=robust)
    np.testing.assert_allclose(rooted**2, squared, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 128])
def test_one_time_in_each_stratum(batch):
    """floor(t batch) = 0, ..., batch - 1."""
    t = stratified_times(KEY, batch)
    np.testing.assert_array_equal(np.floor(np.asarray(t, np.float64) * batch), np.arange(batch))


def test_times_are_uniform():
    """The marginal over keys is uniform: Kolmogorov-Smirnov inside a stratum."""
    t = jax.vmap(lambda key: stratified_times(key, 4))(jax.random.split(KEY, 500))
    assert stats.kstest(np.asarray((t * 4) % 1).ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", ["karras", "cosine"])
def test_times_of_lognormal_noise(name):
    """The log of sigma / alpha is the quantile of a normal distribution; far out, times stay within [0, 1]."""
    make = getattr(schedule, name)
    uniform = (jnp.arange(4000) + 0.5) / 4000
    t = jax.jit(lambda u: lognormal_times(make, u, mean=-1.0, std=1.2))(uniform)
    log_noise = -0.5 * make(t).logsnr[:, 0, 0, 0]
    inside = np.abs(np.asarray(uniform) - 0.5) < 0.499
    np.testing.assert_allclose(log_noise[inside], stats.norm.ppf(uniform, -1.0, 1.2)[inside], rtol=0, atol=2e-3)
    ends = lognormal_times(make, jnp.array([0.0, 1.0]), mean=-30.0, std=0.1)
    assert np.all(np.isfinite(ends)) and np.all(ends == 0)
    assert np.all(1 - lognormal_times(make, jnp.array([0.0, 1.0]), mean=30.0, std=0.1) < 1e-6)


def test_times_are_the_callers():
    """The denoiser is asked at the function of the uniform times, and the noise is of that level."""
    seen = {}

    def denoiser(z_t, t):
        seen.update(z_t=z_t, t=t)
        return X

    _, metrics = diffusion_loss(denoiser, schedule.cosine, X, KEY, times=lambda t: t / 2)
    np.testing.assert_array_equal(np.floor(seen["t"] * 16), np.arange(8))
    np.testing.assert_allclose(metrics["logsnr"], schedule.cosine(seen["t"]).logsnr[:, 0, 0, 0])
