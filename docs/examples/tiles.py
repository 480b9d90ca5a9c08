"""Tiles of 16 x 16 pixels of the two photographs inside scikit-learn, a class each: a data set of 2,080 images."""

import numpy as np
from jaxtyping import UInt8

from mscm.data.sources import SOURCES, ArraySource

SIDE = 16


def cut(photograph: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "n side side 3"]:
    """The tiles of a photograph, row by row; what is left at its right and lower edge is dropped."""
    rows, columns = photograph.shape[0] // SIDE, photograph.shape[1] // SIDE
    whole = photograph[: rows * SIDE, : columns * SIDE]
    return whole.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)


def open_tiles(split: str) -> ArraySource:
    """The data set; it has one split, `train`."""
    if split != "train":
        raise ValueError(f"unknown split of 'tiles': got {split!r}, expected train")
    from sklearn import datasets  # here, so that only who opens it needs scikit-learn

    photographs = [cut(image) for image in datasets.load_sample_images().images]
    labels = np.repeat(np.arange(len(photographs), dtype=np.int32), [len(tiles) for tiles in photographs])
    return ArraySource("tiles", split, np.concatenate(photographs), labels, ("china", "flower"))


SOURCES["tiles"] = open_tiles
