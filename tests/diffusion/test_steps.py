"""Sampler steps: inverses, closed forms, limits, marginals and orders of convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.types import Level

SHAPE = (4, 3, 3, 2)
PHI_T = (0.3, 0.9, 1.3, 1.56)
PHI_S = (0.2, 0.1, 1.25, 1.0)
PHI_R = (0.1, 0.0, 0.4, 0.999)


def level(phi, kind="vp"):
    phi = jnp.asarray(phi)[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi)) if kind == "vp" else Level(jnp.ones_like(phi), jnp.tan(phi))


def images(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def norm_square(image):
    return np.sum(np.square(image), axis=(1, 2, 3))


def literal_coefficient(lvl_t, lvl_s):
    return lvl_s.alpha - lvl_t.alpha * lvl_s.sigma / lvl_t.sigma


# ---------------------------------------------------------------------------------------------------------------- DDIM


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_ddim_is_its_equation(x64, kind):
    """z_s = alpha_s x + (sigma_s / sigma_t)(z_t - alpha_t x), written out."""
    lvl_t, lvl_s, x, z = level(PHI_T, kind), level(PHI_S, kind), images(0), images(1)
    expected = lvl_s.alpha * x + lvl_s.sigma * (z - lvl_t.alpha * x) / lvl_t.sigma
    np.testing.assert_allclose(steps.ddim(x, z, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_inv_ddim_undoes_ddim(x64, kind):
    """invDDIM(DDIM(x, z_t), z_t) = x."""
    lvl_t, lvl_s, x, z = level(PHI_T, kind), level(PHI_S, kind), images(0), images(1)
    actual = steps.inv_ddim(steps.ddim(x, z, lvl_t, lvl_s), z, lvl_t, lvl_s)
    np.testing.assert_allclose(actual, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_coefficient_equals_the_difference(x64, kind):
    """A(t, s) = sin(phi_t - phi_s) / sin(phi_t) when VP, alpha_s - alpha_t sigma_s / sigma_t for any level."""
    lvl_t, lvl_s = level(PHI_T, kind), level(PHI_S, kind)
    actual = steps.ddim_coefficient(lvl_t, lvl_s)
    np.testing.assert_allclose(actual, literal_coefficient(lvl_t, lvl_s), rtol=1e-10)
    if kind == "vp":
        sine = np.sin(np.subtract(PHI_T, PHI_S)) / np.sin(PHI_T)
        np.testing.assert_allclose(actual[:, 0, 0, 0], sine, rtol=1e-12)
    else:
        np.testing.assert_allclose(actual, 1 - lvl_s.sigma / lvl_t.sigma, rtol=1e-10)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_composition_law(x64, kind):
    """A(s, r) + (sigma_r / sigma_s) A(t, s) = A(t, r): with a constant x two DDIM steps are one."""
    lvl_t, lvl_s, lvl_r, x, z = (*(level(phi, kind) for phi in (PHI_T, PHI_S, PHI_R)), images(0), images(1))
    a = steps.ddim_coefficient
    left = a(lvl_s, lvl_r) + lvl_r.sigma / lvl_s.sigma * a(lvl_t, lvl_s)
    np.testing.assert_allclose(left, a(lvl_t, lvl_r), rtol=1e-12)
    two = steps.ddim(x, steps.ddim(x, z, lvl_t, lvl_s), lvl_s, lvl_r)
    np.testing.assert_allclose(two, steps.ddim(x, z, lvl_t, lvl_r), rtol=0, atol=1e-12)


def test_ddim_equals_the_exponential_form(x64):
    """z_s = (sigma_s / sigma_t) z_t - alpha_s (e^{-h} - 1) x, h the step in log(alpha / sigma): DPM-Solver++(1)."""
    lvl_t, lvl_s, x, z = level(PHI_T), level(PHI_S), images(0), images(1)
    h = (lvl_s.logsnr - lvl_t.logsnr) / 2
    expected = lvl_s.sigma / lvl_t.sigma * z - lvl_s.alpha * jnp.expm1(-h) * x
    np.testing.assert_allclose(steps.ddim(x, z, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)


def test_ddim_keeps_the_noise_of_the_true_x(x64):
    """With the true x, alpha_t x + sigma_t eps goes to alpha_s x + sigma_s eps; at sigma_s = 0 it is x."""
    lvl_t, x, eps = level(PHI_T), images(0), images(1)
    z = lvl_t.alpha * x + lvl_t.sigma * eps
    for phi in (PHI_S, (0.0,) * 4):
        lvl_s = level(phi)
        expected = lvl_s.alpha * x + lvl_s.sigma * eps
        np.testing.assert_allclose(steps.ddim(x, z, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "karras"])
def test_coefficient_does_not_cancel_in_float32(name):
    """1/1280 of the range apart, the relative error of A(t, s) is that of the angle difference, not of its products.

    Differences of the angles themselves lose where sigma is large: there all are nearly pi / 2.
    """
    t = jnp.arange(1, 1281) / 1280
    lvl_t, lvl_s = (getattr(schedule, name)(times) for times in (t, t - 1 / 1280))
    alpha_t, sigma_t, alpha_s, sigma_s = (np.asarray(part, np.float64) for part in (*lvl_t, *lvl_s))
    exact = (alpha_s * sigma_t - alpha_t * sigma_s) / sigma_t
    assert np.max(np.abs(steps.ddim_coefficient(lvl_t, lvl_s) / exact - 1)) < 1e-4


# --------------------------------------------------------------------------------------------------------------- aDDIM


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_addim_is_its_equation(x64, kind):
    """z_s = alpha_s x + sqrt(sigma_s^2 + (d / |eps|^2) A^2 x_var) eps, one example at a time in NumPy."""
    lvl_t, lvl_s, x, z = level(PHI_T, kind), level(PHI_S, kind), images(0), images(1)
    x_var = np.array([0.3, 0.01, 2.0, 0.0])
    actual = steps.addim(x, jnp.asarray(x_var), z, lvl_t, lvl_s)
    for i in range(len(x_var)):
        alpha_t, sigma_t, alpha_s, sigma_s = (float(a[i, 0, 0, 0]) for a in (*lvl_t, *lvl_s))
        x_i, z_i = np.asarray(x[i]), np.asarray(z[i])
        eps = (z_i - alpha_t * x_i) / sigma_t
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var[i]
        expected = alpha_s * x_i + np.sqrt(sigma_s**2 + x_i.size / np.sum(eps**2) * z_var) * eps
        np.testing.assert_allclose(actual[i], expected, rtol=0, atol=1e-11)


def test_addim_without_variance_is_ddim():
    """x_var = 0 is DDIM, bit for bit, in float32."""
    lvl_t, lvl_s, x, z = level(PHI_T), level(PHI_S), images(0), images(1)
    np.testing.assert_array_equal(steps.addim(x, jnp.zeros(4), z, lvl_t, lvl_s), steps.ddim(x, z, lvl_t, lvl_s))


def test_addim_that_goes_nowhere():
    """s = t returns z_t exactly, whatever x_var."""
    lvl_t, x, z = level(PHI_T), images(0), images(1)
    np.testing.assert_array_equal(steps.addim(x, jnp.full(4, 0.7), z, lvl_t, lvl_t), z)


def orthogonal_pair():
    x, eps = np.array(images(0), np.float64), np.array(images(1), np.float64)
    overlap = np.sum(x * eps, axis=(1, 2, 3), keepdims=True) / np.sum(x * x, axis=(1, 2, 3), keepdims=True)
    return jnp.asarray(x), jnp.asarray(eps - overlap * x)


def test_addim_restores_the_norm(x64):
    """x orthogonal to eps: |z_s|^2 = |DDIM|^2 + d A^2 x_var, the norm of an exact sample."""
    lvl_t, lvl_s = level(PHI_T), level(PHI_S)
    x, eps = orthogonal_pair()
    z = lvl_t.alpha * x + lvl_t.sigma * eps
    x_var = jnp.array([0.3, 0.01, 2.0, 0.5])
    gained = norm_square(steps.addim(x, x_var, z, lvl_t, lvl_s)) - norm_square(steps.ddim(x, z, lvl_t, lvl_s))
    expected = x[0].size * literal_coefficient(lvl_t, lvl_s)[:, 0, 0, 0] ** 2 * x_var
    np.testing.assert_allclose(gained, expected, rtol=1e-9)


def test_addim_does_not_see_batch_mates():
    """Permuting the batch permutes the result; other mates change nothing."""
    lvl_t, lvl_s, x, z = level(PHI_T), level(PHI_S), images(0), images(1)
    x_var = jnp.array([0.3, 0.01, 2.0, 0.5])
    together = steps.addim(x, x_var, z, lvl_t, lvl_s)
    order = jnp.array([2, 0, 3, 1])
    shuffled = steps.addim(*jax.tree.map(lambda a: a[order], (x, x_var, z, lvl_t, lvl_s)))
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=2e-6)
    mates = steps.addim(x.at[1:].mul(30.0), x_var.at[1:].mul(9.0), z, lvl_t, lvl_s)
    np.testing.assert_allclose(mates[0], together[0], rtol=0, atol=2e-6)


def test_addim_coefficient_grows_with_the_variance(x64):
    """The multiple of eps is sigma_s at x_var = 0 and strictly increasing in x_var."""
    x_var = jnp.array([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0])
    lvl_t, lvl_s = level((0.9,) * 6), level((0.4,) * 6)
    ones = jnp.ones((6, 1, 1, 1))
    correction = steps.addim_correction(x_var[:, None, None, None], ones, lvl_t, lvl_s)[:, 0, 0, 0]
    assert correction[0] == 0 and np.all(np.diff(correction) > 0)
    c = lvl_s.sigma[:, 0, 0, 0] + correction
    expected = np.sqrt(np.sin(0.4) ** 2 + literal_coefficient(lvl_t, lvl_s)[:, 0, 0, 0] ** 2 * x_var)
    np.testing.assert_allclose(c, expected, rtol=1e-12)


def test_addim_final_step():
    """sigma_s = 0: x plus a residual of rms sqrt(x_var); with x_var = 0 or eps = 0 it is finite and x itself."""
    lvl_t, lvl_s = level(PHI_T), level((0.0,) * 4)
    x, z = images(0), images(1)
    x_var = jnp.array([0.3, 0.01, 2.0, 0.5])
    residual = steps.addim(x, x_var, z, lvl_t, lvl_s) - x
    np.testing.assert_allclose(norm_square(residual) / x[0].size, x_var, rtol=2e-4)
    np.testing.assert_allclose(steps.addim(x, jnp.zeros(4), z, lvl_t, lvl_s), x, rtol=0, atol=1e-6)
    noiseless = steps.addim(x, x_var, lvl_t.alpha * x, lvl_t, lvl_s)
    assert np.all(np.isfinite(noiseless))


def test_analytic_variance_is_a_tenth_of_the_gaussian_posterior(x64):
    """0.1 / (2 + SNR) = 0.1 Var[x | z] for x ~ N(0, 1/2): precision 2 from the prior, SNR from z."""
    lvl_t = level(PHI_T)
    posterior = 1 / (1 / 0.5 + lvl_t.alpha**2 / lvl_t.sigma**2)
    np.testing.assert_allclose(steps.analytic_x_var(lvl_t), 0.1 * posterior[:, 0, 0, 0], rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------- ancestral


def ancestral_line(lvl_t, lvl_s, mix, shape=(1, 256, 256, 1)):
    """Weights of z_t and x in the mean, and the noise, by differences under one key."""
    step = functools.partial(
        steps.ancestral,
        lvl_t=lvl_t,
        lvl_s=lvl_s,
        xi=jax.random.normal(jax.random.key(5), shape),
        log_variance_mix=mix,
    )
    zero, one = jnp.zeros(shape), jnp.ones(shape)
    noise = step(zero, zero)
    return (step(zero, one) - noise)[0, 0, 0, 0], (step(one, zero) - noise)[0, 0, 0, 0], noise


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("phi_t, phi_s", [(0.9, 0.4), (1.5, 1.45), (0.3, 0.01)])
def test_ancestral_is_the_posterior(x64, phi_t, phi_s, kind):
    """Mean and variance by Bayes: precisions 1 / sigma_s^2 and alpha_ts^2 / sigma_ts^2 of q(z_t | z_s)."""
    lvl_t, lvl_s = level((phi_t,), kind), level((phi_s,), kind)
    alpha_t, sigma_t, alpha_s, sigma_s = (float(a[0, 0, 0, 0]) for a in (*lvl_t, *lvl_s))
    alpha_ts = alpha_t / alpha_s
    var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + alpha_ts**2 / var_ts)
    of_z, of_x, noise = ancestral_line(lvl_t, lvl_s, 0.0)
    np.testing.assert_allclose(of_z, variance * alpha_ts / var_ts, rtol=1e-9)
    np.testing.assert_allclose(of_x, variance * alpha_s / sigma_s**2, rtol=1e-9)
    np.testing.assert_allclose(np.var(noise), variance, rtol=0.03)  # relative error 0.55 % (1 sigma)


@pytest.mark.parametrize("alpha_t", [1e-3, 1e-4])
def test_ancestral_keeps_its_digits_from_pure_noise(alpha_t):
    """The weight of z_t, alpha_t sigma_s^2 / (alpha_s sigma_t^2), where SNR_t / SNR_s is below float32's 1e-7."""
    lvl_t, lvl_s = level((np.pi / 2 - alpha_t,)), level((0.7,))
    zero = jnp.zeros((1, 1, 1, 1))
    weight = steps.ancestral(zero, zero + 1, lvl_t, lvl_s, zero)
    (alpha, sigma), (alpha_s, sigma_s) = (tuple(np.float64(part) for part in lvl) for lvl in (lvl_t, lvl_s))
    np.testing.assert_allclose(weight, alpha * sigma_s**2 / (alpha_s * sigma**2), rtol=1e-5)


