"""Noise schedules: time t -> Level(alpha, sigma).

A schedule is a decreasing log-SNR lambda(t), t = 0 data, t = 1 noise. With a = atan(exp(-logsnr_max / 2)) and
b = atan(exp(-logsnr_min / 2)):

  (1) bounded cosine   lambda(t) = -2 log tan(a + t (b - a))                         Nichol & Dhariwal; PD; SiD
  (2) shifted          lambda_n(t) = lambda(t) + 2 log(n / D)                        SiD, arXiv:2301.11093
  (3) interpolated     lambda(t) = t lambda_{n_low}(t) + (1 - t) lambda_{n_high}(t)  SiD, image side D
  (4) variance preserving   alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda)
  (5) Karras grid      sigma(t) = (s_min^(1/rho) + t (s_max^(1/rho) - s_min^(1/rho)))^rho   EDM, arXiv:2206.00364

Average pooling s x s multiplies the SNR by s^2, so the shift (2) gives an image of side D the noise that a plain
cosine gives an image of side n. In (3) the noise end follows the LOW noise resolution (more noise), the clean end the
high one (fine detail). The bounds are applied before the shift, so they move with it.
All arithmetic is float32, and alpha, sigma come from lambda through sigmoids: 1 - alpha^2 would cancel.
"""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mscm.types import Float, Int, Level, Schedule, Times

_TimeOrTimes = TypeVar("_TimeOrTimes", Times, Float[jax.Array, ""], Float[np.ndarray, "b"])


def level_from_logsnr(logsnr: Times) -> Level:
    """Variance-preserving level of a log-SNR, equation (4); gains the axes that broadcast over an image."""
    logsnr = logsnr[:, None, None, None]
    return Level(jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr)))


def cosine_logsnr(t: Times, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0, shift: float = 0.0) -> Times:
    """Bounded and shifted cosine log-SNR, equations (1) and (2); `shift` = 2 log(n / D) is added to lambda."""
    if not logsnr_min < logsnr_max:
        raise ValueError(f"got logsnr_min={logsnr_min} and logsnr_max={logsnr_max}, expected logsnr_min < logsnr_max")
    # log cos = log sin of the complement: each end keeps its own small angle, which a rounded tan near pi/2 would lose.
    a = math.atan(math.exp(-logsnr_max / 2))
    a_complement = math.atan(math.exp(logsnr_min / 2))
    width = math.pi / 2 - a - a_complement
    return 2.0 * (jnp.log(jnp.sin(a_complement + (1 - t) * width)) - jnp.log(jnp.sin(a + t * width))) + shift


def cosine(t: Times, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0, shift: float = 0.0) -> Level:
    """Bounded cosine schedule, shifted by `shift` in log-SNR; equations (1), (2), (4)."""
    return level_from_logsnr(cosine_logsnr(t, logsnr_min=logsnr_min, logsnr_max=logsnr_max, shift=shift))


def interpolated_logsnr(
    t: Times,
    *,
    resolution: int,
    noise_low: int,
    noise_high: int,
    logsnr_min: float = -15.0,
    logsnr_max: float = 15.0,
) -> Times:
    """Interpolated cosine log-SNR, equation (3); `resolution` is the image side D, all three in pixels."""
    if min(resolution, noise_low, noise_high) <= 0:
        raise ValueError(
            f"got resolution={resolution}, noise_low={noise_low}, noise_high={noise_high}, expected pixel counts > 0"
        )
    plain = cosine_logsnr(t, logsnr_min=logsnr_min, logsnr_max=logsnr_max)
    return plain + t * (2 * math.log(noise_low / resolution)) + (1 - t) * (2 * math.log(noise_high / resolution))


def interpolated(
    t: Times,
    *,
    resolution: int,
    noise_low: int,
    noise_high: int,
    logsnr_min: float = -15.0,
    logsnr_max: float = 15.0,
) -> Level:
    """Cosine schedule whose shift moves from `noise_high` at t = 0 to `noise_low` at t = 1; equations (3), (4)."""
    return level_from_logsnr(
        interpolated_logsnr(
            t,
            resolution=resolution,
            noise_low=noise_low,
            noise_high=noise_high,
            logsnr_min=logsnr_min,
            logsnr_max=logsnr_max,
        )
    )


def karras_sigma(
    t: _TimeOrTimes,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> _TimeOrTimes:
    """EDM noise level, equation (5): sigma(0) = sigma_min, sigma(1) = sigma_max, in units of the data."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"got sigma_min={sigma_min} and sigma_max={sigma_max}, expected 0 < sigma_min < sigma_max")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + t * (high - low)) ** rho


def karras(
    t: Times, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, num_steps: int | None = None
) -> Level:
    """Variance-exploding level alpha = 1, sigma on the Karras curve, equation (5).

    With `num_steps` n the curve begins at t = 1/n, and before it sigma is proportional to t: sigma(0) = 0, and the
    times j/n are the levels of EDM's sampler in n steps, whose last step ends in the data.
    """
    curve = functools.partial(karras_sigma, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    if num_steps is None:
        sigma = curve(t)
    elif num_steps < 2:
        raise ValueError(f"got num_steps={num_steps}, expected at least 2")
    else:
        on_curve = curve(jnp.maximum(t * num_steps - 1, 0) / (num_steps - 1))
        sigma = jnp.where(t * num_steps < 1, t * num_steps * sigma_min, on_curve)
    sigma = sigma[:, None, None, None]
    return Level(jnp.ones_like(sigma), sigma)


def times_of_logsnr(schedule: Schedule, logsnr: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The inverse of lambda(t) of any schedule: the latest time in [0, 1] with at least this log-SNR.

    Bisection in float32, to the spacing of the numbers (below 2^-30: to 2^-50). A log-SNR that the schedule does not
    have gives the nearer end, 0 or 1. To be called outside of jit.
    """
    logsnr = np.asarray(logsnr, np.float32)
    noisiest, cleanest = logsnr_range(schedule)
    inside = np.asarray(_bisected(schedule, logsnr))
    return np.select([logsnr >= cleanest, logsnr <= noisiest], [np.float32(0), np.float32(1)], inside)


def logsnr_range(schedule: Schedule) -> tuple[float, float]:
    """lambda(1) and lambda(0). To be called outside of jit."""
    cleanest, noisiest = host_logsnr(schedule, np.array([0, 1], np.float32))
    return float(noisiest), float(cleanest)


def host_logsnr(schedule: Schedule, t: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """lambda(t) as NumPy has it. To be called outside of jit."""
    return np.asarray(_logsnr(schedule, t))


def traced_times_of_logsnr(schedule: Schedule, logsnr: Float[np.ndarray | jax.Array, "n"]) -> Times:
    """`times_of_logsnr` for use inside of jit; beyond the noisiest log-SNR a time within 2^-24 of 1."""

    def halve(_: Int[jax.Array, ""] | int, bounds: tuple[Times, Times]) -> tuple[Times, Times]:
        low, high = bounds
        middle = (low + high) / 2
        is_clean = _logsnr(schedule, middle) >= logsnr
        return jnp.where(is_clean, middle, low), jnp.where(is_clean, high, middle)

    low, _ = jax.lax.fori_loop(0, 50, halve, (jnp.zeros_like(logsnr), jnp.ones_like(logsnr)))
    return low


# Compiled as a whole: one operation after the other would each be compiled for every number of times.
_bisected = jax.jit(traced_times_of_logsnr, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _logsnr(schedule: Schedule, t: Times) -> Times:
    return schedule(t).logsnr[:, 0, 0, 0]
