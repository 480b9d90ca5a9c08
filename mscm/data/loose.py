"""Images of any origin, to be scored: files in a folder, zip or tar, without classes, or an array in an .npz.

    images = open_images("samples.npz", resolution=64, channels=3)
    for batch in images.batches(256):  # uint8 "b 64 64 3"
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8

from mscm.arrays import names_in_npz, read_npz
from mscm.data import folders, images

_ARRAYS = ("images", "arr_0")  # what mscm.sample writes, and what np.savez calls an array without a name


@dataclasses.dataclass(frozen=True)
class LooseImages:
    """A number of images, in the order of their names or of the array."""

    count: int
    load: Callable[[range], UInt8[np.ndarray, "b h w c"]]

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """All images; the last batch may be smaller.

        Raises:
          BrokenImage: a file is no image, or of another size; names it.
          OSError: it cannot be read, or not any more.
        """
        for start in range(0, self.count, batch_size):
            yield self.load(range(start, min(start + batch_size, self.count)))


def open_images(path: str | os.PathLike, *, resolution: int, channels: int) -> LooseImages:
    """The images at `path`, which are not resized: a score depends on how that is done.

    Raises:
      ValueError: there are none, or those of an array are not uint8 of this size.
    """
    path = os.fspath(path)
    if path.endswith(".npz"):
        array = _array(path)
        expected = (resolution, resolution, channels)
        if array.dtype != np.uint8 or array.shape[1:] != expected or not len(array):
            raise ValueError(
                f"{path}: got {array.dtype} images of shape {array.shape}, expected uint8 of shape "
                f"(n, {', '.join(map(str, expected))}) as the reference has"
            )
        return LooseImages(len(array), lambda indices: array[indices.start : indices.stop])
    files = folders.open_unlabelled(path)

    def load(index: int) -> UInt8[np.ndarray, "h w c"]:
        name = files.entries[index].name
        try:
            pixels = images.decode(files.read(index), channels=channels)
        except (images.BrokenImage, zlib.error) as error:
            raise images.BrokenImage(f"{path}: got a broken image, {name} ({error}); repair or remove it") from error
        height, width, _ = pixels.shape
        if (height, width) != (resolution, resolution):
            raise images.BrokenImage(
                f"{path}: got {name} of {width} x {height} pixels, expected {resolution} x {resolution} as the "
                "reference has; resize the images as those of the reference were"
            )
        return pixels

    return LooseImages(len(files.entries), lambda indices: np.stack([load(i) for i in indices]))


def _array(path: str) -> np.ndarray:
    try:
        found = read_npz(path, _ARRAYS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: got a file that cannot be read ({error}), expected an .npz of images") from error
    for name in _ARRAYS:
        if name in found:
            return found[name]
    there = sorted(names_in_npz(path))
    raise ValueError(f"{path}: got arrays called {', '.join(there) or 'nothing'}, expected {' or '.join(_ARRAYS)}")
