"""How a teacher steps from t to s, as the x and the x_var of the aDDIM step that lands where the solver lands.

A loss composes the teacher's step with DDIM steps. Knowing that x and not only z_s, it does so by convex combinations,
without the cancellation of solving for x afterwards (see multistep_consistency.py).
"""

from collections.abc import Callable

import jax.numpy as jnp

from mscm.diffusion import steps
from mscm.diffusion.prediction import x_hat_of
from mscm.objectives import distance as distances
from mscm.types import Guided, Images, Level, PerExample, Teacher, Times

# (teacher, x, z_t, t, s, lvl_t, lvl_s) -> (x_T, x_var); `x` is the data that z_t was made of.
Solver = Callable[[Teacher, Images, Images, Times, Times, Level, Level], tuple[Images, PerExample]]


def addim(
    teacher: Teacher, x: Images, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level, *, x_var_frac: float
) -> tuple[Images, PerExample]:
    """Adjusted DDIM with x_var = x_var_frac mean (x_T - x)^2, arXiv:2403.06807v3; one evaluation.

    Under guidance the step uses the guided output, the variance the conditional one.
    """
    del s, lvl_t, lvl_s
    answer = teacher(z_t, t)
    x_teacher, x_cond = answer if isinstance(answer, Guided) else (answer, answer)
    return x_teacher, x_var_frac * distances.mean_square(x_cond - x)


def ddim(
    teacher: Teacher, x: Images, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level
) -> tuple[Images, PerExample]:
    """DDIM, which is Euler's step in sigma / alpha; one evaluation."""
    del x, s, lvl_t, lvl_s
    return x_hat_of(teacher)(z_t, t), jnp.zeros_like(t)


def clipped_ddim(
    teacher: Teacher, x: Images, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level
) -> tuple[Images, PerExample]:
    """DDIM with x_hat, and so eps_hat, clipped to the range [-1, 1] of the data; one evaluation."""
    del x, s, lvl_t, lvl_s
    return jnp.clip(x_hat_of(teacher)(z_t, t), -1, 1), jnp.zeros_like(t)


def heun(
    teacher: Teacher, x: Images, z_t: Images, t: Times, s: Times, lvl_t: Level, lvl_s: Level
) -> tuple[Images, PerExample]:
    """Heun's step in sigma / alpha, arXiv:2206.00364; two evaluations."""
    del x
    x_teacher = steps.heun_prediction(x_hat_of(teacher), z_t, t, s, lvl_t, lvl_s)
    return x_teacher, jnp.zeros_like(t)
