"""Progressive distillation, arXiv:2202.00512: each phase teaches a student one step for two of its teacher's.

With N student steps, i ~ U{1..N}, t = i / N, r = t - 1 / 2N, s = t - 1 / N:

  (1) z_r = DDIM_{t->r}(x_T(z_t, t), z_t),  z_s = DDIM_{r->s}(x_T(z_r, r), z_r)
  (2) target = invDDIM_{t->s}(z_s, z_t);  where s = 0, x_T(z_r, r), because there a sampler returns x_hat itself
  (3) L = distance(x_hat(z_t, t) - target)

Like the target of multistep consistency (its equations (5) and (6)), (2) is formed as a convex combination of the two
predictions. With aDDIM steps (the baseline of arXiv:2403.06807v3, Table 3) each step adds its correction:

  (4) target = w x_T(z_t, t) + (1 - w) x_T(z_r, r)
               + [(sigma_s / sigma_r) (c_r - sigma_r) eps_t + (c_s - sigma_s) eps_r] / A(t, s)
      w = (sigma_s / sigma_r) A(t, r) / A(t, s),  c - sigma = steps.addim_correction

The correction is for what a mean lacks of the variance of x given z_t. A diffusion model predicts means; a student does
not, and its difference to x is no such variance: corrected again in each phase, the samples become too wide (on a
Gaussian in a quarter of its dimensions, 64 steps halved to 1: 1.21 of the standard deviation). So only the first
phase, which learns from a diffusion model, takes (4), and the later ones (2); which of the two the baseline did is not
said, and `objective.later_solver = "same"` is the other.
"""

import jax
import jax.numpy as jnp

from mscm.diffusion import prediction, steps
from mscm.objectives import distance as distances
from mscm.objectives import multistep_consistency, solvers
from mscm.types import Denoiser, Distance, Images, Key, Metrics, PerExample, Schedule, Teacher, Times


def progressive_loss(
    student: Denoiser,
    teacher: Teacher,
    schedule: Schedule,
    x: Images,
    key: Key,
    *,
    student_steps: int,
    solver: solvers.Solver = solvers.ddim,
    distance: Distance = distances.truncated_snr_mse,
) -> tuple[PerExample, Metrics]:
    """One phase: equation (3), one loss per example.

    `solver` is how the teacher makes each of its 2 `student_steps` steps; with aDDIM the variance at both is measured
    against the example's own x. Gradient flows through the student only. Consumes `key`. Metrics are per example:
    `logsnr`, and `segment`, the student's step counted from the data.
    """
    if student_steps < 1:
        raise ValueError(f"got student_steps={student_steps}, expected at least 1")
    k_eps, k_step = jax.random.split(key)
    segment = jax.random.randint(k_step, (x.shape[0],), 0, student_steps)
    t, r, s = multistep_consistency.exact_times(2 * student_steps, 2 * segment + 2, 2 * segment + 1, 2 * segment)
    lvl_t = schedule(t)
    z_t = lvl_t.alpha * x + lvl_t.sigma * jax.random.normal(k_eps, x.shape, x.dtype)
    x_target = jax.lax.stop_gradient(target(teacher, schedule, x, z_t, t, r, s, solver=solver))
    return distance(student(z_t, t) - x_target, lvl_t), {"logsnr": lvl_t.logsnr[:, 0, 0, 0], "segment": segment}


def target(
    teacher: Teacher,
    schedule: Schedule,
    x: Images,
    z_t: Images,
    t: Times,
    r: Times,
    s: Times,
    *,
    solver: solvers.Solver = solvers.ddim,
) -> Images:
    """The x that carries z_t by one DDIM step to where the teacher's steps t -> r -> s carry it: (2) and (4)."""
    lvl_t, lvl_r, lvl_s = schedule(t), schedule(r), schedule(s)
    x_t, x_var_t = solver(teacher, x, z_t, t, r, lvl_t, lvl_r)
    z_r = steps.addim(x_t, x_var_t, z_t, lvl_t, lvl_r)
    x_r, x_var_r = solver(teacher, x, z_r, r, s, lvl_r, lvl_s)
    # The second step as a plain one is the self-teacher's of multistep consistency.
    combined = multistep_consistency.target(
        x_r, x_t, x_var_t, z_t, lvl_t, lvl_r, lvl_s, is_first=jnp.zeros(t.shape, bool)
    )
    eps = prediction.eps_from_x(x_r, z_r, lvl_r)
    eps_square = jnp.mean(jnp.square(eps), axis=(1, 2, 3), keepdims=True)
    correction = steps.addim_correction(x_var_r[:, None, None, None], eps_square, lvl_r, lvl_s)
    tail = correction / steps.ddim_coefficient(lvl_t, lvl_s) * eps
    return jnp.where((s == 0)[:, None, None, None], x_r, combined + tail)
