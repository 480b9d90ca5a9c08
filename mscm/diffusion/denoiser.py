"""From a network and its parameters to a Denoiser: the float32 border, the prediction type, guidance and clipping.

Everything outside this file is float32 whatever the network computes in.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mscm.diffusion import prediction
from mscm.types import Array, Denoiser, Float, Guided, Images, Labels, Level, Schedule, Teacher, Times

# (z_t, log-SNR, labels or None) -> raw output
Network = Callable[[Images, Times, Labels | None], Images]
ToX = Callable[[Images, Images, Level], Images]

PREDICTIONS: dict[str, ToX] = {
    "x": prediction.x_from_x,
    "eps": prediction.x_from_eps,
    "v": prediction.x_from_v,
}


def make_denoiser(network: Network, schedule: Schedule, to_x: ToX, *, labels: Labels | None = None) -> Denoiser:
    """Denoiser (z_t, t) -> x_hat of a network that predicts what `to_x` converts; labels are fixed."""

    def denoiser(z_t: Images, t: Times) -> Images:
        lvl_t = schedule(t)
        output = network(z_t.astype(jnp.float32), lvl_t.logsnr[:, 0, 0, 0], labels)
        return to_x(output.astype(jnp.float32), z_t, lvl_t)

    return denoiser


def make_guided(
    network: Network, schedule: Schedule, to_x: ToX, *, labels: Labels, null_label: int, guidance: float
) -> Teacher:
    """Classifier-free guidance x = (1 + g) x_cond - g x_null with both forwards in one batch.

    Returns `Guided`, because the variance of aDDIM is that of the conditional output.
    """
    both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
    both = make_denoiser(network, schedule, to_x, labels=both_labels)

    def teacher(z_t: Images, t: Times) -> Guided:
        x_cond, x_null = jnp.split(both(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t])), 2)
        return Guided(x_cond + guidance * (x_cond - x_null), x_cond)

    return teacher


def clipped(denoiser: Denoiser, *, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """x_hat clipped to the range of the data, as PD and SiD do while sampling."""
    return lambda z_t, t: jnp.clip(denoiser(z_t, t), low, high)


def gaussian_oracle(schedule: Schedule, variance: float | Float[Array, "h w c"], mean: float = 0.0) -> Denoiser:
    """E[x | z_t] for Gaussian data with independent scalars: the closed form that tests and demos use."""
    variance = jnp.broadcast_to(variance, (1, 1, 1, 1)) if jnp.ndim(variance) == 0 else variance[None]

    def denoiser(z_t: Images, t: Times) -> Images:
        alpha, sigma = schedule(t)
        gain = alpha * variance / (jnp.square(alpha) * variance + jnp.square(sigma))
        return mean + gain * (z_t - alpha * mean)

    return denoiser


def mixture_oracle(
    schedule: Schedule, *, means: Sequence[float], variances: Sequence[float], weights: Sequence[float]
) -> Denoiser:
    """E[x | z_t] for independent scalars of a Gaussian mixture: the components' posterior means by Bayes' rule.

        E[x | z] = sum_k p(k | z) (mean_k + gain_k (z - alpha mean_k)),  gain_k = alpha v_k / (alpha^2 v_k + sigma^2)
        p(k | z) proportional to weight_k N(z; alpha mean_k, alpha^2 v_k + sigma^2)
    """
    # The components are one axis more, the last.
    mean, variance, weight = (jnp.reshape(jnp.asarray(v), (1, 1, 1, 1, -1)) for v in (means, variances, weights))

    def denoiser(z_t: Images, t: Times) -> Images:
        alpha, sigma = (part[..., None] for part in schedule(t))
        spread = jnp.square(alpha) * variance + jnp.square(sigma)
        residual = z_t[..., None] - alpha * mean
        # By softmax: far from all components every density is 0 in float32.
        of_component = jax.nn.softmax(jnp.log(weight) - 0.5 * (jnp.log(spread) + jnp.square(residual) / spread))
        return jnp.sum(of_component * (mean + alpha * variance / spread * residual), axis=-1)

    return denoiser
