"""Power-function averages that were not kept, from snapshots of those that were: arXiv:2312.02696, section 3.2.

A snapshot at step t of the average with exponent gamma weighs the parameters of training by the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)   for 0 <= tau <= t, else 0                                       (1)

and a sum of snapshots with coefficients x by the sum of their profiles. The nearest such sum to a wanted profile r, in
the square over tau, solves A x = b with A_ij = <p_i, p_j> and b_i = <p_i, r> (appendix C). Here it is the nearest of
those whose coefficients sum to one, as the weights of an average do. Parameters are large beside what they move by: a
sum of 0.997 would shrink all of them, and with few snapshots it is further from the average than any snapshot.

    found = solve([Profile(gamma, t), ...], Profile(wanted, t))
    average = sum of found.coefficients times snapshots
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_SMALLEST = 1e-12  # of the singular values that count, relative to the largest


class Profile(NamedTuple):
    """Equation (1)."""

    gamma: float
    step: float


class Reconstruction(NamedTuple):
    """A sum of profiles, and how far it is from the one that was wanted."""

    coefficients: Float[np.ndarray, "n"]
    error: float  # norm of the difference over the norm of what was wanted


def dot(a: Profile, b: Profile) -> float:
    """<p_a, p_b>, the integral of the product of two profiles."""
    if a.step > b.step:
        a, b = b, a
    both = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return both * (a.step / b.step) ** b.gamma / b.step


def solve(profiles: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """The sum of `profiles`, with coefficients that sum to one, that is nearest to `wanted`; in float64.

    Raises:
      ValueError: there are none.
    """
    if not profiles:
        raise ValueError("got no profiles, expected at least one")
    # Of unit norm: snapshots of early steps are narrow and high, and A would be a matrix of very different sizes.
    norms = np.array([math.sqrt(dot(p, p)) for p in profiles])
    norm = math.sqrt(dot(wanted, wanted))
    gram = np.array([[dot(a, b) for b in profiles] for a in profiles]) / np.outer(norms, norms)
    right = np.array([dot(p, wanted) for p in profiles]) / (norms * norm)
    ones = norm / norms  # whose product with the coefficients is their sum
    solved, *_ = np.linalg.lstsq(gram, np.stack([right, ones], axis=1), rcond=_SMALLEST)
    free, step = solved.T
    found = free + step * (1 - ones @ free) / (ones @ step)  # a Lagrange multiplier
    # The square of the distance, all of unit norm; rounding makes what is 0 negative.
    square = 1 - 2 * found @ right + found @ gram @ found
    return Reconstruction(found * norm / norms, math.sqrt(max(0.0, square)))
