"""Frechet distance between two sets of features, each summarised by its mean and covariance.

    d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

With Inception features this is FID; with any other features it is not, and must not be called so.
"""

import numpy as np
from jaxtyping import Float64

from mscm.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet (Wasserstein-2) distance between the Gaussians with these moments.

    Heusel et al., arXiv:1706.08500: tr (S_a S_b)^(1/2) is the sum of the square roots of the
    eigenvalues of the symmetric F^T S_b F, where S_a = F F^T. Unlike a general matrix square root this needs no
    imaginary part thrown away and no jitter for a singular covariance.

    Raises:
      ValueError: for different numbers of features, fewer than two examples, or non-finite moments.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet_distance: got {a.mean.size} and {b.mean.size} features, expected the same number; compute both "
            "sides with one feature network."
        )
    for moments in (a, b):
        if moments.count < 2:
            raise ValueError(f"frechet_distance: got moments of {moments.count} example(s), expected at least 2.")
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.cov).all()):
            raise ValueError("frechet_distance: got non-finite moments, expected finite; recompute them from features.")
    factor = _factor(a.cov)
    eigenvalues = np.linalg.eigvalsh(factor.T @ b.cov @ factor)
    trace_sqrt = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2.0 * trace_sqrt
    return max(float(distance), 0.0)  # below zero only by rounding


def _factor(matrix: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """F with F F^T the matrix, which is positive semi-definite; Cholesky's, the fastest, where it is not singular."""
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        eigenvalues, vectors = np.linalg.eigh(matrix)
        kept = eigenvalues > len(matrix) * np.finfo(np.float64).eps * eigenvalues[-1]  # the others are rounding
        return vectors[:, kept] * np.sqrt(eigenvalues[kept])
