"""How the number of teacher steps, or of grid points, changes during training."""

import math

import jax.numpy as jnp
import numpy as np

from mscm.types import Array, Float, Int


def teacher_steps(
    step: int | Int[Array, ""], *, start: float, end: float, anneal_steps: int
) -> Float[Array, ""]:
    """Real-valued N(i): log-linear from `start` to `end` over `anneal_steps` iterations, then constant.

    Section 5 of arXiv:2403.06807v3 (64 to 1280 over 100 000). `anneal_steps` = 0 is `end` from the first step on.
    """
    fraction = jnp.clip(step / anneal_steps, 0.0, 1.0) if anneal_steps else jnp.float32(1.0)
    return jnp.exp(jnp.log(start) + fraction * (jnp.log(end) - jnp.log(start)))


def constant_grid_points(step: int | Int[Array, ""], *, points: int, num_steps: int) -> Int[Array, ""]:
    """N(k) of consistency distillation: `points`, whatever `num_steps` are; arXiv:2303.01469."""
    del num_steps
    if type(points) is not int or points < 2:
        raise ValueError(f"got points={points!r} of a grid, expected a whole number of at least 2")
    return jnp.full_like(step, points)


def cm_grid_points(step: int | Int[Array, ""], *, start: int, end: int, num_steps: int) -> Int[Array, ""]:
    """N(k) of consistency training: ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1; arXiv:2303.01469.

    From s0 = `start` grid points to s1 + 1 = `end` + 1 at k = K = `num_steps`, then constant.
    """
    if not 2 <= start <= end:
        raise ValueError(f"got start={start} and end={end} grid points, expected 2 <= start <= end")
    # N(k) is the root rounded up: s0 plus the number of j in s0 .. s1 below the root, which j is for
    # k > K (j^2 - s0^2) / span. Integers on the host: a root that rounding puts just above j would count j too early.
    span = (end + 1) ** 2 - start**2
    passed_after = [num_steps * (j**2 - start**2) // span for j in range(start, end + 1)]
    return start + jnp.searchsorted(jnp.asarray(np.array(passed_after, np.int32)), step, side="left")


def cm_target_decay(grid_points: int | Int[Array, ""], *, start: int, start_decay: float) -> Float[Array, ""]:
    """mu(k) = exp(s0 log(mu0) / N(k)), the decay of f_ref's average; arXiv:2303.01469. mu = mu0 where N = s0."""
    return jnp.power(jnp.float32(start_decay), start / jnp.asarray(grid_points, jnp.float32))


def ict_grid_points(step: int | Int[Array, ""], *, start: int, end: int, num_steps: int) -> Int[Array, ""]:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)); arXiv:2310.14189.

    s0 = `start` and s1 = `end` are numbers of intervals, K = `num_steps`.
    """
    if not 1 <= start <= end:
        raise ValueError(f"got start={start} and end={end} intervals, expected 1 <= start <= end")
    stage_steps = math.floor(num_steps / (math.log2(end // start) + 1))
    if stage_steps < 1:
        raise ValueError(f"got num_steps={num_steps}, expected at least one step for each doubling of {start} to {end}")
    num_doublings = (-(-end // start) - 1).bit_length()  # the least that reach the end
    doublings = jnp.minimum(jnp.asarray(step) // stage_steps, num_doublings)
    return jnp.minimum(start * 2**doublings, end) + 1
