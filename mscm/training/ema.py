"""Exponential moving average of the parameters, from which images are sampled."""

import jax.numpy as jnp
import optax

from mscm.types import Array, Float, Int, Params


def decay_at(step: Int[Array, ""], *, decay: float, warmup: bool) -> Float[Array, ""]:
    """`decay`, or with `warmup` min(decay, (1 + step) / (10 + step)): short runs forget their first parameters."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else jnp.float32(decay)


def update(average: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1.0 - decay)
