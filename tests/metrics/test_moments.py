"""Moments against numpy, and merging against one shot."""

import functools
import inspect

import numpy as np
import pytest

from mscm.metrics import moments


def make_features(num=101, dim=5):
    rng = np.random.RandomState(0)
    return rng.randn(num, dim) @ rng.randn(dim, dim) + 1e3 * rng.randn(dim)  # a mean far from zero hurts naive sums


def assert_close(got, expected):
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(got.cov, expected.cov, rtol=1e-10, atol=1e-10)


def test_equals_numpy_and_is_float64():
    features = make_features().astype(np.float32)
    got = moments.from_features(features)
    assert got.mean.dtype == got.cov.dtype == np.float64
    np.testing.assert_allclose(got.mean, features.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.cov, np.cov(features.astype(np.float64).T), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 101])
def test_streaming_equals_one_shot(size):
    features = make_features()
    pieces = [features[start : start + size] for start in range(0, len(features), size)]
    assert_close(functools.reduce(moments.add, pieces, moments.empty(5)), moments.from_features(features))


@pytest.mark.parametrize("cut", [2, 50, 99])
def test_merge_is_exact_and_symmetric(cut):
    features = make_features()
    a, b = moments.from_features(features[:cut]), moments.from_features(features[cut:])
    assert_close(moments.merge(a, b), moments.from_features(features))
    assert_close(moments.merge(b, a), moments.from_features(features))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_hosts_in_any_order_equal_one_shot(offset, seed):
    rng = np.random.RandomState(seed)
    features = rng.randn(200, 4) @ rng.randn(4, 4) + offset
    cuts = np.sort(np.append(rng.randint(0, 201, 30), [0, 1, 1, 200]))  # with pieces of no row and of one
    pieces = [moments.add(moments.empty(4), piece) for piece in np.split(features, cuts)]
    assert {0, 1} <= {piece.count for piece in pieces}
    while len(pieces) > 1:
        pieces.append(moments.merge(*(pieces.pop(rng.randint(len(pieces))) for _ in range(2))))
    (got,) = pieces
    assert got.count == 200
    for value, expected in ((got.mean, features.mean(axis=0)), (got.cov, np.cov(features.T))):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_no_rows_are_neutral():
    one = moments.from_features(make_features())
    assert_close(moments.merge(moments.empty(5), one), one)
    assert_close(moments.add(one, np.zeros((0, 5))), one)
    assert moments.merge(moments.empty(5), moments.empty(5)).count == 0


def test_single_rows_have_zero_covariance():
    single = moments.add(moments.empty(2), np.array([[1.0, 2.0]]))
    assert single.count == 1 and not single.cov.any()


def test_bad_input_is_a_sentence():
    from_features = inspect.unwrap(moments.from_features)
    with pytest.raises(ValueError, match=r"got 1 row\(s\)"):
        from_features(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"shape \(4,\), expected 'n d'"):
        from_features(np.zeros(4))
    broken = np.zeros((4, 3))
    broken[1, 2], broken[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 4 rows with a non-finite feature"):
        from_features(broken)
    with pytest.raises(ValueError, match="got 2 and 3 features"):
        moments.merge(moments.empty(2), moments.empty(3))
