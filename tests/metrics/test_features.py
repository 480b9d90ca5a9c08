"""A feature network gives every image its own row, whatever comes with it and whichever devices compute it."""

import inspect
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.metrics.features import FeatureNetwork, Outputs, pixels

WEIGHTS = np.random.RandomState(1).randn(2, 2, 3, 5).astype(np.float32)
IMAGES = np.random.RandomState(0).randint(0, 256, (9, 2, 2, 3)).astype(np.uint8)

# Run in other processes: prints the rows, and how many images one device had at a time.
PROGRAM = """
import json, sys
import jax
from mscm import distributed
if len(sys.argv) > 1:
    distributed.start(sys.argv[1])
from tests.metrics import test_features

parts = []
outputs = test_features.network(parts=parts)(test_features.many_images())
test_features.network(parts=parts).for_calls_of(5)(test_features.many_images()[:5])
print(json.dumps({"rows": outputs.features.tolist(), "parts": parts, "devices": jax.device_count()}))
"""


def network(*, batch_size=2, shape=None, traces=None, parts=None) -> FeatureNetwork:
    """Of linear features and two classes; notes the shapes that it is compiled for, whole and on one device."""

    def forward(params, images):
        if traces is not None:
            traces.append(images.shape)
        if parts is not None:
            jax.debug.inspect_array_sharding(images, callback=lambda s: parts.append(s.shard_shape(images.shape)))
        rows = jnp.einsum("nhwc,hwcd->nd", images.astype(jnp.float32) / 255.0, params["kernel"], precision="highest")
        return Outputs(rows, probabilities=jax.nn.softmax(rows[:, :2]))

    return FeatureNetwork("linear", "f" * 64, {"kernel": WEIGHTS}, forward, batch_size, shape)


def many_images():
    """More than one batch of 8 devices, and a broken one."""
    return np.random.RandomState(2).randint(0, 256, (21, 2, 2, 3)).astype(np.uint8)


def expected_rows(images):
    return np.einsum("nhwc,hwcd->nd", images / 255.0, WEIGHTS)


@pytest.fixture(scope="module")
def linear():
    return network(batch_size=4)


@pytest.mark.parametrize("num_images", [1, 3, 4, 5, 8, 9])
def test_one_row_for_each_image(linear, num_images):
    """Also of a last batch that is not full."""
    outputs = linear(IMAGES[:num_images])
    rows = expected_rows(IMAGES[:num_images])
    assert outputs.features.dtype == outputs.probabilities.dtype == np.float32
    np.testing.assert_allclose(outputs.features, rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.probabilities, jax.nn.softmax(rows[:, :2]), rtol=1e-5, atol=1e-6)
    assert outputs.spatial is None


def test_the_last_batch_is_padded():
    """One shape, and so one compilation, for any number of images."""
    traces = []
    counting = network(batch_size=4, traces=traces)
    for num_images in (1, 4, 7, 0):
        counting(IMAGES[:num_images])
    assert traces == [(4, 2, 2, 3)]


@pytest.mark.parametrize("largest_call, at_a_time", [(1, 1), (3, 3), (4, 4), (5, 3), (9, 3), (10, 4)])
def test_calls_of_a_known_size_are_padded_to_it(largest_call, at_a_time):
    """In runs of equal size, and one program for all calls up to it."""
    traces = []
    counting = network(batch_size=4, traces=traces).for_calls_of(largest_call)
    for num_images in (largest_call, 1, largest_call):
        images = np.resize(IMAGES, (num_images, 2, 2, 3))
        np.testing.assert_allclose(counting(images).features, expected_rows(images), rtol=1e-5, atol=1e-5)
    assert traces == [(at_a_time, 2, 2, 3)]


def test_a_row_does_not_depend_on_the_other_images(linear):
    rows = linear(IMAGES).features
    np.testing.assert_array_equal(linear(IMAGES[::-1]).features[::-1], rows)
    np.testing.assert_array_equal(np.concatenate([linear(image[None]).features for image in IMAGES]), rows)


@pytest.mark.parametrize("shape", [None, (2, 2, 3)])
def test_no_images_have_no_rows(shape):
    outputs = network(shape=shape)(IMAGES[:0])
    assert outputs.features.shape == (0, 5) and outputs.probabilities.shape == (0, 2) and outputs.spatial is None


