"""Objectives by their names in a config: what each reads of its section, and the loss that it makes of it.

A new objective is one builder, `(section, parts) -> Method`, in `OBJECTIVES`: here, with its mathematics as a function
of denoisers in `mscm/objectives/`, or in a file of its own (docs/extend/objective.md).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mscm.config import ConfigError, Section, nearest
from mscm.data import transforms
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion.prediction import x_hat_of
from mscm.metrics import lpips
from mscm.metrics import weights as feature_weights
from mscm.objectives import curriculum, solvers
from mscm.objectives import distance as distances
from mscm.objectives.consistency import consistency_model_loss, lognormal_log_weights
from mscm.objectives.diffusion import diffusion_loss, lognormal_times
from mscm.objectives.guidance import guidance_loss, sample_guidance
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.objectives.progressive import progressive_loss
from mscm.objectives.tract import tract_loss
from mscm.training import ema
from mscm.training.step import Batch, LossFn, TargetDecay
from mscm.types import (
    Array,
    Bool,
    Condition,
    Denoiser,
    Distance,
    Images,
    Int,
    Key,
    Metrics,
    Params,
    PerExample,
    Schedule,
    Teacher,
    Text,
    Times,
)

DIFFUSION_LOSSES: dict[str, Distance] = {
    "v_mse": distances.v_mse,
    "eps_mse": distances.eps_mse,
    "edm_mse": distances.edm_mse,
}
CONSISTENCY_DISTANCES: dict[str, Callable[..., PerExample]] = {
    "pseudo_huber": distances.pseudo_huber,
    "pseudo_huber_weighted": distances.pseudo_huber_weighted,
    "charbonnier": distances.charbonnier,
    "v_mse": lambda diff, lvl_t, *, epsilon: distances.v_mse(diff, lvl_t),
}

# Squared distances in x, one weight each.
SQUARED: dict[str, Distance] = {
    "v_mse": distances.v_mse,
    "truncated_snr_mse": distances.truncated_snr_mse,
    "edm_mse": distances.edm_mse,
}
IMAGE_DISTANCES: dict[str, Callable[..., PerExample]] = {
    "l2": distances.squared_l2,
    "pseudo_huber": distances.norm_pseudo_huber,
}
FEATURE_PRECISIONS = ("float32", "bfloat16")
_STEPS_LIMIT = 2.0**24  # float32 counts to it
INTERVAL_WEIGHTS: dict[str, distances.IntervalWeight | None] = {"one": None, "inverse_gap": distances.inverse_gap}
SOLVERS: dict[str, Callable[[Section], solvers.Solver]] = {
    "addim": lambda section: functools.partial(solvers.addim, x_var_frac=section.number("x_var_frac", minimum=0.0)),
    "clipped_ddim": lambda section: solvers.clipped_ddim,
    "ddim": lambda section: solvers.ddim,  # Euler's step in sigma / alpha
    "heun": lambda section: solvers.heun,
}
GRIDS: dict[str, Callable[..., Array]] = {
    "constant": curriculum.constant_grid_points,
    "cm": curriculum.cm_grid_points,
    "ict": curriculum.ict_grid_points,
}

Step = Int[Array, ""]
Loss = tuple[PerExample, Metrics]

# (parameters, condition, guidance weights where they are an input) -> what the teacher answers
Answer = Callable[[Params, Condition, Times | None], Teacher]


def no_teacher(params: Params, condition: Condition, weights: Times | None = None) -> Teacher:
    """The answer of a teacher that is not there.

    Raises:
      ConfigError: always.
    """
    del params, condition, weights
    raise ConfigError("config.teacher: got None, expected a section naming the model that this objective learns from")


class Frozen(NamedTuple):
    """What a loss reads and training does not change: parameters, or nothing."""

    teacher: Params = {}
    features: Params = {}  # of a network in which images are compared


class Features(NamedTuple):
    """The parameters of a network in which images are compared; by default there is none."""

    load: Callable[[], Params] = dict  # from its file; raises ValueError where it is not there
    random: Callable[[Key], Params] = lambda key: {}  # of the same shapes


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an objective is made of beside its own section."""

    model: nn.Module
    schedule: Schedule
    prediction: denoisers.Prediction
    resolution: int
    null_condition: Callable[[int], Condition]  # of so many rows: what stands for none
    flip: bool
    num_steps: int  # of the training
    teacher: Answer  # `no_teacher`: there is none
    has_null: bool  # whether the teacher was trained with dropped conditions
    guidance_range: tuple[float, float] | None  # of the weights that are an input of the teacher; None: they are not


