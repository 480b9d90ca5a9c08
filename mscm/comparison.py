"""Comparison of runs: what `mscm.compare` reads, measures and writes.

Of each work directory the scores of its newest scored checkpoint count, and those of its teacher and of the phases
before it. Scores are compared only where everything but the images is equal: network, reference, number and labels of
the images. Runs whose configs differ in the seed only are one model, whose spread is over the runs; of a single run it
is over the seeds of its noise.
"""

import csv
import dataclasses
import io
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mscm import atomic, evaluation, score_rows
from mscm.checkpoint import CheckpointError
from mscm.config import ConfigError, decides, flat, load_config, read_config
from mscm.data import sources, transforms
from mscm.diffusion import denoiser as denoisers
from mscm.diffusion import paths
from mscm.experiment import Experiment, build
from mscm.metrics import statistics as metric_names
from mscm.report import charts, grid, page, plots, table
from mscm.sampling import SamplerSpec, line_of, steps_in_words
from mscm.types import Params

SAMPLE_COLUMNS = 12
# By the names of their files, on the page where they are not too large.
_PICTURES = {
    "samples.png": "Samples: image i of all rows is from the same noise and class",
    "trajectories.png": "Paths of the models over those of the exact denoiser",
}
_TIMED_BATCHES, _TIMED_SECONDS = 5, 20.0  # the median of so many batches, of fewer where they take longer in all
_EXACT_STEPS, _MANY_STEPS = 1024, 256
_PATHS, _DRAWN_EVERY = 240, 20

