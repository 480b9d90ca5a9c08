"""Samplers: scans of one step of `steps.py` from noise to data.

A sampler asks the denoiser at given times t_0 > t_1 > ... > t_{n-1}; from the last it goes to the data itself, which is
to return x_hat there. One step costs one evaluation, NFE = n, except Heun's, whose steps between two times cost two:
NFE = 2n - 1. The times may be any: `uniform_times` t_j = (n - j) / n, or `karras_times`, on the model's own schedule.

    images = dpm_solver_pp_2m(denoiser, schedule, z_1, times=karras_times(schedule, 20))
    images = ancestral(denoiser, schedule, z_1, keys, times=uniform_times(256))

The noise z_1 ~ N(0, I) is the caller's, so that two models can start from the same; sampling begins with
sigma(t_0) z_1, whether the schedule preserves the variance or lets it explode. `keys` are one for each image, from
which step j draws the noise of that image by fold_in(key, j): it does not depend on the other images of the batch.
Samplers without noise have the argument too, and ignore it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mscm.diffusion import schedule as schedules
from mscm.diffusion import steps
from mscm.types import Array, Denoiser, Float, Images, Int, Keys, Level, Schedule, Times

Grid = Float[np.ndarray, "n"]  # times, noisiest first
XVar = Callable[[Level], Times] | Float[jax.Array, "num_steps"] | Float[np.ndarray, "num_steps"]

# --------------------------------------------------------------------------------------------------------------- times


def uniform_times(num_steps: int) -> Grid:
    """t_j = (n - j) / n; divided on the host, so that t = 1 and the seams of segments are exact."""
    _check_num_steps(num_steps)
    return np.arange(num_steps, 0, -1, dtype=np.float32) / np.float32(num_steps)


def karras_times(
    schedule: Schedule, num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Grid:
    """The times of EDM's noise levels, arXiv:2206.00364: sigma^(1/rho) in equal steps from sigma_max to sigma_min.

    sigma means sigma / alpha, exp(-lambda / 2), in units of the data. A range beyond that of the schedule is cut to it.
    To be called outside of jit.

    Raises:
      ValueError: the schedule has nothing of the range, or less than `num_steps` different times.
    """
    _check_num_steps(num_steps)
    most, least = (math.exp(-logsnr / 2) for logsnr in schedules.logsnr_range(schedule))
    low, high = max(sigma_min, least), min(sigma_max, most)
    if not low < high:
        raise ValueError(
            f"got sigma_min={sigma_min:g} and sigma_max={sigma_max:g}, expected a range that meets that of the "
            f"schedule, {least:.4g} to {most:.4g}"
        )
    sigma = schedules.karras_sigma(np.linspace(1, 0, num_steps), sigma_min=low, sigma_max=high, rho=rho)
    times = schedules.times_of_logsnr(schedule, (-2 * np.log(sigma)).astype(np.float32))
    _check_times(times)
    return times


def churned_times(schedule: Schedule, times: Grid, *, s_churn: float, s_min: float, s_max: float) -> Grid:
    """The times to which EDM's Algorithm 2 adds noise at each of `times`: those of (1 + gamma) sigma.

    gamma = min(s_churn / n, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0; sigma means sigma / alpha. What would
    be noisier than the schedule becomes t = 1. To be called outside of jit.
    """
    _check_times(times)
    logsnr = schedules.host_logsnr(schedule, times).astype(np.float64)
    sigma = np.exp(-0.5 * logsnr)
    gamma = min(s_churn / len(times), np.sqrt(2) - 1)
    raised = schedules.times_of_logsnr(schedule, (logsnr - 2 * np.log1p(gamma)).astype(np.float32))
    return np.where((s_min <= sigma) & (sigma <= s_max), raised, times)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}, expected at least 1 sampling step")


def _check_times(times: Grid) -> None:
    if not len(times) or not 0 <= times[-1] or not times[0] <= 1 or not np.all(np.diff(times) < 0):
        text = np.array2string(times, threshold=8)
        raise ValueError(f"got times {text}, expected times in [0, 1], each below the one before it")


# ------------------------------------------------------------------------------------------------------------ samplers


def sample(denoiser: Denoiser, schedule: Schedule, z_1: Images, *, num_steps: int) -> Images:
    """Plain DDIM from noise z_1: Algorithm 2, arXiv:2403.06807v3, with num_steps = student steps.

    The last step returns x_hat itself. Deterministic given z_1.
    """
    return ddim(denoiser, schedule, z_1, times=uniform_times(num_steps))


def sample_addim(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    *,
    num_steps: int,
    x_var: XVar | None = None,
    denoise_final: bool = True,
) -> Images:
    """Adjusted DDIM: Algorithm 3, arXiv:2403.06807v3, as `addim` on uniform times."""
    times = uniform_times(num_steps)
    return addim(denoiser, schedule, z_1, times=times, x_var=x_var, denoise_final=denoise_final)


def ddim(denoiser: Denoiser, schedule: Schedule, z_1: Images, keys: Keys | None = None, *, times: Grid) -> Images:
    """Deterministic DDIM, arXiv:2010.02502: of first order."""
    del keys

    def step(z_t: Images, at: Step) -> Images:
        return steps.ddim(denoiser(z_t, at.t), z_t, at.lvl_t, at.lvl_s)

    return run(step, denoiser, schedule, z_1, times)


def stochastic_ddim(
    denoiser: Denoiser, schedule: Schedule, z_1: Images, keys: Keys, *, times: Grid, eta: float
) -> Images:
    """DDIM that draws the part eta in [0, 1] of its noise anew, arXiv:2010.02502; 0 is `ddim`, 1 `ancestral`."""

    def step(z_t: Images, at: Step) -> Images:
        xi = _noise(keys, at.index, z_t)
        return steps.stochastic_ddim(denoiser(z_t, at.t), z_t, at.lvl_t, at.lvl_s, xi, eta=eta)

    return run(step, denoiser, schedule, z_1, times)


def addim(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    keys: Keys | None = None,
    *,
    times: Grid,
    x_var: XVar | None = None,
    denoise_final: bool = True,
) -> Images:
    """Adjusted DDIM, arXiv:2403.06807v3.

    Args:
      x_var: Var[x | z_t] per scalar: a function of the level (None: 0.1 / (2 + SNR)), or one number per time, noisiest
        first, measured on data.
      denoise_final: return x_hat at the end. The literal algorithm (False) steps to t = 0 as to any other time: it adds
        sqrt(x_var) of noise-shaped residual, which is visible with one or two steps and vanishes with many.
    """
    del keys
    if x_var is None:
        x_var = steps.analytic_x_var
    if not callable(x_var) and x_var.shape != times.shape:
        raise ValueError(f"got x_var of shape {x_var.shape}, expected one number for each of the {len(times)} steps")
    table = np.zeros_like(times) if callable(x_var) else x_var

    def step(z_t: Images, at: Step) -> Images:
        (tabulated,) = at.entries
        variance = x_var(at.lvl_t) if callable(x_var) else tabulated
        return steps.addim(denoiser(z_t, at.t), variance, z_t, at.lvl_t, at.lvl_s)

    if not denoise_final:
        return _scan(step, schedule, _start(schedule, z_1, times), np.append(times, np.float32(0)), table)
    return run(step, denoiser, schedule, z_1, times, table[:-1])


def noisy_ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    keys: Keys,
    *,
    times: Grid,
    x_var: Callable[[Level], Times] = steps.analytic_x_var,
) -> Images:
    """DDIM of x_hat with noise of variance x_var: what aDDIM does on average, by chance, arXiv:2403.06807v3."""

    def step(z_t: Images, at: Step) -> Images:
        x_hat, xi = denoiser(z_t, at.t), _noise(keys, at.index, z_t)
        return steps.noisy_ddim(x_hat, x_var(at.lvl_t), z_t, at.lvl_t, at.lvl_s, xi)

    return run(step, denoiser, schedule, z_1, times)


def ancestral(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    keys: Keys,
    *,
    times: Grid,
    log_variance_mix: float = 0.0,
) -> Images:
    """DDPM's sampler, arXiv:2006.11239, with the small (`log_variance_mix` 0) or large (1) variance, or a mix: SiD."""

    def step(z_t: Images, at: Step) -> Images:
        x_hat, xi = denoiser(z_t, at.t), _noise(keys, at.index, z_t)
        return steps.ancestral(x_hat, z_t, at.lvl_t, at.lvl_s, xi, log_variance_mix=log_variance_mix)

    return run(step, denoiser, schedule, z_1, times)


def heun(denoiser: Denoiser, schedule: Schedule, z_1: Images, keys: Keys | None = None, *, times: Grid) -> Images:
    """EDM's Algorithm 1, arXiv:2206.00364: of second order; the last step is Euler's, NFE = 2n - 1."""
    del keys

    def step(z_t: Images, at: Step) -> Images:
        return steps.heun(denoiser, z_t, at.t, at.s, at.lvl_t, at.lvl_s)

    return run(step, denoiser, schedule, z_1, times)


def churned_heun(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    keys: Keys,
    *,
    times: Grid,
    raised: Grid,
    s_noise: float = 1.0,
) -> Images:
    """EDM's Algorithm 2, arXiv:2206.00364: before each step, the last too, noise is added up to the time in `raised`.

    `raised` is of `churned_times`; where it equals `times` nothing is added. NFE = 2n - 1.
    """

    def churn(z_t: Images, index: Int[Array, ""], t: Times, t_hat: Times) -> Images:
        return steps.churn(z_t, schedule(t), schedule(t_hat), _noise(keys, index, z_t), s_noise=s_noise)

    def step(z_t: Images, at: Step) -> Images:
        (t_hat,) = at.entries
        z_hat = churn(z_t, at.index, at.t, t_hat)
        return steps.heun(denoiser, z_hat, t_hat, at.s, schedule(t_hat), at.lvl_s)

    z_t = _scan(step, schedule, _start(schedule, z_1, times), times, raised[:-1])
    z_hat = churn(z_t, jnp.int32(len(times) - 1), _of_all(times[-1], z_t), _of_all(raised[-1], z_t))
    return _finish(denoiser, z_hat, raised)


def dpm_solver_pp_2m(
    denoiser: Denoiser, schedule: Schedule, z_1: Images, keys: Keys | None = None, *, times: Grid
) -> Images:
    """DPM-Solver++(2M), arXiv:2211.01095: of second order; the first and the last step are of first order."""
    del keys
    # The first step has no previous time; any other than its own will do, since x_previous is then x itself.
    previous = np.concatenate([times[1:2], times[:-2]])

    def step(carry: tuple[Images, Images], at: Step) -> tuple[Images, Images]:
        z_t, x_previous = carry
        (t_previous,) = at.entries
        x_hat = denoiser(z_t, at.t)
        x_previous = jnp.where(at.index == 0, x_hat, x_previous)
        z_s = steps.dpm_solver_pp_2m(x_hat, x_previous, z_t, schedule(t_previous), at.lvl_t, at.lvl_s)
        return z_s, x_hat

    z_t = _start(schedule, z_1, times)
    z_t, _ = _scan(step, schedule, (z_t, jnp.zeros_like(z_t)), times, previous)
    return _finish(denoiser, z_t, times)


def consistency(denoiser: Denoiser, schedule: Schedule, z_1: Images, keys: Keys, *, times: Grid) -> Images:
    """Sampling of a consistency model, Algorithm 1 of arXiv:2303.01469: x_hat is a sample, noised anew at each time.

    One time is one-step sampling. What `denoiser` gives is taken to have the noise of t = 0.
    """

    def step(z_t: Images, at: Step) -> Images:
        lvl_0 = schedule(jnp.zeros_like(at.t))
        return steps.renoise(denoiser(z_t, at.t), at.lvl_s, lvl_0, _noise(keys, at.index, z_t))

    return run(step, denoiser, schedule, z_1, times)


# ------------------------------------------------------------------------------------------------------------ the scan


class Step(NamedTuple):
    """Where a step of a sampler is: from time t to the next time s."""

    index: Int[Array, ""]  # 0 is the noisiest
    t: Times  # the same for all images
    s: Times
    lvl_t: Level
    lvl_s: Level
    entries: tuple[Times, ...]  # of the tables of the scan


def run(
    step: Callable[[Images, Step], Images],
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    times: Grid,
    *tables: Any,
) -> Images:
    """From noise to x_hat at the last time."""
    return _finish(denoiser, _scan(step, schedule, _start(schedule, z_1, times), times, *tables), times)


def _scan(step: Callable[[Any, Step], Any], schedule: Schedule, carry: Any, times: Grid, *tables: Any) -> Any:
    """`step(carry, at)` from each time to the next; the tables have an entry for each step."""
    batch = jax.tree.leaves(carry)[0].shape[0]

    def body(carry: Any, inputs: tuple[Array, ...]) -> tuple[Any, None]:
        index, *numbers = inputs
        t, s, *entries = (jnp.broadcast_to(number, (batch,)) for number in numbers)
        return step(carry, Step(index, t, s, schedule(t), schedule(s), tuple(entries))), None

    indices = np.arange(len(times) - 1, dtype=np.int32)
    carry, _ = jax.lax.scan(body, carry, (indices, times[:-1], times[1:], *tables))
    return carry


def _start(schedule: Schedule, z_1: Images, times: Grid) -> Images:
    _check_times(times)
    return schedule(_of_all(times[0], z_1)).sigma * z_1


def _finish(denoiser: Denoiser, z_t: Images, times: Grid) -> Images:
    return denoiser(z_t, _of_all(times[-1], z_t))


def _of_all(time: np.floating, z_t: Images) -> Times:
    return jnp.full((z_t.shape[0],), time)


def _noise(keys: Keys, index: Int[Array, ""], z_t: Images) -> Images:
    """Noise of a step for each image, of its own key."""
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), z_t.shape[1:], z_t.dtype))
    return draw(keys)
