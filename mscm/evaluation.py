"""Sampling and scoring of trained models: what `mscm.main`, `mscm.eval` and `mscm.sample` share.

Image i of an evaluation starts from fold_in(key(seed), i) and has the label i modulo the number of classes, or one that
is drawn from the seed, or a caption of the data (`conditions_of_images`); the noise of its steps is its own too: it is
the same image whatever the batch size, and two models sample from common noise.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mscm import compilation, distributed, failures, stopping, terminal
from mscm.checkpoint import reading
from mscm.config import ConfigError
from mscm.data import captioned_digits, captions, embeddings, sources, transforms
from mscm.experiment import EvalSpec, Experiment
from mscm.metrics import alignment, clip, features, files, gathering, reference_statistics, statistics, weights
from mscm.metrics import classifier as classifiers
from mscm.metrics.features import FeatureNetwork, Outputs
from mscm.metrics.statistics import Statistics
from mscm.report import grid
from mscm.sampling import SamplerSpec, own_steps
from mscm.training import partition
from mscm.types import Condition, Images, Int, Key, Params, Text

GRID_IMAGES, _GRID_COLUMNS, _CAPTIONED_COLUMNS = 50, 10, 5

# Folded into the key of an evaluation for the noise of the steps: no image has this index.
_STEPS = np.uint32(2**32 - 1)
_MIN_REFERENCE = 8  # images: each half has more than the three neighbours of precision and recall

HostCondition = Int[np.ndarray, "b"] | Text
# (params, key, indices of the images, what they should show) -> images, whole on every device
SampleFn = Callable[[Params, Key, Int[np.ndarray, "b"], HostCondition], Images]
# Indices of images -> what they should show, on the host
Conditions = Callable[[Int[np.ndarray, "b"]], HostCondition]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What some images should show, as words or numbers too."""

    conditions: Conditions
    columns: int  # of a grid
    labels: Int[np.ndarray, "n"] | None = None
    texts: list[str] | None = None

    @classmethod
    def of_labels(cls, labels: Int[np.ndarray, "n"], num_classes: int) -> "Shown":
        """One label for each image."""
        return cls(lambda i: labels[i].astype(np.int32), min(num_classes, _GRID_COLUMNS), labels=labels)

    @classmethod
    def of_captions(
        cls, spec: captions.TextSpec, texts: list[str], encoder: embeddings.Encoder | None = None
    ) -> "Shown":
        """One caption for each image; `encoder`: the frozen one that the model knows captions from, if it does.

        Raises:
          ValueError: as `captions.encode`.
        """
        tokens, mask = captions.encode(texts, spec, encoder)
        return cls(lambda i: Text(tokens[i], mask[i]), _CAPTIONED_COLUMNS, texts=texts)

    @classmethod
    def of_data(cls, experiment: Experiment, num_images: int) -> "Shown":
        """The captions of the data, whose tokens are there whoever made them."""
        texts = captions_in_turn(experiment, np.arange(num_images))
        return cls(conditions_in_turn(experiment), _CAPTIONED_COLUMNS, texts=texts)


def default_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """A student's own steps with its method's sampler, or `eval.student_samplers`; else `diffusion_samplers`."""
    if experiment.eval.student_samplers:
        # Each has steps of its own: `build` has refused others.
        own = [(text, own_steps(text)) for text in experiment.eval.student_samplers]
        return [SamplerSpec(text, num_steps) for text, num_steps in own if num_steps is not None]
    if experiment.student_steps is not None:
        return [SamplerSpec(experiment.method.sampler, experiment.student_steps)]
    return diffusion_samplers(experiment)


def diffusion_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """`eval.teacher_samplers` with `eval.teacher_steps`: a diffusion model's own, or those of a student's teacher."""
    spec = experiment.eval
    return [SamplerSpec(text, num_steps) for text in spec.teacher_samplers for num_steps in spec.teacher_steps]


