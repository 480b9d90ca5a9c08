"""Frechet distance: closed forms and scipy's general matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from mscm.metrics.frechet import frechet_distance
from mscm.metrics.moments import Moments, empty, from_features
from tests.metrics import torch_reference


def gaussian(mean, cov):
    return Moments(100, np.asarray(mean, np.float64), np.asarray(cov, np.float64))


def random_spd(rng, dim):
    root = rng.randn(dim, dim)
    return root @ root.T / dim + 0.1 * np.eye(dim)


def test_zero_to_itself():
    moments = from_features(np.random.RandomState(0).randn(500, 64) * np.logspace(-3, 2, 64))
    assert frechet_distance(moments, moments) <= 1e-6 * np.trace(moments.cov)


@pytest.mark.parametrize("shift", [0.5, -3.0])
def test_shift_of_one_feature(shift):
    features = np.random.RandomState(0).randn(300, 6)
    moved = features.copy()
    moved[:, 2] += shift
    assert frechet_distance(from_features(features), from_features(moved)) == pytest.approx(shift**2, rel=1e-9)


def test_commuting_gaussians():
    rng = np.random.RandomState(0)
    basis = np.linalg.qr(rng.randn(7, 7))[0]
    a, b, mean = rng.rand(7) * 4, rng.rand(7) * 4, rng.randn(7)
    got = frechet_distance(gaussian(mean, basis * a @ basis.T), gaussian(0 * mean, basis * b @ basis.T))
    assert got == pytest.approx(mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_equals_scipy_sqrtm_and_is_symmetric(dim):
    rng = np.random.RandomState(dim)
    a, b = (gaussian(rng.randn(dim), random_spd(rng, dim)) for _ in range(2))
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("rows_per_feature", "rel"), [(10, 1e-6), (0.5, 1e-3), (0.25, 1e-3)])
def test_equals_the_reference_with_few_or_many_rows(rows_per_feature, rel, dim):
    rng, rows = np.random.RandomState(dim), int(rows_per_feature * dim)
    a, b = (from_features(rng.randn(rows, dim) * rng.uniform(0.5, 2.0, dim) + 0.1 * rng.randn(dim)) for _ in range(2))
    expected = torch_reference.frechet(a.mean, a.cov, b.mean, b.cov)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=rel)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=rel)


def test_singular_covariances():
    # Variances on different axes: nothing overlaps, so the distance is both traces; fewer rows than features otherwise.
    one, two = np.diag([4.0, 0.0, 0.0]), np.diag([0.0, 9.0, 0.0])
    assert frechet_distance(gaussian(np.zeros(3), one), gaussian(np.zeros(3), two)) == pytest.approx(13.0)
    few = from_features(np.random.RandomState(0).randn(10, 64))
    assert frechet_distance(few, few) <= 1e-6 * np.trace(few.cov)


def test_one_dimension_is_the_textbook_formula():
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[25.0]])) == pytest.approx(4.0 + 9.0)


def test_bad_input_is_a_sentence():
    good = gaussian([0.0], [[1.0]])
    with pytest.raises(ValueError, match="got 1 and 2 features"):
        frechet_distance(good, gaussian([0.0, 0.0], np.eye(2)))
    with pytest.raises(ValueError, match=r"0 example\(s\), expected at least 2"):
        frechet_distance(good, empty(1))
    with pytest.raises(ValueError, match="non-finite"):
        frechet_distance(good, gaussian([np.nan], [[1.0]]))
