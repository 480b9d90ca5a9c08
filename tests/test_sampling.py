"""Samplers as texts: what may be written, how it is printed, and that the NFE is the number of calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.config import ConfigError
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion import sampler, schedule
from mscm.sampling import SamplerSpec, own_steps

Z_1 = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
KEYS = jax.random.split(jax.random.key(1), 2)

TEXTS = (
    "ddim", "ddim:eta=0.5", "addim", "noisy_ddim", "ancestral", "ancestral:variance=large", "ancestral:variance=0.2",
    "heun", "heun:s_churn=40,s_min=0.05,s_max=50,s_noise=1.003", "dpm_solver_pp_2m",
)


def images_of(spec, schedule_, denoiser):
    return spec.plan(schedule_).sample(spec.clip(denoiser), schedule_, Z_1, KEYS)


def with_option(text, option):
    return f"{text}{',' if ':' in text else ':'}{option}"


def oracle(schedule_):
    return denoisers.gaussian_oracle(schedule_, 0.25, 0.1)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("grid, schedule_", [("uniform", schedule.karras), ("karras", schedule.cosine)])
def test_evaluations_are_counted_exactly(text, grid, schedule_):
    """NFE is the number of calls of the denoiser, at the times of the plan: n, and 2n - 1 with Heun."""
    spec = SamplerSpec(with_option(text, f"grid={grid}"), 3)
    times, inner = [], oracle(schedule_)

    def denoiser(z_t, t):
        jax.debug.callback(lambda t: times.append(np.array(t)), t, ordered=True)
        return inner(z_t, t)

    images = images_of(spec, schedule_, denoiser)
    jax.effects_barrier()
    assert np.all(np.isfinite(images))
    nfe = 5 if spec.name == "heun" else 3
    assert len(times) == nfe == spec.num_evaluations(schedule_)
    np.testing.assert_array_equal(np.stack(times), np.tile(spec.plan(schedule_).evaluated[:, None], (1, 2)))
    if spec.name != "heun":
        grids = {"uniform": sampler.uniform_times(3), "karras": sampler.karras_times(schedule_, 3)}
        np.testing.assert_array_equal(np.stack(times)[:, 0], grids[grid])
    assert SamplerSpec(spec.sampler, 1).num_evaluations(schedule_) == 1
    assert spec.num_evaluations(schedule_, guided=True) == 2 * nfe


@pytest.mark.parametrize("text, expected", [
    ("ddim:guidance=0.5", 8),
    ("ddim:guidance=0.5,guidance_low=0", 6),  # t = 1/2, where the log-SNR is 0, is inside
    ("ddim:guidance=0.5,guidance_high=0", 7),
    ("ddim:guidance=0.5,guidance_low=-1,guidance_high=1", 5),
    ("heun:guidance=0.5,guidance_low=-1,guidance_high=1", 7 + 2),  # each time but the first is asked twice
    ("heun:s_churn=4,guidance=0.5,guidance_low=-0.5,guidance_high=0.5", 7 + 1),  # after churning it is outside
    ("heun:grid=karras,guidance=0.5,guidance_low=-3,guidance_high=3", None),
    ("ancestral:guidance=0.5,guidance_low=-5,guidance_high=0.5,clip=static", None),
    ("addim:guidance=0.5,clip=dynamic", 8),
])
def test_guided_evaluations_are_counted_exactly(text, expected):
    """NFE is the number of images that the network sees, by that of the batch."""
    spec, sizes = SamplerSpec(text, 4), []

    def network(z_t, logsnr, labels):
        jax.debug.callback(lambda z: sizes.append(len(z)), z_t)
        return 0.1 * z_t * (1 + labels)[:, None, None, None]

    guided = denoisers.make_guided(
        network, schedule.cosine, denoisers.PREDICTIONS["v"], condition=jnp.array([0, 1]), null=jnp.array([2, 2]),
        guidance=spec.guidance, interval=spec.guided_times(schedule.cosine),
    )
    images = images_of(spec, schedule.cosine, lambda z_t, t: guided(z_t, t).x_hat)
    jax.effects_barrier()
    assert np.all(np.isfinite(images)) and ("clip" not in text or np.abs(images).max() <= 1)
    assert sum(sizes) == 2 * spec.num_evaluations(schedule.cosine)
    assert expected in (None, spec.num_evaluations(schedule.cosine))


@pytest.mark.parametrize("text, expected", [
    ("ddim", "ddim"),
    ("ddim:eta=0.0", "ddim"),
    ("ddim:eta=1.0,grid=uniform", "ddim:eta=1"),
    ("ddim:clip=static,eta=.5", "ddim:eta=0.5,clip=static"),
    ("ancestral:variance=0", "ancestral"),
    ("ancestral:variance=small", "ancestral"),
    ("ancestral:variance=1", "ancestral:variance=large"),
    ("ancestral:variance=0.20", "ancestral:variance=0.2"),
    ("heun:s_churn=40.0,grid=karras,sigma_max=80,s_max=inf", "heun:s_churn=40,grid=karras"),
    ("consistency:sigmas=2.50/0.821", "consistency:sigmas=2.5/0.821"),
    ("heun:grid=karras,rho=1e1", "heun:grid=karras,rho=10"),
    ("addim:guidance=0.1234567890123", "addim:guidance=0.1234567890123"),
])
def test_a_text_is_printed_in_one_way(text, expected):
    """Defaults are left out, options have an order; what is printed is read as the same."""
    num_steps = own_steps(text) or 3
    spec = SamplerSpec(text, num_steps)
    assert spec.sampler == expected
    assert spec == SamplerSpec(expected, num_steps) and hash(spec) == hash(SamplerSpec(expected, num_steps))
    assert str(spec) == f"{expected} {num_steps} steps"


@pytest.mark.parametrize("text, sentence", [
    ("heum", "got sampler 'heum' .did you mean 'heun'.., expected one of ddim, addim, noisy_ddim, ancestral, heun"),
    ("", "got sampler ''"),
    ("heun:s_chrun=4", "'heun:s_chrun=4': got option 's_chrun' .did you mean 's_churn'.., expected one of s_churn"),
    ("addim:eta=1", "got option 'eta', expected one of grid, sigma_min"),
    ("ddim:eta", "got 'eta', expected each option once, as option=value"),
    ("ddim:", "got '', expected each option once"),
    ("ddim:eta=1,eta=0", "got 'eta=0', expected each option once"),
    ("ddim:eta=1.5", "got eta=1.5, expected a number from 0 to 1$"),
    ("ddim:eta=nan", "got eta=nan, expected a number"),
    ("ddim:eta=much", "got eta=much, expected a number"),
    ("ddim:guidance=inf", "got guidance=inf, expected a number from 0$"),
    ("ddim:guidance=-1", "got guidance=-1, expected a number from 0$"),
    ("ancestral:variance=tiny", "got variance=tiny, expected small, large, or a number from 0 to 1 between them"),
    ("ancestral:variance=2", "got variance=2, expected small, large"),
    ("ddim:grid=cosine", "got grid=cosine, expected one of uniform, karras"),
    ("ddim:clip=yes", "got clip=yes, expected one of none, static, dynamic"),
    ("ddim:sigma_max=10", "got sigma_max without grid, expected both or neither"),
    ("heun:s_noise=1.003", "got s_noise without s_churn"),
    ("ddim:guidance_low=0", "got guidance_low without guidance"),
    ("ddim:grid=karras,sigma_min=0", "got sigma_min=0, expected a number above 0"),
    ("ddim:grid=karras,sigma_min=90", "got sigma_min that is not below sigma_max"),
    ("heun:s_churn=1,s_min=2,s_max=1", "got s_min that is not below s_max"),
    ("ddim:guidance=1,guidance_low=1,guidance_high=1", "got guidance_low that is not below guidance_high"),
    ("consistency:sigmas=0.8/2.5", "got sigmas=0.8/2.5, expected falling numbers above 0, such as 2.5/0.8"),
    ("consistency:sigmas=2.5/0", "got sigmas=2.5/0, expected falling"),
    ("consistency:grid=karras", "got option 'grid'"),
])
def test_what_cannot_be_is_one_sentence(text, sentence):
    """What was got, what was expected."""
    with pytest.raises(ConfigError, match=sentence):
        SamplerSpec(text, 3)


def test_what_a_schedule_does_not_have_is_one_sentence():
    """Noise levels and intervals of guidance outside of it."""
    for text, sentence in (
        ("ddim:grid=karras,sigma_min=90,sigma_max=99", "'ddim:.*': got sigma_min=90 and sigma_max=99, expected a"),
        ("ddim:guidance=1,guidance_low=20", "without any log-SNR of the schedule, -8.764 to 12.43"),
        ("ddim:guidance=1,guidance_high=-9", "without any log-SNR"),
        ("consistency:sigmas=90", "'consistency:sigmas=90': got sigmas beyond the schedule, expected .* 0.002 to 80"),
        ("consistency:sigmas=0.001", "got sigmas beyond the schedule"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            SamplerSpec(text, own_steps(text) or 3).num_evaluations(schedule.karras)


def test_numbers_of_steps():
    """At least one; that of a consistency sampler is decided by its noise levels."""
    with pytest.raises(ConfigError, match="num_steps: got 0, expected at least 1"):
        SamplerSpec("ddim", 0)
    assert own_steps("consistency") == 1 and own_steps("consistency:sigmas=3/1") == 3 and own_steps("ddim") is None
    with pytest.raises(ConfigError, match="num_steps: got 2, expected 3 for 'consistency:sigmas=3/1'"):
        SamplerSpec("consistency:sigmas=3/1", 2)
    assert (str(SamplerSpec("ddim", 1)), str(SamplerSpec("ddim:eta=1", 2))) == ("ddim 1 step", "ddim:eta=1 2 steps")


def test_rows_and_file_names():
    """A row has the number of steps where it is not the NFE; a file name has no letter that a disk may refuse."""
    assert SamplerSpec.of_row({"sampler": "addim", "nfe": 4}) == SamplerSpec("addim", 4)
    assert SamplerSpec.of_row({"sampler": "heun", "nfe": 7, "num_steps": 4}) == SamplerSpec("heun", 4)
    assert SamplerSpec("addim", 2).file_name == "addim_2"
    assert SamplerSpec("consistency:sigmas=2.5/0.8", 3).file_name == "consistency-sigmas-2.5-0.8_3"


@pytest.mark.parametrize("text, function", [
    ("ddim", sampler.ddim),
    ("ddim:eta=0.5", lambda *a, times: sampler.stochastic_ddim(*a, times=times, eta=0.5)),
    ("addim", sampler.addim),
    ("noisy_ddim", sampler.noisy_ddim),
    ("ancestral", sampler.ancestral),
    ("ancestral:variance=large", lambda *a, times: sampler.ancestral(*a, times=times, log_variance_mix=1.0)),
    ("ancestral:variance=0.2", lambda *a, times: sampler.ancestral(*a, times=times, log_variance_mix=0.2)),
    ("heun", sampler.heun),
    ("heun:s_churn=1,s_min=0.05,s_max=50,s_noise=1.1", lambda *a, times: sampler.churned_heun(
        *a, times=times, s_noise=1.1,
        raised=sampler.churned_times(schedule.cosine, times, s_churn=1.0, s_min=0.05, s_max=50.0),
    )),
    ("dpm_solver_pp_2m", sampler.dpm_solver_pp_2m),
])
def test_a_text_means_its_function(text, function):
    """The same images as the function with these options on these times."""
    times = sampler.karras_times(schedule.cosine, 3, sigma_min=0.1, sigma_max=20.0, rho=3.0)
    expected = function(oracle(schedule.cosine), schedule.cosine, Z_1, KEYS, times=times)
    spec = SamplerSpec(with_option(text, "grid=karras,sigma_min=0.1,sigma_max=20,rho=3"), 3)
    np.testing.assert_array_equal(images_of(spec, schedule.cosine, oracle(schedule.cosine)), expected)


def test_noise_levels_of_a_consistency_sampler():
    """The first time is 1; the others have the noise that the text says."""
    times = SamplerSpec("consistency:sigmas=24.4084/0.821", 3).plan(schedule.karras).evaluated
    assert times[0] == 1
    sigma = schedule.karras(jnp.asarray(times)).sigma[:, 0, 0, 0]
    np.testing.assert_allclose(sigma, [80, 24.4084, 0.821], rtol=1e-5)
    images = images_of(SamplerSpec("consistency:sigmas=24.4084/0.821", 3), schedule.karras, oracle(schedule.karras))
    expected = sampler.consistency(oracle(schedule.karras), schedule.karras, Z_1, KEYS, times=times)
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize("text, wrap", [
    ("ddim:clip=static", denoisers.clipped), ("ddim:clip=dynamic", denoisers.dynamically_clipped),
])
def test_clipping_is_of_the_denoiser(text, wrap):
    """In every step, not only at the end."""

    def wide(z_t, t):
        return 1.4 * jnp.cos(3 * z_t)

    actual = images_of(SamplerSpec(text, 3), schedule.cosine, wide)
    np.testing.assert_array_equal(actual, sampler.sample(wrap(wide), schedule.cosine, Z_1, num_steps=3))
    at_the_end = wrap(lambda z, t: sampler.sample(wide, schedule.cosine, z, num_steps=3))(Z_1, jnp.ones(2))
    assert np.abs(actual - at_the_end).max() > 0.01


def test_plain_ddim_may_clip_and_take_a_weight():
    """What a student may be asked for; whether it takes a weight of guidance is asked elsewhere."""
    texts = ("ddim", "ddim:clip=static", "ddim:eta=0,grid=uniform", "ddim:guidance=1")
    plain = [SamplerSpec(text, 2).is_plain_ddim for text in texts]
    others = ("ddim:eta=1", "ddim:grid=karras", "ddim:guidance=1,guidance_low=0", "addim", "heun:clip=static")
    other = [SamplerSpec(text, 2).is_plain_ddim for text in others]
    assert all(plain) and not any(other)
