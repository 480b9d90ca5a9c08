"""From a config to functions, shared by every command.

`build(config)` turns every name of the config into a function once, reads every key, and refuses what nobody reads; a
typing error is one sentence from here, before anything is compiled.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mscm import compilation
from mscm.checkpoint import ON_ANY_SCHEDULE, first_mismatch, parameter_shapes
from mscm.config import ConfigError, Section, flat, load_config, read_config
from mscm.data import captions, sources
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion import schedule as schedules
from mscm.diffusion.prediction import x_hat_of
from mscm.methods import OBJECTIVES, Frozen, Method, Parts, network, no_teacher
from mscm.metrics import weights
from mscm.models import attention, mlp, text, unet, uvit
from mscm.sampling import SamplerSpec, own_steps
from mscm.training import ema as ema_lib
from mscm.training import optimizer as optimizers
from mscm.training import partition
from mscm.training.step import LossFn, TrainState, init_state, make_train_steps
from mscm.types import Condition, Denoiser, Guided, Key, Params, Schedule, Teacher, Text, Times


def _on_any_schedule(prediction: denoisers.Prediction) -> Callable[[Schedule], denoisers.Prediction]:
    return lambda schedule: prediction


SCHEDULES: dict[str, Callable[..., Any]] = {
    "cosine": schedules.cosine,
    "interpolated": schedules.interpolated,
    "karras": schedules.karras,
}
PREDICTIONS: dict[str, Callable[[Schedule], denoisers.Prediction]] = {
    **{name: _on_any_schedule(prediction) for name, prediction in denoisers.PREDICTIONS.items()},
    "consistency": denoisers.consistency_prediction,
}
PRECONDITIONED = ("edm", "consistency")  # those that scale the network's input
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LABELS = ("balanced", "uniform", "captions")  # in turn, or drawn independently, or not labels but the data's captions
ALIGNMENTS = ("digits", "clip")
FEATURE_NETWORKS = ("classifier", "pixels", *weights.SCORING)
MAIN_AVERAGE = "main"  # what the others may not be called
_ATTENDING = uvit.UViT | unet.UNet  # networks with a choice of kernels
Load = Callable[[str, str | None], ConfigDict]  # file and work directory by which a student names its teacher
# What does not ask a teacher may be trained from nothing, but for multistep consistency training: as in its paper.
STARTS_FROM_TEACHER = ("multistep_consistency", "tract", "progressive", "guided")
NO_TEACHER = "config.teacher: got None, expected a section naming the diffusion model to start from"
_EVAL_NUMBERS = {"num_images": 4, "batch_size": 1, "num_kept": 4}  # and the least that each may be


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The data set and what its images look like."""

    name: str
    split: str
    path: str | None  # records, or a folder, zip or tar of images; None: the data set called `name`
    resolution: int
    channels: int
    num_classes: int
    flip: bool
    num_workers: int  # processes that load; 0: threads of the training process do
    num_threads: int  # of each process that loads
    text: captions.TextSpec | None = None  # the tokens of the images' captions; None: labels are the condition

    def open(self) -> sources.Source:
        """The source, checked against what the config says of it."""
        try:
            source = sources.open_source(
                self.name,
                split=self.split,
                path=self.path,
                resolution=self.resolution,
                channels=self.channels,
                num_classes=self.num_classes,
                captioned=self.text is not None,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"config.data: {error}") from error
        for key in ("resolution", "channels", "num_classes"):
            if getattr(source, key) != getattr(self, key):
                raise ConfigError(
                    f"config.data.{key}: got {getattr(self, key)}, expected {getattr(source, key)}, "
                    f"which is what {self.path or repr(self.name)} has"
                )
        if self.text is None:
            return source
        try:
            return captions.WithTokens(source, self.text)
        except ValueError as error:
            raise ConfigError(f"config.data.text: {error}") from error

    def null_condition(self, rows: Any) -> Condition:
        """What stands for no condition; `rows`: a number, or the symbol of one that is left open."""
        if self.text is None:
            return jnp.full((rows,), self.num_classes, jnp.int32)
        shape, dtype = self.text.of_tokens
        return Text(jnp.zeros((rows, *shape), dtype), jnp.zeros((rows, self.text.length), bool))


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """How long and how often."""

    num_steps: int
    batch_size: int
    num_microbatches: int  # a batch is taken in so many parts, one after the other
    steps_per_dispatch: int
    log_every_steps: int
    save_every_steps: int
    keep_checkpoints: int
    max_bad_steps: int  # in a row, which are skipped because their loss or gradient is not finite