def test_ancestral_marginals(x64):
    """z_t ~ N(alpha_t x, sigma_t^2) gives z_s ~ N(alpha_s x, sigma_s^2)."""
    lvl_t, lvl_s = level((1.2,)), level((0.7,))
    of_z, of_x, noise = ancestral_line(lvl_t, lvl_s, 0.0)
    np.testing.assert_allclose(of_z * lvl_t.alpha + of_x, lvl_s.alpha, rtol=1e-12)
    np.testing.assert_allclose(of_z**2 * lvl_t.sigma**2 + np.var(noise), lvl_s.sigma**2, rtol=0.03)


@pytest.mark.parametrize("mix", [0.2, 0.5, 1.0])
def test_ancestral_variance_mixes_in_the_logarithm(x64, mix):
    """std(mix) / std(0) = (sigma_t / sigma_s)^mix; the mean does not change; mix 1 is the forward variance."""
    lvl_t, lvl_s = level((1.2,)), level((0.7,))
    of_z, of_x, noise = ancestral_line(lvl_t, lvl_s, mix)
    z_small, x_small, small = ancestral_line(lvl_t, lvl_s, 0.0)
    np.testing.assert_allclose((of_z, of_x), (z_small, x_small), rtol=1e-9)
    np.testing.assert_allclose(noise / small, np.full(noise.shape, (np.sin(1.2) / np.sin(0.7)) ** mix), rtol=1e-9)
    if mix == 1.0:
        forward = lvl_t.sigma**2 - (lvl_t.alpha / lvl_s.alpha) ** 2 * lvl_s.sigma**2
        np.testing.assert_allclose(np.var(noise), forward[0, 0, 0, 0], rtol=0.03)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_is_its_equation(x64, kind, eta):
    """alpha_s x + sqrt(sigma_s^2 - std^2) eps + std xi, std = eta sigma_s sqrt(1 - SNR_t / SNR_s)."""
    lvl_t, lvl_s, x, z, xi = level(PHI_T, kind), level(PHI_S, kind), images(0), images(1), images(2)
    std = eta * lvl_s.sigma * np.sqrt(1 - lvl_t.snr / lvl_s.snr)
    eps = (z - lvl_t.alpha * x) / lvl_t.sigma
    expected = lvl_s.alpha * x + np.sqrt(lvl_s.sigma**2 - std**2) * eps + std * xi
    actual = steps.stochastic_ddim(x, z, lvl_t, lvl_s, xi, eta=eta)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)
    if eta == 1:
        np.testing.assert_allclose(actual, steps.ancestral(x, z, lvl_t, lvl_s, xi), rtol=0, atol=1e-11)


