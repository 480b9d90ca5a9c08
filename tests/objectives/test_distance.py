"""Distances: limits in epsilon, weights, gradients, and multiscale pooling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import prediction, schedule
from mscm.objectives import distance
from mscm.types import Level

ROBUST = {
    "pseudo_huber": distance.pseudo_huber,
    "pseudo_huber_weighted": distance.pseudo_huber_weighted,
    "charbonnier": distance.charbonnier,
}
PHI = jnp.array([0.1, 0.7, 1.5])[:, None, None, None]
LVL = Level(jnp.cos(PHI), jnp.sin(PHI))
DIFF = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


def mean(image):
    return np.mean(np.asarray(image), axis=(1, 2, 3))


def weight():
    """SNR + 1 = 1 / sigma^2 when variance preserving, from the angle."""
    return 1 / np.sin(np.array([0.1, 0.7, 1.5])) ** 2


def test_v_mse_is_the_error_of_v(x64):
    """(SNR + 1) mean (x - x')^2 = mean (v - v')^2, with v from its definition."""
    x, z = (jax.random.normal(jax.random.key(seed), (3, 4, 4, 2)) for seed in (1, 2))
    lvl, diff = LVL, DIFF.astype(jnp.float64)
    v_error = prediction.v_from_x(x + diff, z, lvl) - prediction.v_from_x(x, z, lvl)
    np.testing.assert_allclose(distance.v_mse(diff, lvl), mean(v_error**2), rtol=1e-5)
    np.testing.assert_allclose(distance.v_mse(diff, lvl), weight() * mean(diff**2), rtol=1e-5)
    np.testing.assert_allclose((lvl.snr + 1)[:, 0, 0, 0], weight(), rtol=1e-5)


def test_eps_mse_is_the_error_of_eps():
    """SNR mean (x - x')^2 = mean (eps - eps')^2 with eps = (z - alpha x) / sigma; SNR = SNR + 1 - 1."""
    z = jax.random.normal(jax.random.key(1), DIFF.shape)
    eps_error = prediction.eps_from_x(DIFF, z, LVL) - prediction.eps_from_x(jnp.zeros_like(DIFF), z, LVL)
    np.testing.assert_allclose(distance.eps_mse(DIFF, LVL), mean(eps_error**2), rtol=2e-5)
    np.testing.assert_allclose(distance.eps_mse(DIFF, LVL), (weight() - 1) * mean(DIFF**2), rtol=2e-5)


def test_truncated_snr_is_the_larger_of_two_errors():
    """max(SNR, 1) mean diff^2: the error of x where there is more noise than signal, of eps elsewhere."""
    squares, snr = mean(DIFF**2), weight() - 1
    assert np.min(snr) < 1 < np.max(snr)
    np.testing.assert_allclose(distance.truncated_snr_mse(DIFF, LVL), np.maximum(snr, 1) * squares, rtol=2e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_weight(sigma_data):
    """(u^2 + s^2) / (u s)^2, u = sigma / alpha: one for VP and VE levels of the same SNR; s = 1 is SNR + 1."""
    u = np.tan(np.array([0.1, 0.7, 1.5]))
    expected = (u**2 + sigma_data**2) / (u * sigma_data) ** 2 * mean(DIFF**2)
    exploding = Level(jnp.ones_like(PHI), jnp.tan(PHI))
    for lvl in (LVL, exploding):
        np.testing.assert_allclose(distance.edm_mse(DIFF, lvl, sigma_data=sigma_data), expected, rtol=2e-5)
    unit = distance.edm_mse(DIFF, LVL, sigma_data=1.0)
    np.testing.assert_allclose(unit, distance.v_mse(DIFF, LVL), rtol=2e-5)
    np.testing.assert_array_equal(distance.edm_mse(DIFF, LVL), distance.edm_mse(DIFF, LVL, sigma_data=0.5))


@pytest.mark.parametrize("epsilon", [1e-4, 0.3, 10.0])
def test_formulas(x64, epsilon):
    """The three printed formulas in float64, term by term."""
    diff = np.asarray(DIFF, np.float64)
    lvl = Level(*(jnp.asarray(level, jnp.float64) for level in LVL))
    sigma = np.asarray(lvl.sigma / jnp.hypot(*lvl))  # which float32 left 1 +- 1e-7
    formulas = {
        "pseudo_huber": np.sqrt(mean((diff / sigma) ** 2) + epsilon**2) - epsilon,
        "pseudo_huber_weighted": (mean(np.asarray(lvl.alpha / lvl.sigma) ** 2) + 1)
        * (np.sqrt(mean(diff**2) + epsilon**2) - epsilon),
        "charbonnier": mean(np.sqrt((diff / sigma) ** 2 + epsilon**2) - epsilon),
    }
    for name, robust in ROBUST.items():
        np.testing.assert_allclose(robust(jnp.asarray(diff), lvl, epsilon=epsilon), formulas[name], rtol=1e-9)


@pytest.mark.parametrize("name", ROBUST)
def test_small_epsilon_is_the_norm(name):
    """epsilon -> 0: the rms, or mean absolute, residual in v; (SNR + 1) rms of x for the weighted form."""
    limits = {
        "pseudo_huber": np.sqrt(weight() * mean(DIFF**2)),
        "pseudo_huber_weighted": weight() * np.sqrt(mean(DIFF**2)),
        "charbonnier": np.sqrt(weight()) * mean(jnp.abs(DIFF)),
    }
    for epsilon in (1e-7, 0.0):
        np.testing.assert_allclose(ROBUST[name](DIFF, LVL, epsilon=epsilon), limits[name], rtol=2e-5)


@pytest.mark.parametrize("name", ROBUST)
def test_large_epsilon_is_the_squared_error(name):
    """epsilon -> infinity: 2 epsilon L -> mean square of the residual in v, for every form; float32 keeps it."""
    actual = 2e4 * ROBUST[name](DIFF, LVL, epsilon=1e4)
    np.testing.assert_allclose(actual, weight() * mean(DIFF**2), rtol=2e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("name", ROBUST)
def test_zero_residual(name, epsilon):
    """Distance and gradient are exactly 0 where prediction and target agree, for every epsilon."""
    zero = jnp.zeros_like(DIFF)
    loss, gradient = jax.value_and_grad(lambda diff: jnp.sum(ROBUST[name](diff, LVL, epsilon=epsilon)))(zero)
    assert loss == 0
    np.testing.assert_array_equal(gradient, zero)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_gradient_is_bounded(scale):
    """d (H1) / d (rms residual) = r / sqrt(r^2 + epsilon^2) is at most 1, whatever the residual."""
    lvl = Level(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
    direction = jnp.ones((1, 2, 2, 1))  # rms 1, so that its multiple is the rms residual
    slope = jax.grad(lambda r: distance.pseudo_huber(r * direction, lvl, epsilon=1e-3)[0])(scale)
    assert float(slope) == pytest.approx(scale / np.hypot(scale, 1e-3), rel=1e-5)
    assert 0 < float(slope) <= 1 + 1e-6


ALL = {name: getattr(distance, name) for name in ("v_mse", "eps_mse", "truncated_snr_mse", "edm_mse")} | {
    name: functools.partial(robust, epsilon=0.1) for name, robust in ROBUST.items()
}


@pytest.mark.parametrize("name", ALL)
def test_a_level_counts_by_its_snr(name):
    """Whether it preserves the variance or not: z / alpha is the same image."""
    exploding = Level(jnp.ones_like(PHI), jnp.tan(PHI))
    np.testing.assert_allclose(ALL[name](DIFF, exploding), ALL[name](DIFF, LVL), rtol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_one_number_per_example(name):
    """Other examples change nothing."""
    robust = ALL[name]
    mates = DIFF.at[1:].mul(10.0)
    assert robust(DIFF, LVL).shape == (3,)
    np.testing.assert_allclose(robust(mates, LVL)[0], robust(DIFF, LVL)[0], rtol=1e-6)


# -------------------------------------------------------------------------------------------------- consistency models


A, B = (jax.random.normal(jax.random.key(seed), (3, 4, 4, 2)) for seed in (3, 4))


def test_squared_l2_is_the_mean_square():
    """mean (a - b)^2."""
    np.testing.assert_allclose(distance.squared_l2(A, B), mean((A - B) ** 2), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("side, c", [(32, 0.0299), (64, 0.0599)])
def test_norm_pseudo_huber_is_the_formula(side, c, size):
    """sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(d): CIFAR-10 0.0299, ImageNet 64 0.0599; without cancellation."""
    a, b = (size * jax.random.normal(jax.random.key(seed), (2, side, side, 3)) for seed in (3, 4))
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    square = np.sum(difference**2, axis=(1, 2, 3))
    np.testing.assert_allclose(distance.norm_pseudo_huber(a, b), np.sqrt(square + c**2) - c, rtol=3e-3)
    exact = 0.00054 * np.sqrt(side * side * 3)
    assert exact == pytest.approx(c, abs=5e-5)
    np.testing.assert_allclose(distance.norm_pseudo_huber(a, b), np.sqrt(square + exact**2) - exact, rtol=1e-5)
    np.testing.assert_allclose(distance.norm_pseudo_huber(a, b, scale=0.0), np.sqrt(square), rtol=1e-5)


def test_norm_pseudo_huber_has_a_bounded_gradient():
    """The Euclidean norm of its gradient is at most 1 and falls to 0, not nan, where the images agree."""
    gradient = jax.grad(lambda a, b: jnp.sum(distance.norm_pseudo_huber(a, b)))
    for factor in (1e-4, 1e-2, 1.0, 1e3):
        norm = np.sqrt(np.sum(np.square(gradient(factor * A, factor * B)), axis=(1, 2, 3)))
        assert np.all(norm <= 1 + 1e-6) and np.all(norm > 0)
    assert np.all(norm > 0.999)
    np.testing.assert_array_equal(gradient(A, A), np.zeros_like(A))


def test_inverse_gap_on_the_grid():
    """1 / (sigma_{i+1} - sigma_i), positive and decreasing in sigma; the same for VP levels of the same SNR."""
    t = jnp.arange(1281) / 1280
    exact = np.diff((0.002 ** (1 / 7) + np.arange(1281) / 1280 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7)
    lvl = schedule.karras(t)
    preserving = Level(1 / jnp.sqrt(1 + lvl.sigma**2), lvl.sigma / jnp.sqrt(1 + lvl.sigma**2))
    for levels in (lvl, preserving):
        noisier, cleaner = (Level(*(a[part] for a in levels)) for part in (slice(1, None), slice(0, -1)))
        actual = distance.inverse_gap(noisier, cleaner)
        np.testing.assert_allclose(actual, 1 / exact, rtol=2e-3)
        assert np.all(actual > 0) and np.all(np.diff(actual) < 0)


# ---------------------------------------------------------------------------------------------------------- multiscale


@pytest.mark.parametrize("resolutions", [(4,), (4, 2), (4, 2, 1)])
def test_constant_residual_at_every_scale(resolutions):
    """Pooling keeps a constant residual e and the weights sum to 1: the multiscale loss is e^2."""
    pooled = distance.multiscale(lambda diff, lvl: distance.mean_square(diff), resolutions)
    np.testing.assert_allclose(pooled(jnp.full((3, 4, 4, 2), 0.3), LVL), 0.09, rtol=1e-6)


def test_own_resolution_alone_is_no_change():
    """One resolution, the image's own: the plain distance."""
    np.testing.assert_allclose(
        distance.multiscale(distance.v_mse, (4,))(DIFF, LVL), distance.v_mse(DIFF, LVL), rtol=1e-6
    )


