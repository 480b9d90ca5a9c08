"""Image files on the host: decoding of whatever is in the wild, and the resizing that papers call preprocessing.

Which resizing a statistic was computed with changes FID by tenths, so each has a name:

  area     central square crop, then the exact area average (tf.image.resize with method 'area')   the default
  adm      halve with a box filter while twice too large, bicubic to the short side, central crop   Dhariwal & Nichol
  lanczos  central square crop, then one Lanczos resize                                             Karras et al.

`area` with an integer ratio k is the mean of k x k pixels. An image smaller than the target is enlarged by the same
function; `mscm.prepare` counts such images in its card.
"""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, UnidentifiedImageError

Pixels = UInt8[np.ndarray, "h w c"]
Square = UInt8[np.ndarray, "s s c"]

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow hands some of the others to other programs
MAX_SIDE = 2**13  # in pixels of what is made of an image
MAX_BYTES = 2**30  # of a file: the largest image that Pillow reads, 179 million pixels, is half of it uncompressed

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_BACKGROUND = 255  # behind transparent pixels, as a page shows them

# What makes an image upright, by its EXIF orientation. Pillow's exif_transpose also writes all other tags anew, which
# fails for cameras that fill one with another type.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_MAX_ASPECT = 100  # beyond it `adm`, which resizes before it crops, would make an image of gigabytes


class BrokenImage(ValueError):
    """A file that is no image, or not a whole one."""


def decode(data: bytes, *, channels: int) -> Pixels:
    """An image file as upright 8-bit RGB (`channels` = 3) or grey (1).

    Grey and palette images become RGB, CMYK is converted, 16 bits are scaled to 8, EXIF rotation is applied, alpha is
    blended with white. Of an animation, the first frame.

    Raises:
      BrokenImage: the sentence is the decoder's.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            image = _eight_bit(opened)
            orientation = image.getexif().get(_ORIENTATION)
            if orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[orientation])
            if image.has_transparency_data:
                image = image.convert("RGBA")
                page = Image.new("RGBA", image.size, (_BACKGROUND,) * 3 + (255,))
                image = Image.alpha_composite(page, image)
            pixels = np.asarray(image.convert(mode))
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except BrokenImage:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes
        raise BrokenImage(str(error).replace("\n", " ") or type(error).__name__) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes `I;16` and, from older files, `I`) as 8-bit grey: Pillow's own conversion clips it."""
    if not image.mode.startswith("I"):
        if image.mode == "F":
            raise BrokenImage("got floating-point pixels, whose range is not known, expected 8 or 16 bits")
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BrokenImage(f"got grey values from {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def area(pixels: Pixels, side: int) -> Square:
    """Central square crop, then the average over each target pixel's area, rounded half up; exact."""
    height, width, channels = pixels.shape
    source = min(height, width)
    pixels = _crop(pixels, source, height // 2 - source // 2, width // 2 - source // 2)
    rows = _area_sums(pixels.reshape(source, -1), side, peak=255).reshape(side, source, channels)
    columns = np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(source, -1)
    sums = _area_sums(columns, side, peak=255 * source).reshape(side, side, channels).swapaxes(0, 1)
    return ((2 * sums.astype(np.int64) + source**2) // (2 * source**2)).astype(np.uint8)


def adm(pixels: Pixels, side: int) -> Square:
    """Box-halved, bicubic to the short side, central crop: guided diffusion, arXiv:2105.05233."""
    image = _to_pil(pixels)
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise BrokenImage(f"got {image.width} x {image.height} pixels, expected sides within a factor {_MAX_ASPECT}")
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = _from_pil(image)
    return _crop(pixels, side, *((length - side) // 2 for length in pixels.shape[:2]))


def lanczos(pixels: Pixels, side: int) -> Square:
    """Central square crop, one Lanczos resize: the data set tool of EDM, arXiv:2206.00364."""
    source = min(pixels.shape[:2])
    image = _to_pil(_crop(pixels, source, *((length - source) // 2 for length in pixels.shape[:2])))
    return _from_pil(image.resize((side, side), Image.Resampling.LANCZOS))


TRANSFORMS: dict[str, Callable[[Pixels, int], Square]] = {"area": area, "adm": adm, "lanczos": lanczos}


def _crop(pixels: Pixels, side: int, top: int, left: int) -> Square:
    # Each paper's code rounds the place of the central crop in its own way.
    return pixels[top : top + side, left : left + side]


def _area_sums(values: Integer[np.ndarray, "source n"], target: int, *, peak: int) -> Integer[np.ndarray, "target n"]:
    """Sum of the values, none above `peak`, over each of `target` equal parts of the first axis, times `target`."""
    # In units of 1 / target all edges are whole numbers. Integers are exact, and use one thread: a product with a
    # matrix of shares would start the threads of a linear algebra library in every worker.
    source = len(values)
    dtype = np.uint32 if peak * source * target < 2**32 else np.uint64  # three times as slow
    before = np.zeros((source + 1, values.shape[1]), dtype)
    np.cumsum(values, axis=0, dtype=dtype, out=before[1:])
    whole, part = np.divmod(np.arange(target + 1) * source, target)
    edges = before[whole] * dtype(target)
    if part.any():
        edges += part.astype(dtype)[:, None] * values[np.minimum(whole, source - 1)].astype(dtype)
    return np.diff(edges, axis=0)


def _to_pil(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _from_pil(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)
