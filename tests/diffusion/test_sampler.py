"""Samplers: evaluations, times, orders of convergence, and the law of samples on Gaussian data.

Gaussian flows are linear, so that one unit quantile (z_1 = 1) carries the standard deviation without Monte-Carlo error.
With noise, each step is affine in z_t and its noise, so that mean and variance have a recursion.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import sampler, schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.types import Level

ONE = jnp.ones((1, 1, 1, 1))
Z_1 = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
KEYS = jax.random.split(jax.random.key(1), 3)


def trigonometric(t):
    phi = jnp.pi / 2 * t[:, None, None, None]
    return Level(jnp.cos(phi), jnp.sin(phi))


def counting(denoiser):
    """The denoiser and the list of times that it will have been called at."""
    times = []

    def counted(z_t, t):
        jax.debug.callback(lambda t: times.append(np.array(t)), t, ordered=True)
        return denoiser(z_t, t)

    return counted, times


SAMPLERS = {
    "ddim": sampler.sample,
    "addim": sampler.sample_addim,
    "addim literal": lambda *args, **kwargs: sampler.sample_addim(*args, **kwargs, denoise_final=False),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_evaluations(name, num_steps):
    """NFE = num_steps exactly, at t = j / num_steps for j = num_steps, ..., 1, the same for every image."""
    denoiser, times = counting(gaussian_oracle(schedule.cosine, 0.25))
    images = SAMPLERS[name](denoiser, schedule.cosine, Z_1, num_steps=num_steps)
    jax.effects_barrier()
    expected = np.arange(num_steps, 0, -1, dtype=np.float32) / np.float32(num_steps)
    np.testing.assert_array_equal(np.stack(times), np.tile(expected[:, None], (1, 3)))
    assert images.shape == Z_1.shape


def test_sample_is_its_loop():
    """Algorithm 2 written as a loop: DDIM from j / S to (j - 1) / S, the last x_hat returned."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25, 0.1)
    z = Z_1
    for j in range(5, 0, -1):
        t, s = (jnp.full(3, np.float32(index) / np.float32(5)) for index in (j, j - 1))
        x_hat = denoiser(z, t)
        z = steps.ddim(x_hat, z, schedule.cosine(t), schedule.cosine(s))
    np.testing.assert_allclose(sampler.sample(denoiser, schedule.cosine, Z_1, num_steps=5), x_hat, rtol=0, atol=1e-5)


def test_samplers_run_under_jit_and_are_deterministic():
    """The same noise gives the same images, compiled or not."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25)
    plain = sampler.sample_addim(denoiser, schedule.cosine, Z_1, num_steps=4)
    compiled = jax.jit(lambda z: sampler.sample_addim(denoiser, schedule.cosine, z, num_steps=4))(Z_1)
    np.testing.assert_allclose(compiled, plain, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(sampler.sample_addim(denoiser, schedule.cosine, Z_1, num_steps=4), plain)


def exact_student(student_steps):
    """f*(z, t) = invDDIM_{t->tau}(flow of N(0, 1/4) data from t to tau, z), tau the start of the segment (tau, t]."""

    def variance(lvl):
        return 0.25 * jnp.square(lvl.alpha) + jnp.square(lvl.sigma)

    def student(z_t, t):
        tau = (jnp.ceil(t * student_steps) - 1) / student_steps
        lvl_t, lvl_tau = trigonometric(t), trigonometric(tau)
        flow = z_t * jnp.sqrt(variance(lvl_tau) / variance(lvl_t))
        return steps.inv_ddim(flow, z_t, lvl_t, lvl_tau)

    return student


@pytest.mark.parametrize("student_steps", [1, 2, 4, 8])
def test_exact_student_samples_exactly(student_steps):
    """Algorithm 2 with the exact multistep consistency function gives the flow's x = z_1 / 2 for any S."""
    actual = sampler.sample(exact_student(student_steps), trigonometric, Z_1, num_steps=student_steps)
    np.testing.assert_allclose(actual, Z_1 / 2, rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_steps, ddim, addim", [
    (1, 0.0, 0.500), (2, 0.200, 0.671), (4, 0.334, 0.722), (8, 0.411, 0.710), (16, 0.454, 0.678), (64, 0.488, 0.610),
])
def test_standard_deviation_on_full_rank_data(num_steps, ddim, addim):
    """Isotropic N(0, 1/4): DDIM comes out too narrow; aDDIM too wide, since x_hat is parallel to eps_hat here."""
    denoiser = gaussian_oracle(trigonometric, 0.25)

    def x_var(lvl_t):
        return (0.25 * lvl_t.sigma**2 / (0.25 * lvl_t.alpha**2 + lvl_t.sigma**2))[:, 0, 0, 0]

    std = sampler.sample(denoiser, trigonometric, ONE, num_steps=num_steps)
    assert float(std[0, 0, 0, 0]) == pytest.approx(ddim, abs=6e-4)
    std = sampler.sample_addim(
        denoiser, trigonometric, ONE, num_steps=num_steps, x_var=x_var, denoise_final=False
    )
    assert float(std[0, 0, 0, 0]) == pytest.approx(addim, abs=6e-4)