@dataclasses.dataclass(frozen=True)
class Method:
    """What an objective decides."""

    loss_fn: LossFn
    student_steps: int | None = None  # None: a diffusion model
    distil: bool = False  # whether training calls the teacher
    has_segments: bool = False  # whether the loss says in which of `student_steps` segments an example is
    sampler: str = "ddim"  # of a student with its own steps: a text of mscm.sampling
    target_decay: TargetDecay | None = None  # None: the loss has no target network
    guidance_range: tuple[float, float] | None = None  # of the weights that are an input; None: they are not
    features: Features = Features()


class Example(NamedTuple):
    """A batch as a loss sees it, and keys that nobody has used."""

    x: Images
    condition: Condition
    guidance: Times | None
    k_dropout: Key
    keys: tuple[Key, Key]


def condition_of(batch: Batch) -> Condition:
    """The texts of a batch, where it has some, else its labels."""
    return Text(batch["tokens"], batch["mask"]) if "tokens" in batch else batch["label"]


def _choose(which: Bool[Array, "b"], if_true: Condition, if_false: Condition) -> Condition:
    """Row by row one of two conditions."""
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b), if_true, if_false)


def network(
    model: nn.Module, params: Params, *, guidance: Times | None = None, dropout_key: Key | None = None
) -> denoisers.Network:
    """The network as a function; with a key it drops out, the same units in every call (synchronised dropout)."""

    def apply(z_t: Images, logsnr: Times, condition: Condition | None) -> Images:
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        inputs = (z_t, logsnr, condition) if guidance is None else (z_t, logsnr, condition, guidance)
        # Flax's type has the variables beside it that a call with `mutable` changes.
        return cast(Array, model.apply({"params": params}, *inputs, train=dropout_key is not None, rngs=rngs))

    return apply


def example_of(parts: Parts, guidance_range: tuple[float, float] | None, batch: Batch, key: Key) -> Example:
    """A batch as float images, flipped at random where the data is, with weights of guidance drawn from their range."""
    k_flip, k_dropout, *keys, k_guidance = jax.random.split(key, 5)
    x = transforms.to_float(batch["image"])
    x = transforms.random_flip(x, k_flip) if parts.flip else x
    guidance = None
    if guidance_range is not None:
        low, high = guidance_range
        guidance = sample_guidance(k_guidance, x.shape[0], low=low, high=high)
    k_first, k_second = keys
    return Example(x, condition_of(batch), guidance, k_dropout, (k_first, k_second))


def denoiser_of(parts: Parts, params: Params, example: Example) -> Denoiser:
    """`params` as a denoiser of the example, in training: with dropout, the same units in every call."""
    function = network(parts.model, params, guidance=example.guidance, dropout_key=example.k_dropout)
    return denoisers.make_denoiser(function, parts.schedule, parts.prediction, condition=example.condition)


def scaled(section: Section, distance: Distance, parts: Parts) -> Distance:
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
    distance = scaled(section, section.choose("loss", DIFFUSION_LOSSES), parts)
    label_dropout = section.number("label_dropout", minimum=0.0, below=1.0)
    noise = section.optional_section("noise")
    times = None if noise is None else noise.bind(functools.partial(lognormal_times, parts.schedule))

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        del target, frozen, step
        example = example_of(parts, None, batch, key)
        k_label, k_loss = example.keys
        if label_dropout:
            dropped = jax.random.bernoulli(k_label, label_dropout, example.x.shape[:1])
            null = parts.null_condition(len(example.x))
            example = example._replace(condition=_choose(dropped, null, example.condition))
        return diffusion_loss(
            denoiser_of(parts, params, example), parts.schedule, example.x, k_loss, times=times, distance=distance
        )

    return Method(loss_fn)


