"""Precision and recall of a set of images against another, by nearest neighbours in a feature space."""

import numpy as np
from jaxtyping import Float, Float64

_BLOCK = 1024  # rows whose distances to all others are in memory at once


def precision_recall(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, k: int = 3
) -> tuple[float, float]:
    """Shares of fake rows within a ball of a real one, and of real rows within a ball of a fake one.

    Kynkaanniemi et al., arXiv:1904.06991, "improved precision and recall": the closed ball of a row reaches to its
    `k`-th nearest neighbour in its own set, itself not counted. In float64.

    Raises:
      ValueError: a set has no more than `k` rows.
    """
    for name, rows in (("real", real), ("fake", fake)):
        if len(rows) <= k:
            raise ValueError(f"precision_recall: got {len(rows)} {name} rows, expected more than k = {k}.")
    centre = real.mean(axis=0, dtype=np.float64)  # distances are differences of squares: small ones are exact
    real, fake = (np.asarray(rows, np.float64) - centre for rows in (real, fake))
    return _covered(fake, real, radii(real, k=k)), _covered(real, fake, radii(fake, k=k))


def radii(rows: Float64[np.ndarray, "n d"], *, k: int) -> Float64[np.ndarray, "n"]:
    """Squared distance of each row to its k-th nearest neighbour."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        distances = _squared_distances(rows[start : start + _BLOCK], rows)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        result[start : start + _BLOCK] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return result


def _covered(points: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray) -> float:
    # Balls are closed: what lies on a border, a copy of a row in a ball of radius 0, is not to fall out by rounding.
    squared_radii = squared_radii + 1e-12 * np.square(centres).sum(axis=1)
    blocks = (points[start : start + _BLOCK] for start in range(0, len(points), _BLOCK))
    inside = [(_squared_distances(block, centres) <= squared_radii).any(axis=1) for block in blocks]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: Float64[np.ndarray, "m d"], b: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "m n"]:
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    return np.maximum(squares - 2.0 * (a @ b.T), 0.0)
