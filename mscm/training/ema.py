"""Exponential moving average of the parameters, from which images are sampled."""

import math

import jax.numpy as jnp
import optax

from mscm.types import Array, Float, Int, Params


def decay_at(step: Int[Array, ""], *, decay: float, warmup: bool) -> Float[Array, ""]:
    """`decay`, or with `warmup` min(decay, (1 + step) / (10 + step)): short runs forget their first parameters."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else jnp.float32(decay)


def bias_corrected_decay(step: Int[Array, ""], *, decay: float) -> Float[Array, ""]:
    """1 - a_i with a_i = (1 - decay) / (1 - decay^i), i = `step` + 1: TRACT's average, arXiv:2303.04248.

    The average is that of all updates with weights decay^age, so the first is a copy of the parameters.
    """
    if decay == 0:
        return jnp.float32(0.0)
    log_decay = math.log(decay)
    return decay * jnp.expm1(step * log_decay) / jnp.expm1((step + 1) * log_decay)


def update(average: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1.0 - decay)
