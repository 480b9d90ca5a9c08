"""The report of a run: WORKDIR/report/index.html, one file for a person with any browser.

Made of what stands in the work directory, whatever has written it and whether it is at work: the config, the event
files, the scores and their samples, the newest checkpoint. None of it is trusted: texts are escaped, sizes bounded.
"""

import datetime
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mscm import atomic, distributed, failures, remote, sampling, score_rows, terminal
from mscm.arrays import read_npz
from mscm.checkpoint import reading
from mscm.config import ConfigError, flat, read_config
from mscm.report import charts, events, page

_MAX_SCORES_BYTES, _MAX_SAMPLES_BYTES = 2**26, 2**26
_MAX_SESSIONS, _MAX_PHASES, _MAX_METRICS = 60, 16, 12
_GRIDS, _IMAGES, _IMAGE_SIDE = 8, 10, 64  # checkpoints, images of each, pixels
_SMALLEST_SIDE = 32  # pixels of an image on the page


class _Curve(NamedTuple):
    """A chart of the scalars whose names fit a pattern."""

    title: str
    pattern: str
    note: str = ""
    scale: float = 1.0
    log_y: bool = True


_CURVES = (
    _Curve("Loss", "loss"),
    _Curve("Loss of each segment", r"loss_segment/(\d+)", "Segment 0 ends at the data."),
    _Curve("Loss by log-SNR", r"loss_logsnr/(.+)", "From noise to data."),
    _Curve("Gradient norm", "gradient_norm"),
    _Curve("Teacher steps N", "teacher_steps"),
    _Curve("Learning rate", "learning_rate", log_y=False),
    _Curve("Images per second", "images_per_second", log_y=False),
    _Curve("Waiting for data, % of the time", "data_wait_fraction", scale=100.0, log_y=False),
    _Curve("Utilisation, % of the chips' peak", "model_flops_utilisation", scale=100.0, log_y=False),
    _Curve("Steps skipped as not finite", "skipped_steps"),
)


def path_of(workdir: str) -> str:
    """Where the report of a work directory is."""
    return os.path.join(workdir, "report", "index.html")


def write(workdir: str) -> str:
    """Writes the report of a work directory and returns its path.

    Raises:
      ConfigError: it is none, or holds a config or scores that are none.
      OSError: it cannot be read or written.
    """
    path = path_of(workdir)
    atomic.write_text(path, html_of(workdir))
    return path


def update(workdir: str) -> None:
    """The same at the end of other work, which must not fail for a page: a warning says what was in the way.

    Of several processes the main one writes.
    """
    if not distributed.is_main():
        return
    try:
        logging.info("Report: %s", write(workdir))
    except Exception as error:
        explained = failures.explain(error)
        logging.warning("No report: %s", explained[0] if explained else f"{type(error).__name__}: {error}")


def html_of(workdir: str) -> str:
    """The page.

    Raises:
      ConfigError: as `write`.
    """
    config = read_config(workdir)
    own = events.read(workdir)
    scores = _Scores(workdir, (config or {}).get("name"))
    if config is None and not own.sessions and not scores.rows:
        raise ConfigError(
            f"--workdir: got {workdir}, which has no config.json, events or scores, expected the work directory of a "
            "training, as mscm.main makes it"
        )
    config = config or {}
    name = str(config.get("name") or scores.model or os.path.basename(os.path.normpath(workdir)))
    before = {title: events.read(folder) for title, folder in _members_before(workdir)}
    return page.document(
        name,
        page.text(f"Work directory {workdir}; this page was made at {_moment(_now())}."),
        page.facts(_summary(config, own, scores)),
        page.section("Samples", *_samples(workdir, scores)),
        page.section("Scores", *scores.parts()),
        page.section("Training", *_curves(own.scalars)),
        *(page.section(title, *_curves(of.scalars)) for title, of in before.items()),
        page.section("Hardware and time", *_time(workdir, {**before, "Training": own})),
        page.section("Model and data", *_facts(workdir)),
        page.section("Config", *_config(config)),
    )


def _members_before(workdir: str) -> list[tuple[str, str]]:
    """Title and folder of what was trained below a work directory before its model."""
    phases = epath.Path(workdir) / "phases"
    names = [path.name for path in phases.iterdir() if path.name.isdecimal()] if phases.is_dir() else []
    found: list[tuple[str, str]] = []
    of, folder = "Teacher", os.path.join(workdir, "teacher")
    while not found or epath.Path(folder).is_dir():
        found.append((f"{of}'s training", folder))
        of, folder = f"{of}'s teacher", os.path.join(folder, "teacher")
    for name in sorted(names, key=int, reverse=True)[:_MAX_PHASES]:
        found.append((f"Training of the phase of {name[:9]} steps", os.path.join(workdir, "phases", name)))
    return found


