"""How long a Frechet distance takes, against the usual formula with SciPy's general matrix square root.

  pip install -e .[dev]
  python benchmarks/frechet.py

Both in one process and turn by turn, on moments of random features: of well-conditioned covariances, from four rows a
feature, and of rank-deficient ones, from one row for two features. The table shows medians of the times and of each
turn's share, and the relative difference of the two results. At 2048 features it takes three minutes on one core.
"""

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
from absl import app, flags

from mscm.metrics.frechet import frechet_distance
from mscm.metrics.moments import Moments, from_features
from mscm.report.table import format_table

FEATURES = flags.DEFINE_integer("features", 2048, "Features of a row; Inception has 2048.", lower_bound=2)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each; the table shows the median.", lower_bound=1)

ROWS_PER_FEATURE = {"well-conditioned": 4.0, "rank-deficient": 0.5}
HEADER = ("covariances", "rows", "ours (s)", "SciPy (s)", "share of SciPy's", "relative difference")


def with_scipy(a: Moments, b: Moments) -> float:
    """The formula of the common evaluators, with their jitter where the square root of a singular product fails."""
    root = scipy.linalg.sqrtm(a.cov @ b.cov)
    if not np.isfinite(root).all():
        jitter = 1e-6 * np.eye(len(a.cov))
        root = scipy.linalg.sqrtm((a.cov + jitter) @ (b.cov + jitter))
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2.0 * np.trace(root).real)


def random_moments(rng: np.random.RandomState, num_rows: int) -> Moments:
    """Of features on different scales, shifted a little."""
    dim = FEATURES.value
    return from_features(rng.randn(num_rows, dim) * rng.uniform(0.5, 2.0, dim) + 0.1 * rng.randn(dim))


def timed(distance: Callable[[Moments, Moments], float], a: Moments, b: Moments) -> tuple[float, float]:
    """The distance and the seconds that it took."""
    started = time.perf_counter()
    result = distance(a, b)
    return result, time.perf_counter() - started


def row(kind: str) -> list:
    """One line of the table."""
    rng, num_rows = np.random.RandomState(0), int(ROWS_PER_FEATURE[kind] * FEATURES.value)
    a, b = (random_moments(rng, num_rows) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS.value):
        (ours, our_seconds), (theirs, their_seconds) = timed(frechet_distance, a, b), timed(with_scipy, a, b)
        seconds.append((our_seconds, their_seconds))
    medians = [f"{statistics.median(column):.2f}" for column in zip(*seconds, strict=True)]
    share = statistics.median(ours / theirs for ours, theirs in seconds)
    return [kind, num_rows, *medians, f"{100 * share:.0f}%", f"{abs(ours - theirs) / theirs:.1g}"]


def main(_: list[str]) -> None:
    """Measures, prints the table."""
    table = [row(kind) for kind in ROWS_PER_FEATURE]
    print(f"{FEATURES.value} features, {os.cpu_count()} cores, SciPy {scipy.__version__}")
    print(format_table(HEADER, table))


if __name__ == "__main__":
    app.run(main)
