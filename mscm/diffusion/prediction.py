"""Conversions between what a network predicts and x_hat (EDM: arXiv:2206.00364).

With z = alpha x + sigma eps:  eps = (z - alpha x) / sigma,  v = alpha eps - sigma x.  For any level
(alpha^2 + sigma^2 = r^2; r = 1 when variance preserving)

  (1) x   = (alpha z - sigma v) / r^2
  (2) x   = (z - sigma eps) / alpha
  (3) eps = (z - alpha x) / sigma

Preconditioned networks F see c_in z and give, with u = sigma / alpha and data of standard deviation sigma_data,

  (4) c_in   = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2)
  (5) x      = c_skip z / alpha + c_out F,
      c_skip = sigma_data^2 / ((u - u_0)^2 + sigma_data^2),  c_out = sigma_data (u - u_0) / sqrt(u^2 + sigma_data^2)

which depend on z / alpha and u alone: the same function whether the level preserves or explodes variance.
"""

import jax.numpy as jnp

from mscm.types import Array, Denoiser, Float, Guided, Images, Level, Teacher, Times

SIGMA_DATA = 0.5  # of the papers of (4) and (5), for images in [-1, 1]


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


def c_in(lvl_t: Level, *, sigma_data: float = SIGMA_DATA) -> Float[Array, "b 1 1 1"]:
    """Scale of a network's input that gives it variance 1 for data of variance sigma_data^2, equation (4)."""
    return 1 / _radius(lvl_t, sigma_data)


def x_from_edm(
    output: Images, z_t: Images, lvl_t: Level, *, u_0: float = 0.0, sigma_data: float = SIGMA_DATA
) -> Images:
    """x_hat of a preconditioned network of c_in z_t, equation (5).

    u_0 = 0 is EDM's denoiser (arXiv:2206.00364, Table 1). u_0 = sigma / alpha at t = 0 is that of a consistency model
    (arXiv:2303.01469, appendix C), whose output there is z_t / alpha_t itself, whatever the network says.
    """
    alpha, sigma = lvl_t
    above = sigma - u_0 * alpha  # alpha (u - u_0)
    skip = alpha * sigma_data**2 / (jnp.square(above) + jnp.square(alpha * sigma_data))
    return skip * z_t + sigma_data * above * c_in(lvl_t, sigma_data=sigma_data) * output


def _radius(lvl_t: Level, sigma_data: float) -> Float[Array, "b 1 1 1"]:
    return jnp.hypot(lvl_t.alpha * sigma_data, lvl_t.sigma)


def x_hat_of(teacher: Teacher) -> Denoiser:
    """What a teacher answers, guided or not, without what it says beside it."""

    def denoiser(z_t: Images, t: Times) -> Images:
        answered = teacher(z_t, t)
        return answered.x_hat if isinstance(answered, Guided) else answered

    return denoiser
