"""Distances between a target and a prediction of x, one value per example.

A `Distance` takes the residual in x and the level at which it was predicted. With r = hypot(alpha, sigma), which is 1
for a variance-preserving level, the residual of v is r diff / sigma, and its mean square (SNR + 1) mean diff^2 at any
level ("v-loss").

  (H1) sqrt(mean (r diff / sigma)^2 + epsilon^2) - epsilon           default: pseudo-Huber on the v-space rms
  (H2) (SNR + 1) (sqrt(mean diff^2 + epsilon^2) - epsilon)           the paper's sentence read literally
  (H3) mean(sqrt((r diff / sigma)^2 + epsilon^2) - epsilon)          Charbonnier, element by element
  (SQ) mean (r diff / sigma)^2                                       squared error: ordinary v-MSE
  (EP) SNR mean diff^2                                               squared error of eps
  (TR) max(SNR, 1) mean diff^2                                       truncated SNR: PD, TRACT
  (ED) (SNR + 1 / sigma_data^2) mean diff^2                          EDM; TRACT's EDM variant
  (MS) sum_r w_r distance(diff pooled to r)                          multiscale: simple diffusion

Consistency models compare two images at the least noise level, which a feature network may have to see: an
`ImageDistance` takes both, and is weighted by an `IntervalWeight` of the two levels between which the grid steps.

  (L2) mean (a - b)^2                                                                        CM
  (PH) sqrt(|a - b|^2 + c^2) - c,  c = 0.00054 sqrt(d),  a sum over the d scalars            iCT
  (IG) 1 / (u_t - u_s),  u = sigma / alpha                                                   iCT's weight
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mscm.types import Array, Distance, Float, Images, Level, PerExample

ImageDistance = Callable[[Images, Images], PerExample]
IntervalWeight = Callable[[Level, Level], PerExample]  # (noisier level, cleaner level) -> one factor per example

_PIXELS = (1, 2, 3)


def mean_square(residual: Images) -> PerExample:
    """Mean square per example; a mean, not a sum, so that epsilon means the same at every resolution."""
    return jnp.mean(jnp.square(residual), axis=_PIXELS)


def _softened(square: jax.Array, epsilon: float) -> jax.Array:
    """sqrt(square + epsilon^2) - epsilon without cancellation; at epsilon = 0 its gradient at 0 is 0, not nan."""
    is_zero = square == 0  # not "is not above 0": a nan stays a nan
    root = jnp.sqrt(jnp.where(is_zero, 1.0, square) + epsilon**2)
    return jnp.where(is_zero, 0.0, square / (root + epsilon))


def _in_v(diff: Images, lvl_t: Level) -> Images:
    return diff * (jnp.hypot(lvl_t.alpha, lvl_t.sigma) / lvl_t.sigma)


def pseudo_huber(diff: Images, lvl_t: Level, *, epsilon: float) -> PerExample:
    """(H1): pseudo-Huber of the root mean square residual in v space."""
    return _softened(mean_square(_in_v(diff, lvl_t)), epsilon)


def pseudo_huber_weighted(diff: Images, lvl_t: Level, *, epsilon: float) -> PerExample:
    """(H2): SNR + 1 times the pseudo-Huber of the root mean square residual in x space."""
    return (lvl_t.snr + 1)[:, 0, 0, 0] * _softened(mean_square(diff), epsilon)


def charbonnier(diff: Images, lvl_t: Level, *, epsilon: float) -> PerExample:
    """(H3): mean over the elements of the pseudo-Huber of each v-space residual."""
    return jnp.mean(_softened(jnp.square(_in_v(diff, lvl_t)), epsilon), axis=_PIXELS)


def v_mse(diff: Images, lvl_t: Level) -> PerExample:
    """(SQ): mean squared error in v space, weight SNR + 1 on x."""
    return mean_square(_in_v(diff, lvl_t))


def eps_mse(diff: Images, lvl_t: Level) -> PerExample:
    """(EP): mean squared error in eps space, weight SNR on x."""
    return mean_square(diff * (lvl_t.alpha / lvl_t.sigma))


def truncated_snr_mse(diff: Images, lvl_t: Level) -> PerExample:
    """(TR): mean squared error of x or of eps, whichever weighs more; arXiv:2202.00512."""
    return mean_square(diff * jnp.maximum(lvl_t.alpha / lvl_t.sigma, 1))


def edm_mse(diff: Images, lvl_t: Level, *, sigma_data: float = 0.5) -> PerExample:
    """(ED): weight (u^2 + sigma_data^2) / (u sigma_data)^2 with u = sigma / alpha, arXiv:2206.00364."""
    return (lvl_t.snr + sigma_data**-2)[:, 0, 0, 0] * mean_square(diff)


def multiscale(distance: Distance, resolutions: tuple[int, ...]) -> Distance:
    """(MS): weighted mean of `distance` on residuals pooled to each resolution, weights 1 / r (SiD, arXiv:2301.11093).

    `distance` must be a mean over pixels. The weights are normalised to sum 1, so that one resolution, the image's
    own, is no change.

    Raises:
      ValueError: a resolution that does not divide the image side.
    """
    weights = jnp.asarray([1 / r for r in resolutions], jnp.float32)
    weights = weights / jnp.sum(weights)

    def summed(diff: Images, lvl_t: Level) -> PerExample:
        scales = jnp.stack([distance(average_pool(diff, r), lvl_t) for r in resolutions])
        return jnp.sum(weights[:, None] * scales, axis=0)

    return summed


def average_pool(images: Images, resolution: int) -> Float[Array, "b r r c"]:
    """Average pooling of square images down to `resolution` pixels a side."""
    b, h, w, c = images.shape
    if h != w or h % resolution:
        raise ValueError(f"got images of {h} x {w} to pool to {resolution}, expected a square of a multiple of it")
    factor = h // resolution
    return jnp.mean(images.reshape(b, resolution, factor, resolution, factor, c), axis=(2, 4))


def squared_l2(a: Images, b: Images) -> PerExample:
    """(L2): mean squared difference."""
    return mean_square(a - b)


def norm_pseudo_huber(a: Images, b: Images, *, scale: float = 0.00054) -> PerExample:
    """(PH) with c = `scale` sqrt(d), arXiv:2310.14189; `scale` 0 is the Euclidean norm."""
    root_d = math.sqrt(math.prod(a.shape[1:]))
    return root_d * _softened(mean_square(a - b), scale)


def inverse_gap(lvl_t: Level, lvl_s: Level) -> PerExample:
    """(IG): small gaps, which are many and clean, weigh more; the same for VP and VE levels of one SNR."""
    # Neighbours on a grid of a thousand differ by some 1e-3 of themselves: the difference keeps four digits.
    return (1 / (lvl_t.sigma / lvl_t.alpha - lvl_s.sigma / lvl_s.alpha))[:, 0, 0, 0]
