"""Mean and covariance of features, streamed and merged in float64 on the host.

    moments = empty(64)
    for batch in batches:
        moments = add(moments, network(batch).features)  # any number of rows, the last partial batch included
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64


class Moments(NamedTuple):
    """Count, mean and unbiased covariance (ddof = 1, as `np.cov`); below two rows `cov` is zero by convention."""

    count: int  # type: ignore[assignment]  # hides the method of a tuple, which nobody calls
    mean: Float64[np.ndarray, "d"]
    cov: Float64[np.ndarray, "d d"]


def checked(count: int, mean: np.ndarray, cov: np.ndarray) -> Moments:
    """The moments that a file holds.

    Raises:
      ValueError: they are not finite numbers of fitting shapes, or `cov` is no covariance.
    """
    if mean.dtype.kind not in "fiu" or cov.dtype.kind not in "fiu":
        raise ValueError(f"got {mean.dtype} and {cov.dtype}, expected numbers")
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(f"got a mean of shape {mean.shape} and a covariance of {cov.shape}, expected (d,) and (d, d)")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("got non-finite numbers, expected finite ones")
    if (np.diag(cov) < 0).any() or np.abs(cov - cov.T).max(initial=0) > 1e-6 * np.abs(cov).max(initial=0):
        raise ValueError("got a matrix that is not symmetric or has a negative variance, expected a covariance")
    return Moments(count, mean.astype(np.float64), cov.astype(np.float64))


def from_features(features: Float[np.ndarray, "n d"]) -> Moments:
    """Moments of all rows at once.

    Mean and covariance in float64, ddof = 1, as Heusel et al., arXiv:1706.08500, use them.

    Raises:
      ValueError: for fewer than two rows, a wrong rank or a non-finite value.
    """
    moments = _from_rows(features)
    if moments.count < 2:
        raise ValueError(
            f"moments: got {moments.count} row(s) of features, expected at least 2; a covariance needs two examples "
            "(to stream smaller pieces, start from `empty` and `add` them)."
        )
    return moments


def empty(dim: int) -> Moments:
    """The neutral element of `merge`: no rows of `dim` features."""
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def add(moments: Moments, features: Float[np.ndarray, "n d"]) -> Moments:
    """Moments with the rows of `features` added; any number of rows."""
    return merge(moments, _from_rows(features))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of rows, exact up to rounding.

    Chan, Golub, LeVeque (1979), the pairwise update: scatter_ab = scatter_a + scatter_b + (n_a n_b / n) delta delta^T.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments: got {a.mean.size} and {b.mean.size} features, expected the same number; both sides must come "
            "from one feature network."
        )
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = _scatter(a) + _scatter(b) + np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, mean, scatter / max(count - 1, 1))


def _scatter(moments: Moments) -> Float64[np.ndarray, "d d"]:
    return moments.cov * max(moments.count - 1, 0)


def _from_rows(features: np.ndarray) -> Moments:
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise ValueError(
            f"moments: got features of shape {features.shape}, expected 'n d'; pool or flatten each example to one row."
        )
    bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if bad:
        raise ValueError(
            f"moments: got {bad} of {len(features)} rows with a non-finite feature, expected none; the images or the "
            "feature network are broken, and a distance computed from them would mean nothing."
        )
    count, dim = features.shape
    if count == 0:
        return empty(dim)
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(count, mean, centred.T @ centred / max(count - 1, 1))