def test_stochastic_ddim_that_renews_nothing_is_ddim():
    """eta = 0, bit for bit, in float32."""
    lvl_t, lvl_s, x, z, xi = level(PHI_T), level(PHI_S), images(0), images(1), images(2)
    actual = steps.stochastic_ddim(x, z, lvl_t, lvl_s, xi, eta=0.0)
    np.testing.assert_array_equal(actual, steps.ddim(x, z, lvl_t, lvl_s))


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_noisy_ddim_adds_what_addim_restores(x64, kind):
    """DDIM plus A sqrt(x_var) xi, whose mean square is what aDDIM adds to that of DDIM."""
    lvl_t, lvl_s, x, z, xi = level(PHI_T, kind), level(PHI_S, kind), images(0), images(1), images(2)
    x_var = jnp.array([0.3, 0.01, 2.0, 0.0])
    added = steps.noisy_ddim(x, x_var, z, lvl_t, lvl_s, xi) - steps.ddim(x, z, lvl_t, lvl_s)
    scale = literal_coefficient(lvl_t, lvl_s) * np.sqrt(x_var)[:, None, None, None]
    np.testing.assert_allclose(added, scale * xi, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_churn_has_the_law_of_the_noisier_level(x64, kind):
    """alpha_t x + sigma_t eps becomes alpha_hat x + noise of variance sigma_hat^2; s_noise scales what is added."""
    lvl_t, lvl_hat, x, eps, xi = level(PHI_S[:1], kind), level(PHI_T[:1], kind), images(0), images(1), images(2)
    x, eps, xi = x[:1], eps[:1], xi[:1]
    zero = jnp.zeros_like(x)
    of_x, of_eps = (steps.churn(z, lvl_t, lvl_hat, zero) for z in (lvl_t.alpha * x, lvl_t.sigma * eps))
    of_xi = steps.churn(zero, lvl_t, lvl_hat, xi)
    np.testing.assert_allclose(of_x, lvl_hat.alpha * x, rtol=1e-12)
    variance = (of_eps / eps) ** 2 + (of_xi / xi) ** 2
    np.testing.assert_allclose(variance, np.broadcast_to(lvl_hat.sigma**2, variance.shape), rtol=1e-11)
    np.testing.assert_allclose(steps.churn(zero, lvl_t, lvl_hat, xi, s_noise=1.3), 1.3 * of_xi, rtol=1e-12)


def test_churn_to_the_same_level_changes_nothing():
    """Bit for bit, in float32."""
    z = images(0)
    np.testing.assert_array_equal(steps.churn(z, level(PHI_T), level(PHI_T), images(1), s_noise=1.3), z)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_renoise_counts_the_noise_that_is_there(x64, kind):
    """alpha_s (x + sqrt(u_s^2 - u_0^2) xi) with u = sigma / alpha = tan(phi)."""
    x, xi = images(0), images(1)
    lvl_s, lvl_0 = level(PHI_T, kind), level((0.05,) * 4, kind)
    expected = lvl_s.alpha * (x + np.sqrt(np.tan(PHI_T) ** 2 - np.tan(0.05) ** 2)[:, None, None, None] * xi)
    np.testing.assert_allclose(steps.renoise(x, lvl_s, lvl_0, xi), expected, rtol=0, atol=1e-11)


# -------------------------------------------------------------------------------------------------------- second order


def trigonometric(t):
    return level(jnp.pi / 2 * t)


def test_constant_denoiser_makes_all_solvers_agree(x64):
    """x_hat = x constant: DDIM, Heun and DPM-Solver++(2M) all give alpha_s x + sigma_s eps."""
    x, eps = images(0), images(1)
    t, s = jnp.full(4, 0.8), jnp.full(4, 0.3)
    lvl_p, lvl_t, lvl_s = trigonometric(jnp.full(4, 0.9)), trigonometric(t), trigonometric(s)
    z = lvl_t.alpha * x + lvl_t.sigma * eps
    expected = lvl_s.alpha * x + lvl_s.sigma * eps
    np.testing.assert_allclose(steps.ddim(x, z, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(steps.heun(lambda z, t: x, z, t, s, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(steps.dpm_solver_pp_2m(x, x, z, lvl_p, lvl_t, lvl_s), expected, rtol=0, atol=1e-12)


def test_dpm_solver_pp_2m_is_its_equation(x64):
    """D = (1 + 1 / 2r) x - x_prev / 2r, r = h_prev / h; z_s = (sigma_s / sigma_t) z_t - alpha_s (e^{-h} - 1) D."""
    lvl_p, lvl_t, lvl_s = level((1.4,) * 4), level((1.1,) * 4), level((0.5,) * 4)
    x, x_previous, z = images(0), images(1), images(2)
    half_p, half_t, half_s = (np.log(np.cos(phi) / np.sin(phi)) for phi in (1.4, 1.1, 0.5))
    r = (half_t - half_p) / (half_s - half_t)
    mixed = (1 + 1 / (2 * r)) * x - x_previous / (2 * r)
    expected = np.sin(0.5) / np.sin(1.1) * z - np.cos(0.5) * np.expm1(half_t - half_s) * mixed
    actual = steps.dpm_solver_pp_2m(x, x_previous, z, lvl_p, lvl_t, lvl_s)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


def test_heun_is_edm_algorithm_1(x64):
    """Variance exploding: x' = x + h (d + d') / 2 with d = (x - D(x)) / sigma, two evaluations."""
    sigma_t, sigma_s = 3.0, 1.25
    z, calls = images(0), []

    def denoise(z_t, t):
        calls.append(t)
        return 0.3 * z_t + jnp.sin(z_t) * t[:, None, None, None]

    lvl_t, lvl_s = (Level(jnp.ones((4, 1, 1, 1)), jnp.full((4, 1, 1, 1), sigma)) for sigma in (sigma_t, sigma_s))
    actual = steps.heun(denoise, z, jnp.full(4, 0.7), jnp.full(4, 0.4), lvl_t, lvl_s)
    z = np.asarray(z)
    slope = (z - (0.3 * z + np.sin(z) * 0.7)) / sigma_t
    euler = z + (sigma_s - sigma_t) * slope
    corrected = (euler - (0.3 * euler + np.sin(euler) * 0.4)) / sigma_s
    np.testing.assert_allclose(actual, z + (sigma_s - sigma_t) * (slope + corrected) / 2, rtol=0, atol=1e-12)
    assert len(calls) == 2


def test_heun_prediction_is_the_mean_slope(x64):
    """In y = z / alpha, u = sigma / alpha: x = y_t - u_t (d_t + d_s) / 2; DDIM with it is EDM's step, as printed."""
    t, s = jnp.array([0.9, 0.5, 0.3, 0.999]), jnp.array([0.7, 0.1, 0.29, 0.95])
    lvl_t, lvl_s, z = trigonometric(t), trigonometric(s), images(0)

    def denoise(z_t, t):
        return 0.3 * z_t + jnp.sin(z_t) * t[:, None, None, None]

    y_t, u_t, u_s = z / lvl_t.alpha, lvl_t.sigma / lvl_t.alpha, lvl_s.sigma / lvl_s.alpha
    slope_t = (y_t - denoise(z, t)) / u_t
    euler = y_t + (u_s - u_t) * slope_t
    slope = (slope_t + (euler - denoise(lvl_s.alpha * euler, s)) / u_s) / 2
    x_hat = steps.heun_prediction(denoise, z, t, s, lvl_t, lvl_s)
    np.testing.assert_allclose(x_hat, y_t - u_t * slope, rtol=1e-9, atol=1e-9)
    actual = steps.heun(denoise, z, t, s, lvl_t, lvl_s)
    np.testing.assert_allclose(actual, lvl_s.alpha * (y_t + (u_s - u_t) * slope), rtol=0, atol=1e-10)


def test_heun_to_no_noise_is_euler():
    """u_s = 0: the prediction is x_t, finite, and so is its gradient."""
    t, lvl_t, lvl_s, z = jnp.full(4, 0.3), trigonometric(jnp.full(4, 0.3)), level((0.0,) * 4), images(0)

    def denoise(z_t, t):
        return 0.3 * z_t * (1 + t)[:, None, None, None]

    x_hat = steps.heun_prediction(denoise, z, t, jnp.zeros(4), lvl_t, lvl_s)
    np.testing.assert_array_equal(x_hat, denoise(z, t))
    gradient = jax.grad(lambda a: jnp.sum(steps.heun(denoise, a * z, t, jnp.zeros(4), lvl_t, lvl_s)))(1.0)
    np.testing.assert_allclose(gradient, 0.39 * jnp.sum(z), rtol=1e-4)


def test_heun_to_the_data_is_the_euler_step(x64):
    """sigma_s = 0 gives x_hat, whatever the denoiser says there."""
    lvl_t, t = level(PHI_T), jnp.ones(4)
    actual = steps.heun(
        lambda z, time: jnp.where(time[:, None, None, None] > 0, jnp.sin(z), jnp.inf),
        images(0), t, jnp.zeros(4), lvl_t, level((0.0,) * 4),
    )
    np.testing.assert_allclose(actual, jnp.sin(images(0)), rtol=0, atol=1e-12)


def integrate(solver, num_steps):
    """Error at t = 0.01 of the probability-flow ODE of N(0, 1/4) data from the unit quantile at t = 0.99."""
    denoise = gaussian_oracle(trigonometric, 0.25)

    def std(t):
        lvl = trigonometric(t)
        return jnp.sqrt(0.25 * lvl.alpha**2 + lvl.sigma**2)

    @jax.jit
    def step(z, x_previous, previous, t, s):
        x, lvl_t, lvl_s = denoise(z, t), trigonometric(t), trigonometric(s)
        if solver == "heun":
            return steps.heun(denoise, z, t, s, lvl_t, lvl_s), x
        if solver == "dpm" and x_previous is not None:
            return steps.dpm_solver_pp_2m(x, x_previous, z, trigonometric(previous), lvl_t, lvl_s), x
        return steps.ddim(x, z, lvl_t, lvl_s), x

    times = jnp.linspace(0.99, 0.01, num_steps + 1, dtype=jnp.float64)[:, None]
    z, x, previous = std(times[0]), None, None
    for t, s in zip(times[:-1], times[1:], strict=True):
        z, x = step(z, x, previous, t, s)
        previous = t
    return float(jnp.abs(z - std(times[-1]))[0, 0, 0, 0])


@pytest.mark.parametrize("solver, order, expected", [
    ("ddim", 1, (8.4e-2, 4.4e-2, 2.2e-2, 1.1e-2)),
    ("dpm", 2, (1.1e-1, 4.2e-2, 1.1e-2, 2.7e-3)),
    ("heun", 2, (4.9e-2, 8.6e-3, 1.8e-3, 4.0e-4)),
])
def test_order_of_convergence(x64, solver, order, expected):
    """Global errors at 8, 16, 32, 64 steps, computed outside this package, fall with the order of the method."""
    errors = np.array([integrate(solver, num_steps) for num_steps in (8, 16, 32, 64)])
    np.testing.assert_allclose(errors, expected, rtol=0.05)
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.25)