def _summary(config: Mapping[str, Any], own: events.Events, scores: "_Scores") -> dict[str, Any]:
    """What a reader asks first."""
    last = {scalar.name: scalar for scalar in own.scalars}
    train = config.get("train")
    num_steps = train.get("num_steps") if isinstance(train, dict) else None
    summary: dict[str, Any] = {}
    if "loss" in last:
        step = page.number(last["loss"].step)
        summary["Step"] = f"{step} of {page.number(num_steps)}" if _is_number(num_steps) else step
        summary["Loss"] = last["loss"].value
    if scores.newest:
        row = scores.newest[-1]
        what = f"{scores.metric}, NFE {row['nfe']}, step {page.number(row['step'])}"
        summary[what] = scores.mean([r for r in scores.newest if scores.line_of(r) == scores.line_of(row)])
    if scores.real is not None and scores.metric in scores.real:
        summary[f"{scores.metric} of real images"] = scores.real[scores.metric]
    if "images_per_second" in last:
        summary["Speed"] = f"{page.number(round(last['images_per_second'].value))} images/s"
    seconds = sum(session.ended - session.started for session in _with_scalars(own))
    if seconds > 0:
        summary["Time in training"] = terminal.duration(seconds)
    return summary


class _Scores:
    """The newest scores of a model, and what they are compared with."""

    def __init__(self, workdir: str, model: Any):
        """`model`: its name; None: that of the last row."""
        path = os.path.join(workdir, "eval", "scores.jsonl")
        if _size(path) > _MAX_SCORES_BYTES:
            raise ConfigError(f"{path}: got more than {_MAX_SCORES_BYTES} bytes, expected a file of scores")
        self.rows = [row for row in score_rows.read(path) if _is_sound(row)]
        images = [row for row in self.rows if row["labels"] is not None]
        if model is None and images:
            model = images[-1]["model"]
        own = [row for row in images if row["model"] == model]
        self.model, self.own, self.newest, self.others, self.real = model, [], [], [], None
        last = own[-1] if own else {}
        self.metrics = score_rows.metric_names(last)[:_MAX_METRICS]
        if not self.metrics:
            return
        images = [row for row in images if self._has_numbers(row)]
        same = [row for row in images if all(row[key] == last[key] for key in ("identity", "num_images", "labels"))]
        self.own = [row for row in same if row["model"] == model and row["run"] == last["run"]]
        self.newest = score_rows.newest(self.own)
        for other in dict.fromkeys(row["model"] for row in same if row["model"] != model):
            rows = score_rows.newest([row for row in same if row["model"] == other])
            self.others += sorted(rows, key=lambda row: row["nfe"])
        real = [row for row in self.rows if row["labels"] is None and row["identity"] == last["identity"]]
        real = [row for row in real if self._has_numbers(row)]
        self.real = real[-1] if real else None

    def _has_numbers(self, row: dict[str, Any]) -> bool:
        """Whether the metrics that a row has are numbers."""
        return all(isinstance(row.get(name, 0.0), float) for name in self.metrics)

    @property
    def metric(self) -> str:
        """The one that is drawn: the Frechet distance, which rows give first."""
        return self.metrics[0]

    @staticmethod
    def line_of(row: dict[str, Any]) -> str:
        """Model, sampler and steps of a row in words."""
        steps = sampling.steps_in_words(row.get("num_steps", row["nfe"]))
        return f"{row['model']}, {row['sampler']} {steps}{_average_of(row)}"

    def mean(self, rows: Sequence[dict[str, Any]]) -> float | None:
        """Of the metric over the seeds."""
        values = [row[self.metric] for row in rows if self.metric in row]
        return score_rows.mean_and_spread(values)[0] if values else None

    def parts(self) -> Iterator[str]:
        """Charts and the table of the newest."""
        if not self.metrics:
            return
        level = None
        if self.real is not None and self.metric in self.real:
            level = str(self.real["model"]), self.real[self.metric]
        by_step = _lines(self.own, self.line_of, "step", self.metric)
        shown = [*self.newest, *self.others]
        by_nfe = _lines(shown, _method_of, "nfe", self.metric)
        yield page.columns(
            charts.chart(f"{self.metric} by training step", by_step, x_label="step", marks=True, level=level),
            charts.by_nfe(self.metric, by_nfe, level=level),
        )
        last = self.newest[-1]
        yield page.table(
            ["model", "step", "sampler", "NFE", "images", "seed", *self.metrics],
            [
                [*(row[key] or None for key in ("model", "step")), (row["sampler"] or "") + _average_of(row),
                 *(row[key] or None for key in ("nfe", "num_images")), row["seed"],
                 *(row.get(name) for name in self.metrics)]
                for row in [*shown, *([self.real] if self.real else [])]
            ],
            title="Scores of the newest checkpoint",
        )
        yield page.text(
            f"Network {last.get('network')}; reference {last.get('reference')}; {last['labels']} labels. Lower is "
            f"better for {self.metric}; bars are standard deviations over seeds."
        )