def _multistep_consistency(section: Section, parts: Parts) -> Method:
    student_steps, distil = section.number("student_steps", minimum=1), bool(section.take("distil"))
    distance: Distance = functools.partial(
        section.choose("distance", CONSISTENCY_DISTANCES), epsilon=section.number("huber_epsilon", minimum=0.0)
    )
    distance = scaled(section, distance, parts)
    grows = section.section("teacher_steps")
    teacher_steps = functools.partial(
        curriculum.teacher_steps,
        start=grows.number("start", minimum=1.0, below=_STEPS_LIMIT),
        end=grows.number("end", minimum=1.0, below=_STEPS_LIMIT),
        anneal_steps=grows.number("anneal_steps", minimum=0),
    )
    x_var_frac = section.number("x_var_frac", minimum=0.0)

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        del target
        example = example_of(parts, parts.guidance_range, batch, key)
        current_steps = teacher_steps(step)
        loss, metrics = consistency_loss(
            denoiser_of(parts, params, example),
            parts.teacher(frozen.teacher, example.condition, example.guidance) if distil else None,
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


def _phase(section: Section) -> tuple[int, int]:
    """Steps of the teacher and of the student in this phase, the last that the section names."""
    teacher_steps, student_steps = section.whole_numbers("phase_steps")[-2:]
    return teacher_steps, student_steps


def _of_phase(loss_fn: LossFn, student_steps: int, parts: Parts, target_decay: TargetDecay | None = None) -> Method:
    """PD and TRACT sample with x_hat within the range of images, as in their papers: arXiv:2202.00512, 2303.04248."""
    return Method(
        loss_fn,
        student_steps,
        distil=True,
        has_segments=True,
        sampler="ddim:clip=static",
        target_decay=target_decay,
        guidance_range=parts.guidance_range,
    )


def _solver(section: Section) -> solvers.Solver:
    solver = section.section("solver")
    return solver.choose("name", SOLVERS)(solver)


def _progressive(section: Section, parts: Parts) -> Method:
    teacher_steps, student_steps = _phase(section)
    if teacher_steps != 2 * student_steps:
        raise ConfigError(
            f"config.objective.phase_steps: got {student_steps} steps after {teacher_steps}, expected half of them: "
            "progressive distillation makes one step of two"
        )
    distance, solver = scaled(section, section.choose("distance", SQUARED), parts), _solver(section)
    later = section.choose("later_solver", {"ddim": solvers.ddim, "same": solver})
    if len(section.whole_numbers("phase_steps")) > 2:  # the teacher is the student of the phase before
        solver = later

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        del target, step
        example = example_of(parts, parts.guidance_range, batch, key)
        return progressive_loss(
            denoiser_of(parts, params, example),
            parts.teacher(frozen.teacher, example.condition, example.guidance),
            parts.schedule,
            example.x,
            example.keys[0],
            student_steps=student_steps,
            solver=solver,
            distance=distance,
        )

    return _of_phase(loss_fn, student_steps, parts)


def _tract(section: Section, parts: Parts) -> Method:
    teacher_steps, student_steps = _phase(section)
    distance, solver = scaled(section, section.choose("distance", SQUARED), parts), _solver(section)
    decay = section.number("self_teacher_decay", minimum=0.0, below=1.0)

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        del step
        example = example_of(parts, parts.guidance_range, batch, key)
        return tract_loss(
            denoiser_of(parts, params, example),
            parts.teacher(frozen.teacher, example.condition, example.guidance),
            denoiser_of(parts, target, example),
            parts.schedule,
            example.x,
            example.keys[0],
            student_steps=student_steps,
            teacher_steps=teacher_steps,
            solver=solver,
            distance=distance,
        )

    return _of_phase(loss_fn, student_steps, parts, functools.partial(ema.bias_corrected_decay, decay=decay))


def _consistency(section: Section, parts: Parts) -> Method:
    distil = bool(section.take("distil"))
    solver = _solver(section) if distil else solvers.ddim  # training on the data asks no solver
    grid = section.section("grid")
    points_at = grid.bind(functools.partial(grid.choose("name", GRIDS), num_steps=parts.num_steps))
    max_points = int(points_at(jnp.int32(parts.num_steps)))  # a grid only grows
    noise, decays = (section.optional_section(key) for key in ("noise", "target_decay"))
    draw = None
    if noise is not None:
        draw = noise.bind(functools.partial(lognormal_log_weights, parts.schedule, max_points=max_points))
    distance, features = _image_distance(section.section("distance"), parts)
    weight = section.choose("weight", INTERVAL_WEIGHTS)
    target_decay = None if decays is None else _consistency_target_decay(decays, grid, points_at)

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        example = example_of(parts, parts.guidance_range, batch, key)
        points = points_at(step)
        loss, metrics = consistency_model_loss(
            denoiser_of(parts, params, example),
            parts.teacher(frozen.teacher, example.condition, example.guidance) if distil else None,
            parts.schedule,
            example.x,
            example.keys[0],
            grid_points=points,
            reference=denoiser_of(parts, target, example) if target_decay else None,
            solver=solver,
            log_weights=draw(points) if draw else None,
            weight=weight,
            distance=distance(frozen.features),
        )
        return loss, {**metrics, "grid_points": points.astype(jnp.float32)}

    return Method(loss_fn, 1, distil, target_decay=target_decay, guidance_range=parts.guidance_range, features=features)


def _image_distance(section: Section, parts: Parts) -> tuple[Callable[[Params], distances.ImageDistance], Features]:
    """The distance that parameters of features give, and where they come from."""
    name = section.choose("name", (*IMAGE_DISTANCES, "lpips"))
    if name == "lpips":
        return section.bind(_lpips)(parts)
    distance = section.bind(IMAGE_DISTANCES[name])
    return lambda params: distance, Features()


def _lpips(
    parts: Parts, *, weights: str | None, resize: Any, precision: str = "float32", pooling: str = "max"
) -> tuple[Callable[[Params], distances.ImageDistance], Features]:
    side = parts.resolution if resize is None else resize
    if type(side) is not int or side < lpips.MIN_SIDE:
        raise ConfigError(
            f"config.objective.distance.resize: got {resize!r} for images of {parts.resolution} pixels, expected a "
            f"whole number such as 224, or None for images as they are, of {lpips.MIN_SIDE} pixels at least"
        )
    for key, got, choices in (("precision", precision, FEATURE_PRECISIONS), ("pooling", pooling, lpips.POOLINGS)):
        if got not in choices:
            hint = nearest(str(got), choices)
            raise ConfigError(
                f"config.objective.distance.{key}: got {got!r}{hint}, expected one of {', '.join(choices)}"
            )
    path = weights or feature_weights.default_path("lpips")
    features = Features(
        load=lambda: feature_weights.load("lpips", path, dtype=precision).params,
        random=functools.partial(lpips.random_params, dtype=precision),
    )
    return lambda params: functools.partial(lpips.distance, params, resize=resize, pooling=pooling), features


def _consistency_target_decay(section: Section, grid: Section, points_at: Callable[..., Array]) -> TargetDecay:
    if section.choose("name", ("constant", "cm")) == "constant":
        decay = section.number("decay", minimum=0.0, below=1.0)
        return lambda step: jnp.float32(decay)
    start, start_decay = grid.number("start", minimum=2), section.number("start_decay", minimum=0.0, below=1.0)
    return lambda step: curriculum.cm_target_decay(points_at(step), start=start, start_decay=start_decay)


def _guided(section: Section, parts: Parts) -> Method:
    low = section.number("guidance_low", minimum=0.0)
    high = section.number("guidance_high", minimum=float(low))
    distance = scaled(section, section.choose("distance", SQUARED), parts)
    if not parts.has_null:
        raise ConfigError(
            "config.teacher: got a teacher that was trained with objective.label_dropout = 0.0, expected one that "
            "knows the null class: without it there is nothing to guide away from"
        )

    def loss_fn(params: Params, target: Params, frozen: Frozen, batch: Batch, key: Key, step: Step) -> Loss:
        del target, step
        example = example_of(parts, (low, high), batch, key)
        assert example.guidance is not None  # of a range, there are some
        null = parts.null_condition(len(example.x))
        return guidance_loss(
            denoiser_of(parts, params, example),
            x_hat_of(parts.teacher(frozen.teacher, example.condition, None)),
            x_hat_of(parts.teacher(frozen.teacher, null, None)),
            parts.schedule,
            example.x,
            example.guidance,
            example.keys[0],
            distance=distance,
        )

    return Method(loss_fn, distil=True, guidance_range=(low, high))


OBJECTIVES: dict[str, Callable[[Section, Parts], Method]] = {
    "diffusion": _diffusion,
    "multistep_consistency": _multistep_consistency,
    "consistency": _consistency,
    "tract": _tract,
    "progressive": _progressive,
    "guided": _guided,
}