def test_outputs_that_there_are():
    """Each of them by its name, in NumPy."""

    def forward(params, images):
        x = images.astype(jnp.float32).reshape(len(images), -1)
        return Outputs(x[:, :1], x[:, 1:3], x[:, 3:6])

    pixels = IMAGES.reshape(len(IMAGES), -1)
    outputs = FeatureNetwork("pixels", "", {}, forward, 4)(IMAGES)
    assert outputs.alignment is None  # a network knows of no captions
    for rows, columns in zip(outputs[:3], (slice(1), slice(1, 3), slice(3, 6)), strict=True):
        assert type(rows) is np.ndarray
        np.testing.assert_array_equal(rows, pixels[:, columns])


@pytest.mark.parametrize("height, width, channels", [(8, 8, 1), (4, 6, 3)])
def test_images_of_any_shape(height, width, channels):
    def forward(params, images):
        return Outputs(images.astype(jnp.float32).sum((1, 2, 3))[:, None])

    images = np.random.RandomState(0).randint(0, 256, (3, height, width, channels)).astype(np.uint8)
    rows = FeatureNetwork("sum", "", {}, forward, 2)(images).features
    np.testing.assert_array_equal(rows[:, 0], images.sum((1, 2, 3)))


@pytest.mark.parametrize("shape", [None, (2, 2, 3)])
@pytest.mark.parametrize(
    "images",
    [
        IMAGES.astype(np.float32),
        IMAGES.astype(np.int32),
        IMAGES.astype(bool),
        IMAGES[0],
        IMAGES[None],
        IMAGES[..., :2],
        IMAGES[..., 0],
        IMAGES.reshape(len(IMAGES), -1),
        np.zeros((0,), np.uint8),
        np.zeros((2, 2, 2, 4), np.uint8),
    ],
    ids=lambda images: f"{images.dtype} {images.shape}",
)
def test_what_is_no_image_is_refused(images, shape):
    call = inspect.unwrap(FeatureNetwork.__call__)
    expected = "h, w, 1 or 3" if shape is None else "2, 2, 3"
    with pytest.raises(ValueError) as error:
        call(network(shape=shape), images)
    assert str(error.value).startswith(
        f"linear: got {images.dtype} images of shape {images.shape}, expected uint8 of shape (n, {expected})"
    )


def test_images_of_another_shape_are_refused():
    for images in (IMAGES[:, :1], IMAGES[..., :1], np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 of shape \(n, 2, 2, 3\)"):
            network(shape=(2, 2, 3))(images)


@pytest.mark.parametrize("processes, devices", [(1, 8), (2, 2)])
def test_several_devices_give_the_same_rows(run_together, processes, devices):
    """Every device computes its part of a batch, every process gets all rows."""
    where = ["WHERE"] if processes > 1 else []
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    results = run_together(*[[sys.executable, "-c", PROGRAM, *where]] * processes, XLA_FLAGS=flags)
    expected = network()(many_images()).features
    for code, output, errors in results:
        assert code == 0, errors
        result = json.loads(output.splitlines()[-1])
        assert result["devices"] == processes * devices
        # Two images on each device; of five at most, which is fewer than there are devices or not, what holds them.
        assert result["parts"] == [[2, 2, 2, 3], [-(-5 // (processes * devices)), 2, 2, 3]]
        np.testing.assert_allclose(result["rows"], expected, rtol=1e-6, atol=1e-6)


def test_pixels_are_their_own_features():
    """In [-1, 1], row by row in the order of the pixels; Frechet's distance is then that of the images themselves."""
    images = np.array([[0, 255], [51, 204]], np.uint8).reshape(2, 1, 2, 1)
    identity = pixels((1, 2, 1))
    outputs = identity(images)
    np.testing.assert_allclose(outputs.features, [[-1, 1], [-0.6, 0.6]], rtol=1e-6)
    assert outputs.spatial is None and outputs.probabilities is None
    with pytest.raises(ValueError, match=r"pixels: got uint8 images of shape \(2, 2, 1, 1\), expected"):
        identity(images.reshape(2, 2, 1, 1))