@dataclasses.dataclass(frozen=True)
class Average:
    """An average of the parameters that is kept beside the one from which images are sampled."""

    update: ema_lib.Update
    sigma_rel: float | None  # of a power-function average; None: it is exponential


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """How models are scored."""

    num_images: int
    batch_size: int
    seeds: tuple[int, ...]  # each gives a score of its own
    labels: str  # of the images, one of LABELS
    student_samplers: tuple[str, ...]  # of a consistency model: texts of mscm.sampling; others have one of their own
    teacher_samplers: tuple[str, ...]  # the same of a diffusion model, each with any number of steps
    teacher_steps: tuple[int, ...]
    network: str  # whose features are compared, one of FEATURE_NETWORKS
    precision: str  # of that network, one of DTYPES
    weights: str | None  # its converted file; None: where mscm.metrics.convert writes it
    reference: str | None  # file of reference statistics; None: computed from the data
    reference_split: str | None  # the split of the reference; None: the split that is trained on
    alignment: str | None  # with the captions, one of ALIGNMENTS; None: is not scored
    alignment_weights: str | None  # the directory of a CLIP
    num_kept: int  # images whose features are kept, for precision, recall and the kernel distance
    at_end: bool  # whether training ends with scores; else mscm.eval gives them


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The model that a student starts from and, in distillation, learns from."""

    experiment: "Experiment"
    workdir: str | None  # None: trained first, below the student's work directory
    phase: int | None = None  # of a phase before the student's: its number of steps


class Member(NamedTuple):
    """One model of a lineage."""

    experiment: "Experiment"
    workdir: str
    is_given: bool  # trained elsewhere: its work directory is only read


@dataclasses.dataclass(frozen=True, eq=False)  # eq: compiled samplers are cached by identity
class Experiment:
    """All that a command needs; made by `build`."""

    name: str
    seed: int
    config: dict[str, Any]  # as JSON: for the checkpoint and the work directory
    data: DataSpec
    model: nn.Module
    schedule: Schedule
    prediction: denoisers.Prediction
    method: Method
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    update_ema: ema_lib.Update  # of the average that images are sampled from
    further: Mapping[str, Average]  # averages beside that one, by name
    snapshot_every_steps: int | None  # of the power averages, for all others of their kind; None: there are none
    train: TrainSpec
    eval: EvalSpec
    teacher: TeacherSpec | None
    mesh_sizes: partition.MeshSizes
    guidance: float = 0.0  # classifier-free guidance in all that it answers
    guided_times: tuple[float, float] | None = None  # the first and the last with guidance; None: all
    devices: tuple[jax.Device, ...] | None = None  # of the mesh; None: those that are there

    @property
    def loss_fn(self) -> LossFn:
        """What training minimises."""
        return self.method.loss_fn

    @property
    def student_steps(self) -> int | None:
        """Of a student: the steps that it samples in. None: a diffusion model."""
        return self.method.student_steps

    @property
    def distil(self) -> bool:
        """Whether training calls the teacher."""
        return self.method.distil

    def on(self, devices: Sequence[jax.Device]) -> "Experiment":
        """The same on other devices, which need not exist: a topology to compile for."""
        return dataclasses.replace(self, devices=tuple(devices))

    def for_any_device(self) -> "Experiment":
        """The same with a network that, traced without a mesh, is one program for devices of every kind."""
        if not isinstance(self.model, _ATTENDING):
            return self
        return dataclasses.replace(self, model=self.model.clone(attention="xla"))

    def for_evaluation(self) -> "Experiment":
        """The same for sampling alone, on all devices that are there: the training's mesh and batch need not fit them.

        On the config's mesh where it does; else each device has a copy of the parameters and a part of the images.
        """
        sizes = self.mesh_sizes
        try:
            mesh = partition.make_mesh(sizes, self.devices)
        except ValueError:
            sizes = partition.MeshSizes(data=-1, fsdp=1, tensor=1)
            mesh = partition.make_mesh(sizes, self.devices)
        train = dataclasses.replace(self.train, batch_size=partition.rounded_up(1, mesh), num_microbatches=1)
        teacher = self.teacher
        if teacher is not None:
            teacher = dataclasses.replace(teacher, experiment=teacher.experiment.for_evaluation())
        return dataclasses.replace(self, mesh_sizes=sizes, train=train, teacher=teacher)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices as the config arranges them.

        Raises:
          ConfigError: the sizes, the batch or the attention do not fit the devices.
        """
        try:
            mesh = partition.make_mesh(self.mesh_sizes, self.devices)
            partition.check_batch_size(self.train.batch_size, self.train.num_microbatches, mesh)
            if isinstance(self.model, _ATTENDING):
                attention.check_device(self.model.attention, mesh.devices.flat[0])
        except ValueError as error:
            raise ConfigError(f"config {self.name!r}: {error}") from error
        return mesh

    @property
    def platform(self) -> str:
        """Of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    def init_params(self, key: Key) -> Params:
        """Parameters at random; compile it with jit."""
        return nn.meta.unbox(_init(self.model, self.data, key))

    @property
    def _boxed_params(self) -> Params:
        return _boxed_shapes(self.model, self.data)

    def abstract_params(self) -> Params:
        """Shapes and types of the parameters, without computing them."""
        return nn.meta.unbox(self._boxed_params)

    @property
    def teacher_experiment(self) -> "Experiment":
        """What a student starts from.

        Raises:
          ConfigError: it starts from nothing.
        """
        if self.teacher is None:
            raise ConfigError(f"got {self.name!r}, which has no teacher, expected a student")
        return self.teacher.experiment

    @property
    def adds_guidance(self) -> bool:
        """Whether the weight of guidance is an input that the teacher's network has not."""
        return self.model.guidance_input and not self.teacher_experiment.model.guidance_input

    def from_teacher(self, params: Params, key: Key) -> Params:
        """The teacher's parameters, and those of an input of guidance that it has not: it is the same function."""
        if not self.adds_guidance:
            return params
        return unflatten_dict(flatten_dict(self.init_params(key)) | flatten_dict(params))

    def init_state(self, params: Params) -> TrainState:
        """Training state before the first step."""
        has_target = self.method.target_decay is not None
        return init_state(params, self.optimizer, has_target=has_target, further=self.further)

    def power_averages(self, state: TrainState) -> dict[str, Params]:
        """Those of the further averages from whose snapshots others can be made."""
        return {name: state.further[name] for name, of in self.further.items() if of.sigma_rel is not None}

    def boxed_state(self) -> TrainState:
        """Shapes and types of the training state, boxed with the logical names of the axes."""
        return jax.eval_shape(self.init_state, self._boxed_params)

    def state_shardings(self) -> TrainState:
        """Where every part of the training state lies on the mesh; the average lies as the parameters do."""
        return partition.shardings(self.boxed_state(), self.mesh)

    def abstract_state(self) -> TrainState:
        """Shapes and types of the training state."""
        return jax.eval_shape(self.init_state, self.abstract_params())

    def placed_state(self) -> TrainState:
        """The same with the places on the mesh: what a checkpoint is restored to."""
        return partition.placed(self.abstract_state(), self.state_shardings())

    def frozen(self, teacher_params: Params) -> Frozen:
        """What training reads and does not change: a teacher's parameters, in distillation, and those of features."""
        return Frozen(teacher_params if self.distil else {}, self.read_features())

    def read_features(self) -> Params:
        """Parameters of the network in which the loss compares images, from its file; nothing where there is none.

        Raises:
          ConfigError: there is no such file, or it holds something else.
        """
        try:
            params = self.method.features.load()
        except ValueError as error:
            raise ConfigError(f"config.objective.distance.weights: {error}") from error
        return jax.device_put(params, partition.replicated(self.mesh))

    def abstract_frozen(self) -> Frozen:
        """Shapes and types of what training reads and does not change; no file is read."""
        features = jax.eval_shape(self.method.features.random, jax.random.key(0))
        return Frozen(self.teacher_experiment.abstract_params() if self.distil else {}, features)

    def frozen_shardings(self) -> Frozen:
        """Where it lies: a teacher as a student; features, which are small beside their activations, on all devices."""
        teacher = partition.shardings(self.teacher_experiment._boxed_params, self.mesh) if self.distil else {}
        return Frozen(teacher, jax.tree.map(lambda _: partition.replicated(self.mesh), self.abstract_frozen().features))

    def placed_frozen(self) -> Frozen:
        """The same with shapes and types."""
        return partition.placed(self.abstract_frozen(), self.frozen_shardings())

    def random_frozen(self, key: Key) -> Frozen:
        """The same as arrays, at random."""

        def make(key: Key) -> Frozen:
            teacher = self.teacher_experiment.init_params(key) if self.distil else {}
            return Frozen(teacher, self.method.features.random(key))

        return jax.jit(make, out_shardings=self.frozen_shardings())(key)

    def random_state(self, key: Key) -> TrainState:
        """Training state before the first step of parameters at random, on the mesh."""
        make_state = jax.jit(lambda key: self.init_state(self.init_params(key)), out_shardings=self.state_shardings())
        return make_state(key)

    def train_steps(self) -> jax.stages.Wrapped:
        """The jitted step of `make_train_steps`; batches carry a leading axis of `train.steps_per_dispatch`."""
        state, whole = self.state_shardings(), partition.replicated(self.mesh)
        return make_train_steps(
            partition.on_mesh(self.loss_fn, self.mesh),
            self.optimizer,
            self.learning_rate,
            update_ema=self.update_ema,
            num_segments=self.student_steps if self.method.has_segments else None,
            target_decay=self.method.target_decay,
            further={name: average.update for name, average in self.further.items()},
            num_microbatches=self.train.num_microbatches,
            skips_bad_steps=self.train.max_bad_steps > 0,
            in_shardings=(state, self.frozen_shardings(), partition.batch_sharding(self.mesh, leading=1), whole),
            out_shardings=(state, whole),
            compiler_options=compilation.options(self.platform),
        )

    def answer(self, params: Params, condition: Condition, weights: Times | None = None) -> Teacher:
        """Without dropout; with its guidance, and then beside the conditional output.

        `weights`: of guidance, where they are an input of the network; the conditional output is that of weights 0.
        """
        if weights is None and not self.guidance:
            return self.denoiser(params, condition)
        if self.method.guidance_range is not None:
            weights = jnp.full(_rows(condition), self.guidance) if weights is None else weights
            guided, conditional = (self._at(params, condition, w) for w in (weights, jnp.zeros_like(weights)))
            return lambda z_t, t: Guided(guided(z_t, t), conditional(z_t, t))
        return denoisers.make_guided(
            network(self.model, params),
            self.schedule,
            self.prediction,
            condition=condition,
            null=self.data.null_condition(_rows(condition)),
            guidance=self.guidance,
            interval=self.guided_times,
        )

    def _at(self, params: Params, condition: Condition, weights: Times | None) -> Denoiser:
        """The network's one answer, with weights of guidance where these are an input of it."""
        function = network(self.model, params, guidance=weights)
        return denoisers.make_denoiser(function, self.schedule, self.prediction, condition=condition)

    def guided(self, guidance: float, times: tuple[float, float] | None = None) -> "Experiment":
        """The same with classifier-free guidance; `times`: only from the first to the last of them.

        Raises:
          ConfigError: it was not trained for guidance, or has some.
        """
        trained_for = self.method.guidance_range
        if trained_for is not None:
            low, high = trained_for
            if times is not None or not low <= guidance <= high:
                raise ConfigError(
                    f"got {guidance}{' at some times' * (times is not None)}, expected one weight from {low:g} to "
                    f"{high:g} at all times, as {self.name!r} was trained with"
                )
            return dataclasses.replace(self, guidance=guidance)
        if self.guidance:
            raise ConfigError(f"got {guidance}, expected 0.0 because {self.name!r} is guided already")
        if not self.config["objective"].get("label_dropout"):
            raise ConfigError(
                f"got {guidance}, expected 0.0 because {self.name!r} was trained with objective.label_dropout = 0.0: "
                "it does not know what to guide away from"
            )
        return dataclasses.replace(self, guidance=guidance, guided_times=times)

    def for_sampler(self, sampler: SamplerSpec) -> "Experiment":
        """The same with the guidance of a sampler.

        Raises:
          ConfigError: as `guided`.
        """
        if not sampler.guidance:
            return self
        try:
            return self.guided(sampler.guidance, sampler.guided_times(self.schedule))
        except ConfigError as error:
            raise ConfigError(f"sampler {sampler.sampler!r}: guidance: {error}") from error

    def denoiser(self, params: Params, condition: Condition) -> Denoiser:
        """Deterministic denoiser for sampling."""
        if self.method.guidance_range is not None:
            return self._at(params, condition, jnp.full(_rows(condition), self.guidance))
        return x_hat_of(self.answer(params, condition)) if self.guidance else self._at(params, condition, None)

    def lineage(self, workdir: str) -> list[Member]:
        """This model in `workdir` and all that it comes from, oldest first: its teacher, then the phases before it.

        Nothing is older than a model whose work directory the config names, or the run of `workdir` was given.
        """
        members, home = [Member(self, workdir, is_given=False)], workdir
        while (spec := members[-1].experiment.teacher) is not None and not members[-1].is_given:
            if spec.phase is not None:
                members.append(Member(spec.experiment, os.path.join(home, "phases", str(spec.phase)), is_given=False))
                continue
            given = spec.workdir or given_teacher(home)
            home = given or os.path.join(home, "teacher")
            members.append(Member(spec.experiment, home, is_given=given is not None))
        return members[::-1]

    def diffusion_teacher(self, workdir: str) -> Member | None:
        """The diffusion model by which this one, or the first of its phases, is taught; None: it is one itself."""
        *older, _ = self.lineage(workdir)
        return next((member for member in reversed(older) if member.experiment.student_steps is None), None)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of its model."""
        return {
            "name": self.name,
            "student_steps": self.student_steps,
            "resolution": self.data.resolution,
            "channels": self.data.channels,
            "num_classes": self.data.num_classes,
            "data_range": [-1.0, 1.0],
            "schedule": self.config["schedule"],
            "prediction": self.config["prediction"],
            "logsnr_input": self.config["model"]["logsnr_input"],
            "parameters": parameter_shapes(self.abstract_params()),
            "config": self.config,
        }


def given_teacher(workdir: str) -> str | None:
    """The work directory of the teacher that the run of `workdir` was given; None where it has its own, or none yet."""
    if not workdir or epath.Path(workdir, "teacher").exists():
        return None
    try:
        teacher = (read_config(workdir) or {}).get("teacher")
    except ConfigError:  # a file that is cut: the training writes it again
        return None
    return teacher.get("workdir") if isinstance(teacher, dict) else None


def _rows(condition: Condition) -> Any:
    """How many: an int, or the symbol of an export, which JAX takes for one."""
    return jax.tree.leaves(condition)[0].shape[0]


def _from_file(file: str, workdir: str | None) -> ConfigDict:
    del workdir
    return load_config(file)


def build(config: ConfigDict, *, heirs: tuple[str, ...] = (), load: Load = _from_file) -> Experiment:
    """Everything that the config decides, as functions.

    Args:
      heirs: files of the teachers that come from this one.
      load: the config of a teacher, of the file and the work directory that its student names.

    Raises:
      ConfigError: a key is missing, unknown, unread or has an impossible value; nothing has been compiled yet.
    """
    root = Section(config)
    try:
        for path, value in flat(json.loads(config.to_json_best_effort())).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"config.{path}: got {value}, expected a finite number")
        experiment = _build(root, config, heirs, load)
    except ConfigError:
        raise
    except ValueError as error:  # a sentence of the part that refused its arguments
        raise ConfigError(f"config {config.get('name')!r}: {error}") from error
    root.refuse_unread()
    return experiment


def _build(root: Section, config: ConfigDict, heirs: tuple[str, ...], load: Load) -> Experiment:
    data = _data(root.section("data"))
    model_section = root.section("model")
    model = model_section.choose("name", MODELS)(model_section, data)
    schedule_section = root.section("schedule")
    schedule = schedule_section.bind(schedule_section.choose("name", SCHEDULES))
    schedule_section.refuse_unread()  # now: a misspelt key is not a difference from the teacher's schedule
    prediction = root.choose("prediction", PREDICTIONS)(schedule)
    if config.schedule.name == "karras" and config.prediction not in PRECONDITIONED:
        raise ConfigError(
            f"config.prediction: got {config.prediction!r}, expected one of {', '.join(PRECONDITIONED)} with the "
            "schedule 'karras': its noise has a standard deviation of up to sigma_max, which only these scale"
        )
    train = _train(root.section("train"))
    spec = _eval(root.section("eval"), data)
    optimizer_section = root.section("optimizer")
    if config.model.name == "ncsnpp" and config.optimizer.get("weight_decay"):
        raise ConfigError(
            f"config.optimizer.weight_decay: got {config.optimizer.weight_decay}, expected 0.0 with config.model "
            "'ncsnpp': its random frequencies are not trained, and would decay"
        )
    bind_rate = optimizer_section.bind(functools.partial(optimizers.make_learning_rate, num_steps=train.num_steps))
    learning_rate = bind_rate()
    ema = root.section("ema")
    mesh = root.section("mesh")
    objective = root.section("objective")
    phases = _phases(objective) if "phase_steps" in config.objective else ()
    teacher = _teacher(root.optional_section("teacher"), config, phases, heirs, load)
    make_method = objective.choose("name", OBJECTIVES)
    _check_teacher(config, teacher)
    parts = Parts(
        model=model,
        schedule=schedule,
        prediction=prediction,
        resolution=data.resolution,
        null_condition=data.null_condition,
        flip=data.flip,
        num_steps=train.num_steps,
        teacher=no_teacher if teacher is None else teacher.experiment.answer,
        has_null=teacher is not None and bool(teacher.experiment.config["objective"].get("label_dropout")),
        guidance_range=None if teacher is None else teacher.experiment.method.guidance_range,
    )
    method = make_method(objective, parts)
    if teacher is None and method.distil:
        raise ConfigError(NO_TEACHER)
    _check_guidance(method, model, 0.0 if teacher is None else teacher.experiment.guidance)
    experiment = Experiment(
        name=root.name("name"),
        seed=root.number("seed", minimum=0),
        config=json.loads(config.to_json_best_effort()),
        data=data,
        model=model,
        schedule=schedule,
        prediction=prediction,
        method=method,
        optimizer=optimizer_section.bind(optimizers.make_optimizer)(learning_rate),
        learning_rate=learning_rate,
        update_ema=_exponential(ema),
        **_further(ema, train),
        train=train,
        eval=spec,
        teacher=teacher,
        mesh_sizes=partition.MeshSizes(**_fields(mesh, partition.MeshSizes)),
    )
    jax.eval_shape(schedule, jnp.zeros((1,)))
    _check_shapes(experiment)
    _check_samplers(experiment)
    return experiment


def _eval(section: Section, data: DataSpec) -> EvalSpec:
    # Not None in a config: the command line cannot set that where there is a text.
    alignment = section.choose("alignment", ("none", *ALIGNMENTS)) if section.has("alignment") else "none"
    spec = EvalSpec(
        **{key: section.number(key, minimum=least) for key, least in _EVAL_NUMBERS.items()},
        seeds=section.whole_numbers("seeds", minimum=0, distinct=True),
        teacher_steps=section.whole_numbers("teacher_steps", distinct=True),
        teacher_samplers=section.texts("teacher_samplers"),
        student_samplers=section.texts("student_samplers") if section.take("student_samplers") else (),
        labels=section.choose("labels", LABELS),
        network=section.choose("network", FEATURE_NETWORKS),
        precision=section.choose("precision", tuple(DTYPES)),
        alignment=None if alignment == "none" else alignment,
        alignment_weights=section.optional_text("alignment_weights") if section.has("alignment_weights") else None,
        at_end=bool(section.take("at_end")),
        weights=section.optional_text("weights"),
        reference=section.optional_text("reference"),
        reference_split=section.optional_text("reference_split"),
    )
    if (spec.labels == "captions") != (data.text is not None):
        raise ConfigError(
            f"config.eval.labels: got {spec.labels!r} for a model of {'labels' if data.text is None else 'captions'}, "
            f"expected {'balanced or uniform' if data.text is None else 'captions'}"
        )
    if spec.alignment is not None and data.text is None:
        raise ConfigError(f"config.eval.alignment: got {spec.alignment!r}, expected 'none' for a model of labels")
    return spec


def _check_guidance(method: Method, model: nn.Module, of_teacher: float) -> None:
    """Refuses a weight of guidance that counts twice or not at all; `of_teacher`: of one that is fixed."""
    is_input = method.guidance_range is not None
    if is_input and not method.distil:
        raise ConfigError(
            "config.objective.distil: got False, expected True: what the weight of guidance means only its teacher says"
        )
    if is_input != model.guidance_input:
        raise ConfigError(
            f"config.model.guidance_input: got {model.guidance_input}, expected {is_input} because the weight of "
            f"guidance is {'an' if is_input else 'no'} input of what is trained"
        )
    if of_teacher and not method.distil:
        raise ConfigError("config.teacher.guidance: expected 0.0, because objective.distil = False asks no teacher")
    if of_teacher and is_input:
        raise ConfigError(
            f"config.teacher.guidance: got {of_teacher}, expected 0.0 because the weight is an input of what is "
            "trained: its loss guides, and the guidance would count twice"
        )


def _check_shapes(experiment: Experiment) -> None:
    """Shapes that do not fit are errors of the config."""
    ours = parameter_shapes(experiment.abstract_params())
    if experiment.teacher is None:
        return
    theirs = parameter_shapes(experiment.teacher_experiment.abstract_params())
    if experiment.adds_guidance:
        ours = {name: shape for name, shape in ours.items() if name in theirs}
    mismatch = first_mismatch(ours, theirs)
    if mismatch:
        name, got, expected = mismatch
        raise ConfigError(
            f"config.model: got shape {got} for parameter {name}, expected the teacher's {expected}, "
            "because the student starts from the teacher's weights"
        )


def _check_samplers(experiment: Experiment) -> None:
    """Refuses now what would otherwise be refused after the training."""
    spec = experiment.eval
    for sampler in spec.student_samplers:
        try:
            own = own_steps(sampler)
            if own is None or experiment.config["objective"]["name"] != "consistency":
                raise ConfigError(f"got {sampler!r}, expected None, or of a consistency model consistency:sigmas=...")
            chosen = SamplerSpec(sampler, own)
            chosen.plan(experiment.schedule)
            experiment.for_sampler(chosen)
        except ConfigError as error:
            raise ConfigError(f"config.eval.student_samplers: {error}") from error
    models = [member.experiment for member in experiment.lineage("")]
    diffusion = [model for model in models if model.student_steps is None]
    for sampler, model in itertools.product(spec.teacher_samplers, diffusion):
        try:
            if own_steps(sampler) is not None:
                raise ConfigError(f"got {sampler!r}, expected a sampler of diffusion models with any number of steps")
            largest = SamplerSpec(sampler, max(spec.teacher_steps))
            largest.num_evaluations(model.schedule)
            model.for_sampler(largest)
        except ConfigError as error:
            raise ConfigError(f"config.eval.teacher_samplers: {error}") from error


def _fields(section: Section, spec: type) -> dict[str, Any]:
    return {field.name: section.take(field.name) for field in dataclasses.fields(spec)}


def _data(section: Section) -> DataSpec:
    of_text = section.section("text") if section.has("text") else None
    return DataSpec(
        name=section.text("name"),
        split=section.text("split"),
        path=section.optional_text("path"),
        **{key: section.number(key, minimum=1) for key in ("resolution", "channels", "num_classes")},
        flip=bool(section.take("flip")),
        num_workers=section.number("num_workers", minimum=0),
        num_threads=section.number("num_threads", minimum=1),
        text=None if of_text is None else _text_spec(of_text),
    )


def _text_spec(section: Section) -> captions.TextSpec:
    encoder = section.text("encoder")
    features = None if encoder == captions.BYTES else section.number("features", minimum=1)
    return captions.TextSpec(encoder, section.number("length", minimum=1), features)


def _train(section: Section) -> TrainSpec:
    train = TrainSpec(**{
        f.name: section.number(f.name, minimum=0 if f.name == "max_bad_steps" else 1)
        for f in dataclasses.fields(TrainSpec)
    })
    for key in ("num_steps", "log_every_steps", "save_every_steps"):
        if getattr(train, key) % train.steps_per_dispatch:
            raise ConfigError(
                f"config.train.{key}: got {getattr(train, key)}, expected a multiple of "
                f"config.train.steps_per_dispatch = {train.steps_per_dispatch}"
            )
    return train


def _further(section: Section, train: TrainSpec) -> dict[str, Any]:
    """The fields of an experiment that say which averages there are beside the first."""
    further, every = {}, None
    if section.has("further"):
        of_all = section.section("further")
        for name in of_all.keys():
            if name == MAIN_AVERAGE or not re.fullmatch(r"[a-z]\w*", name):
                raise ConfigError(
                    f"config.ema.further: got the name {name!r}, expected letters, digits and _ after a small letter, "
                    f"and not {MAIN_AVERAGE!r}, which is the average of config.ema.decay"
                )
            further[name] = _average(of_all.section(name))
    if section.has("snapshot_every_steps"):
        every = section.number("snapshot_every_steps", minimum=1)
        if all(average.sigma_rel is None for average in further.values()):
            raise ConfigError(
                f"config.ema.snapshot_every_steps: got {every} without any sigma_rel in config.ema.further, "
                "expected one or two, such as dict(short=dict(sigma_rel=0.05), long=dict(sigma_rel=0.1)): from "
                "snapshots of them come all others"
            )
        if every % train.steps_per_dispatch:
            raise ConfigError(
                f"config.ema.snapshot_every_steps: got {every}, expected a multiple of config.train.steps_per_dispatch "
                f"= {train.steps_per_dispatch}"
            )
    return {"further": further, "snapshot_every_steps": every}


def _exponential(section: Section) -> ema_lib.Update:
    decay = section.number("decay", minimum=0.0, below=1.0)
    return ema_lib.exponential(decay=decay, warmup=bool(section.take("warmup")))


def _average(section: Section) -> Average:
    if not section.has("sigma_rel"):
        return Average(_exponential(section), None)
    sigma_rel = section.number("sigma_rel", minimum=0.0)
    try:
        return Average(ema_lib.power(sigma_rel=sigma_rel), sigma_rel)
    except ValueError as error:
        raise ConfigError(f"config.ema.further: {error}") from error


def _uvit(section: Section, data: DataSpec) -> uvit.UViT:
    has_scale = section.has("position_scale")
    stages = tuple(uvit.Stage(**_fields(stage, uvit.Stage)) for stage in section.section("stages").sections())
    middle = section.section("middle")
    return uvit.UViT(
        out_channels=data.channels,
        num_classes=data.num_classes if data.text is None else None,
        text=None if data.text is None else _text_stage(section.section("text"), data.text),
        stages=stages,
        middle=uvit.Stage("transformer", **{key: middle.take(key) for key in ("width", "num_blocks", "dropout")}),
        dtype=section.choose("dtype", DTYPES),
        remat_policy=section.take("remat"),
        logsnr_input=section.take("logsnr_input"),
        scan_blocks=bool(section.take("scan_blocks")),
        fourier_scale=section.take("fourier_scale"),
        guidance_input=bool(section.take("guidance_input")),
        attention=section.choose("attention", attention.IMPLEMENTATIONS),
        position_scale=section.number("position_scale", minimum=0.0) if has_scale else uvit.POSITION_SCALE,
        **{key: section.number(key, minimum=1) for key in ("emb_dim", "head_dim", "mlp_ratio", "patch_size")},
    )


def _text_stage(section: Section, spec: captions.TextSpec) -> text.TextStage:
    return text.TextStage(
        kind="bytes" if spec.features is None else "embeddings",
        length=spec.length,
        width=section.number("width", minimum=1),
        num_blocks=section.number("num_blocks", minimum=0),
    )


def _mlp(section: Section, data: DataSpec) -> mlp.MLP:
    if data.text is not None:
        raise ConfigError("config.data.text: got one, expected none: config.model 'mlp' reads no captions")
    return mlp.MLP(
        out_channels=data.channels,
        num_classes=data.num_classes,
        logsnr_input=section.take("logsnr_input"),
        guidance_input=bool(section.take("guidance_input")),
        **{key: section.number(key, minimum=1) for key in ("width", "num_blocks", "emb_dim", "mlp_ratio")},
    )


def _unet(architecture: str, section: Section, data: DataSpec) -> unet.UNet:
    if data.text is not None:
        raise ConfigError(f"config.data.text: got one, expected none: config.model {architecture!r} reads no captions")
    return unet.UNet(
        architecture=architecture,
        out_channels=data.channels,
        num_classes=data.num_classes if section.take("conditional") else None,
        channel_mult=section.whole_numbers("channel_mult"),
        attention_resolutions=section.whole_numbers("attention_resolutions"),
        dropout=section.number("dropout", minimum=0.0, below=1.0),
        dtype=section.choose("dtype", DTYPES),
        remat_policy=section.take("remat"),
        logsnr_input=section.take("logsnr_input"),
        guidance_input=bool(section.take("guidance_input")),
        attention=section.choose("attention", attention.IMPLEMENTATIONS),
        **{key: section.number(key, minimum=1) for key in ("channels", "num_blocks")},
    )


MODELS: dict[str, Callable[[Section, DataSpec], nn.Module]] = {
    "uvit": _uvit,
    "mlp": _mlp,
    **{name: functools.partial(_unet, name) for name in unet.ARCHITECTURES},
}


def _init(model: nn.Module, data: DataSpec, key: Key) -> Params:
    """Parameters boxed with the logical names of their axes."""
    images = jnp.zeros((1, data.resolution, data.resolution, data.channels))
    guidance = (jnp.zeros((1,)),) if model.guidance_input else ()
    variables = model.init(key, images, jnp.zeros((1,)), data.null_condition(1), *guidance, train=False)
    return variables["params"]


@functools.lru_cache(maxsize=8)
def _boxed_shapes(model: nn.Module, data: DataSpec) -> Params:
    # Kept: it traces the whole network, and shapes, shardings and facts of all phases are asked for several times.
    return jax.eval_shape(functools.partial(_init, model, data), jax.random.key(0))


def _teacher(
    section: Section | None, config: ConfigDict, phases: tuple[int, ...], heirs: tuple[str, ...], load: Load
) -> TeacherSpec | None:
    if section is None:
        return None
    file, workdir = section.text("config"), section.optional_text("workdir")
    guidance = section.number("guidance", minimum=0.0)
    if file in heirs:
        raise ConfigError(f"config.teacher.config: got {file!r}, whose model is its own teacher, expected another")
    if len(phases) > 2:  # the phase before this one, with the same teacher before it
        before = copy.deepcopy(config)  # with its references: TRACT's average follows the length of the phase
        before.objective.phase_steps = phases[:-1]
        lengths = config.objective.get("num_steps_before")
        if lengths:
            before.objective.num_steps_before, before.train.num_steps = lengths[:-1], lengths[-1]
        experiment = build(before, heirs=heirs, load=load)
        experiment = dataclasses.replace(experiment, name=f"{config.name}_{phases[-2]}")
        return TeacherSpec(experiment, None, phase=phases[-2])
    of_teacher = load(file, workdir)
    of_teacher.data = config.data  # so that --config.data.path is said once
    of_teacher.mesh = config.mesh
    if "attention" in config.model and "attention" in of_teacher.model:
        of_teacher.model.attention = config.model.attention  # it runs on the same devices
    if config.prediction in PRECONDITIONED and of_teacher.get("prediction") in ON_ANY_SCHEDULE:
        of_teacher.schedule = config.schedule  # on whose levels the student asks it
    experiment = build(of_teacher, heirs=(*heirs, file), load=load)
    if guidance and experiment.method.guidance_range is not None:
        raise ConfigError(
            f"config.teacher.guidance: got {guidance}, expected 0.0 because the weight is an input of "
            f"{experiment.name!r}: the student learns all of them"
        )
    if guidance:
        try:
            guided = experiment.guided(guidance)
        except ConfigError as error:
            raise ConfigError(f"config.teacher.guidance: {error}") from error
        experiment = dataclasses.replace(guided, name=f"{experiment.name}, guidance {guidance:g}")
    return TeacherSpec(experiment, workdir)


def _phases(objective: Section) -> tuple[int, ...]:
    """Steps of the teacher, and of the student after each phase."""
    phases = objective.whole_numbers("phase_steps")
    if len(phases) < 2 or any(before <= after or before % after for before, after in itertools.pairwise(phases)):
        raise ConfigError(
            f"config.objective.phase_steps: got {phases}, expected the teacher's steps and those of the student after "
            "each phase, each a divisor of the one before, such as (64, 32, 16)"
        )
    if objective.take("num_steps_before") is not None:
        lengths = objective.whole_numbers("num_steps_before") if len(phases) > 2 else ()
        if len(lengths) != len(phases) - 2:
            raise ConfigError(
                f"config.objective.num_steps_before: got {objective.take('num_steps_before')}, expected None, or the "
                f"training steps of each of the {len(phases) - 2} phases before the last"
            )
    return phases


def _check_teacher(config: ConfigDict, teacher: TeacherSpec | None) -> None:
    name = config.objective.name
    if name == "diffusion" and teacher is not None:
        raise ConfigError("config.teacher: got a teacher, expected None because config.objective is 'diffusion'")
    if teacher is None:
        # Before the method is made: it would ask the teacher what is not there.
        if name in STARTS_FROM_TEACHER or config.objective.get("distil"):
            raise ConfigError(NO_TEACHER)
        return
    if teacher.experiment.student_steps is not None and teacher.phase is None:
        got = teacher.experiment.name
        raise ConfigError(f"config.teacher.config: got {got!r}, expected the config of a diffusion model")
    ours = json.loads(config.to_json_best_effort())
    theirs = teacher.experiment.config
    for path, got, expected in (
        ("schedule", ours["schedule"], theirs["schedule"]),
        ("prediction", ours["prediction"], theirs["prediction"]),
        ("model.logsnr_input", ours["model"]["logsnr_input"], theirs["model"]["logsnr_input"]),
    ):
        # A consistency model's preconditioning is EDM's, shifted to be the identity at t = 0.
        if got != expected and (path, got, expected) != ("prediction", "consistency", "edm"):
            raise ConfigError(
                f"config.{path}: got {got}, expected the teacher's {expected}, "
                "because the student starts from the teacher's weights"
            )
