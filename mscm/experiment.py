"""From a config to functions, shared by every command.

`build(config)` turns every name of the config into a function once, reads every key, and refuses what nobody reads; a
typing error is one sentence from here, before anything is compiled.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mscm import compilation
from mscm.checkpoint import first_mismatch, parameter_shapes
from mscm.config import ConfigError, Section, load_config
from mscm.data import sources, transforms
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion import sampler
from mscm.diffusion import schedule as schedules
from mscm.metrics import weights
from mscm.models import attention, uvit
from mscm.objectives import curriculum
from mscm.objectives import distance as distances
from mscm.objectives.diffusion import diffusion_loss
from mscm.objectives.multistep_consistency import consistency_loss
from mscm.training import optimizer as optimizers
from mscm.training import partition
from mscm.training.step import Averages, Batch, LossFn, TrainState, init_state, make_train_steps
from mscm.types import Array, Denoiser, Distance, Int, Key, Labels, Metrics, Params, PerExample, Schedule, Teacher

SCHEDULES: dict[str, Callable[..., Any]] = {
    "cosine": schedules.cosine,
    "interpolated": schedules.interpolated,
}
DIFFUSION_LOSSES: dict[str, Distance] = {"v_mse": distances.v_mse, "eps_mse": distances.eps_mse}
CONSISTENCY_DISTANCES: dict[str, Callable[..., PerExample]] = {
    "pseudo_huber": distances.pseudo_huber,
    "pseudo_huber_weighted": distances.pseudo_huber_weighted,
    "charbonnier": distances.charbonnier,
    "v_mse": lambda diff, lvl_t, *, epsilon: distances.v_mse(diff, lvl_t),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MODELS = ("uvit",)
SAMPLERS: dict[str, Callable[..., Any]] = {"ddim": sampler.sample, "addim": sampler.sample_addim}
LABELS = ("balanced", "uniform")  # in turn, or drawn independently
FEATURE_NETWORKS = ("classifier", *weights.NETWORKS)
_EVAL_NUMBERS = {"num_images": 4, "batch_size": 1, "num_kept": 4}  # and the least that each may be
OBJECTIVES = ("diffusion", "multistep_consistency")


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
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"config.data: {error}") from error
        for key in ("resolution", "channels", "num_classes"):
            if getattr(source, key) != getattr(self, key):
                raise ConfigError(
                    f"config.data.{key}: got {getattr(self, key)}, expected {getattr(source, key)}, "
                    f"which is what {self.path or repr(self.name)} has"
                )
        return source


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


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """How models are scored."""

    num_images: int
    batch_size: int
    seeds: tuple[int, ...]  # each gives a score of its own
    labels: str  # of the images, one of LABELS
    teacher_samplers: tuple[str, ...]
    teacher_steps: tuple[int, ...]
    network: str  # whose features are compared, one of FEATURE_NETWORKS
    precision: str  # of that network, one of DTYPES
    weights: str | None  # its converted file; None: where mscm.metrics.convert writes it
    reference: str | None  # file of reference statistics; None: computed from the data
    reference_split: str | None  # the split of the reference; None: the split that is trained on
    num_kept: int  # images whose features are kept, for precision, recall and the kernel distance
    at_end: bool  # whether training ends with scores; else mscm.eval gives them


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """The diffusion model that a student starts from and, in distillation, learns from."""

    experiment: "Experiment"
    workdir: str | None  # None: trained first, below the student's work directory


@dataclasses.dataclass(frozen=True, eq=False)  # eq: compiled samplers are cached by identity
class Experiment:
    """All that a command needs; made by `build`."""

    name: str
    seed: int
    config: dict[str, Any]  # as JSON: for the checkpoint and the work directory
    data: DataSpec
    model: nn.Module
    schedule: Schedule
    to_x: denoisers.ToX
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    ema_decay: float
    ema_warmup: bool
    train: TrainSpec
    eval: EvalSpec
    student_steps: int | None  # None: a diffusion model
    distil: bool  # whether training calls the teacher
    teacher: TeacherSpec | None
    mesh_sizes: partition.MeshSizes
    guidance: float = 0.0  # of a teacher: classifier-free guidance in all that it answers
    devices: tuple[jax.Device, ...] | None = None  # of the mesh; None: those that are there

    def on(self, devices: Sequence[jax.Device]) -> "Experiment":
        """The same on other devices, which need not exist: a topology to compile for."""
        return dataclasses.replace(self, devices=tuple(devices))

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

    @functools.cached_property
    def _boxed_params(self) -> Params:
        # Kept: it traces the whole network, and shapes, shardings and facts are all asked for several times.
        return jax.eval_shape(functools.partial(_init, self.model, self.data), jax.random.key(0))

    def abstract_params(self) -> Params:
        """Shapes and types of the parameters, without computing them."""
        return nn.meta.unbox(self._boxed_params)

    def init_state(self, params: Params) -> TrainState:
        """Training state before the first step."""
        return init_state(params, self.optimizer)

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

    def random_state(self, key: Key) -> TrainState:
        """Training state before the first step of parameters at random, on the mesh."""
        make_state = jax.jit(lambda key: self.init_state(self.init_params(key)), out_shardings=self.state_shardings())
        return make_state(key)

    def train_steps(self) -> Callable[[TrainState, Params, Batch, Key], tuple[TrainState, Averages]]:
        """The jitted step; batches carry a leading axis of `train.steps_per_dispatch`."""
        state, whole = self.state_shardings(), partition.replicated(self.mesh)
        frozen = state.params if self.distil else {}
        return make_train_steps(
            partition.on_mesh(self.loss_fn, self.mesh),
            self.optimizer,
            self.learning_rate,
            ema_decay=self.ema_decay,
            ema_warmup=self.ema_warmup,
            num_segments=self.student_steps,
            num_microbatches=self.train.num_microbatches,
            in_shardings=(state, frozen, partition.batch_sharding(self.mesh, leading=1), whole),
            out_shardings=(state, whole),
            compiler_options=compilation.options(self.platform),
        )

    def answer(self, params: Params, labels: Labels) -> Teacher:
        """Without dropout; with its guidance, and then beside the conditional output."""
        network = _network(self.model, params)
        if not self.guidance:
            return denoisers.make_denoiser(network, self.schedule, self.to_x, labels=labels)
        null_label, guidance = self.data.num_classes, self.guidance
        return denoisers.make_guided(
            network, self.schedule, self.to_x, labels=labels, null_label=null_label, guidance=guidance
        )

    def denoiser(self, params: Params, labels: Labels) -> Denoiser:
        """Deterministic denoiser for sampling."""
        answer = self.answer(params, labels)
        return answer if not self.guidance else lambda z_t, t: answer(z_t, t).x_hat

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


def build(config: ConfigDict) -> Experiment:
    """Everything that the config decides, as functions.

    Raises:
      ConfigError: a key is missing, unknown, unread or has an impossible value; nothing has been compiled yet.
    """
    root = Section(config)
    try:
        experiment = _build(root, config)
    except ConfigError:
        raise
    except ValueError as error:  # a sentence of the part that refused its arguments
        raise ConfigError(f"config {config.get('name')!r}: {error}") from error
    root.refuse_unread()
    return experiment


def _build(root: Section, config: ConfigDict) -> Experiment:
    data = _data(root.section("data"))
    model = _model(root.section("model"), data)
    schedule_section = root.section("schedule")
    schedule = schedule_section.bind(schedule_section.choose("name", SCHEDULES))
    schedule_section.refuse_unread()  # now: a misspelt key is not a difference from the teacher's schedule
    to_x = root.choose("prediction", denoisers.PREDICTIONS)
    train = _train(root.section("train"))
    eval_section = root.section("eval")
    spec = EvalSpec(
        **{key: eval_section.number(key, minimum=least) for key, least in _EVAL_NUMBERS.items()},
        seeds=eval_section.whole_numbers("seeds", minimum=0, distinct=True),
        teacher_steps=eval_section.whole_numbers("teacher_steps", distinct=True),
        teacher_samplers=eval_section.choose_some("teacher_samplers", SAMPLERS),
        labels=eval_section.choose("labels", LABELS),
        network=eval_section.choose("network", FEATURE_NETWORKS),
        precision=eval_section.choose("precision", tuple(DTYPES)),
        at_end=bool(eval_section.take("at_end")),
        **{key: eval_section.take(key) for key in ("weights", "reference", "reference_split")},
    )
    optimizer_section = root.section("optimizer")
    bind_rate = optimizer_section.bind(functools.partial(optimizers.make_learning_rate, num_steps=train.num_steps))
    learning_rate = bind_rate()
    ema = root.section("ema")
    mesh = root.section("mesh")
    teacher = _teacher(root.optional_section("teacher"), config)
    objective = root.section("objective")
    kind = objective.choose("name", OBJECTIVES)
    _check_teacher(config, teacher, needs_teacher=kind != "diffusion")
    student_steps, distil = None, False
    if kind == "diffusion":
        loss_fn = _diffusion_objective(objective, data, model, schedule, to_x)
    else:
        student_steps, distil = objective.number("student_steps", minimum=1), bool(objective.take("distil"))
        if teacher.experiment.guidance and not distil:
            raise ConfigError("config.teacher.guidance: expected 0.0, because objective.distil = False asks no teacher")
        loss_fn = _consistency_objective(objective, data, model, schedule, to_x, teacher, student_steps, distil)
    experiment = Experiment(
        name=root.take("name"),
        seed=root.number("seed", minimum=0),
        config=json.loads(config.to_json_best_effort()),
        data=data,
        model=model,
        schedule=schedule,
        to_x=to_x,
        loss_fn=loss_fn,
        optimizer=optimizer_section.bind(optimizers.make_optimizer)(learning_rate),
        learning_rate=learning_rate,
        ema_decay=ema.number("decay", minimum=0.0, below=1.0),
        ema_warmup=bool(ema.take("warmup")),
        train=train,
        eval=spec,
        student_steps=student_steps,
        distil=distil,
        teacher=teacher,
        mesh_sizes=partition.MeshSizes(**_fields(mesh, partition.MeshSizes)),
    )
    jax.eval_shape(schedule, jnp.zeros((1,)))
    ours = parameter_shapes(experiment.abstract_params())  # shapes that do not fit are errors of the config
    if teacher is not None:
        theirs = parameter_shapes(teacher.experiment.abstract_params())
        mismatch = first_mismatch(ours, theirs)
        if mismatch:
            name, got, expected = mismatch
            raise ConfigError(
                f"config.model: got shape {got} for parameter {name}, expected the teacher's {expected}, "
                "because the student starts from the teacher's weights"
            )
    return experiment


def _fields(section: Section, spec: type) -> dict[str, Any]:
    return {field.name: section.take(field.name) for field in dataclasses.fields(spec)}


def _data(section: Section) -> DataSpec:
    return DataSpec(
        **{key: section.take(key) for key in ("name", "split", "path")},
        **{key: section.number(key, minimum=1) for key in ("resolution", "channels", "num_classes")},
        flip=bool(section.take("flip")),
        num_workers=section.number("num_workers", minimum=0),
        num_threads=section.number("num_threads", minimum=1),
    )


def _train(section: Section) -> TrainSpec:
    train = TrainSpec(**{f.name: section.number(f.name, minimum=1) for f in dataclasses.fields(TrainSpec)})
    for key in ("num_steps", "log_every_steps", "save_every_steps"):
        if getattr(train, key) % train.steps_per_dispatch:
            raise ConfigError(
                f"config.train.{key}: got {getattr(train, key)}, expected a multiple of "
                f"config.train.steps_per_dispatch = {train.steps_per_dispatch}"
            )
    return train


def _model(section: Section, data: DataSpec) -> uvit.UViT:
    section.choose("name", MODELS)
    stages = tuple(uvit.Stage(**_fields(stage, uvit.Stage)) for stage in section.section("stages").sections())
    middle = section.section("middle")
    return uvit.UViT(
        out_channels=data.channels,
        num_classes=data.num_classes,
        stages=stages,
        middle=uvit.Stage("transformer", **{key: middle.take(key) for key in ("width", "num_blocks", "dropout")}),
        dtype=section.choose("dtype", DTYPES),
        remat_policy=section.take("remat"),
        logsnr_input=section.take("logsnr_input"),
        scan_blocks=bool(section.take("scan_blocks")),
        attention=section.choose("attention", attention.IMPLEMENTATIONS),
        **{key: section.number(key, minimum=1) for key in ("emb_dim", "head_dim", "mlp_ratio", "patch_size")},
    )


def _init(model: nn.Module, data: DataSpec, key: Key) -> Params:
    """Parameters boxed with the logical names of their axes."""
    images = jnp.zeros((1, data.resolution, data.resolution, data.channels))
    variables = model.init(key, images, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32), train=False)
    return variables["params"]


def _network(model: nn.Module, params: Params, *, dropout_key: Key | None = None) -> denoisers.Network:
    """The network as a function; with a key it drops out, the same units in every call (synchronised dropout)."""

    def network(z_t, logsnr, labels):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply({"params": params}, z_t, logsnr, labels, train=dropout_key is not None, rngs=rngs)

    return network


def _teacher(section: Section | None, config: ConfigDict) -> TeacherSpec | None:
    if section is None:
        return None
    of_teacher = load_config(section.take("config"))
    of_teacher.data = config.data  # so that --config.data.path is said once
    of_teacher.mesh = config.mesh
    of_teacher.model.attention = config.model.attention  # it runs on the same devices
    experiment = build(of_teacher)
    guidance = section.number("guidance", minimum=0.0)
    if guidance:
        if not experiment.config["objective"].get("label_dropout"):
            raise ConfigError(
                f"config.teacher.guidance: got {guidance}, expected 0.0 because {experiment.name!r} was trained with "
                "objective.label_dropout = 0.0: its null class means nothing"
            )
        name = f"{experiment.name}, guidance {guidance:g}"
        experiment = dataclasses.replace(experiment, name=name, guidance=guidance)
    return TeacherSpec(experiment, section.take("workdir"))


def _check_teacher(config: ConfigDict, teacher: TeacherSpec | None, *, needs_teacher: bool) -> None:
    if not needs_teacher:
        if teacher is not None:
            raise ConfigError("config.teacher: got a teacher, expected None because config.objective is 'diffusion'")
        return
    if teacher is None:
        raise ConfigError("config.teacher: got None, expected a section naming the diffusion model to start from")
    if teacher.experiment.student_steps is not None:
        got = teacher.experiment.name
        raise ConfigError(f"config.teacher.config: got {got!r}, expected the config of a diffusion model")
    ours = json.loads(config.to_json_best_effort())
    theirs = teacher.experiment.config
    for path, got, expected in (
        ("schedule", ours["schedule"], theirs["schedule"]),
        ("prediction", ours["prediction"], theirs["prediction"]),
        ("model.logsnr_input", ours["model"]["logsnr_input"], theirs["model"]["logsnr_input"]),
    ):
        if got != expected:
            raise ConfigError(
                f"config.{path}: got {got}, expected the teacher's {expected}, "
                "because the student starts from the teacher's weights"
            )


def _scaled(section: Section, distance: Distance, data: DataSpec) -> Distance:
    if section.take("multiscale") is None:
        return distance
    resolutions = section.whole_numbers("multiscale")
    odd = [resolution for resolution in resolutions if data.resolution % resolution]
    if odd:
        raise ConfigError(
            f"config.objective.multiscale: got {odd[0]}, expected divisors of data.resolution = {data.resolution}"
        )
    return distances.multiscale(distance, resolutions)


def _inputs(data: DataSpec, batch: Batch, key: Key):
    x = transforms.to_float(batch["image"])
    return (transforms.random_flip(x, key) if data.flip else x), batch["label"]


def _diffusion_objective(
    section: Section, data: DataSpec, model: nn.Module, schedule: Schedule, to_x: denoisers.ToX
) -> LossFn:
    distance = _scaled(section, section.choose("loss", DIFFUSION_LOSSES), data)
    label_dropout = section.number("label_dropout", minimum=0.0, below=1.0)

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: Key, step: Int[Array, ""]):
        del frozen, step
        k_flip, k_dropout, k_label, k_loss = jax.random.split(key, 4)
        x, labels = _inputs(data, batch, k_flip)
        if label_dropout:
            dropped = jax.random.bernoulli(k_label, label_dropout, labels.shape)
            labels = jnp.where(dropped, data.num_classes, labels)
        network = _network(model, params, dropout_key=k_dropout)
        return diffusion_loss(
            denoisers.make_denoiser(network, schedule, to_x, labels=labels), schedule, x, k_loss, distance=distance
        )

    return loss_fn


def _consistency_objective(
    section: Section,
    data: DataSpec,
    model: nn.Module,
    schedule: Schedule,
    to_x: denoisers.ToX,
    teacher: TeacherSpec,
    student_steps: int,
    distil: bool,
) -> LossFn:
    distance = functools.partial(
        section.choose("distance", CONSISTENCY_DISTANCES), epsilon=section.number("huber_epsilon", minimum=0.0)
    )
    distance = _scaled(section, distance, data)
    grows = section.section("teacher_steps")
    teacher_steps = functools.partial(
        curriculum.teacher_steps,
        start=grows.number("start", minimum=1),
        end=grows.number("end", minimum=1),
        anneal_steps=grows.number("anneal_steps", minimum=0),
    )
    x_var_frac = section.number("x_var_frac", minimum=0.0)

    def loss_fn(
        params: Params, frozen: Params, batch: Batch, key: Key, step: Int[Array, ""]
    ) -> tuple[PerExample, Metrics]:
        k_flip, k_dropout, k_loss = jax.random.split(key, 3)
        x, labels = _inputs(data, batch, k_flip)
        network = _network(model, params, dropout_key=k_dropout)
        current_steps = teacher_steps(step)
        loss, metrics = consistency_loss(
            denoisers.make_denoiser(network, schedule, to_x, labels=labels),
            teacher.experiment.answer(frozen, labels) if distil else None,
            schedule,
            x,
            k_loss,
            student_steps=student_steps,
            teacher_steps=current_steps,
            x_var_frac=x_var_frac,
            distance=distance,
        )
        return loss, {**metrics, "teacher_steps": current_steps}

    return loss_fn