@pytest.mark.parametrize("num_steps, exact, analytic", [
    (2, 0.508, 0.353), (4, 0.466, 0.407), (8, 0.466, 0.443), (16, 0.478, 0.470),
])
def test_standard_deviation_on_low_rank_data(num_steps, exact, analytic):
    """Gaussian data of rank d / 4, true rms 1/2: DDIM gives cos(pi / 2n)^n / 2, aDDIM closes most of the gap."""
    z_1 = jnp.ones((1, 2, 2, 1))
    denoiser = gaussian_oracle(trigonometric, jnp.zeros((2, 2, 1)).at[0, 0, 0].set(1.0))

    def x_var(lvl_t):
        return (0.25 * lvl_t.sigma**2)[:, 0, 0, 0]  # a quarter of the scalars has posterior variance sigma^2

    def rms(images):
        return float(jnp.sqrt(jnp.mean(jnp.square(images))))

    def addim(x_var):
        return rms(sampler.sample_addim(
            denoiser, trigonometric, z_1, num_steps=num_steps, x_var=x_var, denoise_final=False
        ))

    ddim = np.cos(np.pi / 2 / num_steps) ** num_steps / 2
    assert rms(sampler.sample(denoiser, trigonometric, z_1, num_steps=num_steps)) == pytest.approx(ddim, abs=1e-5)
    # The numbers of aDDIM are a Monte-Carlo estimate from outside this package, good to a unit of the last digit.
    assert addim(x_var) == pytest.approx(exact, abs=1.5e-3)
    assert addim(None) == pytest.approx(analytic, abs=1.5e-3)


