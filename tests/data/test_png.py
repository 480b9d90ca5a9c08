"""Our own PNG files: readable by everything, decoded as every other reader decodes them."""

import io

import numpy as np
import pytest
from PIL import Image

from mscm.data import png


def _images(num, side, channels):
    """Noise and ramps: differences of every size, so that every byte wraps around."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (num, side, side, channels), np.uint8)
    pixels[0] = np.arange(side)[:, None, None] * 16 % 256
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 33])
def test_batch_decodes_to_what_was_encoded(side, channels):
    pixels = _images(5, side, channels)
    decoded = png.decode([png.encode(image) for image in pixels], side=side, channels=channels)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_pillow_reads_the_same(channels, mode):
    """Every checksum, size and filter is as the format has it, also of an image that is not square."""
    for pixels in (*_images(3, 17, channels), _images(1, 17, channels)[0, :5]):
        image = Image.open(io.BytesIO(png.encode(pixels)))
        image.verify()
        image = Image.open(io.BytesIO(png.encode(pixels)))
        assert image.mode == mode and image.size == (17, len(pixels))
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def _by_pillow(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file, pixels: file[:60], "does not unpack"),
        (lambda file, pixels: file[:100] + bytes([file[100] ^ 1]) + file[101:], "does not unpack"),
        (lambda file, pixels: png.encode(pixels[:8, :8]), "no PNG of 16 x 16 pixels and 3 channels"),
        (lambda file, pixels: png.encode(pixels[..., :1]), "no PNG of 16 x 16 pixels and 3 channels"),
        (lambda file, pixels: _by_pillow(pixels), "another filter"),
        (lambda file, pixels: b"", "no PNG"),
    ],
)
def test_anything_else_is_refused(damage, message):
    pixels, good = _images(2, 16, 3)
    pixels[:] = np.arange(16)[:, None]  # a slope to the right, which an encoder that chooses does not filter upwards
    with pytest.raises(ValueError, match=message):
        png.decode([png.encode(good), damage(png.encode(good), pixels)], side=16, channels=3)
