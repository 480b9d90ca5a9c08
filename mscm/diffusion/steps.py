"""Sampler steps from level t to a cleaner level s, one function per equation.

With A(t, s) = alpha_s - alpha_t sigma_s / sigma_t:

  (1) DDIM           z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x)  =  A(t, s) x + (sigma_s / sigma_t) z_t
  (2) inverse DDIM   x   = (z_s - (sigma_s / sigma_t) z_t) / A(t, s)
  (3) aDDIM          z_s = alpha_s x + sqrt(sigma_s^2 + A(t, s)^2 x_var / mean(eps^2)) eps
                     with eps = (z_t - alpha_t x) / sigma_t
  (4) ancestral      q(z_s | z_t, x), c = -expm1(lambda_t - lambda_s):
                     z_s = (1 - c) (alpha_s / alpha_t) z_t + c alpha_s x + std xi
  (5) eta-DDIM       z_s = alpha_s x + sqrt(sigma_s^2 - std^2) eps + std xi,  std = eta sigma_s sqrt(c)
  (6) Heun           z_s = DDIM of x + (u_t / 2 u_s) (x' - x), with u = sigma / alpha and x' the denoiser's answer at
                     the end of the plain DDIM step: EDM's trapezoid in (z / alpha, u), sorted by x and x'

A(t, s) equals sin(phi_t - phi_s) / sin(phi_t) for variance-preserving levels with phi = atan2(sigma, alpha), and for
any level r_s times that (r = hypot(alpha, sigma)): a difference of angles does not cancel where t and s are close, but
the literal expression does. The same holds of z / alpha and u, which are thousands where alpha is small: no step forms
them. Every step keeps its arithmetic per example and in the precision of its arguments; xi ~ N(0, I) is the caller's.
"""

import jax.numpy as jnp

from mscm.diffusion.prediction import eps_from_x
from mscm.types import Array, Denoiser, Float, Images, Level, Times


def ddim_coefficient(lvl_t: Level, lvl_s: Level) -> Float[Array, "b 1 1 1"]:
    """A(t, s), the weight of x in a DDIM step, through the sine of an angle difference."""
    radius_s = jnp.hypot(lvl_s.alpha, lvl_s.sigma)
    # Near the noise through the complements of the angles, which are small there and keep their digits.
    complement_t, complement_s = (jnp.arctan2(level.alpha, level.sigma) for level in (lvl_t, lvl_s))
    is_noise = lvl_s.sigma > lvl_s.alpha
    difference = jnp.where(is_noise, complement_s - complement_t, lvl_t.angle - lvl_s.angle)
    return radius_s * jnp.sin(difference) / jnp.sin(lvl_t.angle)


def ddim(x: Images, z_t: Images, lvl_t: Level, lvl_s: Level) -> Images:
    """Deterministic step, equation (1)."""
    return ddim_coefficient(lvl_t, lvl_s) * x + (lvl_s.sigma / lvl_t.sigma) * z_t


def inv_ddim(z_s: Images, z_t: Images, lvl_t: Level, lvl_s: Level) -> Images:
    """The x for which `ddim(x, z_t, lvl_t, lvl_s) == z_s`, equation (2); infinite or nan where t = s."""
    return (z_s - (lvl_s.sigma / lvl_t.sigma) * z_t) / ddim_coefficient(lvl_t, lvl_s)


def addim(
    x: Images, x_var: Float[Array, "b"] | Float[Array, "b 1 1 1"], z_t: Images, lvl_t: Level, lvl_s: Level
) -> Images:
    """Adjusted DDIM, equation (3) and Algorithm 3, arXiv:2403.06807v3.

    Scales eps_hat up so that the norm of z_s is that of an exact sample; assumes x_hat orthogonal to eps_hat.
    `x_var` is the variance of x given z_t per scalar and example; zero gives DDIM exactly.
    """
    x_var = x_var.reshape(-1, 1, 1, 1)
    eps = eps_from_x(x, z_t, lvl_t)
    # One mean per example: over the batch, images would depend on their batch mates.
    eps_square = jnp.mean(jnp.square(eps), axis=(1, 2, 3), keepdims=True)
    # Written as DDIM plus a correction, so that x_var = 0 and s = t are exact in floating point.
    return ddim(x, z_t, lvl_t, lvl_s) + addim_correction(x_var, eps_square, lvl_t, lvl_s) * eps


def addim_correction(
    x_var: Float[Array, "b 1 1 1"], eps_square: Float[Array, "b 1 1 1"], lvl_t: Level, lvl_s: Level
) -> Float[Array, "b 1 1 1"]:
    """c - sigma_s with c = sqrt(sigma_s^2 + A(t, s)^2 x_var / mean(eps^2)), without cancellation."""
    # Without noise there is no direction to add variance in, and the quotient would overflow.
    is_noisy = eps_square > jnp.finfo(eps_square.dtype).tiny
    ratio = jnp.where(is_noisy, x_var / jnp.where(is_noisy, eps_square, 1), 0)
    added = jnp.square(ddim_coefficient(lvl_t, lvl_s)) * ratio
    total = jnp.sqrt(jnp.square(lvl_s.sigma) + added) + lvl_s.sigma
    # Both square roots are 0 only if sigma_s = 0 and x_var = 0, where the correction is 0 too.
    return added / jnp.where(total > 0, total, 1)


def analytic_x_var(lvl_t: Level) -> Times:
    """x_var_t = 0.1 / (2 + SNR_t): a tenth of x's posterior variance under a Gaussian prior of variance 1/2."""
    return (0.1 / (2 + lvl_t.snr))[:, 0, 0, 0]