def test_addim_without_variance_is_ddim():
    """x_var = 0 samples what plain DDIM samples."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25, 0.1)
    expected = sampler.sample(denoiser, schedule.cosine, Z_1, num_steps=4)
    actual = sampler.sample_addim(denoiser, schedule.cosine, Z_1, num_steps=4, x_var=jnp.zeros(4))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("denoise_final", [True, False])
def test_table_of_variances_equals_the_function(denoise_final):
    """One number per step, noisiest first, against the function that made it; None is 0.1 / (2 + SNR)."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25, 0.1)
    table = steps.analytic_x_var(schedule.cosine(jnp.array([1.0, 0.75, 0.5, 0.25])))
    by_function, by_table, by_host_table, by_default = (
        sampler.sample_addim(denoiser, schedule.cosine, Z_1, num_steps=4, x_var=x_var, denoise_final=denoise_final)
        for x_var in (steps.analytic_x_var, table, np.asarray(table), None)
    )
    np.testing.assert_allclose(by_table, by_function, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(by_host_table, by_table)
    np.testing.assert_array_equal(by_default, by_function)


def test_final_step_denoised_or_literal():
    """One step: x_hat itself, or the aDDIM step to t = 0, which adds noise of rms about sqrt(x_var)."""
    denoiser = gaussian_oracle(schedule.cosine, 0.25, 0.1)
    t, s = jnp.ones(3), jnp.zeros(3)
    lvl_t, lvl_s, x_hat = schedule.cosine(t), schedule.cosine(s), denoiser(Z_1, t)
    x_var = jnp.full(1, 0.09)
    denoised, literal = (
        sampler.sample_addim(denoiser, schedule.cosine, Z_1, num_steps=1, x_var=x_var, denoise_final=final)
        for final in (True, False)
    )
    np.testing.assert_allclose(denoised, x_hat, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        literal, steps.addim(x_hat, jnp.full(3, 0.09), Z_1, lvl_t, lvl_s), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(jnp.sqrt(jnp.mean((literal - x_hat) ** 2, axis=(1, 2, 3))), 0.3, rtol=5e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [0, -3])
def test_too_few_steps(name, num_steps):
    """At least one step, and the message has the number."""
    with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
        SAMPLERS[name](gaussian_oracle(schedule.cosine, 0.25), schedule.cosine, Z_1, num_steps=num_steps)


def test_table_of_the_wrong_length():
    """A table that is not one number per step raises."""
    with pytest.raises(ValueError, match="4 steps"):
        sampler.sample_addim(
            gaussian_oracle(schedule.cosine, 0.25), schedule.cosine, Z_1, num_steps=4, x_var=jnp.zeros(3)
        )


# --------------------------------------------------------------------------------------------------- all, on any times


def churned(denoiser, schedule_, z_1, keys, *, times):
    raised = sampler.churned_times(schedule_, times, s_churn=3.0, s_min=0.05, s_max=50.0)
    return sampler.churned_heun(denoiser, schedule_, z_1, keys, times=times, raised=raised, s_noise=1.003)


WITHOUT_NOISE = {
    "ddim": sampler.ddim,
    "addim": sampler.addim,
    "heun": sampler.heun,
    "dpm_solver_pp_2m": sampler.dpm_solver_pp_2m,
}
WITH_NOISE = {
    "stochastic_ddim": functools.partial(sampler.stochastic_ddim, eta=0.5),
    "ancestral": sampler.ancestral,
    "noisy_ddim": sampler.noisy_ddim,
    "churned_heun": churned,
    "consistency": sampler.consistency,
}
ALL = WITHOUT_NOISE | WITH_NOISE


def vp_karras(t):
    """The levels of `schedule.karras`, rescaled to preserve the variance."""
    return schedule.level_from_logsnr(schedule.karras(t).logsnr[:, 0, 0, 0])


def denoiser_of_a_network(schedule_):
    """A network of the scaled input and the log-SNR, which knows nothing of the scale of z."""

    def denoiser(z_t, t):
        alpha, sigma = lvl_t = schedule_(t)
        scaled, gate = z_t / jnp.hypot(alpha, sigma), jax.nn.sigmoid(lvl_t.logsnr / 4)
        return jnp.tanh(1.5 * scaled + 0.3) * (0.2 + 0.7 * gate) - 0.1 * jnp.flip(scaled, 1)

    return denoiser


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grid", ["uniform", "karras"])
def test_exploding_and_preserved_variance_give_the_same_images(name, grid):
    """One network, the same signal-to-noise ratios, z 1 or 80 wide at the start: the same images."""
    images = []
    for schedule_ in (schedule.karras, vp_karras):
        times = sampler.uniform_times(5) if grid == "uniform" else sampler.karras_times(schedule_, 5, sigma_min=0.01)
        images.append(ALL[name](denoiser_of_a_network(schedule_), schedule_, Z_1, KEYS, times=times))
    np.testing.assert_allclose(*images, rtol=0, atol=1e-4)
    assert np.std(images[0]) > 0.05


@pytest.mark.parametrize("name", ALL)
def test_images_do_not_see_their_batch_mates(name):
    """Another order and other mates change nothing; each image has the noise of its own key."""
    run = functools.partial(
        ALL[name], denoiser_of_a_network(schedule.cosine), schedule.cosine, times=sampler.uniform_times(4)
    )
    together, order = run(Z_1, KEYS), jnp.array([2, 0])
    np.testing.assert_allclose(run(Z_1[order], KEYS[order]), together[order], rtol=0, atol=1e-5)
    same_start = run(jnp.broadcast_to(Z_1[:1], Z_1.shape), KEYS)
    differs = np.abs(same_start[1] - same_start[2]).max() > 0.02
    assert differs == (name in WITH_NOISE)


@pytest.mark.parametrize("name", WITH_NOISE)
def test_noise_of_every_step_is_new(name):
    """A denoiser that gives 0 leaves the noise; the correlation of what two steps add is that of 4,096 draws."""
    seen = []

    def denoiser(z_t, t):
        jax.debug.callback(lambda z: seen.append(np.array(z)), z_t, ordered=True)
        return jnp.zeros_like(z_t)

    z_1 = jax.random.normal(jax.random.key(5), (1, 64, 64, 1))
    times = sampler.karras_times(schedule.karras, 5, sigma_min=1.0, sigma_max=20.0)
    ALL[name](denoiser, schedule.karras, z_1, KEYS[:1], times=times)
    jax.effects_barrier()
    seen = seen[::2] if name == "churned_heun" else seen
    added = []
    for z_t, z_s in zip(seen[:-1], seen[1:], strict=True):
        rest = z_s - z_t * (np.vdot(z_s, z_t) / np.vdot(z_t, z_t))
        added.append(rest.ravel() / np.linalg.norm(rest))
    overlap = np.stack(added) @ np.stack(added).T - np.eye(len(added))
    assert len(added) >= 3 and np.abs(overlap).max() < 5 / 64


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"churned_heun"}))  # which has added noise
def test_one_time_is_the_denoiser(name):
    """One step returns x_hat of sigma(t) z_1 at that time, with the variance that the level has."""
    for schedule_ in (schedule.karras, schedule.cosine):
        denoiser, t = denoiser_of_a_network(schedule_), np.float32([0.9])
        expected = denoiser(schedule_(jnp.full(3, t)).sigma * Z_1, jnp.full(3, t))
        np.testing.assert_allclose(ALL[name](denoiser, schedule_, Z_1, KEYS, times=t), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_impossible_times(name):
    """Times fall from at most 1 to at least 0."""
    for times in ([0.5, 0.5], [0.2, 0.5], [1.5, 0.5], [0.5, -0.1], []):
        with pytest.raises(ValueError, match="expected times in .0, 1., each below the one before it"):
            ALL[name](
                gaussian_oracle(schedule.cosine, 0.25), schedule.cosine, Z_1, KEYS, times=np.asarray(times, np.float32)
            )


# ---------------------------------------------------------------------------------------------------------- exact flows


def flow(schedule_, times):
    """x_hat of the oracle at the last time on the exact path of the unit quantile of N(0, 1/4) data."""
    (alpha, sigma) = (np.asarray(a, np.float64)[:, 0, 0, 0] for a in schedule_(jnp.asarray(times)))
    std = np.sqrt(0.25 * alpha**2 + sigma**2)
    return sigma[0] / std[0] * std[-1] * 0.25 * alpha[-1] / std[-1] ** 2


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpm_solver_pp_2m", 2)])
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_order_of_convergence_on_the_karras_grid(name, order, kind):
    """The error at sigma = 0.02 of 16, 32 and 64 steps from sigma = 80 falls with the order of the method."""
    schedule_ = {"vp": schedule.cosine, "ve": schedule.karras}[kind]
    errors = []
    for num_steps in (16, 32, 64):
        times = sampler.karras_times(schedule_, num_steps, sigma_min=0.02)
        x_hat = ALL[name](gaussian_oracle(schedule_, 0.25), schedule_, ONE, KEYS[:1], times=times)
        errors.append(abs(float(x_hat[0, 0, 0, 0]) - flow(schedule_, times)))
    assert np.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.25), errors
    assert errors[0] < 0.1