def test_multiscale_weights():
    """Weights 1 / r: a residual that pools to zero keeps (1 / 4) / (1 / 4 + 1 / 2) = 1 / 3 of its distance."""
    checkerboard = jnp.tile(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), (2, 2))[None, :, :, None] * jnp.ones((3, 1, 1, 1))
    pooled = distance.multiscale(distance.v_mse, (4, 2))
    np.testing.assert_allclose(pooled(checkerboard, LVL), weight() / 3, rtol=1e-5)


def test_average_pool():
    """Each output pixel is the mean of its block, channels apart."""
    images = np.arange(2 * 4 * 4 * 2, dtype=np.float32).reshape(2, 4, 4, 2)
    pooled = distance.average_pool(jnp.asarray(images), 2)
    assert pooled.shape == (2, 2, 2, 2)
    for i in range(2):
        for j in range(2):
            block = images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(pooled[:, i, j], block.mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(distance.average_pool(jnp.asarray(images), 4), images)


@pytest.mark.parametrize("shape, resolution", [((1, 4, 4, 1), 3), ((1, 4, 8, 1), 2), ((1, 4, 4, 1), 8)])
def test_impossible_pooling(shape, resolution):
    """Images that are not square, or not a multiple of the resolution, raise with their size."""
    with pytest.raises(ValueError, match=f"{shape[1]} x {shape[2]} to pool to {resolution}"):
        distance.average_pool(jnp.zeros(shape), resolution)


@pytest.mark.parametrize("name", ROBUST)
def test_a_residual_that_is_not_a_number_is_no_loss_of_zero(name):
    """What has diverged must show; the other examples are untouched."""
    loss = np.asarray(ROBUST[name](DIFF.at[1, 0, 0, 0].set(jnp.nan), LVL, epsilon=1e-4))
    assert np.isnan(loss).tolist() == [False, True, False]
