"""Multistep consistency training and distillation: Algorithm 1 of arXiv:2403.06807v3.

Cut [0, 1] into S segments. One network f(z, t) -> x_hat is, in each segment, a consistency model whose one DDIM step
from t must land on the start tau of that segment, wherever in the segment t is. With N(i) teacher steps,
n = max(1, round(N / S)) of them in each segment, and T = n S:

  (1) k ~ U{0..S-1},  m ~ U{1..n},  tau = k / S,  t = tau + m / T,  s = t - 1 / T          (m is the paper's n_rel)
  (2) z_s = aDDIM_{t->s}(x_T, z_t, x_var),  x_var = 0.75 mean (x_T - x)^2
      x_T = x in consistency training (then x_var = 0), x_T = teacher(z_t, t) in distillation
      (or what another solver's step from z_t to s amounts to: solvers.py)
  (3) x_ref = sg f(z_s, s),  x_hat = f(z_t, t)                                           same parameters, same dropout
  (4) target = invDDIM_{t->tau}(DDIM_{s->tau}(x_ref, z_s), z_t),  L = distance(x_hat - target)

Composing the steps of (4) gives a convex combination, with A(a, b) the DDIM coefficient of `steps`:

  (5) w      = (sigma_tau / sigma_s) A(t, s) / A(t, tau)                                  in [0, 1]; 1 where s = tau
  (6) target = (1 - w) x_ref + w x_T + (sigma_tau / sigma_s) (c - sigma_s) / A(t, tau) eps_T
      with c - sigma_s = steps.addim_correction

which this file uses: in float32 the literal chain divides rounding errors by A(t, tau), which shrinks with T; the
convex form stays below 1e-6 of the exact target at T = 1280, far below the paper's Huber epsilon of 1e-4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mscm.diffusion import prediction, steps
from mscm.objectives import distance as distances
from mscm.objectives import solvers
from mscm.types import (
    Array,
    Denoiser,
    Distance,
    Float,
    Images,
    Int,
    Key,
    Level,
    Metrics,
    PerExample,
    Schedule,
    Teacher,
    Times,
)


class Grid(NamedTuple):
    """The times of equation (1), one per example; `segment` is k and `n_rel` is m."""

    t: Times
    s: Times
    t_step: Times
    segment: Int[Array, "b"]
    n_rel: Int[Array, "b"]


def consistency_loss(
    student: Denoiser,
    teacher: Teacher | None,
    schedule: Schedule,
    x: Images,
    key: Key,
    *,
    student_steps: int,
    teacher_steps: float | Float[Array, ""],
    self_teacher: Denoiser | None = None,
    x_var_frac: float = 0.75,
    solver: solvers.Solver | None = None,
    huber_epsilon: float = 1e-4,
    distance: Distance | None = None,
) -> tuple[PerExample, Metrics]:
    """Algorithm 1, arXiv:2403.06807v3: one loss per example.

    `teacher` None trains on the data itself (consistency training). The student must use the same dropout masks in both
    of its calls, i.e. be closed over one dropout key. Gradient flows through student(z_t, t) only. `teacher_steps` is
    N(i), real and possibly traced. `self_teacher` gives x_ref: None is the student itself, TRACT takes an average of
    it. `solver` is how the teacher steps from t to s, by default aDDIM with `x_var_frac`. `distance` defaults to the
    pseudo-Huber of `huber_epsilon` (H1 of distance.py).
    Consumes `key`. Metrics are per example: `logsnr`, `segment`.
    """
    self_teacher = self_teacher or student
    solver = solver or functools.partial(solvers.addim, x_var_frac=x_var_frac)
    distance = distance or functools.partial(distances.pseudo_huber, epsilon=huber_epsilon)
    k_eps, k_grid = jax.random.split(key)
    grid = sample_grid(k_grid, x.shape[0], student_steps=student_steps, teacher_steps=teacher_steps)
    lvl_t, lvl_s, lvl_step = schedule(grid.t), schedule(grid.s), schedule(grid.t_step)

    z_t = lvl_t.alpha * x + lvl_t.sigma * jax.random.normal(k_eps, x.shape, x.dtype)
    if teacher is None:
        x_teacher, x_var = x, jnp.zeros(x.shape[0], x.dtype)
    else:
        x_teacher, x_var = jax.lax.stop_gradient(solver(teacher, x, z_t, grid.t, grid.s, lvl_t, lvl_s))
    z_s = steps.addim(x_teacher, x_var, z_t, lvl_t, lvl_s)

    x_ref = jax.lax.stop_gradient(self_teacher(z_s, grid.s))
    x_hat = student(z_t, grid.t)
    x_target = target(x_ref, x_teacher, x_var, z_t, lvl_t, lvl_s, lvl_step, is_first=grid.n_rel == 1)
    loss = distance(x_hat - x_target, lvl_t)
    return loss, {"logsnr": lvl_t.logsnr[:, 0, 0, 0], "segment": grid.segment}


def sample_grid(key: Key, batch: int, *, student_steps: int, teacher_steps: float | Float[Array, ""]) -> Grid:
    """Segments and times of equation (1), T = n S; integers first, so that the seams are exact."""
    if student_steps < 1:
        raise ValueError(f"got student_steps={student_steps}, expected at least 1 segment")
    per_segment = jnp.maximum(1, jnp.round(jnp.asarray(teacher_steps) / student_steps)).astype(jnp.int32)
    k_segment, k_rel = jax.random.split(key)
    segment = jax.random.randint(k_segment, (batch,), 0, student_steps)
    n_rel = jax.random.randint(k_rel, (batch,), 1, per_segment + 1)
    start = segment * per_segment
    t, s, t_step = exact_times(per_segment * student_steps, start + n_rel, start + n_rel - 1, start)
    return Grid(t, s, t_step, segment, n_rel)


def exact_times(total: int | Int[Array, ""], *indices: Int[Array, "b"]) -> tuple[Times, ...]:
    """index / total, correctly rounded, for each of `indices`; `total` may be traced."""
    # One total per example, behind a barrier: XLA turns division by a known or a shared number into a product with its
    # rounded inverse.
    total = jax.lax.optimization_barrier(jnp.broadcast_to(total, indices[0].shape)).astype(jnp.float32)
    return tuple((index / total).astype(jnp.float32) for index in indices)


def target(
    x_ref: Images,
    x_teacher: Images,
    x_var: Float[Array, "b"],
    z_t: Images,
    lvl_t: Level,
    lvl_s: Level,
    lvl_step: Level,
    *,
    is_first: Array,
) -> Images:
    """The x that carries z_t by one DDIM step to where x_ref carries z_s: equations (5) and (6).

    Where `is_first` (s = t_step) the student's own prediction has weight exactly 0: the anchor in the teacher.
    """
    is_first = is_first[:, None, None, None]
    to_step = steps.ddim_coefficient(lvl_t, lvl_step)
    shrink = jnp.where(is_first, 1.0, lvl_step.sigma / lvl_s.sigma)  # a schedule without bounds has 0 / 0 at t = 0
    weight = jnp.where(is_first, 1.0, shrink * steps.ddim_coefficient(lvl_t, lvl_s) / to_step)
    # f(z_s, s) at s = t_step belongs to the segment below and may be anything: 0 * nan is nan, so select.
    x_ref = jnp.where(is_first, x_teacher, x_ref)
    eps = prediction.eps_from_x(x_teacher, z_t, lvl_t)
    eps_square = jnp.mean(jnp.square(eps), axis=(1, 2, 3), keepdims=True)
    tail = shrink / to_step * steps.addim_correction(x_var[:, None, None, None], eps_square, lvl_t, lvl_s) * eps
    return (1 - weight) * x_ref + weight * x_teacher + tail
