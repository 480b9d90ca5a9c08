"""The diffusion objective: regress the data from a noised copy (simple diffusion, arXiv:2301.11093)."""

import jax
import jax.numpy as jnp

from mscm.objectives import distance as distances
from mscm.types import Denoiser, Distance, Images, Key, Metrics, PerExample, Schedule


def diffusion_loss(
    denoiser: Denoiser, schedule: Schedule, x: Images, key: Key, *, distance: Distance = distances.v_mse
) -> tuple[PerExample, Metrics]:
    """Distance of x_hat(z_t, t) to x, t uniform in (0, 1) and stratified over the batch.

    Consumes `key`. Metrics are per example: `logsnr`.
    """
    k_eps, k_t = jax.random.split(key)
    eps = jax.random.normal(k_eps, x.shape, x.dtype)
    t = stratified_times(k_t, x.shape[0])
    lvl_t = schedule(t)
    x_hat = denoiser(lvl_t.alpha * x + lvl_t.sigma * eps, t)
    return distance(x_hat - x, lvl_t), {"logsnr": lvl_t.logsnr[:, 0, 0, 0]}


def stratified_times(key: Key, batch: int) -> jax.Array:
    """One time in each of `batch` equal strata of (0, 1), in order: same marginal as uniform, less variance."""
    # In order, the first example of a batch is always the cleanest: harmless, because the examples are shuffled.
    return (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
