"""Conversions between what a network predicts and x_hat (EDM: arXiv:2206.00364).

With z = alpha x + sigma eps:  eps = (z - alpha x) / sigma,  v = alpha eps - sigma x.  For any level
(alpha^2 + sigma^2 = r^2; r = 1 when variance preserving)

  (1) x   = (alpha z - sigma v) / r^2
  (2) x   = (z - sigma eps) / alpha
  (3) eps = (z - alpha x) / sigma
"""

from collections.abc import Callable

import jax.numpy as jnp

from mscm.types import Images, Level


def x_from_v(v: Images, z_t: Images, lvl_t: Level) -> Images:
    """x_hat of a v prediction, equation (1)."""
    alpha, sigma = lvl_t
    return (alpha * z_t - sigma * v) / (jnp.square(alpha) + jnp.square(sigma))


def x_from_eps(eps: Images, z_t: Images, lvl_t: Level) -> Images:
    """x_hat of an eps prediction, equation (2); ill-conditioned where alpha is small."""
    return (z_t - lvl_t.sigma * eps) / lvl_t.alpha


def x_from_x(x: Images, z_t: Images, lvl_t: Level) -> Images:
    """x_hat of an x prediction: itself."""
    del z_t, lvl_t
    return x


def eps_from_x(x: Images, z_t: Images, lvl_t: Level) -> Images:
    """eps_hat = (z_t - alpha_t x_hat) / sigma_t."""
    return (z_t - lvl_t.alpha * x) / lvl_t.sigma


def v_from_x(x: Images, z_t: Images, lvl_t: Level) -> Images:
    """v_hat = alpha_t eps_hat - sigma_t x_hat."""
    return lvl_t.alpha * eps_from_x(x, z_t, lvl_t) - lvl_t.sigma * x


def edm_preconditioned(
    network: Callable[[Images, Images], Images], z_t: Images, lvl_t: Level, *, sigma_data: float = 0.5
) -> Images:
    """EDM's D(z, sigma) = c_skip z + c_out F(c_in z, c_noise), arXiv:2206.00364, Table 1, with alpha = 1.

    `network(c_in z, c_noise)` receives c_noise = log(sigma) / 4 as "b 1 1 1".
    """
    sigma = lvl_t.sigma
    variance = jnp.square(sigma) + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / jnp.sqrt(variance)
    c_in = 1 / jnp.sqrt(variance)
    return c_skip * z_t + c_out * network(c_in * z_t, jnp.log(sigma) / 4)