def short_teacher_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """What ends a student's training: its teacher with the student's number of steps, and with the largest.

    `mscm.eval` scores the teacher at all of `eval.teacher_steps`.
    """
    text, largest = experiment.eval.teacher_samplers[0], max(experiment.eval.teacher_steps)
    return [SamplerSpec(text, num_steps) for num_steps in sorted({experiment.student_steps or largest, largest})]


def chosen_sampler(experiment: Experiment, text: str | None, num_steps: int | None, *, force: bool) -> SamplerSpec:
    """The sampler that the flags of a command ask for; None: the default of the model.

    Raises:
      ConfigError: as `SamplerSpec` and `check_sampler`.
    """
    default = default_samplers(experiment)[-1]
    text = default.sampler if text is None else text
    if num_steps is None:
        num_steps = own_steps(text) or experiment.student_steps or default.num_steps
    spec = SamplerSpec(text, num_steps)
    check_sampler(experiment, spec, force=force)
    return spec


def check_sampler(experiment: Experiment, spec: SamplerSpec, *, force: bool = False) -> None:
    """Refuses what a model was not trained for, unless `force`, and what it cannot do.

    Raises:
      ConfigError: the sentence says what is possible.
    """
    num_evaluations(experiment, spec)
    possible = experiment.student_steps
    if force:
        return
    if possible is None:
        if spec.name == "consistency":
            raise ConfigError(
                f"got {spec} for {experiment.name!r}, expected another sampler: a diffusion model's x_hat is a mean of "
                "images, not an image; use a consistency model, or --force"
            )
    elif not (spec.is_plain_ddim and spec.num_steps == possible) and not (possible == 1 and spec.name == "consistency"):
        raise ConfigError(
            f"got {spec} for {experiment.name!r}, expected ddim with {possible} steps"
            f"{' or consistency' if possible == 1 else ''}: a student jumps to the starts of its {possible} segments "
            f"and knows no others; train one for {spec.num_steps} steps, or use --force"
        )


def num_evaluations(experiment: Experiment, spec: SamplerSpec) -> int:
    """NFE: how often a model's network is asked for each image.

    Raises:
      ConfigError: the model does not have the noise levels or the guidance of the sampler.
    """
    model = experiment.for_sampler(spec)
    if model.method.guidance_range is not None:  # guidance is an input, not a second pass
        return len(spec.plan(experiment.schedule).evaluated)
    return spec.num_evaluations(experiment.schedule, guided=bool(experiment.guidance))


def sampling_function(
    experiment: Experiment, spec: SamplerSpec
) -> Callable[[Params, Key, jax.Array, Condition], Images]:
    """A sampler as a pure function, to be traced: on the mesh around the trace, or without one for any device."""
    data, schedule = experiment.data, experiment.schedule
    model, plan = experiment.for_sampler(spec), spec.plan(schedule)
    shape = (data.resolution, data.resolution, data.channels)

    def sample(params: Params, key: Key, indices: jax.Array, condition: Condition) -> Images:
        z_1 = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)
        of_steps = jax.random.fold_in(key, _STEPS)
        keys = jax.vmap(lambda i: jax.random.fold_in(of_steps, i))(indices)
        return plan.sample(spec.clip(model.denoiser(params, condition)), schedule, z_1, keys)

    return sample


@functools.lru_cache(maxsize=64)
def make_sample_fn(experiment: Experiment, spec: SamplerSpec) -> SampleFn:
    """Jitted sampler; kept, so that a model is compiled once however many checkpoints are scored."""
    sample = sampling_function(experiment, spec)
    rows, whole = partition.batch_sharding(experiment.mesh), partition.replicated(experiment.mesh)

    def sample_parts(params: Params, key: Key, indices: jax.Array, condition: Condition) -> Images:
        # Every process has all indices, and every device computes the images of its part.
        indices, condition = jax.lax.with_sharding_constraint((indices, condition), rows)
        return sample(params, key, indices, condition)

    options = compilation.options(experiment.platform)
    return jax.jit(
        partition.on_mesh(sample_parts, experiment.mesh),
        in_shardings=(None, whole, whole, whole),
        out_shardings=whole,
        compiler_options=options,
    )


