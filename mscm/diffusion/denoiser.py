"""From a network and its parameters to a Denoiser: the float32 border, the prediction type, guidance and clipping.

Everything outside this file is float32 whatever the network computes in.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mscm.diffusion import prediction
from mscm.types import Array, Condition, Denoiser, Float, Guided, Images, Level, Schedule, Teacher, Times

# (z_t, log-SNR, condition or None) -> raw output
Network = Callable[[Images, Times, Condition | None], Images]
ToX = Callable[[Images, Images, Level], Images]


class Prediction(NamedTuple):
    """What a network's output means."""

    to_x: ToX
    c_in: Callable[[Level], Float[Array, "b 1 1 1"]] | None = None  # scale of its input; None: z_t as it is


PREDICTIONS: dict[str, Prediction] = {
    "x": Prediction(prediction.x_from_x),
    "eps": Prediction(prediction.x_from_eps),
    "v": Prediction(prediction.x_from_v),
    "edm": Prediction(prediction.x_from_edm, prediction.c_in),
}


def consistency_prediction(schedule: Schedule) -> Prediction:
    """EDM's preconditioning shifted so that the output at t = 0 is the input, as a consistency model's must be."""
    lvl_0 = schedule(jnp.zeros((1,)))
    u_0 = float((lvl_0.sigma / lvl_0.alpha)[0, 0, 0, 0])
    return Prediction(functools.partial(prediction.x_from_edm, u_0=u_0), prediction.c_in)


def make_denoiser(
    network: Network, schedule: Schedule, predicted: Prediction, *, condition: Condition | None = None
) -> Denoiser:
    """Denoiser (z_t, t) -> x_hat of a network whose output means what `predicted` says; the condition is fixed."""

    def denoiser(z_t: Images, t: Times) -> Images:
        lvl_t = schedule(t)
        scaled = z_t if predicted.c_in is None else predicted.c_in(lvl_t) * z_t
        output = network(scaled.astype(jnp.float32), lvl_t.logsnr[:, 0, 0, 0], condition)
        return predicted.to_x(output.astype(jnp.float32), z_t, lvl_t)

    return denoiser


def make_guided(
    network: Network,
    schedule: Schedule,
    predicted: Prediction,
    *,
    condition: Condition,
    null: Condition,
    guidance: float,
    interval: tuple[float, float] | None = None,
) -> Teacher:
    """Classifier-free guidance x = (1 + g) x_cond - g x_null with both forwards in one batch.

    `null`: what stands for no condition, as many rows as `condition`.

    Returns `Guided`, because the variance of aDDIM is that of the conditional output. With `interval`, the first and
    the last of the times that are guided (arXiv:2404.07724), the conditional output alone is the answer outside; where
    no image is inside, which a sampler's common time decides for all, one forward is all that is computed.
    """
    of_both = jax.tree.map(lambda *parts: jnp.concatenate(parts), condition, null)
    both = make_denoiser(network, schedule, predicted, condition=of_both)

    def guided(z_t: Images, t: Times) -> Guided:
        x_cond, x_null = jnp.split(both(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t])), 2)
        return Guided(x_cond + guidance * (x_cond - x_null), x_cond)

    if interval is None:
        return guided
    conditional = make_denoiser(network, schedule, predicted, condition=condition)

    def teacher(z_t: Images, t: Times) -> Guided:
        is_inside = (interval[0] <= t) & (t <= interval[1])

        def inside() -> Guided:
            x_hat, x_cond = guided(z_t, t)
            return Guided(jnp.where(is_inside[:, None, None, None], x_hat, x_cond), x_cond)

        def outside() -> Guided:
            x_cond = conditional(z_t, t)
            return Guided(x_cond, x_cond)

        return jax.lax.cond(jnp.any(is_inside), inside, outside)

    return teacher


def clipped(denoiser: Denoiser, *, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """x_hat clipped to the range of the data, as PD and SiD do while sampling."""
    return lambda z_t, t: jnp.clip(denoiser(z_t, t), low, high)


def dynamically_clipped(denoiser: Denoiser, *, quantile: float = 0.995) -> Denoiser:
    """x_hat clipped at the larger of 1 and a quantile of its own |x_hat|, and divided by it: Imagen, arXiv:2205.11487.

    Each image has a bound of its own.
    """

    def clip(z_t: Images, t: Times) -> Images:
        x_hat = denoiser(z_t, t)
        bound = jnp.maximum(jnp.quantile(jnp.abs(x_hat), quantile, axis=(1, 2, 3), keepdims=True), 1)
        return jnp.clip(x_hat, -bound, bound) / bound

    return clip


def gaussian_oracle(schedule: Schedule, variance: float | Float[Array, "h w c"], mean: float = 0.0) -> Denoiser:
    """E[x | z_t] for Gaussian data with independent scalars: the closed form that tests and demos use."""
    variance = jnp.broadcast_to(variance, (1, 1, 1, 1)) if isinstance(variance, int | float) else variance[None]

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