@pytest.mark.parametrize("name, expected", [
    ("ddim", (8.4e-2, 4.4e-2, 2.2e-2, 1.1e-2)),
    ("dpm_solver_pp_2m", (1.1e-1, 4.2e-2, 1.1e-2, 2.7e-3)),
    ("heun", (4.9e-2, 8.6e-3, 1.8e-3, 4.0e-4)),
])
def test_errors_on_uniform_times(name, expected):
    """z at t = 0.01 from the unit quantile at t = 0.99, against errors computed outside this package."""
    errors = []
    for num_steps in (8, 16, 32, 64):
        times = np.linspace(0.99, 0.01, num_steps + 1, dtype=np.float32)
        first, last = (trigonometric(jnp.full(1, t)) for t in (times[0], times[-1]))
        std_first, std_last = (jnp.sqrt(0.25 * lvl.alpha**2 + lvl.sigma**2) for lvl in (first, last))
        x_hat = ALL[name](
            gaussian_oracle(trigonometric, 0.25), trigonometric, std_first / first.sigma, KEYS[:1], times=times
        )
        z = x_hat * std_last**2 / (0.25 * last.alpha)
        errors.append(float(jnp.abs(z - std_last)[0, 0, 0, 0]))
    np.testing.assert_allclose(errors, expected, rtol=0.06)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp_2m"])
