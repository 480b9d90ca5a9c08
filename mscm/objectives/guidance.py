"""Distillation of guided diffusion, stage 1, arXiv:2210.03142: one network answers for every guidance weight.

  (1) w ~ U[low, high] per example,  t ~ U(0, 1)
  (2) L = distance(x_hat(z_t, t, w) - [(1 + w) x_cond - w x_null])

The student receives w as an input, so it is closed over w, and w is drawn before it:

  w = sample_guidance(k_w, batch)
  loss, metrics = guidance_loss(lambda z_t, t: student(z_t, t, w), conditional, unconditional, schedule, x, w, key)
"""

import jax

from mscm.objectives import distance as distances
from mscm.types import Denoiser, Distance, Images, Key, Metrics, PerExample, Schedule


def sample_guidance(key: Key, batch: int, *, low: float = 0.0, high: float = 4.0) -> PerExample:
    """Guidance weights of equation (1), independent; w = 0 is the conditional model. Consumes `key`."""
    if not low <= high:
        raise ValueError(f"got guidance weights from {low} to {high}, expected low <= high")
    return jax.random.uniform(key, (batch,), minval=low, maxval=high)


def guidance_loss(
    student: Denoiser,
    conditional: Denoiser,
    unconditional: Denoiser,
    schedule: Schedule,
    x: Images,
    w: PerExample,
    key: Key,
    *,
    distance: Distance = distances.truncated_snr_mse,
) -> tuple[PerExample, Metrics]:
    """Equation (2), one loss per example, for a student closed over `w`.

    `conditional` and `unconditional` are the teacher with and without its condition. Gradient flows through the
    student only. Consumes `key`. Metrics are per example: `logsnr`, `guidance`.
    """
    k_eps, k_t = jax.random.split(key)
    t = 1 - jax.random.uniform(k_t, (x.shape[0],))  # in (0, 1]: without bounds, t = 0 has no noise to weigh by
    lvl_t = schedule(t)
    z_t = lvl_t.alpha * x + lvl_t.sigma * jax.random.normal(k_eps, x.shape, x.dtype)
    x_cond, x_null = jax.lax.stop_gradient((conditional(z_t, t), unconditional(z_t, t)))
    x_target = x_cond + w[:, None, None, None] * (x_cond - x_null)
    return distance(student(z_t, t) - x_target, lvl_t), {"logsnr": lvl_t.logsnr[:, 0, 0, 0], "guidance": w}
