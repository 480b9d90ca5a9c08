"""Paths of samples through diffusion time, for looking at them: every state and not only the last.

A model of S steps takes S of them (Algorithm 2); a denoiser's probability-flow path is the limit of many.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mscm.diffusion import steps
from mscm.types import Array, Denoiser, Float, Images, Schedule


def ddim_path(denoiser: Denoiser, schedule: Schedule, z_1: Images, *, num_steps: int) -> Float[Array, "n b h w c"]:
    """States of `sampler.sample` at t = 1, (num_steps - 1) / num_steps, ..., 0, noise first; n = num_steps + 1.

    As there, `z_1` is standard noise, which the schedule scales, and the last state is x_hat of the last step.
    """
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}, expected at least 1 step")
    grid = jnp.asarray(np.arange(num_steps, -1, -1, dtype=np.float32) / np.float32(num_steps))

    def step(z_t: Images, times: tuple[Array, Array]) -> tuple[Images, Images]:
        t, s = (jnp.broadcast_to(time, z_1.shape[:1]) for time in times)
        x_hat = denoiser(z_t, t)
        z_s = jnp.where(times[1] > 0, steps.ddim(x_hat, z_t, schedule(t), schedule(s)), x_hat)
        return z_s, z_s

    first = schedule(jnp.ones(z_1.shape[:1])).sigma * z_1
    _, states = jax.lax.scan(step, first, (grid[:-1], grid[1:]))
    return jnp.concatenate([first[None], states])
