"""uint8 <-> float, and flips."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.data import transforms

ALL_LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def test_round_trip_of_every_level():
    images = transforms.to_float(ALL_LEVELS)
    assert images.dtype == jnp.float32
    assert images.min() == -1.0 and images.max() == 1.0
    np.testing.assert_array_equal(transforms.to_uint8(images), ALL_LEVELS)


def test_to_uint8_clips_and_rounds():
    images = jnp.array([-3.0, -1.0, -1.0 + 0.6 / 127.5, 1.0, 9.0]).reshape(1, 1, 5, 1)
    np.testing.assert_array_equal(transforms.to_uint8(images).ravel(), [0, 0, 1, 255, 255])


def test_extra_leading_axes():
    stacked = np.broadcast_to(ALL_LEVELS, (3, *ALL_LEVELS.shape))
    np.testing.assert_array_equal(transforms.to_uint8(transforms.to_float(stacked)), stacked)


def test_scaling_twice_is_refused():
    with pytest.raises(TypeError, match="got float32 images, expected uint8"):
        inspect.unwrap(transforms.to_float)(np.zeros((1, 2, 2, 1), np.float32))
    with pytest.raises(TypeError, match="got uint8 images, expected floats"):
        inspect.unwrap(transforms.to_uint8)(ALL_LEVELS)


def test_random_flip_mirrors_about_half():
    images = jnp.arange(1000 * 2 * 3).reshape(1000, 2, 3, 1)
    flipped = jax.jit(transforms.random_flip)(images, jax.random.key(0))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 400 < mirrored.sum() < 600  # six standard deviations
