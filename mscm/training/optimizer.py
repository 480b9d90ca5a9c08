"""The optimiser: an optax chain of clipping, Adam or RAdam, and a learning-rate schedule."""

import math

import jax.numpy as jnp
import optax

DECAYS = ("constant", "cosine", "linear")
RULES = {"adam": optax.scale_by_adam, "radam": optax.scale_by_radam}


def make_learning_rate(*, learning_rate: float, warmup_steps: int, decay: str, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine or a line to 0 at `num_steps`.

    Raises:
      ValueError: unknown decay, or a warm-up longer than the training.
    """
    if decay not in DECAYS:
        raise ValueError(f"optimizer.decay: got {decay!r}, expected one of {', '.join(DECAYS)}")
    if not learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate: got {learning_rate}, expected a number above 0")
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"optimizer.warmup_steps: got {warmup_steps}, expected 0 to train.num_steps = {num_steps}")
    rest = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
    }[decay]
    if warmup_steps == 0:
        return lambda step: jnp.asarray(after(step), jnp.float32)  # of a constant schedule optax gives Python's number
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])


def make_optimizer(
    learning_rate: optax.Schedule,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    """Clip the global norm (None: do not), then one of `RULES`, with decoupled weight decay where it is not 0.

    Raises:
      ValueError: an unknown name, or a number outside its range.
    """
    if name not in RULES:
        raise ValueError(f"optimizer.name: got {name!r}, expected one of {', '.join(RULES)}")
    limits = {"b1": (b1, 1.0), "b2": (b2, 1.0), "eps": (eps, math.inf), "weight_decay": (weight_decay, 1.0)}
    for field, (value, limit) in limits.items():
        if not 0 <= value < limit:
            raise ValueError(f"optimizer.{field}: got {value}, expected a number from 0 and below {limit}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"optimizer.clip_norm: got {clip_norm}, expected a number above 0, or None for no clipping")
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(
        *clip, RULES[name](b1=b1, b2=b2, eps=eps), *decay, optax.scale_by_learning_rate(learning_rate)
    )
