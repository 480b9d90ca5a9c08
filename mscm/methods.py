"""Objectives by their names in a config: what each reads of its section, and the loss that it makes of it.

A new objective is one builder here, `(section, parts) -> Method`, in `OBJECTIVES`; its mathematics is a function of
denoisers in `mscm/objectives/`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mscm.config import ConfigError, Section
from mscm.data import transforms
from mscm.diffusion import denoiser as denoisers
from mscm.objectives import curriculum
from mscm.objectives import distance as distances
from mscm.objectives.diffusion import diffusion_loss
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.training.step import Batch, LossFn, TargetDecay
from mscm.types import Array, Denoiser, Distance, Images, Int, Key, Labels, Params, PerExample, Schedule, Teacher, Times

DIFFUSION_LOSSES: dict[str, Distance] = {"v_mse": distances.v_mse, "eps_mse": distances.eps_mse}
CONSISTENCY_DISTANCES: dict[str, Callable[..., PerExample]] = {
    "pseudo_huber": distances.pseudo_huber,
    "pseudo_huber_weighted": distances.pseudo_huber_weighted,
    "charbonnier": distances.charbonnier,
    "v_mse": lambda diff, lvl_t, *, epsilon: distances.v_mse(diff, lvl_t),
}

# (parameters, labels, guidance weights where they are an input) -> what the teacher answers
Answer = Callable[[Params, Labels, Times | None], Teacher]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an objective is made of beside its own section."""

    model: nn.Module
    schedule: Schedule
    prediction: denoisers.Prediction
    resolution: int
    num_classes: int
    flip: bool
    num_steps: int  # of the training
    teacher: Answer | None  # None: there is none
    guidance_range: tuple[float, float] | None  # of the weights that are an input of the teacher; None: they are not


@dataclasses.dataclass(frozen=True)
class Method:
    """What an objective decides."""

    loss_fn: LossFn
    student_steps: int | None = None  # None: a diffusion model
    distil: bool = False  # whether training calls the teacher
    has_segments: bool = False  # whether the loss says in which of `student_steps` segments an example is
    target_decay: TargetDecay | None = None  # None: the loss has no target network
    guidance_range: tuple[float, float] | None = None  # of the weights that are an input; None: they are not


class Example(NamedTuple):
    """A batch as a loss sees it, and keys that nobody has used."""

    x: Images
    labels: Labels
    guidance: Times | None
    k_dropout: Key
    keys: tuple[Key, Key]


def network(
    model: nn.Module, params: Params, *, guidance: Times | None = None, dropout_key: Key | None = None
) -> denoisers.Network:
    """The network as a function; with a key it drops out, the same units in every call (synchronised dropout)."""

    def apply(z_t, logsnr, labels):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        inputs = (z_t, logsnr, labels) if guidance is None else (z_t, logsnr, labels, guidance)
        return model.apply({"params": params}, *inputs, train=dropout_key is not None, rngs=rngs)

    return apply


def _example(parts: Parts, guidance_range: tuple[float, float] | None, batch: Batch, key: Key) -> Example:
    k_flip, k_dropout, *keys, k_guidance = jax.random.split(key, 5)
    x = transforms.to_float(batch["image"])
    x = transforms.random_flip(x, k_flip) if parts.flip else x
    guidance = None
    if guidance_range is not None:
        low, high = guidance_range
        guidance = jax.random.uniform(k_guidance, x.shape[:1], minval=low, maxval=high)
    return Example(x, batch["label"], guidance, k_dropout, tuple(keys))


def _denoiser(parts: Parts, params: Params, example: Example) -> Denoiser:
    """In training: with dropout."""
    function = network(parts.model, params, guidance=example.guidance, dropout_key=example.k_dropout)
    return denoisers.make_denoiser(function, parts.schedule, parts.prediction, labels=example.labels)


def _scaled(section: Section, distance: Distance, parts: Parts) -> Distance:
    """`distance`, on several scales where the section says so."""
    if section.take("multiscale") is None:
        return distance
    resolutions = section.whole_numbers("multiscale")
    odd = [resolution for resolution in resolutions if parts.resolution % resolution]
    if odd:
        raise ConfigError(
            f"config.objective.multiscale: got {odd[0]}, expected divisors of data.resolution = {parts.resolution}"
        )
    return distances.multiscale(distance, resolutions)


def _diffusion(section: Section, parts: Parts) -> Method:
    distance = _scaled(section, section.choose("loss", DIFFUSION_LOSSES), parts)
    label_dropout = section.number("label_dropout", minimum=0.0, below=1.0)

    def loss_fn(params: Params, target: Params, frozen: Params, batch: Batch, key: Key, step: Int[Array, ""]):
        del target, frozen, step
        example = _example(parts, None, batch, key)
        k_label, k_loss = example.keys
        if label_dropout:
            dropped = jax.random.bernoulli(k_label, label_dropout, example.labels.shape)
            example = example._replace(labels=jnp.where(dropped, parts.num_classes, example.labels))
        return diffusion_loss(
            _denoiser(parts, params, example), parts.schedule, example.x, k_loss, distance=distance
        )

    return Method(loss_fn)


def _multistep_consistency(section: Section, parts: Parts) -> Method:
    student_steps, distil = section.number("student_steps", minimum=1), bool(section.take("distil"))
    distance = functools.partial(
        section.choose("distance", CONSISTENCY_DISTANCES), epsilon=section.number("huber_epsilon", minimum=0.0)
    )
    distance = _scaled(section, distance, parts)
    grows = section.section("teacher_steps")
    teacher_steps = functools.partial(
        curriculum.teacher_steps,
        start=grows.number("start", minimum=1),
        end=grows.number("end", minimum=1),
        anneal_steps=grows.number("anneal_steps", minimum=0),
    )
    x_var_frac = section.number("x_var_frac", minimum=0.0)

    def loss_fn(params: Params, target: Params, frozen: Params, batch: Batch, key: Key, step: Int[Array, ""]):
        del target
        example = _example(parts, parts.guidance_range, batch, key)
        current_steps = teacher_steps(step)
        loss, metrics = consistency_loss(
            _denoiser(parts, params, example),
            parts.teacher(frozen, example.labels, example.guidance) if distil else None,
            parts.schedule,
            example.x,
            example.keys[0],
            student_steps=student_steps,
            teacher_steps=current_steps,
            x_var_frac=x_var_frac,
            distance=distance,
        )
        return loss, {**metrics, "teacher_steps": current_steps}

    return Method(loss_fn, student_steps, distil, has_segments=True, guidance_range=parts.guidance_range)


OBJECTIVES: dict[str, Callable[[Section, Parts], Method]] = {
    "diffusion": _diffusion,
    "multistep_consistency": _multistep_consistency,
}