# Of a row: what it is a score of, beside its sampler, and what must be equal for two to be compared.
_OF_ROW = ("run", "model", "step", "seed")
_SETTINGS = ("identity", "num_images", "labels")
_SETTINGS_IN_WORDS = ("network", "reference", "num_kept", "num_images", "labels", "mismatch", "identity")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained network: where its checkpoints are, and the config that they were made with."""

    experiment: Experiment  # on one device
    workdir: str
    config: dict[str, Any]

    @property
    def is_diffusion(self) -> bool:
        return self.experiment.student_steps is None

    def params(self, step: int) -> Params:
        """Averaged parameters of a checkpoint."""
        return evaluation.read_ema(self.experiment, self.workdir, step)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A work directory: its model, what that comes from, and all of its scores."""

    workdir: str
    model: Model
    ancestors: list[Model]  # the teacher, and the phases before the model
    rows: list[dict[str, Any]]

    def newest(self, model: Model, settings: tuple[Any, ...]) -> list[dict[str, Any]]:
        """The rows of the newest checkpoint of the newest training of `model` that has scores of these settings."""
        name = model.experiment.name
        return score_rows.newest(
            [row for row in self.rows if row["model"] == name and _settings(row) == settings]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """The scores of one model under one sampler, over runs and seeds."""

    method: str
    nfe: int
    num_runs: int
    num_seeds: int  # of the noise, in each run
    num_images: int
    scores: dict[str, tuple[float, float | None]]  # metric -> mean, and standard deviation where there are several
    model: Model  # of the first run
    step: int
    spec: SamplerSpec

    @property
    def sampler(self) -> str:
        return self.spec.sampler


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn from a point's model."""

    images: np.ndarray
    seconds_per_image: float | None  # None: not measured


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """The scores of some runs, in the order of the table: diffusion models first, then as the runs were given."""

    points: list[Point]
    metrics: list[str]  # that all of them have
    real: dict[str, Any] | None  # the row of real images
    described: dict[str, Any]  # any of the rows: network, reference, ...


def compare(workdirs: Sequence[str]) -> Comparison:
    """The newest scores of work directories, and those of their teachers.

    Raises:
      ConfigError: a directory is no work directory or has no scores; two have scores that cannot be compared, or are
        the same training twice.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    settings = _common_settings(runs)
    entries: dict[tuple[Any, ...], tuple[Model, dict[str, Any]]] = {}
    seen: dict[tuple[str, str], str] = {}  # trainings by model
    for run in runs:
        own = run.newest(run.model, settings)
        for row in own[:1]:
            other = seen.setdefault((row["model"], row["run"]), run.workdir)
            if other != run.workdir:
                raise ConfigError(
                    f"--workdir: got {other} and {run.workdir}, which are the same training of {row['model']!r} twice, "
                    "expected another config.seed in each"
                )
        rows = [(run.model, row) for row in own]
        rows += [(model, row) for model in run.ancestors for row in run.newest(model, settings)]
        for model, row in rows:  # students of one teacher may each have its scores
            key = *(row[name] for name in _OF_ROW), SamplerSpec.of_row(row)
            entries.setdefault(key, (model, row))
    real = [row for run in runs for row in run.rows if row["labels"] is None and row["identity"] == settings[0]]
    rows = list(entries.values())
    described = rows[0][1]
    metrics = [name for name in score_rows.metric_names(described) if all(name in row for _, row in rows)]
    return Comparison(_points(rows, metrics), metrics, real[-1] if real else None, described)


def read_run(workdir: str) -> Run:
    """A work directory as training and scoring left it.

    Raises:
      ConfigError: there is no config or there are no scores; the sentence says which command makes them.
    """
    config = read_config(workdir)
    if config is None:
        raise ConfigError(
            f"--workdir: got {workdir}, which has no config.json, expected the work directory of a training, as "
            "mscm.main makes it"
        )
    rows = score_rows.read(os.path.join(workdir, "eval", "scores.jsonl"))
    rows = [row for row in rows if "ema" not in row]  # of the average that all runs have
    experiment = _on_one_device(workdir, config)
    lineage = experiment.lineage(workdir)
    if not any(row["model"] == experiment.name for row in rows):
        raise ConfigError(
            f"--workdir: got {workdir} without scores of {experiment.name!r}, expected some; make them with "
            f"python -m mscm.eval --config=ITS_CONFIG --workdir={workdir}"
        )
    *ancestors, model = (
        Model(of, where, read_config(where) or of.config)
        for of, where in ((member.experiment.on(jax.devices()[:1]), member.workdir) for member in lineage)
    )
    return Run(workdir, model, ancestors, rows)


def _on_one_device(workdir: str, config: dict[str, Any]) -> Experiment:
    """The experiment of a config as JSON, wherever it was trained: a time per image is one device's.

    Its teachers are what their work directories say; their files may have changed, and are read where these are gone.
    """
    home = workdir

    def load(file: str, given: str | None) -> ConfigDict:
        nonlocal home  # the teacher's, whose teacher is asked for next
        home = given or os.path.join(home, "teacher")
        found = read_config(home)
        return load_config(file) if found is None else ConfigDict(found)

    here = ConfigDict(config)
    here.mesh = dict(data=-1, fsdp=1, tensor=1)
    if "attention" in here.get("model", {}):
        here.model.attention = "auto"
    return build(here, load=load).on(jax.devices()[:1])


def _settings(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in _SETTINGS)


def _common_settings(runs: Sequence[Run]) -> tuple[Any, ...]:
    """The newest settings of the first run under which all have scores.

    Raises:
      ConfigError: there are none; the sentence names what differs.
    """
    own = [[row for row in run.rows if row["model"] == run.model.experiment.name] for run in runs]
    for row in reversed(own[0]):
        if all(any(_settings(other) == _settings(row) for other in rows) for rows in own):
            return _settings(row)
    first = own[0][-1]
    run, other = next(
        (run, rows[-1]) for run, rows in zip(runs, own, strict=True) if _settings(rows[-1]) != _settings(first)
    )
    key = next(key for key in _SETTINGS_IN_WORDS if first.get(key) != other.get(key))
    raise ConfigError(
        f"--workdir: got scores that cannot be compared: {key} {first.get(key)!r} in {runs[0].workdir}, "
        f"{other.get(key)!r} in {run.workdir}; score both with one config.eval, by python -m mscm.eval"
    )


def _points(entries: Sequence[tuple[Model, dict[str, Any]]], metrics: Sequence[str]) -> list[Point]:
    names = _methods(entries)
    groups: dict[tuple[Any, ...], list[tuple[Model, dict[str, Any]]]] = {}
    for (model, row), name in zip(entries, names, strict=True):
        groups.setdefault((name, SamplerSpec.of_row(row)), []).append((model, row))
    points = []
    for (name, spec), group in groups.items():
        model, row = group[0]
        by_seed: dict[str, dict[int, dict[str, Any]]] = {}
        for of_run, other in group:
            by_seed.setdefault(_training(of_run), {})[other["seed"]] = other
        runs = [list(rows.values()) for rows in by_seed.values()]
        points.append(
            Point(
                name, row["nfe"], len(runs), len(runs[0]), row["num_images"],
                {key: over_runs_or_seeds([[other[key] for other in rows] for rows in runs]) for key in metrics},
                model, row["step"], spec,
            )
        )
    first = {point.method: i for i, point in reversed(list(enumerate(points)))}
    samplers = {(point.method, point.sampler): i for i, point in reversed(list(enumerate(points)))}

    def place(point: Point) -> tuple[Any, ...]:
        line = point.method, point.sampler
        return not point.model.is_diffusion, first[point.method], samplers[line], point.nfe

    return sorted(points, key=place)


def _training(model: Model) -> str:
    """What decides the parameters beside the name, under which a phase may have been trained for several students."""
    return json.dumps({key: value for key, value in decides(model.config).items() if key != "name"}, sort_keys=True)


def over_runs_or_seeds(scores: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean over runs and seeds, and standard deviation: of the runs' means, or over the seeds of a single run.

    `scores` has the seeds of one run in each entry. The deviation of a sample (ddof = 1); None of a single score.
    """
    means = [score_rows.mean_and_spread(of_run)[0] for of_run in scores]
    return score_rows.mean_and_spread(means if len(means) > 1 else scores[0])


def _methods(entries: Sequence[tuple[Model, dict[str, Any]]]) -> list[str]:
    """What each entry's method is called.

    The model's name without its number of steps, which the axis has, and without what all names begin with; where
    models of one name were trained under several configs, with what differs between these. A phase before the last is
    called as the last.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    of_last: dict[str, str] = {}  # by the name in the config, which all phases have
    for model, _ in entries:
        name, steps = model.experiment.name, model.experiment.student_steps
        by_name.setdefault(name, []).append(flat(decides(model.config)))
        of_last[name] = re.sub(rf"^(.*[a-z])_?{steps}(?=_|$)", r"\1", name)
    labels = []
    for model, _ in entries:
        name, steps = model.experiment.name, model.experiment.student_steps
        config, others = flat(decides(model.config)), by_name[name]
        differing = [key for key in config if key != "seed" and any(o.get(key) != config[key] for o in others)]
        is_phase = name == f"{config['name']}_{steps}"
        label = of_last.get(config["name"], config["name"]) if is_phase else of_last[name]
        inside = ", ".join(f"{key.rpartition('.')[2]}={config[key]}" for key in differing)
        labels.append(f"{label} ({inside})" if inside else label)
    names = [label.partition(" ")[0] for label in labels]
    shared = os.path.commonprefix(names)
    start = shared.rfind("_") + 1
    return [label[start:] for label in labels]


def choose_metric(comparison: Comparison, metric: str | None) -> str:
    """`metric`; None: the Frechet distance.

    Raises:
      ConfigError: no score is called so.
    """
    metric = metric or metric_names.names(comparison.described["network"].partition(" ")[0])[0]
    if metric not in comparison.metrics:
        raise ConfigError(f"--metric: got {metric!r}, expected one of {', '.join(comparison.metrics)}")
    return metric


def draw(comparison: Comparison, *, timed: bool) -> list[Drawn | None]:
    """Images from common noise for each point, image i from the same noise and of the same class; and their time.

    None for a point whose checkpoint is not here, or the captions of its images; a warning says why.
    """
    drawn: list[Drawn | None] = []
    params, failed = {}, set()
    for point in comparison.points:
        key = (point.model.workdir, point.step)
        drawn.append(None)
        if key in failed:
            continue
        try:
            if key not in params:
                params = {key: point.model.params(point.step)}  # of one model at a time
            drawn[-1] = _draw(point, params[key], timed=timed)
        except (CheckpointError, ConfigError) as error:
            failed.add(key)
            logging.warning("No samples of %s: %s", point.model.experiment.name, error)
    return drawn


def _draw(point: Point, params: Params, *, timed: bool) -> Drawn:
    experiment = point.model.experiment
    batch_size = max(SAMPLE_COLUMNS, experiment.eval.batch_size) if timed else SAMPLE_COLUMNS
    indices = np.arange(batch_size)
    condition = evaluation.conditions_in_turn(experiment)(indices)
    sample = evaluation.make_sample_fn(experiment, point.spec)

    def batch() -> jax.Array:
        return jax.block_until_ready(sample(params, jax.random.key(0), indices, condition))

    images = np.asarray(transforms.to_uint8(batch()[:SAMPLE_COLUMNS]))  # compiled by now
    if not timed:
        return Drawn(images, None)
    seconds = median_seconds(batch)
    logging.info("%s, %s: %.3g s for %d images", point.method, point.spec, seconds, batch_size)
    return Drawn(images, seconds / batch_size)


def median_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of `_TIMED_BATCHES` calls, of fewer where they take more than `_TIMED_SECONDS` together."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < _TIMED_BATCHES and sum(seconds) < _TIMED_SECONDS):
        started = clock()
        work()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def device_name() -> str:
    """The device that times are of."""
    device = jax.devices()[0]
    return f"{device.device_kind}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def write(comparison: Comparison, drawn: Sequence[Drawn | None], output: str, *, metric: str) -> list[str]:
    """Writes tables, the figures of `metric`, samples and a page of all below `output`, and returns their paths."""
    points = comparison.points
    written = [os.path.join(output, f"compare.{kind}") for kind in ("csv", "md")]
    atomic.write_text(written[0], _csv(comparison, drawn))
    atomic.write_text(written[1], markdown(comparison, drawn))
    level = None
    if comparison.real is not None and metric in comparison.real:
        level = f"{comparison.real['model']} ({comparison.real['num_images']} images)", comparison.real[metric]
    written += plots.save(
        os.path.join(output, "compare"), plots.scores_against_nfe(_series(points, metric), metric=metric, level=level)
    )
    shown = [(point, images) for point, images in zip(points, drawn, strict=True) if images is not None]
    if shown:
        written.append(os.path.join(output, "samples.png"))
        grid.save_png(
            written[-1],
            grid.image_grid(
                np.concatenate([images.images for _, images in shown]),
                columns=SAMPLE_COLUMNS,
                row_titles=[f"{point.method}, {point.sampler}, NFE {point.nfe}" for point, _ in shown],
            ),
        )
    panels = _panels([point for point, _ in shown])
    if panels:
        written += plots.save(os.path.join(output, "trajectories"), _trajectories(panels))
    pictures = [path for path in written if os.path.basename(path) in _PICTURES]
    written.append(os.path.join(output, "compare.html"))
    atomic.write_text(written[-1], _page(comparison, drawn, metric, level, pictures))
    return written


def _page(
    comparison: Comparison,
    drawn: Sequence[Drawn | None],
    metric: str,
    level: tuple[str, float] | None,
    pictures: Sequence[str],
) -> str:
    """All of it as one file; `pictures` are paths of PNGs."""
    header, rows, notes = _table(comparison, drawn)
    chart = charts.by_nfe(
        metric,
        [
            charts.Line(f"{line.method}, {line.sampler}", line.nfe, line.mean, line.spread)
            for line in _series(comparison.points, metric)
        ],
        level=level,
    )
    titles = {path: _PICTURES[os.path.basename(path)] for path in pictures}
    parts = [page.picture(path, title=title, alt=title) for path, title in titles.items()]
    return page.document(
        f"{metric} of {len({point.method for point in comparison.points})} methods",
        page.section("Scores", chart, page.table(header, rows, title="Scores"), page.text(notes)),
        page.section("Samples", *parts),
    )


def _series(points: Sequence[Point], metric: str) -> list[plots.Series]:
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        lines.setdefault((point.method, line_of(point.sampler)), []).append(point)
    return [
        plots.Series(
            method, sampler, [point.nfe for point in line], *zip(*(point.scores[metric] for point in line), strict=True)
        )
        for (method, sampler), line in lines.items()
    ]


_COLUMNS = ("method", "sampler", "nfe", "runs", "seeds", "images")


def _of_point(point: Point) -> list[Any]:
    return [point.method, point.sampler, point.nfe, point.num_runs, point.num_seeds, point.num_images]


def _csv(comparison: Comparison, drawn: Sequence[Drawn | None]) -> str:
    """All digits; an empty cell where there is no number."""
    metrics = comparison.metrics
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [*_COLUMNS, *(name for key in metrics for name in (key, f"{key}_spread")), "seconds_per_image", "device"]
    )
    for point, images in zip(comparison.points, drawn, strict=True):
        seconds = images.seconds_per_image if images else None
        numbers = [number for key in metrics for number in point.scores[key]]
        writer.writerow([*_of_point(point), *numbers, seconds, device_name() if seconds is not None else None])
    return text.getvalue()


def markdown(comparison: Comparison, drawn: Sequence[Drawn | None]) -> str:
    """The table as a person reads it, and what its numbers are."""
    header, rows, notes = _table(comparison, drawn)
    return f"{table.format_table(header, rows)}\n\n{notes}\n"


def _table(comparison: Comparison, drawn: Sequence[Drawn | None]) -> tuple[list[str], list[list[Any]], str]:
    """Titles, rows, and what the numbers are."""
    metrics = comparison.metrics
    timed = any(images is not None and images.seconds_per_image is not None for images in drawn)
    rows = []
    for point, images in zip(comparison.points, drawn, strict=True):
        row = [*_of_point(point), *(score_rows.with_spread(*point.scores[key]) for key in metrics)]
        if timed:
            seconds = None if images is None else images.seconds_per_image
            row.append(None if seconds is None else f"{1000 * seconds:.3g}")
        rows.append(row)
    if comparison.real is not None:
        numbers = [comparison.real.get(key) for key in metrics]
        real = [comparison.real["model"], None, None, None, None, comparison.real["num_images"]]
        rows.append([*real, *numbers, *([None] if timed else [])])
    header = [*("NFE" if name == "nfe" else name for name in _COLUMNS), *metrics, *(["ms/image"] if timed else [])]
    said = comparison.described
    notes = [f"Network {said['network']}; reference {said['reference']}; {said['labels']} labels."]
    notes += [f"Not comparable with other tables: {'; '.join(said['mismatch'])}."] if "mismatch" in said else []
    notes += ["After ±: the standard deviation over runs, of a single run over the seeds of its noise."]
    if timed:
        notes.append(f"Times are medians over batches after compilation, on one device: {device_name()}.")
    return header, rows, " ".join(notes)


def _panels(points: Sequence[Point]) -> list[tuple[str, int, Point]]:
    """Of models of the mixture: title, number of steps and model of each panel, students first.

    On the levels of the first: the exact paths are the same in all panels.
    """
    points = [point for point in points if point.model.experiment.data.name == "mixture"]
    levels = [point.model.experiment.config["schedule"] for point in points]
    points = [point for point, own in zip(points, levels, strict=True) if own == levels[0]]
    students = {
        (point.method, point.nfe): (f"{point.method}, {steps_in_words(point.nfe)}", point.nfe, point)
        for point in points
        if not point.model.is_diffusion
    }
    diffusion = {point.method: (f"{point.method}, ∞ steps", _MANY_STEPS, point) for point in points
                 if point.model.is_diffusion}
    return [*students.values(), *diffusion.values()]


def _trajectories(panels: Sequence[tuple[str, int, Point]]) -> Any:
    """Each model's paths over those of the exact denoiser, from the same quantiles of the noise."""
    experiment, mixture = panels[0][2].model.experiment, sources.MIXTURE
    z_1 = jax.scipy.stats.norm.ppf((jnp.arange(_PATHS) + 0.5) / _PATHS)[:, None, None, None]

    def states(denoiser: Any, num_steps: int) -> np.ndarray:
        path = jax.jit(lambda z: paths.ddim_path(denoiser, experiment.schedule, z, num_steps=num_steps))
        return np.asarray(path(z_1))[..., 0, 0, 0]

    variances = [std**2 for std in mixture.stds]
    oracle = denoisers.mixture_oracle(
        experiment.schedule, means=mixture.means, variances=variances, weights=mixture.weights
    )
    exact, drawn = states(oracle, _EXACT_STEPS), []
    some = slice(_DRAWN_EVERY // 2, None, _DRAWN_EVERY)
    labels = jnp.zeros(_PATHS, jnp.int32)
    for title, num_steps, point in panels:
        of_model = states(point.model.experiment.denoiser(point.model.params(point.step), labels), num_steps)
        error = np.sqrt(np.mean(np.square(of_model[-1] - exact[-1])))
        drawn.append(plots.Panel(f"{title}\nrms error {error:.2g}", of_model[:: max(1, num_steps // 64), some]))
    x = np.linspace(-2.8, 2.8, 141)
    parts = zip(*mixture, strict=True)
    densities = [weight / std * np.exp(-0.5 * np.square((x - mean) / std)) for weight, mean, std in parts]
    return plots.trajectories(
        drawn,
        exact[:: _EXACT_STEPS // 64, some],
        x=x,
        density_data=np.sum(densities, axis=0),
        density_noise=np.exp(-0.5 * x**2),
    )
