"""Precision and recall against an independent implementation by every distance, and cases that are known."""

import numpy as np
import pytest

from mscm.metrics import neighbours
from mscm.metrics.neighbours import precision_recall
from tests.metrics import torch_reference


def gaussians(rng):
    return rng.randn(41, 5), 0.8 * rng.randn(60, 5) + 0.3


def grids(rng):
    """Distances that are equal, rows that are equal, and fake rows on the borders of balls."""
    return rng.randint(0, 3, (50, 3)) / 4.0, rng.randint(0, 4, (43, 3)) / 4.0


def copies(rng):
    """Balls of radius zero, some of them with copies on the other side."""
    rows = rng.randn(12, 4)
    return np.repeat(rows[:8], 5, axis=0), np.repeat(rows[4:], [1, 2, 3, 4, 5, 6, 7, 8], axis=0)


def line(*places):
    return np.array(places, np.float64)[:, None]


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])  # in float32 the last is a grid of 1/16
@pytest.mark.parametrize("make_sets", [gaussians, grids, copies])
def test_equals_the_reference(make_sets, offset, dtype, k, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    real, fake = ((rows + offset).astype(dtype) for rows in make_sets(np.random.RandomState(0)))
    expected = torch_reference.precision_recall(real, fake, k)
    assert 0 < min(expected) and expected[0] != expected[1]
    assert precision_recall(real, fake, k=k) == expected
    assert precision_recall(fake, real, k=k) == expected[::-1]


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize(("k", "expected"), [(1, [1, 1, 4, 16]), (2, [9, 4, 9, 36]), (3, [49, 36, 16, 49])])
def test_radii_by_hand(k, expected, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    np.testing.assert_allclose(neighbours.radii(line(0, 1, 3, 7), k=k), expected)


@pytest.mark.parametrize(
    ("fake", "expected"),
    [
        (line(1, 1.25, 100, 100.5), (1 / 2, 1 / 4)),
        (line(-1, 4, 50, 51), (1 / 2, 1)),  # the first two on borders
        (line(-1.01, 4.01, 4.02, 4.03), (0, 1)),
        (line(1, 1.01, 2, 2.01), (1, 1 / 2)),
    ],
)
def test_asymmetric_by_hand(fake, expected):
    assert precision_recall(line(0, 1, 2, 3), fake, k=1) == expected


@pytest.mark.parametrize("make_sets", [gaussians, grids, copies])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_set_covers_itself(make_sets, offset):
    for rows in make_sets(np.random.RandomState(1)):
        rows = (rows + offset).astype(np.float32)
        assert precision_recall(rows, rows) == (1, 1)
        assert precision_recall(rows, rows[::-1]) == (1, 1)
        assert precision_recall(np.repeat(rows, 4, axis=0), rows)[0] == 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_equal_rows_cover_themselves(value):
    same = np.full((10, 3), value)
    assert precision_recall(same, same) == (1, 1)


def test_a_ball_of_radius_zero_holds_copies_only():
    rows = np.repeat(np.random.RandomState(0).randn(10, 4), 4, axis=0)
    assert precision_recall(rows, rows + 1e-4) == (0, 0)


def test_a_subset_is_precise():
    rows = np.random.RandomState(0).randn(60, 2)
    rows = rows[np.argsort(rows[:, 0])]
    precision, recall = precision_recall(rows, rows[:20])
    assert precision == 1 and recall < 0.7
    assert precision_recall(rows[:20], rows) == (recall, 1)


def test_apart():
    real, fake = gaussians(np.random.RandomState(0))
    assert precision_recall(real, fake + 1e3) == precision_recall(real + 1e5, fake) == (0, 0)


@pytest.mark.parametrize(("num_real", "num_fake", "name"), [(3, 9, "real"), (9, 3, "fake"), (0, 9, "real")])
def test_too_few_rows(num_real, num_fake, name):
    rows = np.random.RandomState(0).randn(9, 2)
    with pytest.raises(ValueError, match=f"got {min(num_real, num_fake)} {name} rows, expected more than k = 3"):
        precision_recall(rows[:num_real], rows[:num_fake])
    assert precision_recall(rows[:4], rows[:4]) == (1, 1)
