"""Sampling and scoring of trained models: what `mscm.main`, `mscm.eval` and `mscm.sample` share.

Image i of an evaluation starts from fold_in(key(seed), i) and has the label i modulo the number of classes (balanced),
so that it is the same image whatever the batch size, and two models sample from common noise.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from mscm import compilation, distributed
from mscm.checkpoint import reading
from mscm.config import ConfigError
from mscm.data import sources, transforms
from mscm.diffusion import sampler
from mscm.experiment import EvalSpec, Experiment
from mscm.metrics import classifier as classifiers
from mscm.metrics import frechet, moments
from mscm.report import grid, table
from mscm.training import partition
from mscm.types import Images, Int, Key, Labels, Params

_GRID_IMAGES, _GRID_COLUMNS = 50, 10

# (params, key, indices of the images, labels) -> images, whole on every device
SampleFn = Callable[[Params, Key, Int[np.ndarray, "b"], Labels], Images]


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """A sampler and its number of steps, which is its NFE."""

    name: str  # "ddim": Algorithm 2, "addim": Algorithm 3
    num_steps: int

    def __str__(self) -> str:
        steps = f"{self.num_steps} step" + ("s" if self.num_steps > 1 else "")
        return f"{self.name} {steps}"


SAMPLERS = {"ddim": sampler.sample, "addim": sampler.sample_addim}


def default_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """A student's own steps with DDIM; a diffusion model's `eval.teacher_steps` with aDDIM."""
    if experiment.student_steps is not None:
        return [SamplerSpec("ddim", experiment.student_steps)]
    return diffusion_samplers(experiment)


def diffusion_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """aDDIM with `eval.teacher_steps`: a diffusion model's own samplers, or those of a student's teacher."""
    return [SamplerSpec("addim", num_steps) for num_steps in experiment.eval.teacher_steps]


def short_teacher_samplers(experiment: Experiment) -> list[SamplerSpec]:
    """What ends a student's training: its teacher with the student's number of steps, and with the largest.

    `mscm.eval` scores the teacher at all of `eval.teacher_steps`.
    """
    largest = max(experiment.eval.teacher_steps)
    return [SamplerSpec("addim", num_steps) for num_steps in sorted({experiment.student_steps, largest})]


def check_sampler(experiment: Experiment, spec: SamplerSpec, *, force: bool = False) -> None:
    """Refuses what a student was not trained for, unless `force`.

    Raises:
      ConfigError: the sentence says which numbers of steps are possible.
    """
    if spec.num_steps < 1:
        raise ConfigError(f"num_steps: got {spec.num_steps}, expected at least 1")
    possible = experiment.student_steps
    if not force and possible is not None and (spec.num_steps != possible or spec.name != "ddim"):
        raise ConfigError(
            f"got {spec} for {experiment.name!r}, expected ddim with {possible} steps: a student jumps to the starts "
            f"of its {possible} segments and knows no others; train one for {spec.num_steps} steps, or use --force"
        )


@functools.lru_cache(maxsize=64)
def make_sample_fn(experiment: Experiment, spec: SamplerSpec) -> SampleFn:
    """Jitted sampler; kept, so that a model is compiled once however many checkpoints are scored."""
    data = experiment.data
    shape = (data.resolution, data.resolution, data.channels)
    rows, whole = partition.batch_sharding(experiment.mesh), partition.replicated(experiment.mesh)

    def sample(params: Params, key: Key, indices: jax.Array, labels: Labels) -> Images:
        # Every process has all indices, and every device computes the images of its part.
        indices, labels = jax.lax.with_sharding_constraint((indices, labels), rows)
        z_1 = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)
        denoiser = experiment.denoiser(params, labels)
        return SAMPLERS[spec.name](denoiser, experiment.schedule, z_1, num_steps=spec.num_steps)

    sample = partition.on_mesh(sample, experiment.mesh)
    options = compilation.options(experiment.platform)
    return jax.jit(sample, in_shardings=(None, whole, whole, whole), out_shardings=whole, compiler_options=options)


def generate(
    experiment: Experiment,
    params: Params,
    spec: SamplerSpec,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    labels: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Batches of uint8 images `b h w c` as an image file would hold them; the last may be smaller.

    `labels`: one for each image; None: balanced.
    """
    data, sample = experiment.data, make_sample_fn(experiment, spec)
    batch_size = partition.rounded_up(batch_size, experiment.mesh)
    key = jax.random.key(seed)
    for first in range(0, num_images, batch_size):
        # The last batch is filled up and cut: one compiled shape, and no image is dropped.
        indices = np.arange(first, first + batch_size)
        wanted = indices % data.num_classes if labels is None else labels[indices % num_images]
        images = transforms.to_uint8(sample(params, key, indices, wanted.astype(np.int32)))
        yield np.asarray(images)[: num_images - first]


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model reaches with a sampler, and the first of the images that were scored."""

    model: str
    sampler: SamplerSpec
    num_images: int
    distance: float
    samples: np.ndarray  # uint8 n h w c

    def row(self) -> dict[str, Any]:
        """One line of a result table."""
        return {
            "model": self.model,
            "sampler": self.sampler.name,
            "nfe": self.sampler.num_steps,
            "num_images": self.num_images,
            "fd_classifier": self.distance,
        }


class Scorer:
    """Frechet distances to a data set in the features of a classifier trained on it: `fd_classifier`, never FID.

    `spec` is the scored run's, also for its teacher: scores of one table have equal counts and common noise.
    """

    def __init__(self, source: sources.Source, cache_dir: str, spec: EvalSpec):
        self._source, self._spec = source, spec
        with distributed.main_first():
            self.classifier = classifiers.load_or_train(source, cache_dir)
        self._reference = self._source_moments(np.arange(len(source)))

    def _source_moments(self, indices: np.ndarray) -> moments.Moments:
        chunks = np.array_split(indices, -(-len(indices) // self._spec.batch_size))
        return self._moments(self._source.load(chunk)["image"] for chunk in chunks)

    def _moments(self, batches: Iterator[np.ndarray]) -> moments.Moments:
        features = (self.classifier.features(images) for images in batches)
        return functools.reduce(moments.add, features, moments.empty(classifiers.FEATURE_DIM))

    def score(self, experiment: Experiment, params: Params, spec: SamplerSpec) -> Score:
        """Distance of generated images to the whole data set."""
        num_images, batch_size, seed = self._spec.num_images, self._spec.batch_size, self._spec.seed
        samples = []

        def images() -> Iterator[np.ndarray]:
            for batch in generate(experiment, params, spec, num_images=num_images, batch_size=batch_size, seed=seed):
                samples.extend(batch[: _GRID_IMAGES - len(samples)])
                yield batch

        distance = frechet.frechet_distance(self._moments(images()), self._reference)
        logging.info("%s, %s: fd_classifier %.3f", experiment.name, spec, distance)
        return Score(experiment.name, spec, num_images, distance, np.stack(samples))

    def half_against_half(self) -> tuple[float, int]:
        """Distance between two class-stratified halves of the data, and the size of one.

        Counts below that of a score make it larger: with 1797 digits most of it is this bias.
        """
        half_a, half_b = sources.stratified_halves(self._source.labels)
        distance = frechet.frechet_distance(self._source_moments(half_a), self._source_moments(half_b))
        return distance, min(len(half_a), len(half_b))


def identity(experiment: Experiment, scorer: Scorer, specs: list[SamplerSpec]) -> str:
    """Hash of all that decides a score beside the checkpoint; scores under another one are not comparable."""
    evaluation = dataclasses.asdict(experiment.eval)
    parts = [scorer.classifier.fingerprint, evaluation, [str(spec) for spec in specs]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def teacher_workdir_of(experiment: Experiment, workdir: str) -> str:
    """Where the student's teacher lies: config.teacher.workdir, else below the student's own."""
    return experiment.teacher.workdir or os.path.join(workdir, "teacher")


def read_ema(experiment: Experiment, workdir: str, step: int | None = None) -> Params:
    """Averaged parameters of a checkpoint (None: the newest)."""
    with reading(workdir) as checkpoints:
        step = checkpoints.check(experiment.facts(), step)
        return checkpoints.restore_ema(experiment.placed_state().ema, step)


def real_row(scorer: Scorer) -> dict:
    """The reference point: one half of the real images against the other half."""
    distance, count = scorer.half_against_half()
    return {"model": "real, half against half", "nfe": 0, "num_images": count, "fd_classifier": distance}


def result_table(rows: list[dict]) -> str:
    """The scores as a person reads them."""
    header = ["model", "sampler", "NFE", "images", "fd_classifier"]
    body = [
        [row["model"], row.get("sampler", ""), row["nfe"] or "", row["num_images"], f"{row['fd_classifier']:.3f}"]
        for row in rows
    ]
    return table.format_table(header, body)


def sample_grid(scores: list[Score]) -> np.ndarray:
    """The samples of several scores side by side: image i of each is from the same noise and of the same class."""
    panels = {f"{score.model}, {score.sampler}": score.samples for score in scores}
    return grid.side_by_side(panels, columns=_GRID_COLUMNS)
