"""Scores as rows, one for each model, sampler, checkpoint and seed: as a file of JSON lines, by name, as a table."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mscm import cli
from mscm.config import ConfigError
from mscm.report.table import format_table
from mscm.sampling import SamplerSpec

# Of a row of scores: what it is a score of. A row is written once for each.
KEY = ("identity", "run", "model", "step", "sampler", "nfe", "seed", "num_images", "labels")


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a file of scores; none where there is no file.

    Raises:
      ConfigError: it holds something else.
    """
    rows = cli.read_json_lines(path)
    for row in rows:
        if not isinstance(row, dict) or not row.keys() >= set(KEY):
            raise ConfigError(f"{path}: got a line that is no score, expected those of mscm.eval; move the file away")
    return rows


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row of scores by name: what else it says, of how it was made, is no fraction."""
    return {name: value for name, value in row.items() if isinstance(value, float)}


def metric_names(row: dict[str, Any]) -> list[str]:
    """The same by name, without deviations: the columns of a table."""
    return [name for name in metrics_of(row) if not name.endswith("_std")]


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows of one model those of the newest checkpoint of the newest training; none of none."""
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    newest = max((row["step"] for row in rows), default=None)
    return [row for row in rows if row["step"] == newest]


def name_of(row: dict[str, Any]) -> str:
    """Of the pictures and events of a row, beside its step: those under other settings are others."""
    name = f"{row['model']}_{SamplerSpec.of_row(row).file_name}_{row['num_images']}_{row['labels']}"
    name += f"_ema_{row['ema']}" if "ema" in row else ""
    return f"{name}_seed{row['seed']}" if row["seed"] else name


def samples_path(directory: str, row: dict[str, Any]) -> str:
    """Of the first images of a row below the directory of the scores, without the ending."""
    return os.path.join(directory, "samples", f"{name_of(row)}_{row['step']:08d}")


def table(rows: list[dict[str, Any]]) -> str:
    """The scores as a person reads them: one line for each model and sampler, mean and deviation over seeds."""
    known = ("model", "sampler", "nfe", "num_images", "num_steps", "ema", "ema_error")
    several = any("ema" in row for row in rows)
    metrics = metric_names(rows[0])
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in known), []).append(row)
    body = []
    for (model, sampler, nfe, count, _, ema, error), group in groups.items():
        average = [f"{ema or 'main'}{f' ({error} off)' if error else ''}" if sampler else ""] if several else []
        scores = (_over_seeds([row.get(name) for row in group]) for name in metrics)
        body.append([model, sampler or "", nfe or "", count, *average, *scores])
    return format_table(["model", "sampler", "NFE", "images", *["EMA"] * several, *metrics], body)


def _over_seeds(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    return with_spread(*mean_and_spread(known))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of a sample (ddof = 1); None of a single value. nan where a score is."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def with_spread(mean: float, spread: float | None) -> str:
    """Both as tables show them."""
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"
