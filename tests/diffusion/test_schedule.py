"""Schedules: closed forms, symmetries and limits of the log-SNR, and the grid of EDM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import schedule
from mscm.objectives.distance import average_pool

TIMES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
SCHEDULES = {
    "cosine": schedule.cosine,
    "shifted": functools.partial(schedule.cosine, shift=2 * np.log(32 / 128)),
    "interpolated": functools.partial(schedule.interpolated, resolution=128, noise_low=32, noise_high=128),
}


def interpolated_logsnr(t, resolution):
    return schedule.interpolated_logsnr(t, resolution=resolution, noise_low=32, noise_high=resolution)


@pytest.mark.parametrize("resolution, expected", [
    (32, (15.0, 3.6797, 1.7612, 0.0, -1.7612, -3.6797, -15.0)),
    (64, (15.0, 3.5411, 1.4146, -0.6931, -2.8009, -4.9274, -16.3863)),
    (128, (15.0, 3.4025, 1.0680, -1.3863, -3.8406, -6.1751, -17.7726)),
    (512, (15.0, 3.1252, 0.3749, -2.7726, -5.9201, -8.6704, -20.5452)),
])
def test_interpolated_table(resolution, expected):
    """Interpolated 32 -> D at image side D, evaluated by hand from the formula; D = 32 is the plain cosine."""
    np.testing.assert_allclose(interpolated_logsnr(jnp.array(TIMES), resolution), expected, rtol=0, atol=6e-5)
    if resolution == 32:
        np.testing.assert_allclose(schedule.cosine_logsnr(jnp.array(TIMES)), expected, rtol=0, atol=6e-5)


def test_bounded_cosine_formula(x64):
    """lambda(t) = -2 log tan(a + t (b - a)), a = atan(exp(-max / 2)), b = atan(exp(-min / 2))."""
    t = jnp.linspace(0, 1, 41, dtype=jnp.float64)
    a, b = np.arctan(np.exp(-9 / 2)), np.arctan(np.exp(5 / 2))
    actual = schedule.cosine_logsnr(t, logsnr_min=-5.0, logsnr_max=9.0)
    np.testing.assert_allclose(actual, -2 * np.log(np.tan(a + np.asarray(t) * (b - a))), rtol=0, atol=1e-12)


def test_wide_bounds_give_the_plain_cosine():
    """Bounds -> infinity: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    t = jnp.linspace(0, 1, 41)
    lvl = schedule.cosine(t, logsnr_min=-60.0, logsnr_max=60.0)
    np.testing.assert_allclose(lvl.alpha[:, 0, 0, 0], np.cos(np.pi / 2 * np.asarray(t)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(lvl.sigma[:, 0, 0, 0], np.sin(np.pi / 2 * np.asarray(t)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_bounds_are_the_ends_and_move_with_the_shift(shift):
    """lambda(0) = logsnr_max + shift and lambda(1) = logsnr_min + shift."""
    ends = schedule.cosine_logsnr(jnp.array([0.0, 1.0]), logsnr_min=-20.0, logsnr_max=10.0, shift=shift)
    np.testing.assert_allclose(ends, [10 + shift, -20 + shift], rtol=1e-6)


def test_cosine_is_odd_about_the_middle():
    """lambda(1 - t) = -lambda(t) for symmetric bounds."""
    t = jnp.arange(65) / 64
    np.testing.assert_allclose(schedule.cosine_logsnr(1 - t), -schedule.cosine_logsnr(t), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_preserving(name):
    """alpha^2 + sigma^2 = 1, and Level.logsnr, snr and angle agree with each other."""
    lvl = SCHEDULES[name](jnp.linspace(0, 1, 101))
    np.testing.assert_allclose(lvl.alpha**2 + lvl.sigma**2, 1, rtol=0, atol=5e-7)
    np.testing.assert_allclose(jnp.exp(lvl.logsnr), lvl.snr, rtol=2e-5)
    np.testing.assert_allclose(jnp.cos(lvl.angle), lvl.alpha, rtol=0, atol=5e-7)
    np.testing.assert_allclose(jnp.sin(lvl.angle), lvl.sigma, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_logsnr_strictly_decreases(name):
    """t_1 < t_2 gives lambda(t_1) > lambda(t_2), on the finest grid that training uses."""
    logsnr = SCHEDULES[name](jnp.arange(1281) / 1280).logsnr[:, 0, 0, 0]
    assert np.all(np.diff(logsnr) < 0)


@pytest.mark.parametrize("logsnr", [-30.0, -15.0, 0.0, 15.0, 30.0])
def test_level_keeps_both_small_ends(logsnr):
    """lambda = log(alpha^2 / sigma^2) survives float32 where 1 - alpha^2 is 0."""
    lvl = schedule.level_from_logsnr(jnp.array([logsnr]))
    np.testing.assert_allclose(lvl.sigma[0, 0, 0, 0], (1 + np.exp(logsnr)) ** -0.5, rtol=2e-6)
    np.testing.assert_allclose(lvl.alpha[0, 0, 0, 0], (1 + np.exp(-logsnr)) ** -0.5, rtol=2e-6)


@pytest.mark.parametrize("resolution, noise", [(128, 32), (64, 32), (32, 64)])
def test_shift_undoes_pooling(resolution, noise):
    """SNR of the shifted schedule times (D / n)^2, what pooling D -> n gives, is the plain SNR."""
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = schedule.cosine(t, shift=2 * float(np.log(noise / resolution)))
    np.testing.assert_allclose(shifted.snr * (resolution / noise) ** 2, schedule.cosine(t).snr, rtol=1e-5)


def test_pooling_multiplies_the_snr():
    """s x s average pooling keeps a constant image and divides the variance of white noise by s^2."""
    noise = jax.random.normal(jax.random.key(0), (4, 256, 256, 1))
    np.testing.assert_allclose(average_pool(jnp.full_like(noise, 0.7), 64), 0.7, rtol=1e-6)
    np.testing.assert_allclose(jnp.var(average_pool(noise, 64)) * 16, 1, rtol=0.04)  # relative error 1.1 % (1 sigma)


@pytest.mark.parametrize("noise", [32, 64, 512])
def test_interpolated_between_equal_resolutions_is_a_shift(noise):
    """n_low = n_high = n is lambda + 2 log(n / D), and n = D is no change."""
    t = jnp.linspace(0, 1, 21)
    actual = schedule.interpolated_logsnr(t, resolution=64, noise_low=noise, noise_high=noise)
    expected = schedule.cosine_logsnr(t, shift=2 * float(np.log(noise / 64)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    if noise == 64:
        np.testing.assert_allclose(actual, schedule.cosine_logsnr(t), rtol=0, atol=0)


def test_interpolated_noise_end_follows_the_low_resolution():
    """lambda(1) is that of noise_low (more noise), lambda(0) that of noise_high."""
    ends = schedule.interpolated_logsnr(jnp.array([0.0, 1.0]), resolution=128, noise_low=32, noise_high=256)
    np.testing.assert_allclose(ends, [15 + 2 * np.log(256 / 128), -15 + 2 * np.log(32 / 128)], rtol=1e-6)


def test_karras_grid_of_11():
    """EDM's grid with N = 11, evaluated by hand from its equation 5."""
    expected = (0.002, 0.0167, 0.0851, 0.3183, 0.9654, 2.5152, 5.8389, 12.3816, 24.4083, 45.3137, 80.0)
    sigma = schedule.karras_sigma(jnp.arange(11) / 10)
    np.testing.assert_allclose(sigma, expected, rtol=2e-6, atol=5e-5)
    np.testing.assert_allclose(sigma[jnp.array([0, 10])], [0.002, 80], rtol=2e-6)


def test_karras_grid_of_18():
    """EDM's CIFAR-10 grid, N = 18: second and last but one."""
    sigma = schedule.karras_sigma(jnp.array([1 / 17, 16 / 17]))
    assert float(sigma[0]) == pytest.approx(0.0075, abs=5e-5)
    assert float(sigma[1]) == pytest.approx(57.586, abs=5e-4)


def test_karras_level_is_variance_exploding():
    """alpha = 1; rho = 1 is linear in t."""
    t = jnp.array([0.0, 0.25, 1.0])
    alpha, sigma = schedule.karras(t, sigma_min=1.0, sigma_max=5.0, rho=1.0)
    np.testing.assert_array_equal(alpha, np.ones((3, 1, 1, 1)))
    np.testing.assert_allclose(sigma[:, 0, 0, 0], [1, 2, 5], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 18, 40])
def test_karras_levels_of_a_sampler(num_steps):
    """At j / n: sigma_0 = 0, then EDM's n levels; sigma is continuous and rises between them."""
    sigma = schedule.karras(jnp.arange(num_steps + 1) / num_steps, num_steps=num_steps).sigma[:, 0, 0, 0]
    expected = schedule.karras_sigma(jnp.arange(num_steps) / (num_steps - 1))
    np.testing.assert_allclose(sigma, [0, *expected], rtol=1e-5)
    fine = schedule.karras(jnp.linspace(0, 1, 5001), num_steps=num_steps).sigma[:, 0, 0, 0]
    assert np.all(np.diff(fine) > 0)
    around = 1 / num_steps + jnp.array([-1e-6, 1e-6])
    np.testing.assert_allclose(schedule.karras(around, num_steps=num_steps).sigma[:, 0, 0, 0], 0.002, rtol=2e-3)


def test_impossible_bounds_are_named():
    """Wrong orders and signs raise, and the message has the offending numbers."""
    t = jnp.zeros(1)
    with pytest.raises(ValueError, match="logsnr_min=3.0 and logsnr_max=-3.0"):
        schedule.cosine(t, logsnr_min=3.0, logsnr_max=-3.0)
    with pytest.raises(ValueError, match="noise_low=0"):
        schedule.interpolated(t, resolution=64, noise_low=0, noise_high=64)
    with pytest.raises(ValueError, match="sigma_min=2.0 and sigma_max=1.0"):
        schedule.karras(t, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="num_steps=1"):
        schedule.karras(t, num_steps=1)


@pytest.mark.parametrize("name", [*SCHEDULES, "karras", "karras to 0"])
def test_times_of_logsnr_invert_the_schedule(name):
    """The latest time with at least this log-SNR, to the spacing of float32; beyond the schedule, its nearer end."""
    to_0 = functools.partial(schedule.karras, num_steps=18)
    make = {**SCHEDULES, "karras": schedule.karras, "karras to 0": to_0}[name]
    noisiest, cleanest = schedule.logsnr_range(make)
    assert (cleanest == np.inf) == (make is to_0)
    cleanest = min(cleanest, 20.0)
    wanted = np.linspace(noisiest, cleanest, 42, dtype=np.float32)[1:-1]
    times = schedule.times_of_logsnr(make, wanted)
    assert times.dtype == np.float32 and np.all(np.diff(times) < 0)

    def logsnr_at(times):
        return np.asarray(make(jnp.asarray(times)).logsnr)[:, 0, 0, 0]

    rounding = 4e-6  # of a log-SNR of 15, compiled as a whole or not
    assert np.all(logsnr_at(times) >= wanted - rounding)
    assert np.all(logsnr_at(np.nextafter(times, np.float32(1))) < wanted + rounding)
    np.testing.assert_allclose(logsnr_at(times), wanted, rtol=0, atol=2e-4)
    cleanest = schedule.logsnr_range(make)[1]
    ends = schedule.times_of_logsnr(make, np.float32([np.inf, cleanest + 1, cleanest, noisiest, noisiest - 1, -np.inf]))
    np.testing.assert_array_equal(ends, [0, 0, 0, 1, 1, 1])
