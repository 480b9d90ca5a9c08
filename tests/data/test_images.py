"""Decoding of what is in the wild, and the transforms: exact means, agreement with the printed recipes."""

import io

import numpy as np
import pytest
from PIL import Image

from mscm.data import images


def _file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def photo():
    """Smooth colours, 48 high and 64 wide, so that JPEG keeps them."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "GIF", "JPEG", "WEBP"])
def test_formats(photo, format):
    """Lossless formats exactly, the others nearly."""
    pixels = images.decode(_file(Image.fromarray(photo), format), channels=3)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    error = np.abs(pixels.astype(int) - photo).mean()
    assert error == 0 if format in ("PNG", "BMP", "PPM", "TIFF") else error < 8


def test_grey_becomes_three_equal_channels(photo):
    pixels = images.decode(_file(Image.fromarray(photo[..., 0])), channels=3)
    np.testing.assert_array_equal(pixels, np.repeat(photo[..., :1], 3, axis=-1))


def test_colour_becomes_grey_by_its_luma(photo):
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    pixels = images.decode(_file(Image.fromarray(photo)), channels=1)
    assert np.abs(pixels[..., 0] - photo @ [0.299, 0.587, 0.114]).max() < 1.01


def test_sixteen_bits_are_scaled(photo):
    """v / 257: 65535 becomes 255 and nothing is clipped."""
    values = photo[..., 0].astype(np.uint16) * 257
    np.testing.assert_array_equal(images.decode(_file(Image.fromarray(values)), channels=1)[..., 0], photo[..., 0])


def test_palette_and_its_transparency(photo):
    """A palette is looked up; its transparent colour is white."""
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    palette.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    red, green, blue = [250, 0, 0], [0, 250, 0], [0, 0, 250]
    np.testing.assert_array_equal(images.decode(_file(palette), channels=3), [[red, green], [blue, green]])
    transparent = images.decode(_file(palette, transparency=1), channels=3)
    np.testing.assert_array_equal(transparent, [[red, [255] * 3], [blue, [255] * 3]])


def test_alpha_is_blended_with_white():
    pixels = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 100, 200, 51]]], np.uint8)
    expected = [[[0] * 3, [255] * 3, [204, 224, 244]]]
    np.testing.assert_array_equal(images.decode(_file(Image.fromarray(pixels)), channels=3), expected)


def test_cmyk_is_not_inverted():
    """No ink is white, all black ink is black."""
    for ink, expected in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        pixels = images.decode(_file(Image.new("CMYK", (8, 8), ink), "JPEG", quality=95), channels=3)
        assert np.abs(pixels.astype(int) - expected).max() < 3


def test_exif_rotation_is_applied(photo):
    """Orientation 6: the file holds the picture turned left by a quarter."""
    image = Image.fromarray(photo)
    exif = image.getexif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(images.decode(_file(turned, exif=exif), channels=3), photo)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no image", lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_broken_file_is_refused(photo, format, damage):
    with pytest.raises(images.BrokenImage):
        images.decode(damage(_file(Image.fromarray(photo), format)), channels=3)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
def test_area_with_a_whole_ratio_is_the_mean(ratio):
    """k x k pixels become their mean, rounded half up."""
    pixels = np.random.RandomState(0).randint(0, 256, (6 * ratio, 6 * ratio, 3), np.uint8)
    means = pixels.reshape(6, ratio, 6, ratio, 3).astype(np.int64).sum(axis=(1, 3))
    np.testing.assert_array_equal(images.area(pixels, 6), (2 * means + ratio**2) // (2 * ratio**2))


def test_area_with_a_broken_ratio_weighs_shares():
    """3 pixels onto 2: each target pixel is 2/3 of one and 1/3 of the middle one."""
    pixels = np.zeros((3, 3, 1), np.uint8)
    pixels[:, :, 0] = [30, 90, 210]
    np.testing.assert_array_equal(images.area(pixels, 2)[0, :, 0], [50, 170])


@pytest.mark.parametrize("sides", [(5, 3), (3, 5), (37, 16), (375, 64), (16, 37)])
def test_area_is_the_product_with_the_shares(sides):
    """Against the definition: share of source pixel j in target pixel i, along both axes."""
    source, target = sides
    pixels = np.random.RandomState(0).randint(0, 256, (source, source, 3), np.uint8)
    low, high = (np.arange(target)[:, None] + k for k in (0, 1))
    start, end = (np.arange(source)[None] + k for k in (0, 1))
    shares = np.minimum(high * source, end * target) - np.maximum(low * source, start * target)
    shares = np.maximum(shares, 0) / source
    means = np.einsum("ij,kl,jlc->ikc", shares, shares, pixels.astype(np.float64), optimize=True)
    np.testing.assert_array_equal(images.area(pixels, target), np.floor(means + 0.5 + 1e-9))


def test_area_of_a_huge_white_image_does_not_overflow():
    white = np.full((4500, 4500, 1), 255, np.uint8)
    assert (images.area(white, 4000) == 255).all()


def test_area_crops_the_centre():
    """A wide image keeps its middle: offset floor(w / 2) - floor(side / 2)."""
    pixels = np.tile(np.arange(7, dtype=np.uint8)[None, :, None], (4, 1, 3))
    np.testing.assert_array_equal(images.area(pixels, 4)[0, :, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(images.lanczos(pixels, 4)[0, :, 0], [1, 2, 3, 4])


def test_lanczos_crops_where_edm_does():
    """Offset floor((w - side) / 2), which differs from the other one where one length is odd."""
    pixels = np.tile(np.arange(6, dtype=np.uint8)[None, :, None], (3, 1, 3))
    np.testing.assert_array_equal(images.area(pixels, 3)[0, :, 0], [2, 3, 4])
    np.testing.assert_array_equal(images.lanczos(pixels, 3)[0, :, 0], [1, 2, 3])


def test_adm_refuses_a_thread():
    with pytest.raises(images.BrokenImage, match="got 900 x 1 pixels, expected sides within a factor 100"):
        images.adm(np.zeros((1, 900, 3), np.uint8), 8)


def test_an_odd_exif_tag_is_no_obstacle(photo):
    """A resolution given as text, as some cameras do: Pillow reads it and could not write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _file(Image.fromarray(photo), "JPEG", quality=95, exif=exif.tobytes())
    plain = images.decode(data, channels=3)
    # The same file with one more entry: XResolution, type 2 (ASCII), 3 letters in the entry itself.
    header = exif.tobytes()
    order, mark = ("little", b"II*\0") if b"II*\0" in header else ("big", b"MM\0*")
    start = header.index(mark) + 8
    entry = (0x011A).to_bytes(2, order) + (2).to_bytes(2, order) + (3).to_bytes(4, order) + b"72\0\0"
    odd = header[:start] + (2).to_bytes(2, order) + header[start + 2 : start + 14] + entry + bytes(4)
    odd_file = _file(Image.fromarray(photo), "JPEG", quality=95, exif=odd)
    np.testing.assert_array_equal(images.decode(odd_file, channels=3), plain)
    assert plain.shape == (64, 48, 3)


def test_adm_is_its_recipe():
    """A large image is halved before the bicubic step; at a power of two the halving is all there is."""
    pixels = np.random.RandomState(0).randint(0, 256, (64, 80, 3), np.uint8)
    halved = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BOX).resize((20, 16), Image.Resampling.BOX)
    np.testing.assert_array_equal(images.adm(pixels, 16), np.asarray(halved)[:, 2:18])
    between = images.adm(pixels, 24)  # 64 -> 32 by halving, -> 24 by the bicubic step
    assert between.shape == (24, 24, 3)
    bicubic = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BOX)
    bicubic = np.asarray(bicubic.resize((30, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(between, bicubic[:, 3:27])


@pytest.mark.parametrize("transform", images.TRANSFORMS.values(), ids=images.TRANSFORMS)
def test_transforms_keep_a_flat_image_and_enlarge_a_small_one(transform):
    for shape in ((50, 70), (70, 50), (5, 9)):
        flat = np.full((*shape, 3), 77, np.uint8)
        square = transform(flat, 16)
        assert square.shape == (16, 16, 3) and square.dtype == np.uint8
        assert (square == 77).all()