def generate(
    experiment: Experiment,
    params: Params,
    spec: SamplerSpec,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    conditions: Conditions,
    start: int = 0,
) -> Iterator[np.ndarray]:
    """Batches of uint8 images `b h w c` as an image file would hold them; the last may be smaller.

    `start`: the first image, the first of a batch. Several processes go through them together; between two batches a
    signal ends them all.
    """
    sample = make_sample_fn(experiment, spec)
    batch_size = partition.rounded_up(batch_size, experiment.mesh)
    key = jax.random.key(seed)
    for first in range(start, num_images, batch_size):
        stopping.end_if_asked()
        # The last batch is filled up and cut: one compiled shape, and no image is dropped.
        indices = np.arange(first, first + batch_size)
        condition = conditions(indices % num_images)
        with failures.device_memory(
            f"{experiment.name}, {spec}: {batch_size} images at once on {experiment.mesh.devices.size} devices",
            "lower config.eval.batch_size, which changes no image",
        ):
            images = np.asarray(transforms.to_uint8(sample(params, key, indices, condition)))
        yield images[: num_images - first]


class Scorer:
    """Scores of images against one reference, in the features of one network.

    The scored run's settings are also its teacher's: scores of one table have equal counts and common noise.
    """

    def __init__(self, experiment: Experiment, directory: str, *, allow_mismatch: bool = False):
        """Makes or reads the network and the reference; what it makes is kept in `directory`.

        Raises:
          ConfigError: the weights or the reference cannot be read, or the reference is not of what is scored and
            `allow_mismatch` does not say that it may be.
        """
        self.spec, self._experiment = experiment.eval, experiment
        self._directory, self._allow_mismatch = directory, allow_mismatch
        try:
            self.network = make_network(experiment, directory)
            self.reference = _reference(experiment, self.network, directory)
        except ValueError as error:
            raise ConfigError(f"config.eval: {error}") from error
        self.alignment = _alignment(experiment, directory)
        self.mismatch = self.differences(reference_facts(experiment))
        if experiment.eval.reference:
            data = experiment.data
            shape = (data.resolution, data.resolution, data.channels)
            try:
                reference_statistics.check_size(self.reference.statistics, self.network, shape)
            except ValueError as error:
                raise ConfigError(f"config.eval.reference: {error}") from error

    def differences(self, known: dict[str, Any]) -> list[str]:
        """What is not the same in the reference and in images of which `known` is known.

        Raises:
          ConfigError: something is not, and `allow_mismatch` does not say that it may be.
        """
        found = reference_statistics.differences(self.reference, known, self.network)
        if found and not self._allow_mismatch:
            raise ConfigError(
                f"config.eval.reference: got a reference of other images, {'; '.join(found)}; give the right one, or "
                "use --allow_mismatch of mscm.eval, which marks the scores"
            )
        return found

    @property
    def metric(self) -> str:
        """Name of the distance by which models are compared."""
        return statistics.names(self.network.name)[0]

    @functools.cached_property
    def identity(self) -> str:
        """Hash of all that decides a score beside the images; scores under another one are not comparable."""
        reference = self.reference
        of_file = files.fingerprint(reference.statistics.to_arrays()) if reference.imported_from else None
        kept = None if reference.statistics.kept is None else len(reference.statistics.kept)
        parts = [self.network.fingerprint, reference.data, reference.network, of_file, kept, self.spec.num_kept]
        parts += self.mismatch + ([self.alignment.fingerprint] if self.alignment else [])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self, mismatch: list[str] | None = None) -> dict[str, Any]:
        """What every score says of how it was made; `mismatch`: of its images, where more is known than of all."""
        mismatch = self.mismatch if mismatch is None else mismatch
        described = {
            "network": reference_statistics.label(self.network.name, self.network.fingerprint),
            "reference": str(self.reference),
            "num_kept": self.spec.num_kept,
            "identity": self.identity,
        }
        return described | ({"mismatch": mismatch} if mismatch else {})

    def network_for(self, seed: int, start: int) -> Callable[[np.ndarray], Outputs]:
        """The network for the images of an evaluation from the one of number `start` on, in their order."""
        if self.alignment is None:
            return self.network
        images = np.arange(start, self.spec.num_images)
        return self.alignment.beside(self.network, captions_in_turn(self._experiment, images, seed))

    def compare(self, gathered: Statistics) -> dict[str, float]:
        """All metrics of images against the reference, and with their captions where they have some."""
        scores = statistics.compare(gathered, self.reference.statistics, network=self.network.name)
        if gathered.alignment is not None and self.alignment is not None:
            scores[self.alignment.name] = float(gathered.alignment) / gathered.features.count
        return scores

    def size_of_half(self) -> int:
        """Images on each side of `half_against_half`."""
        return min(len(self._source) // 2, self.spec.num_images)

    @functools.cached_property
    def _source(self) -> sources.Source:
        return _reference_source(self._experiment)

    def half_against_half(self) -> dict[str, float]:
        """All metrics of one class-stratified half of the reference's images against the other, or of some of each.

        Counts below that of a score make a Frechet distance larger: with 1797 digits most of it is this bias.
        """
        source, rng = self._source, np.random.RandomState(0)
        halves = [rng.permutation(half)[: self.size_of_half()] for half in sources.stratified_halves(source.labels)]
        with contextlib.ExitStack() as stack:
            a, b = (
                stack.enter_context(
                    _gathered(source, np.sort(half), self.network, self.spec, f"{self._directory}/half_{name}.npz")
                )
                for name, half in zip("ab", halves, strict=True)
            )
            return statistics.compare(a.statistics, b.statistics, network=self.network.name)


def _alignment(experiment: Experiment, directory: str) -> alignment.Alignment | None:
    """What `config.eval.alignment` names; a classifier of digits is trained, where it is not in `directory`.

    Raises:
      ConfigError: there is no such CLIP.
    """
    spec = experiment.eval
    if spec.alignment == "clip":
        return _clip(spec)
    if spec.alignment is None:
        return None
    source = sources.open_source("digits", split="all")
    with distributed.main_first():
        return alignment.of_digits(classifiers.load_or_train(source, directory), captioned_digits.parts)


def _clip(spec: EvalSpec) -> alignment.Alignment:
    try:
        return clip.load(spec.alignment_weights or "")
    except ValueError as error:
        raise ConfigError(f"config.eval.alignment_weights: {error}") from error


def make_network(experiment: Experiment, directory: str) -> FeatureNetwork:
    """The feature network of `config.eval`; a classifier is trained, where it is not in `directory`.

    Raises:
      ValueError: its weights are not there.
    """
    _check_network(experiment.eval)
    network = _loaded_network(experiment)
    if network is None:
        source = captions.without_tokens(experiment.data.open())
        with distributed.main_first():
            network = classifiers.load_or_train(source, directory).network
    return network.for_calls_of(experiment.eval.batch_size)


def _check_network(spec: EvalSpec) -> None:
    if spec.network not in weights.NETWORKS and (spec.precision != "float32" or spec.weights):
        raise ValueError(f"the network {spec.network!r} has no file and is float32, expected no weights or precision")


def _loaded_network(experiment: Experiment) -> FeatureNetwork | None:
    """From its file; None: it is trained."""
    spec, data = experiment.eval, experiment.data
    if spec.network == "classifier":
        return None
    if spec.network == "pixels":
        return features.pixels((data.resolution, data.resolution, data.channels))
    return weights.load(spec.network, spec.weights or weights.default_path(spec.network), dtype=spec.precision)


def reference_facts(experiment: Experiment, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known of the images that a model should be measured against.

    From the config, and from `said`, the facts of its checkpoint: how the images that it was trained on were resized.
    """
    facts = {key: getattr(experiment.data, key) for key in ("name", "resolution", "channels")}
    facts |= {"split": experiment.eval.reference_split or experiment.data.split}
    return facts | {"transform": said["transform"]} if said and "transform" in said else facts


def computed_reference(
    experiment: Experiment, network: FeatureNetwork, partial: str
) -> contextlib.AbstractContextManager[reference_statistics.Reference]:
    """Statistics of the images of `config.data`, of the split `config.eval.reference_split`.

    `partial`: the file of the pass under way, from which one that was killed goes on; it goes when the block ends well.
    """
    source = _reference_source(experiment)
    return _gathered(source, np.arange(len(source)), network, experiment.eval, partial)


def _reference_source(experiment: Experiment) -> sources.Source:
    return captions.without_tokens(_scored_source(experiment))


def _scored_source(experiment: Experiment) -> sources.Source:
    return dataclasses.replace(experiment.data, split=reference_facts(experiment)["split"]).open()


def _reference(experiment: Experiment, network: FeatureNetwork, directory: str) -> reference_statistics.Reference:
    """The file that the config names, or that of an earlier evaluation, or a new one."""
    spec = experiment.eval
    if spec.reference:
        return _load_reference(spec.reference)
    source = _reference_source(experiment)
    path = os.path.join(directory, f"reference_{network.name}_{source.split}.npz")
    stored = None
    with contextlib.suppress(FileNotFoundError, ValueError):  # absent, damaged or of another kind: made again
        stored = reference_statistics.load(path)
    wanted = reference_statistics.describe(source), {"name": network.name, "fingerprint": network.fingerprint}
    num_kept = min(spec.num_kept, len(source))
    kept = None if stored is None else stored.statistics.kept
    is_right = stored is not None and (stored.data, stored.network) == wanted
    usable = is_right and kept is not None and len(kept) == num_kept
    if distributed.everyone(usable) and stored is not None:  # all compute, or none
        return stored
    with computed_reference(experiment, network, f"{path}.partial.npz") as reference:
        if distributed.is_main():
            reference_statistics.save(path, reference)
    return reference


@contextlib.contextmanager
def _gathered(
    source: sources.Source, indices: np.ndarray, network: FeatureNetwork, spec: EvalSpec, path: str
) -> Iterator[reference_statistics.Reference]:
    """Statistics of images that all processes decode together; `path` as `computed_reference`'s `partial`."""
    key = [reference_statistics.describe(source), network.fingerprint, spec.num_kept]
    key.append(files.fingerprint({"indices": indices}))
    partial = gathering.Partial(path, key, writes=distributed.is_main())
    under_way = gathering.Gathering(len(indices), num_kept=spec.num_kept, partial=partial)
    count = distributed.agree(under_way.count)
    if not distributed.everyone(under_way.count == count):  # one does not see the file of another
        under_way = gathering.Gathering(len(indices), num_kept=spec.num_kept, partial=partial, goes_on=False)
        count = 0

    def load(batch: np.ndarray) -> np.ndarray:
        stopping.end_if_asked()
        return distributed.gathered(lambda part: source.load(part)["image"], batch)

    with terminal.Progress(f"{source.name}/{source.split}", len(indices), done=count) as progress:
        reference = reference_statistics.compute(
            source,
            network,
            indices=indices,
            batch_size=spec.batch_size,
            gathering=under_way,
            load=load,
            watch=progress.add,
        )
    under_way.save()
    yield reference
    under_way.remove_file()


def check(experiment: Experiment, source: sources.Source) -> None:
    """Looks for all that scoring needs, before hours of training on `source`.

    Raises:
      ConfigError: something is not there, or the reference is of other images.
    """
    spec = experiment.eval
    if spec.alignment == "clip":
        _clip(spec)
    try:
        _check_network(spec)
        network = _loaded_network(experiment)
        if spec.reference:
            facts = reference_facts(experiment, {"transform": source.transform})
            found = reference_statistics.differences(_load_reference(spec.reference), facts, network)
            if found:
                raise ValueError(f"reference: got one of other images, {'; '.join(found)}; give the right one")
        else:
            count = len(_reference_source(experiment))
            if count < _MIN_REFERENCE:
                raise ValueError(f"got {count} images to compare with, expected at least {_MIN_REFERENCE}; add some")
    except ValueError as error:
        raise ConfigError(
            f"config.eval: {error}, or --config.eval.at_end=False to train without scores at the end"
        ) from error


def _load_reference(path: str) -> reference_statistics.Reference:
    try:
        return reference_statistics.load(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"got no reference {path}; make it with python -m mscm.metrics.reference, or set config.eval.reference to "
            "None to compute it from the data"
        ) from error


def read_ema(experiment: Experiment, workdir: str, step: int | None = None) -> Params:
    """Averaged parameters of a checkpoint (None: the newest)."""
    with reading(workdir) as checkpoints:
        step = checkpoints.check(experiment.facts(), step)
        return checkpoints.restore_ema(experiment.placed_state().ema, step)


def conditions_of_images(experiment: Experiment, seed: int) -> Conditions:
    """What the images of an evaluation should show, by `eval.labels`.

    Raises:
      ConfigError: as `conditions_in_turn`.
    """
    if experiment.eval.labels != "uniform":
        return conditions_in_turn(experiment, seed)
    labels = np.random.RandomState(seed).randint(experiment.data.num_classes, size=experiment.eval.num_images)
    return lambda indices: labels[indices].astype(np.int32)


def conditions_in_turn(experiment: Experiment, seed: int = 0) -> Conditions:
    """All labels one after the other, or all captions in an order of the seed.

    Raises:
      ConfigError: the data cannot be read, whose captions they are.
    """
    if experiment.data.text is None:
        return lambda indices: (indices % experiment.data.num_classes).astype(np.int32)
    source = _captioned(experiment)
    return lambda indices: source.texts(*_captions_in_turn(source, seed, indices))


def captions_in_turn(experiment: Experiment, indices: Int[np.ndarray, "b"], seed: int = 0) -> list[str]:
    """The captions of `conditions_in_turn`, as words."""
    source = _captioned(experiment)
    return captions.in_epochs(source, *_captions_in_turn(source, seed, indices))


@functools.lru_cache(maxsize=2)  # every row of scores asks for its tokens, its words and those of its grid
def _captioned(experiment: Experiment) -> captions.WithTokens:
    source = _scored_source(experiment)
    if not isinstance(source, captions.WithTokens):
        raise ConfigError(f"config.data.text: got None for {source.name!r}, expected the captions that images show")
    return source


def _captions_in_turn(
    source: sources.Source, seed: int, indices: Int[np.ndarray, "b"]
) -> tuple[Int[np.ndarray, "b"], Int[np.ndarray, "b"]]:
    """Example and epoch of each: after all examples comes the next caption of each."""
    order = np.random.RandomState(seed).permutation(len(source))
    return order[indices % len(source)], indices // len(source)


def sample_grid(models: list[tuple[Experiment, Params, SamplerSpec]], batch_size: int) -> np.ndarray:
    """Samples side by side: image i of each is from the same noise and of the same class or caption."""
    panels = {}
    for experiment, params, spec in models:
        batches = generate(
            experiment,
            params,
            spec,
            num_images=GRID_IMAGES,
            batch_size=batch_size,
            seed=0,
            conditions=conditions_in_turn(experiment),
        )
        panels[f"{experiment.name}, {spec}"] = np.concatenate(list(batches))
    return grid_of(models[0][0], panels)


def grid_of(experiment: Experiment, panels: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """The first images of evaluations under their titles, with the captions that they have."""
    columns, texts = _GRID_COLUMNS, None
    if experiment.data.text is not None:
        count = len(next(iter(panels.values())))
        columns, texts = _CAPTIONED_COLUMNS, captions_in_turn(experiment, np.arange(count), seed)
    return grid.side_by_side(panels, columns=columns, captions=texts)
