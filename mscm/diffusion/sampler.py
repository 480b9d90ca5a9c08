"""Samplers: scans of one step of `steps.py` from t = 1 to t = 0.

The times are t_j = j / num_steps, uniform on the model's own schedule. One step costs one evaluation of the denoiser
(NFE = num_steps exactly). The noise z_1 ~ N(0, I) is the caller's, so that two models can start from the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mscm.diffusion import steps
from mscm.types import Denoiser, Float, Images, Level, Schedule, Times

XVar = Callable[[Level], Times] | Float[jax.Array, "n"] | Float[np.ndarray, "n"]


def _times(num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (t, s) of every step, noisiest first; divided on the host, so that t = 1 and the seams are exact."""
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}, expected at least 1 sampling step")
    grid = np.arange(num_steps, -1, -1, dtype=np.float32) / np.float32(num_steps)
    return grid[:-1], grid[1:]


def sample(denoiser: Denoiser, schedule: Schedule, z_1: Images, *, num_steps: int) -> Images:
    """Plain DDIM from noise z_1: Algorithm 2, arXiv:2403.06807v3, with num_steps = student steps.

    The last step returns x_hat itself. Deterministic given z_1.
    """
    t, s = _times(num_steps)
    batch = z_1.shape[0]

    def step(z_t: Images, times: tuple[jax.Array, jax.Array]) -> tuple[Images, None]:
        t, s = (jnp.broadcast_to(time, (batch,)) for time in times)
        return steps.ddim(denoiser(z_t, t), z_t, schedule(t), schedule(s)), None

    z_last, _ = jax.lax.scan(step, z_1, (t[:-1], s[:-1]))
    return denoiser(z_last, jnp.full((batch,), t[-1]))


def sample_addim(
    denoiser: Denoiser,
    schedule: Schedule,
    z_1: Images,
    *,
    num_steps: int,
    x_var: XVar | None = None,
    denoise_final: bool = True,
) -> Images:
    """Adjusted DDIM: Algorithm 3, arXiv:2403.06807v3.

    Args:
      x_var: Var[x | z_t] per scalar: a function of the level (None: 0.1 / (2 + SNR)), or one number per step, noisiest
        first, measured on data.
      denoise_final: return x_hat at the end. The literal algorithm (False) adds sqrt(x_var) of noise-shaped residual
        in its last step, which is visible with one or two steps and vanishes with many.
    """
    t, s = _times(num_steps)
    batch = z_1.shape[0]
    if x_var is None:
        x_var = steps.analytic_x_var
    if not callable(x_var) and x_var.shape != (num_steps,):
        raise ValueError(f"got x_var of shape {x_var.shape}, expected one number for each of the {num_steps} steps")
    table = np.zeros(num_steps, np.float32) if callable(x_var) else x_var

    def step(z_t: Images, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Images, None]:
        t, s, tabulated = (jnp.broadcast_to(number, (batch,)) for number in inputs)
        lvl_t, lvl_s = schedule(t), schedule(s)
        variance = x_var(lvl_t) if callable(x_var) else tabulated
        return steps.addim(denoiser(z_t, t), variance, z_t, lvl_t, lvl_s), None

    scanned = num_steps - 1 if denoise_final else num_steps
    z_last, _ = jax.lax.scan(step, z_1, (t[:scanned], s[:scanned], table[:scanned]))
    return denoiser(z_last, jnp.full((batch,), t[-1])) if denoise_final else z_last
