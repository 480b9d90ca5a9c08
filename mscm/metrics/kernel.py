"""Kernel distance: how far apart two sets of features are, without a bias from their size.

With Inception features it is KID; with any other features it is not, and must not be called so.
"""

import numpy as np
from jaxtyping import Float

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared maximum mean discrepancy.

    Binkowski et al., arXiv:1801.01401: the unbiased estimate with the kernel (x . y / d + 1)^3. A mean over unbiased
    estimates is unbiased: it may be below zero, and its expectation does not depend on the number of rows.

    Raises:
      ValueError: a set has fewer than two rows.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise ValueError(f"kernel_distance: got {len(real)} and {len(fake)} rows, expected at least 2 of each.")
    rng = np.random.RandomState(seed)
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    estimates = [
        _unbiased(real[rng.permutation(len(real))[:size]], fake[rng.permutation(len(fake))[:size]])
        for _ in range(num_subsets)
    ]
    return float(np.mean(estimates)), float(np.std(estimates))


def _unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic for equally many rows."""
    n = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2.0 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # ten times as fast as base ** 3
