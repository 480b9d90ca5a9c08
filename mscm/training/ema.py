"""Averages of the parameters over training: exponential, from one of which images are sampled, and power functions.

A power-function average (arXiv:2312.02696, section 3.1) has a length that grows with training. After t steps it is

    average_t = sum_{i <= t} w_i params_i,   w_i = (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1)           (1)

a weight proportional to i^gamma, kept by average_t = beta average_{t - 1} + (1 - beta) params_t with

    beta = (1 - 1 / t)^(gamma + 1)                                                                                  (2)

so that the parameters before the first step have no weight. Its length is told by the standard deviation of the weight
over t, sigma_rel, because that does not depend on t:

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                                                         (3)
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mscm.types import Array, Float, Int, Params

# (average, parameters after a step, number of the step, from 0) -> average
Update = Callable[[Params, Params, Int[Array, ""]], Params]

MAX_SIGMA_REL = 12**-0.5  # of gamma = 0: all steps have the same weight


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


def exponential(*, decay: float, warmup: bool) -> Update:
    """The average that `decay_at` describes."""

    def updated(average: Params, params: Params, step: Int[Array, ""]) -> Params:
        return update(average, params, decay_at(step, decay=decay, warmup=warmup))

    return updated


def power(*, sigma_rel: float) -> Update:
    """The power-function average of a length; of a step that was skipped, the weight goes to the steps before it."""
    gamma = gamma_of(sigma_rel)

    def updated(average: Params, params: Params, step: Int[Array, ""]) -> Params:
        # By the difference: late in training beta is so near 1 that float32 has few digits of what is missing.
        weight = power_weight(step, gamma=gamma)
        return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)

    return updated


def power_weight(step: Int[Array, ""], *, gamma: float) -> Float[Array, ""]:
    """1 - beta of equation (2) at t = `step` + 1, which is 1 at the first step."""
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1.0)))


@functools.lru_cache(maxsize=64)
def gamma_of(sigma_rel: float) -> float:
    """gamma of equation (3), at least 0: the largest root of the cubic that it is.

    Raises:
      ValueError: no such average.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"got sigma_rel = {sigma_rel}, expected a number above 0 and at most {MAX_SIGMA_REL:.4f}")
    inverse = float(sigma_rel) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))
