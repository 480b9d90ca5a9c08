"""Consistency models (CM, arXiv:2303.01469) and their improved training (iCT, arXiv:2310.14189).

A grid of N points has N - 1 intervals: the points are t_i = i / (N - 1), i = 0 .. N - 1, on the schedule, so that the
first has the schedule's least noise and the last its most. With u = sigma / alpha, on interval i (levels t = t_{i+1},
s = t_i):

  (1) i ~ U{0 .. N-2} (CM), or p(i) ~ Phi((log u_{i+1} - m) / std) - Phi((log u_i - m) / std) (iCT), Phi the normal CDF
  (2) z_t = alpha_t x + sigma_t eps;  z_s = alpha_s x + sigma_s eps (training, CT), or a step of the teacher (CD)
  (3) L = weight(t, s) distance(f(z_t, t), sg f_ref(z_s, s))

Here f maps z_t to the SAMPLE AT t_0, so f(z, t_0) = z (up to alpha_0), and the network's preconditioning sees to that.
The denoiser x_hat of multistep consistency is what a DDIM step to t_0 uses: f(z_t, t) = DDIM_{t->t_0}(x_hat, z_t), or
x_hat = invDDIM_{t->t_0}(f, z_t). With that and one segment, multistep consistency training is (3) with weight
1 / A(t, t_0) in the norm. f_ref is f itself (iCT), or an average of its past parameters (CM).
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from mscm.diffusion import steps
from mscm.objectives import distance as distances
from mscm.objectives import solvers
from mscm.objectives.multistep_consistency import exact_times
from mscm.types import Array, Denoiser, Float, Images, Int, Key, Metrics, PerExample, Schedule, Teacher, Times


def consistency_model_loss(
    student: Denoiser,
    teacher: Teacher | None,
    schedule: Schedule,
    x: Images,
    key: Key,
    *,
    grid_points: int | Int[Array, ""],
    reference: Denoiser | None = None,
    solver: solvers.Solver = solvers.ddim,
    log_weights: Float[Array, "m"] | None = None,
    weight: distances.IntervalWeight | None = None,
    distance: distances.ImageDistance = distances.squared_l2,
) -> tuple[PerExample, Metrics]:
    """Equation (3): one loss per example.

    Args:
      student: f of equation (3); in both of its calls with the same dropout masks, i.e. closed over one dropout key.
      teacher: a denoiser, for distillation; None trains on the data itself.
      grid_points: N, possibly traced.
      reference: f_ref; None is the student itself.
      solver: how the teacher steps from t to s: solvers.ddim is Euler's step.
      log_weights: log p(i) of equation (1), such as `lognormal_log_weights`; None is uniform.
      weight: a factor for each interval; None is 1.
      distance: of f and f_ref; a feature distance is another such function.

    Gradient flows through student(z_t, t) only. Consumes `key`. Metrics are per example: `logsnr`.
    """
    k_eps, k_interval = jax.random.split(key)
    t, s = sample_interval(k_interval, x.shape[0], grid_points=grid_points, log_weights=log_weights)
    lvl_t, lvl_s = schedule(t), schedule(s)
    eps = jax.random.normal(k_eps, x.shape, x.dtype)
    z_t = lvl_t.alpha * x + lvl_t.sigma * eps
    if teacher is None:
        z_s = lvl_s.alpha * x + lvl_s.sigma * eps
    else:
        x_teacher, x_var = solver(teacher, x, z_t, t, s, lvl_t, lvl_s)
        z_s = steps.addim(x_teacher, x_var, z_t, lvl_t, lvl_s)
    f_ref = jax.lax.stop_gradient((reference or student)(z_s, s))
    loss = distance(student(z_t, t), f_ref)
    if weight is not None:
        loss = weight(lvl_t, lvl_s) * loss
    return loss, {"logsnr": lvl_t.logsnr[:, 0, 0, 0]}


def sample_interval(
    key: Key, batch: int, *, grid_points: int | Int[Array, ""], log_weights: Float[Array, "m"] | None = None
) -> tuple[Times, Times]:
    """Times (t, s) of the two ends of an interval of equation (1); integers first, so that the ends are exact."""
    if isinstance(grid_points, int) and grid_points < 2:
        raise ValueError(f"got grid_points={grid_points}, expected at least 2, which have one interval between them")
    if log_weights is None:
        index = jax.random.randint(key, (batch,), 0, grid_points - 1)
    else:
        index = jax.random.categorical(key, log_weights, shape=(batch,))
    t, s = exact_times(grid_points - 1, index + 1, index)
    return t, s


def lognormal_log_weights(
    schedule: Schedule, grid_points: int | Int[Array, ""], *, max_points: int, mean: float = -1.1, std: float = 2.0
) -> Float[Array, "m"]:
    """log p(i) of equation (1): log u normal with `mean` and `std`, discretised on the grid; arXiv:2310.14189.

    There are `max_points` - 1 entries, of which those from `grid_points` - 1 on are -inf: the array keeps its shape
    while a traced `grid_points` grows to at most `max_points`.
    """
    if isinstance(grid_points, int) and not 2 <= grid_points <= max_points:
        raise ValueError(f"got grid_points={grid_points}, expected 2 to max_points={max_points}")
    index = jnp.arange(max_points)
    (t,) = exact_times(grid_points - 1, jnp.minimum(index, grid_points - 1))
    normal = (-0.5 * schedule(t).logsnr[:, 0, 0, 0] - mean) / std
    low, high = normal[:-1], normal[1:]
    # Phi(high) - Phi(low) = Phi(-low) - Phi(-high): in the upper tail both are near 1 and their difference cancels.
    mirrored = low + high > 0
    low, high = jnp.where(mirrored, -high, low), jnp.where(mirrored, -low, high)
    log_mass = jnp.log(ndtr(high) - ndtr(low))
    return jax.nn.log_softmax(jnp.where(index[:-1] < grid_points - 1, log_mass, -jnp.inf))