def noisy_ddim(x: Images, x_var: Float[Array, "b"], z_t: Images, lvl_t: Level, lvl_s: Level, xi: Images) -> Images:
    """DDIM of x + sqrt(x_var) xi: what aDDIM is compared with in arXiv:2403.06807v3."""
    return ddim(x + jnp.sqrt(x_var)[:, None, None, None] * xi, z_t, lvl_t, lvl_s)


def ancestral(
    x: Images, z_t: Images, lvl_t: Level, lvl_s: Level, xi: Images, *, log_variance_mix: float = 0.0
) -> Images:
    """Sample of q(z_s | z_t, x), equation (4).

    The variance is sigma_s^2 c (`log_variance_mix` 0, true posterior), sigma_t^2 c (1, the variance of z_t given z_s),
    or their geometric mix. The latter two are statements about the process: one that explodes and one that preserves
    the variance have other reverse steps.
    """
    c = _added_noise(lvl_t, lvl_s)
    mean = _kept_noise(lvl_t, lvl_s) * (lvl_s.alpha / lvl_t.alpha) * z_t + c * lvl_s.alpha * x
    std = jnp.sqrt(c) * lvl_s.sigma ** (1 - log_variance_mix) * lvl_t.sigma**log_variance_mix
    return mean + std * xi


def stochastic_ddim(x: Images, z_t: Images, lvl_t: Level, lvl_s: Level, xi: Images, *, eta: float) -> Images:
    """DDIM with a part of its noise drawn anew, equation (5), arXiv:2010.02502; eta in [0, 1].

    eta = 0 is DDIM exactly, eta = 1 the true posterior of equation (4).
    """
    renewed = jnp.square(eta) * _added_noise(lvl_t, lvl_s)
    kept = (1 - jnp.square(eta)) + jnp.square(eta) * _kept_noise(lvl_t, lvl_s)  # 1 - renewed
    correction = -lvl_s.sigma * renewed / (1 + jnp.sqrt(kept))  # sigma_s (sqrt(kept) - 1)
    deterministic = ddim(x, z_t, lvl_t, lvl_s) + correction * eps_from_x(x, z_t, lvl_t)
    return deterministic + lvl_s.sigma * jnp.sqrt(renewed) * xi


def _added_noise(lvl_t: Level, lvl_s: Level) -> Float[Array, "b 1 1 1"]:
    """c = 1 - SNR_t / SNR_s: the part of the variance of z_t's noise that was added after s."""
    return -jnp.expm1(lvl_t.logsnr - lvl_s.logsnr)


def _kept_noise(lvl_t: Level, lvl_s: Level) -> Float[Array, "b 1 1 1"]:
    """1 - c, also where c is so nearly 1 that the difference has no digits."""
    return jnp.square(lvl_t.alpha * lvl_s.sigma / (lvl_s.alpha * lvl_t.sigma))


def churn(z_t: Images, lvl_t: Level, lvl_hat: Level, xi: Images, *, s_noise: float = 1.0) -> Images:
    """Noise is added up to the level `lvl_hat`, EDM's Algorithm 2, arXiv:2206.00364; z_t itself where that is lvl_t.

    `s_noise` scales the standard deviation of what is added.
    """
    u_t, u_hat = lvl_t.sigma / lvl_t.alpha, lvl_hat.sigma / lvl_hat.alpha
    added = jnp.sqrt(jnp.maximum((u_hat - u_t) * (u_hat + u_t), 0))
    return (lvl_hat.alpha / lvl_t.alpha) * z_t + lvl_hat.alpha * added * s_noise * xi


def renoise(x: Images, lvl_s: Level, lvl_0: Level, xi: Images) -> Images:
    """z_s = alpha_s (x + sqrt(u_s^2 - u_0^2) xi), u = sigma / alpha, of an x that has the noise of lvl_0.

    The re-noising of consistency models, Algorithm 1 of arXiv:2303.01469.
    """
    return churn(lvl_0.alpha * x, lvl_0, lvl_s, xi)


def heun(denoiser: Denoiser, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level) -> Images:
    """Deterministic second-order step, equation (6), EDM's Algorithm 1, arXiv:2206.00364; two evaluations.

    To sigma_s = 0 it is the Euler step, as there.
    """
    return ddim(heun_prediction(denoiser, z_t, t, s, lvl_t, lvl_s), z_t, lvl_t, lvl_s)


def heun_prediction(denoiser: Denoiser, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level) -> Images:
    """The x whose DDIM step from z_t is the Heun step, equation (6); two evaluations of `denoiser`.

    To u_s = 0 it is x_t.
    """
    x_t = denoiser(z_t, t)
    x_s = denoiser(ddim(x_t, z_t, lvl_t, lvl_s), s)
    is_noisy = lvl_s.sigma > 0
    half_ratio = 0.5 * lvl_t.sigma * lvl_s.alpha / (lvl_t.alpha * jnp.where(is_noisy, lvl_s.sigma, 1))
    return jnp.where(is_noisy, x_t + half_ratio * (x_s - x_t), x_t)


def dpm_solver_pp_2m(
    x: Images, x_previous: Images, z_t: Images, lvl_previous: Level, lvl_t: Level, lvl_s: Level
) -> Images:
    """DPM-Solver++(2M), arXiv:2211.01095: extrapolates x_hat linearly in log(alpha / sigma), then steps by (1).

    To sigma_s = 0, which is infinitely far in log(alpha / sigma), it is the step of first order.
    """
    half_previous, half_t, half_s = (0.5 * level.logsnr for level in (lvl_previous, lvl_t, lvl_s))
    ratio = (half_t - half_previous) / (half_s - half_t)
    slope = jnp.where(lvl_s.sigma > 0, 1 / (2 * jnp.where(lvl_s.sigma > 0, ratio, 1)), 0)
    return ddim(x + slope * (x - x_previous), z_t, lvl_t, lvl_s)
