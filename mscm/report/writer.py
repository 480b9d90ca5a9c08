"""Event files for TensorBoard, with the method names of clu's metric writers (which import TensorFlow)."""

import os
from collections.abc import Mapping

import numpy as np
import tensorboardX

_FLUSH_SECONDS = 10


class Writer:
    """Writes scalars and images of a run below `logdir`; a context manager.

    Written in the background: a reader sees them within `_FLUSH_SECONDS`, and all of them after the exit.
    """

    def __init__(self, logdir: str | os.PathLike, *, active: bool = True):
        """`active` False writes nothing: one of several processes does."""
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(logdir), flush_secs=_FLUSH_SECONDS, write_to_disk=active
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def flush(self) -> None:
        """Writes what there is."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars by name at `step`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images `h w c`, uint8, by name at `step`."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")
