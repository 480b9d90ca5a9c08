"""The diffusion objective: regress the data from a noised copy (simple diffusion, arXiv:2301.11093)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from mscm.diffusion.schedule import traced_times_of_logsnr
from mscm.objectives import distance as distances
from mscm.types import Denoiser, Distance, Images, Key, Metrics, PerExample, Schedule, Times

_TAIL = 5.0  # standard deviations beyond which one example in millions would be


def diffusion_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Images,
    key: Key,
    *,
    times: Callable[[Times], Times] | None = None,
    distance: Distance = distances.v_mse,
) -> tuple[PerExample, Metrics]:
    """Distance of x_hat(z_t, t) to x, t uniform in (0, 1) and stratified over the batch.

    `times` makes other times of the uniform ones: the quantile function of their distribution.
    Consumes `key`. Metrics are per example: `logsnr`.
    """
    k_eps, k_t = jax.random.split(key)
    eps = jax.random.normal(k_eps, x.shape, x.dtype)
    t = stratified_times(k_t, x.shape[0])
    t = t if times is None else times(t)
    lvl_t = schedule(t)
    x_hat = denoiser(lvl_t.alpha * x + lvl_t.sigma * eps, t)
    return distance(x_hat - x, lvl_t), {"logsnr": lvl_t.logsnr[:, 0, 0, 0]}


def stratified_times(key: Key, batch: int) -> jax.Array:
    """One time in each of `batch` equal strata of (0, 1), in order: same marginal as uniform, less variance."""
    # In order, the first example of a batch is always the cleanest: harmless, because the examples are shuffled.
    return (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch


def lognormal_times(schedule: Schedule, uniform: Times, *, mean: float = -1.2, std: float = 1.2) -> Times:
    """Times at which log(sigma / alpha) is normal with `mean` and `std`: its quantiles; arXiv:2206.00364.

    What the schedule does not reach is at its nearer end.
    """
    log_noise = mean + std * jnp.clip(ndtri(uniform), -_TAIL, _TAIL)
    return traced_times_of_logsnr(schedule, -2 * log_noise)
