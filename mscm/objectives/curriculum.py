"""How the number of teacher steps grows during training."""

import jax.numpy as jnp

from mscm.types import Array, Float, Int


def teacher_steps(
    step: int | Int[Array, ""], *, start: float, end: float, anneal_steps: int
) -> Float[Array, ""]:
    """Real-valued N(i): log-linear from `start` to `end` over `anneal_steps` iterations, then constant.

    Section 5 of arXiv:2403.06807v3 (64 to 1280 over 100 000). `anneal_steps` = 0 is `end` from the first step on.
    """
    fraction = jnp.clip(step / anneal_steps, 0.0, 1.0) if anneal_steps else jnp.float32(1.0)
    return jnp.exp(jnp.log(start) + fraction * (jnp.log(end) - jnp.log(start)))