def _average_of(row: Mapping[str, Any]) -> str:
    """Which average of the parameters a row is of, where it is not the usual one."""
    return f", ema {row['ema']}" if "ema" in row else ""


def _method_of(row: Mapping[str, Any]) -> str:
    """What is one line over the number of function evaluations."""
    return f"{row['model']}, {sampling.line_of(row['sampler'])}{_average_of(row)}"


def _is_sound(row: Mapping[str, Any]) -> bool:
    """Whether a line has the types of a score; of real images it has no sampler and no step."""
    if row["labels"] is None:
        return isinstance(row["model"], str)
    of_type = (("model", str), ("sampler", str), ("step", int), ("nfe", int), ("num_images", int), ("seed", int))
    numbers = all(isinstance(row[key], kind) for key, kind in of_type)
    return numbers and 0 <= row["step"] < 2**53 and 0 < row["nfe"] < 2**31 and _is_number(row.get("num_steps", 1))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _lines(
    rows: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str], x: str, metric: str
) -> list[charts.Line]:
    """A line for each label: the mean over seeds, and its standard deviation where there are several."""
    groups: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if metric in row:
            groups.setdefault(label(row), {}).setdefault(row[x], []).append(row[metric])
    lines = []
    for name, by_x in groups.items():
        places = sorted(by_x)
        means, spreads = zip(*(score_rows.mean_and_spread(by_x[at]) for at in places), strict=True)
        lines.append(charts.Line(name, places, means, spreads))
    return lines


def _curves(scalars: Sequence[events.Scalar]) -> Iterator[str]:
    by_name: dict[str, list[events.Scalar]] = {}
    for scalar in scalars:
        by_name.setdefault(scalar.name, []).append(scalar)
    drawn = []
    for curve in _CURVES:
        lines = []
        for name, points in by_name.items():
            found = re.fullmatch(curve.pattern, name)
            if found:
                label = found[1].replace("_", " ") if found.groups() else name.replace("_", " ")
                values = [curve.scale * scalar.value for scalar in points]
                lines.append(charts.Line(label, [scalar.step for scalar in points], values))
        if curve.title.startswith("Steps skipped") and not any(value for line in lines for value in line.y):
            continue
        if lines:
            lines.sort(key=_place)
            drawn.append(charts.chart(curve.title, lines, x_label="step", log_y=curve.log_y, note=curve.note))
    yield page.columns(*drawn)


def _place(line: charts.Line) -> tuple[int, float]:
    """Of segments and bands of log-SNR: `below -6`, `-6 to -3`, ..., `above 6`."""
    found = re.search(r"-?\d+", line.label)
    end = line.label.startswith("above") - line.label.startswith("below")
    return end, float(found[0]) if found else 0.0


def _samples(workdir: str, scores: _Scores) -> Iterator[str]:
    """The first images of checkpoints under one sampler, each from the same noise; else the grid of the run's end."""
    by_line: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for row in scores.own:
        by_line.setdefault((scores.line_of(row), row["seed"]), {})[row["step"]] = row
    # The sampler of most checkpoints; of several the last, which has most steps.
    rows = list(max(reversed(by_line.values()), key=len).values()) if by_line else []
    rows.sort(key=lambda row: row["step"])
    chosen = sorted({round(i) for i in np.linspace(0, len(rows) - 1, _GRIDS)}) if rows else []
    figures = []
    for row in (rows[i] for i in chosen):
        images = _read_samples(workdir, row)
        if images is None:
            continue
        strip = _strip(images)
        title = f"Step {page.number(row['step'])}"
        if scores.metric in row:
            title += f", {scores.metric} {page.number(row[scores.metric])}"
        alt = f"{len(images)} samples of {scores.line_of(row)} after step {row['step']}"
        figures.append(page.image(strip, title=title, alt=alt))
    if figures:
        yield page.text(
            f"{scores.line_of(rows[-1])} (averaged parameters): image i of all rows is from the same noise and class."
        )
        yield page.columns(*figures)
    grid = os.path.join(workdir, "report", "samples.png")
    if _size(grid):
        yield page.picture(grid, title="At the end of training", alt="A grid of samples, the teacher's beside them")


