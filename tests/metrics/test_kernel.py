"""Kernel distance against an independent implementation, and what an unbiased estimate must do."""

import inspect

import numpy as np
import pytest

from mscm.metrics.kernel import kernel_distance
from tests.metrics import torch_reference


def make_sets(num_real=40, num_fake=60, dim=6, offset=0.0):
    rng = np.random.RandomState(0)
    return rng.randn(num_real, dim) + offset, 1.5 * rng.randn(num_fake, dim) + 0.7 + offset


def of_all_rows(real, fake):
    """Without subsets."""
    return kernel_distance(real, fake, num_subsets=1)[0]


def test_by_hand():
    assert kernel_distance(np.zeros((2, 1)), np.ones((2, 1))) == (1.0 + 8.0 - 2.0, 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("offset", "rel"), [(0.0, 1e-10), (100.0, 1e-6)])
@pytest.mark.parametrize("dim", [1, 6])
def test_subsets_of_all_rows_equal_the_reference(dim, offset, rel, dtype):
    real, fake = (rows.astype(dtype) for rows in make_sets(40, 40, dim, offset))
    mean, std = kernel_distance(real, fake, num_subsets=4, subset_size=40)
    assert mean == pytest.approx(torch_reference.kernel_distance(real, fake), rel=rel)
    assert std <= rel * abs(mean)


def test_mean_over_subsets_tends_to_that_of_all_rows():
    # Every pair of rows is as likely as any other, so the expectation over subsets is the estimate from all rows.
    real, fake = make_sets()
    mean, std = kernel_distance(real, fake, num_subsets=4000, subset_size=20)
    assert mean == pytest.approx(torch_reference.kernel_distance(real, fake), abs=4 * std / 4000**0.5)


def test_std_is_over_subsets():
    real, fake = make_sets()
    single = [kernel_distance(real, fake, num_subsets=1, subset_size=20, seed=seed)[0] for seed in range(500)]
    assert np.std(single) == pytest.approx(kernel_distance(real, fake, num_subsets=500, subset_size=20)[1], rel=0.15)


def test_a_subset_is_no_larger_than_a_set():
    real, fake = make_sets()
    assert kernel_distance(real, fake, num_subsets=5) == kernel_distance(real, fake, num_subsets=5, subset_size=40)


@pytest.mark.parametrize("size", [2, 10, 50])
def test_unbiased_whatever_the_number_of_rows(size):
    rng = np.random.RandomState(size)
    estimates = [of_all_rows(rng.randn(size, 4), rng.randn(size, 4)) for _ in range(1000)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 1000**0.5
    assert 0.2 < np.mean(np.less(estimates, 0)) < 0.8


def test_repeatable():
    real, fake = make_sets()
    scores = [kernel_distance(real, fake, num_subsets=3, subset_size=10, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(("num_real", "num_fake"), [(1, 5), (5, 1), (0, 5)])
def test_too_few_rows(num_real, num_fake):
    with pytest.raises(ValueError, match=f"got {num_real} and {num_fake} rows, expected at least 2"):
        inspect.unwrap(kernel_distance)(*make_sets(num_real, num_fake))
