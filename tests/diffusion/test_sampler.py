"""Samplers: evaluations, times, and the standard deviations of samples on Gaussian data.

Gaussian flows are linear, so that one unit quantile (z_1 = 1) carries the standard deviation without Monte-Carlo error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.diffusion import sampler, schedule, steps
from mscm.diffusion.denoiser import gaussian_oracle
from mscm.types import Level

ONE = jnp.ones((1, 1, 1, 1))
Z_1 = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


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