def _read_samples(workdir: str, row: dict[str, Any]) -> UInt8[np.ndarray, "n h w c"] | None:
    """The first images of a row; None where they are not there, or no images."""
    try:
        path = f"{score_rows.samples_path(os.path.join(workdir, 'eval'), row)}.npz"
        if os.path.basename(path) != f"{score_rows.name_of(row)}_{row['step']:08d}.npz":
            return None  # a name that leads out of the folder
        if not 0 < _size(path) <= _MAX_SAMPLES_BYTES:
            return None
        images = read_npz(path, ["images"]).get("images")
    except (ValueError, OSError) as error:
        logging.warning("Samples of step %s are not in the report: %s", row["step"], error)
        return None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        return None
    return images[:_IMAGES] if images.size else None


def _strip(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "H W c"]:
    """The images beside each other, small ones enlarged and large ones reduced."""
    side = max(images.shape[1:3])
    if side < _SMALLEST_SIDE:
        scale = -(-_SMALLEST_SIDE // side)
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    elif side > _IMAGE_SIDE:
        height, width = (max(1, size * _IMAGE_SIDE // side) for size in images.shape[1:3])
        resized = [Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i).resize((width, height)) for i in images]
        images = np.stack([np.asarray(image).reshape(height, width, images.shape[-1]) for image in resized])
    gap = np.full((len(images), images.shape[1], 2, images.shape[-1]), 128, np.uint8)
    return np.concatenate([*np.concatenate([images, gap], axis=2)], axis=1)[:, :-2]


def _time(workdir: str, of_training: Mapping[str, events.Events]) -> Iterator[str]:
    """Sessions: what each job did, when, and on what."""
    rows: list[list[Any]] = []
    totals: dict[str, float] = {}
    jobs = {**of_training, "Scores": events.read(os.path.join(workdir, "eval"))}
    for what, of in jobs.items():
        for session in _with_scalars(of):
            seconds = session.ended - session.started
            totals[what] = totals.get(what, 0.0) + seconds
            ends = (session.first_step, session.last_step)
            steps = " to ".join(page.number(step) for step in ends if step is not None)
            rows.append([what, _moment(session.started), terminal.duration(seconds), steps, session.hardware])
    if not rows:
        return
    yield page.facts({f"{what}, all jobs": terminal.duration(seconds) for what, seconds in totals.items()})
    yield page.table(
        ["job", "began (UTC)", "time", "steps reported", "hardware"], rows[-_MAX_SESSIONS:], title="Jobs"
    )
    yield page.text(
        "A job's time is from its first to its last event: with compilation, and for scores with waiting for "
        "checkpoints. What a killed job did after its last event is not in it."
    )


def _with_scalars(of: events.Events) -> list[events.Session]:
    return [
        session
        for session in of.sessions
        if session.first_step is not None and 0 <= session.ended - session.started < 1e9
    ]


def _facts(workdir: str) -> Iterator[str]:
    """What the newest checkpoint says of its model and data."""
    try:
        with reading(workdir) as checkpoints:
            steps = checkpoints.steps()
            facts = checkpoints.facts()
    except Exception as error:  # whatever Orbax raises where training deletes the checkpoint meanwhile
        yield page.text(f"No checkpoint: {error}")
        return
    sizes = [
        math.prod(shape) for shape in facts["parameters"].values()
        if isinstance(shape, list) and all(_is_number(size) for size in shape)
    ]
    names = ("student_steps", "resolution", "channels", "num_classes", "prediction", "data", "transform")
    yield page.facts({
        "Parameters": sum(sizes),
        "Checkpoints there": ", ".join(page.number(step) for step in steps[-8:]),
        **{name.replace("_", " ").capitalize(): facts.get(name) for name in names},
    })


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    values = flat(config)
    if values:
        rows = [[path, "None" if value is None else str(value)] for path, value in values.items()]
        yield page.folded(f"All {len(rows)} keys", page.table(["key", "value"], rows, title="Config"))


def _size(path: str) -> int:
    """Of a file in bytes; 0 where there is none."""
    file = epath.Path(path)
    return remote.size(file) if file.exists() else 0


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _moment(seconds: float) -> str:
    """`2026-11-22 18:20` of a time since 1970; events may claim any."""
    if not 0 <= seconds < 2**36:
        return "unknown"
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M}"
