"""The training step: the only gradient of the project.

A step is pure: (state, frozen parameters, batch, root key) -> (state, metrics). Its randomness is fold_in(root, step),
so it depends on the step's number and not on how the run got there.
"""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from mscm.training import ema as ema_lib
from mscm.types import Array, Float, Int, Key, Metrics, Params, PerExample

Batch = Mapping[str, Array]
# (params, target, frozen, batch, key, step) -> (one loss per example, per-example metrics)
LossFn = Callable[[Params, Params, Params, Batch, Key, Int[Array, ""]], tuple[PerExample, Metrics]]
# step -> how much of the target network stays when the parameters of that step are averaged in
TargetDecay = Callable[[Int[Array, ""]], Float[Array, ""]]
Averages = dict[str, clu_metrics.Average]

# Edges of the log-SNR bands in which the loss is reported.
LOGSNR_EDGES = (-6.0, -3.0, 0.0, 3.0, 6.0)


class TrainState(NamedTuple):
    """What training changes; `step` counts finished optimiser steps."""

    step: Int[Array, ""]
    params: Params
    ema: Params  # from which images are sampled
    opt_state: Any
    target: Params = {}  # of the loss: a short average; nothing where the loss has none of its own
    further: Mapping[str, Params] = {}  # averages beside `ema`, by name


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    has_target: bool = False,
    further: Iterable[str] = (),
) -> TrainState:
    """State before the first step; the averages are copies, because the state is donated as a whole."""
    ema, target = (jax.tree.map(jnp.copy, params) if wanted else {} for wanted in (True, has_target))
    averages = {name: jax.tree.map(jnp.copy, params) for name in further}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), target, averages)


def make_train_steps(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    update_ema: ema_lib.Update,
    num_segments: int | None,
    target_decay: TargetDecay | None = None,
    further: Mapping[str, ema_lib.Update] = types.MappingProxyType({}),
    num_microbatches: int = 1,
    skips_bad_steps: bool = False,
    **jit_options: Any,
) -> jax.stages.Wrapped:
    """Several optimiser steps as one jitted function with donated state; `jit_options` are its shardings.

    (state, frozen, batches, root key) -> (TrainState, Averages).

    The batches carry a leading axis, one entry per step; the metrics are sums and counts over all of them. Each batch
    is taken in `num_microbatches` parts one after the other, whose gradients are averaged: activations of one part are
    in memory at a time.

    With `skips_bad_steps` one whose loss or gradient is not finite changes nothing but the number of the step, and
    nothing is measured of it; `skipped_steps` says which they were: one entry per step, because those in a row count.
    """

    def one_step(state: TrainState, frozen: Params, batch: Batch, root: Key) -> tuple[TrainState, Averages]:
        key = jax.random.fold_in(root, state.step)

        def mean_loss(params: Params, batch: Batch, key: Key) -> tuple[Array, tuple[PerExample, Metrics]]:
            loss, metrics = loss_fn(params, state.target, frozen, batch, key, state.step)
            return jnp.mean(loss), (loss, metrics)

        gradient_of = jax.grad(mean_loss, has_aux=True)
        if num_microbatches == 1:
            gradient, (loss, metrics) = gradient_of(state.params, batch, key)
        else:
            gradient, (loss, metrics) = accumulate(functools.partial(gradient_of, state.params), batch, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = summarize(loss, metrics, num_segments=num_segments)
        averages["gradient_norm"] = _average(optax.tree.norm(gradient))
        averages["learning_rate"] = _average(learning_rate(state.step))
        ema, target = update_ema(state.ema, params, state.step), state.target
        if target_decay is not None:
            target = ema_lib.update(target, params, target_decay(state.step))
        averaged = {name: average(state.further[name], params, state.step) for name, average in further.items()}
        after = TrainState(state.step + 1, params, ema, opt_state, target, averaged)
        if not skips_bad_steps:
            return after, averages
        is_good = jnp.isfinite(averages["loss"].total) & jnp.isfinite(averages["gradient_norm"].total)
        after = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), after, state._replace(step=after.step))
        averages = jax.tree.map(lambda sums: jnp.where(is_good, sums, jnp.zeros_like(sums)), averages)
        return after, averages | {"skipped_steps": _average(~is_good)}

    def accumulate(gradient_of: Callable[[Batch, Key], Any], batch: Batch, key: Key) -> Any:
        # Part j takes every k-th row from the j-th, so that it lies on the devices as the whole batch does.
        parts = jax.tree.map(lambda a: a.reshape(-1, num_microbatches, *a.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Params, part: tuple[Batch, Array]) -> tuple[Params, tuple[PerExample, Metrics]]:
            rows, j = part
            gradient, values = gradient_of(rows, jax.random.fold_in(key, j))
            return jax.tree.map(jnp.add, total, gradient), values

        abstract, _ = jax.eval_shape(gradient_of, jax.tree.map(lambda a: a[0], parts), key)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
        total, values = jax.lax.scan(add, zero, (parts, jnp.arange(num_microbatches)))
        # One value an example, or one for the whole part.
        values = jax.tree.map(lambda a: a.reshape(-1) if a.ndim == 2 else jnp.mean(a), values)
        return jax.tree.map(lambda g: g / num_microbatches, total), values

    def steps(state: TrainState, frozen: Params, batches: Batch, root: Key) -> tuple[TrainState, Averages]:
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            # No loop around one step: in one, XLA's CPU backend takes 30 times as long for the gradient of a
            # convolution that is not written for it as those of `models/layers.py` are, such as a feature distance's.
            return one_step(state, frozen, jax.tree.map(lambda batch: batch[0], batches), root)
        state, averages = jax.lax.scan(lambda state, batch: one_step(state, frozen, batch, root), state, batches)
        totals = {name: jax.tree.map(lambda sums: jnp.sum(sums, axis=0), a) for name, a in averages.items()}
        return state, totals | {name: a for name, a in averages.items() if name == "skipped_steps"}

    return jax.jit(steps, donate_argnums=0, **jit_options)


def summarize(loss: PerExample, metrics: Metrics, *, num_segments: int | None) -> Averages:
    """Sums and counts of the loss, over the batch, per segment and per log-SNR band; scalars pass as they are."""
    averages = {"loss": _average(loss)}
    band = jnp.searchsorted(jnp.asarray(LOGSNR_EDGES), metrics["logsnr"], side="right")
    for i, name in enumerate(band_names()):
        averages[f"loss_logsnr/{name}"] = _average(loss, band == i)
    for k in range(num_segments or 0):
        averages[f"loss_segment/{k}"] = _average(loss, metrics["segment"] == k)
    for name, value in metrics.items():
        if value.ndim == 0:
            averages[name] = _average(value)
    return averages


def band_names() -> list[str]:
    """Names of the log-SNR bands, noisiest first, such as `-3_to_0`."""
    edges = [f"{edge:g}" for edge in LOGSNR_EDGES]
    inner = [f"{low}_to_{high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return [f"below_{edges[0]}", *inner, f"above_{edges[-1]}"]


def _average(values: Array, mask: Array | None = None) -> clu_metrics.Average:
    values = jnp.atleast_1d(values)
    return clu_metrics.Average.from_model_output(values, mask)