def test_a_constant_denoiser_is_reached_from_anywhere(name):
    """x_hat = x: the last evaluation is at alpha x + sigma z_1, whatever the times."""
    seen, x = [], jnp.full(Z_1.shape, 0.4)

    def denoiser(z_t, t):
        jax.debug.callback(lambda z: seen.append(np.array(z)), z_t, ordered=True)
        return x

    times = np.float32([1.0, 0.8, 0.3, 0.1])
    images = ALL[name](denoiser, schedule.cosine, Z_1, KEYS, times=times)
    jax.effects_barrier()
    lvl, start = schedule.cosine(jnp.full(3, times[-1])), schedule.cosine(jnp.ones(3))
    eps = (start.sigma * Z_1 - start.alpha * x) / start.sigma
    np.testing.assert_allclose(seen[-1], lvl.alpha * x + lvl.sigma * eps, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(images, x)


def test_heun_keeps_its_digits_where_alpha_is_small(x64):
    """At the noisy end z / alpha is 22,000; in float32 four steps are good to 1e-5."""
    schedule_ = functools.partial(schedule.cosine, logsnr_min=-20.0, logsnr_max=20.0)
    images = [
        sampler.heun(denoiser_of_a_network(schedule_), schedule_, Z_1.astype(dtype), times=times)
        for dtype, times in ((jnp.float32, sampler.uniform_times(4)), (jnp.float64, np.float64([1, 0.75, 0.5, 0.25])))
    ]
    assert [array.dtype for array in images] == [jnp.float32, jnp.float64]
    np.testing.assert_allclose(*images, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ in law

_MEAN, _VARIANCE = 0.3, 0.2


def _x_hat(z, level):
    """E[x | z] of N(0.3, 0.2) data."""
    alpha, sigma = level
    return _MEAN + alpha * _VARIANCE / (alpha**2 * _VARIANCE + sigma**2) * (z - alpha * _MEAN)


def _ddim(z, x, at, to):
    return to[0] * x + to[1] * (z - at[0] * x) / at[1]


def _reference_stochastic_ddim(z, xi, at, to, eta=0.6):
    x = _x_hat(z, at)
    c = 1 - (at[0] / at[1]) ** 2 / (to[0] / to[1]) ** 2
    std = eta * to[1] * np.sqrt(c)
    return to[0] * x + np.sqrt(to[1] ** 2 - std**2) * (z - at[0] * x) / at[1] + std * xi


def _reference_ancestral(z, xi, at, to, mix=0.0):
    """By Bayes: q(z_s | z_t, x) of q(z_s | x) and q(z_t | z_s)."""
    ratio = at[0] / to[0]
    added = at[1] ** 2 - ratio**2 * to[1] ** 2
    small = 1 / (1 / to[1] ** 2 + ratio**2 / added)
    mean = small * (ratio * z / added + to[0] * _x_hat(z, at) / to[1] ** 2)
    return mean + np.sqrt(small ** (1 - mix) * added**mix) * xi


def _reference_noisy_ddim(z, xi, at, to):
    x = _x_hat(z, at) + np.sqrt(0.1 / (2 + (at[0] / at[1]) ** 2)) * xi
    return _ddim(z, x, at, to)


def _reference_consistency(z, xi, at, to):
    u_0 = 0.002  # of schedule.karras
    return to[0] * (_x_hat(z, at) + np.sqrt((to[1] / to[0]) ** 2 - u_0**2) * xi)


LAWS = {
    "eta 0.6": (functools.partial(sampler.stochastic_ddim, eta=0.6), _reference_stochastic_ddim),
    "small": (sampler.ancestral, _reference_ancestral),
    "large": (
        functools.partial(sampler.ancestral, log_variance_mix=1.0),
        functools.partial(_reference_ancestral, mix=1.0),
    ),
    "mixed": (
        functools.partial(sampler.ancestral, log_variance_mix=0.2),
        functools.partial(_reference_ancestral, mix=0.2),
    ),
    "noisy": (sampler.noisy_ddim, _reference_noisy_ddim),
    "consistency": (sampler.consistency, _reference_consistency),
}


def assert_law(images, mean, variance):
    """Mean and variance of normal scalars within five standard errors."""
    values = np.asarray(images, np.float64).ravel()
    assert abs(values.mean() - mean) < 5 * np.sqrt(variance / values.size)
    assert abs(values.var() - variance) < 5 * variance * np.sqrt(2 / values.size)


def many(count=10):
    """1e5 scalars of noise in ten images, and their keys."""
    return jax.random.normal(jax.random.key(7), (count, 100, 100, 1)), jax.random.split(jax.random.key(8), count)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_law_of_samplers_with_noise(name, kind):
    """1e5 samples against the recursion of mean and variance through the affine steps, in NumPy's float64."""
    run, reference = LAWS[name]
    schedule_ = {"vp": vp_karras, "ve": schedule.karras}[kind]
    times = np.float32([0.9, 0.7, 0.5, 0.2])
    alpha, sigma = (np.asarray(a, np.float64)[:, 0, 0, 0] for a in schedule_(jnp.asarray(times)))
    mean, variance = 0.0, sigma[0] ** 2
    for i in range(3):
        step = functools.partial(reference, at=(alpha[i], sigma[i]), to=(alpha[i + 1], sigma[i + 1]))
        of_z, of_xi = step(1.0, 0.0) - step(0.0, 0.0), step(0.0, 1.0) - step(0.0, 0.0)
        mean, variance = step(mean, 0.0), of_z**2 * variance + of_xi**2
    last = alpha[3], sigma[3]
    mean, variance = _x_hat(mean, last), (_x_hat(1.0, last) - _x_hat(0.0, last)) ** 2 * variance
    z_1, keys = many()
    images = run(gaussian_oracle(schedule_, _VARIANCE, _MEAN), schedule_, z_1, keys, times=times)
    assert_law(images, mean, variance)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_law_of_churned_heun(kind):
    """EDM's Algorithm 2 written in (z / alpha, sigma / alpha), as a recursion of mean and variance."""
    schedule_ = {"vp": vp_karras, "ve": schedule.karras}[kind]
    times = np.float32([0.9, 0.7, 0.5, 0.35])
    sigma = np.asarray(schedule.karras(jnp.asarray(times)).sigma, np.float64)[:, 0, 0, 0]
    s_noise, gamma = 1.2, 0.3
    raised = sampler.churned_times(schedule_, times, s_churn=1.2, s_min=0.5, s_max=30.0)

    def step(y, xi, at, to, euler):
        hat = at * (1 + gamma) if 0.5 <= at <= 30 else at
        y = y + np.sqrt(hat**2 - at**2) * s_noise * xi
        slope = (y - _x_hat(y, (1.0, hat))) / hat
        end = y + (to - hat) * slope
        if euler:
            return end
        return y + (to - hat) * (slope + (end - _x_hat(end, (1.0, to))) / to) / 2

    mean, variance, inside = 0.0, sigma[0] ** 2, 0
    for i in range(4):
        inside += 0.5 <= sigma[i] <= 30
        last = i == 3
        take = functools.partial(step, at=sigma[i], to=0.0 if last else sigma[i + 1], euler=last)
        of_y, of_xi = take(1.0, 0.0) - take(0.0, 0.0), take(0.0, 1.0) - take(0.0, 0.0)
        mean, variance = take(mean, 0.0), of_y**2 * variance + of_xi**2
    assert 0 < inside < 4 and 0.5 <= sigma[3]  # some are churned, the last among them
    z_1, keys = many()
    # A preserved variance is that of y times alpha, at the start too.
    images = sampler.churned_heun(
        gaussian_oracle(schedule_, _VARIANCE, _MEAN), schedule_, z_1, keys, times=times, raised=raised, s_noise=s_noise
    )
    assert_law(images, mean, variance)


def test_an_exact_consistency_function_keeps_the_law():
    """f*(z, sigma) = z sqrt((v + s^2) / (v + sigma^2)), s the least noise: variance v + s^2 after any re-noising."""
    schedule_ = functools.partial(schedule.karras, sigma_min=0.4)

    def exact(z_t, t):
        return z_t * jnp.sqrt((0.25 + 0.4**2) / (0.25 + schedule_(t).sigma ** 2))

    z_1, keys = many()
    for times in ([1.0], [1.0, 0.6], [1.0, 0.5, 0.3, 0.1]):
        images = sampler.consistency(exact, schedule_, z_1, keys, times=np.float32(times))
        assert_law(images, 0.0, 0.25 + 0.4**2)


def test_all_noise_renewed_is_ancestral():
    """eta = 1 with the noise of the same keys is ancestral sampling with the small variance; eta = 0 is DDIM."""
    denoiser, times = denoiser_of_a_network(schedule.cosine), sampler.uniform_times(6)
    run = functools.partial(sampler.stochastic_ddim, denoiser, schedule.cosine, Z_1, KEYS, times=times)
    ancestral = sampler.ancestral(denoiser, schedule.cosine, Z_1, KEYS, times=times)
    np.testing.assert_allclose(run(eta=1.0), ancestral, rtol=0, atol=1e-5)
    ddim = sampler.ddim(denoiser, schedule.cosine, Z_1, times=times)
    np.testing.assert_allclose(run(eta=0.0), ddim, rtol=0, atol=1e-6)
    assert np.abs(ancestral - ddim).max() > 0.1


def test_without_churn_it_is_heun():
    """Nothing raised, nothing added."""
    denoiser, times = denoiser_of_a_network(schedule.cosine), sampler.uniform_times(4)
    raised = sampler.churned_times(schedule.cosine, times, s_churn=0.0, s_min=0.0, s_max=np.inf)
    np.testing.assert_array_equal(raised, times)
    actual = sampler.churned_heun(denoiser, schedule.cosine, Z_1, KEYS, times=times, raised=raised)
    np.testing.assert_allclose(
        actual, sampler.heun(denoiser, schedule.cosine, Z_1, times=times), rtol=0, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------------------- times


def sigmas_of(schedule_, times):
    return np.exp(-0.5 * np.asarray(schedule_(jnp.asarray(times)).logsnr, np.float64)[:, 0, 0, 0])


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_karras_times_are_edm_s_noise_levels(kind):
    """Eleven levels as published; a preserved variance has them to the spacing of t."""
    schedule_ = {"vp": schedule.cosine, "ve": schedule.karras}[kind]
    expected = [80, 45.3137, 24.4083, 12.3816, 5.8389, 2.5152, 0.9654, 0.3183, 0.0851, 0.0167, 0.002]
    times = sampler.karras_times(schedule_, 11)
    assert times.dtype == np.float32 and np.all(np.diff(times) < 0)
    np.testing.assert_allclose(sigmas_of(schedule_, times), expected, rtol=3e-3)
    np.testing.assert_allclose(sigmas_of(schedule_, sampler.karras_times(schedule_, 1)), [80], rtol=1e-4)
    if kind == "ve":
        np.testing.assert_allclose(times, np.linspace(1, 0, 11), rtol=0, atol=1e-6)
        assert times[0] == 1 and times[-1] == 0


def test_karras_times_are_cut_to_the_schedule():
    """What the schedule does not have is left out, and the grid lies between its ends; all steps remain."""
    for schedule_ in (schedule.cosine, functools.partial(schedule.cosine, shift=2.0)):
        times = sampler.karras_times(schedule_, 64, sigma_min=1e-9, sigma_max=1e9)
        assert len(times) == 64 and times[0] == 1 and times[-1] == 0 and np.all(np.diff(times) < 0)
        root = sigmas_of(schedule_, times) ** (1 / 7)
        np.testing.assert_allclose(np.diff(root), (root[-1] - root[0]) / 63, rtol=2e-2)
    with pytest.raises(ValueError, match="sigma_min=2000 .*, expected a range that meets .* 0.0005531 to 1808"):
        sampler.karras_times(schedule.cosine, 4, sigma_min=2000.0, sigma_max=3000.0)
    for num_steps in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            sampler.karras_times(schedule.cosine, num_steps)


def test_uniform_times_are_exact():
    """The quotients of whole numbers, from 1 on."""
    for num_steps in (1, 3, 7, 1000):
        times = sampler.uniform_times(num_steps)
        np.testing.assert_array_equal(times, np.float32(np.arange(num_steps, 0, -1)) / np.float32(num_steps))
        assert times[0] == 1 and times.dtype == np.float32


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_churn_raises_the_noise_between_its_bounds(kind):
    """gamma = min(s_churn / n, sqrt(2) - 1); untouched below s_min and above s_max; never beyond the schedule."""
    schedule_ = {"vp": schedule.cosine, "ve": schedule.karras}[kind]
    times = sampler.karras_times(schedule_, 18)
    sigma = sigmas_of(schedule_, times)
    inside = (sigma >= 0.05) & (sigma <= 50)
    for s_churn, gamma in ((1.8, 0.1), (40.0, np.sqrt(2) - 1)):
        raised = sampler.churned_times(schedule_, times, s_churn=s_churn, s_min=0.05, s_max=50.0)
        np.testing.assert_array_equal(raised[~inside], times[~inside])
        np.testing.assert_allclose(sigmas_of(schedule_, raised)[inside] / sigma[inside], 1 + gamma, rtol=1e-4)
    assert 0 < inside.sum() < 18
    unbounded = sampler.churned_times(schedule.karras, times, s_churn=40.0, s_min=0.0, s_max=np.inf)
    assert np.all(unbounded <= 1)
