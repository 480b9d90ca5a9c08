"""One pass over images, which continues where it was when it is killed.

    gathering = Gathering(len(images), num_kept=10_000, partial=Partial("DIR/partial.npz", key))
    over(batches_from(gathering.count), network, gathering)  # in order, of any sizes
    gathering.statistics()
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from mscm.metrics import files
from mscm.metrics.features import Outputs
from mscm.metrics.statistics import Accumulator, Statistics

_KIND = "mscm pass under way 1"
_SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Partial:
    """The file of a pass under way."""

    path: str | os.PathLike
    key: Any  # as JSON, of what it is a pass: a file of another one is not continued
    save_every_seconds: float = 60.0
    writes: bool = True  # one of several processes does
    before_write: Callable[[], None] = lambda: None


class Gathering:
    """Statistics of all images, and the first of them."""

    def __init__(
        self,
        num_images: int,
        *,
        num_kept: int,
        num_samples: int = 0,
        partial: Partial | None = None,
        goes_on: bool = True,
    ):
        """Goes on from the file of `partial`, where it is one of the same pass and `goes_on` does not say otherwise."""
        self._num_samples, self._partial, self._saved = num_samples, partial, time.monotonic()
        self._accumulator = Accumulator(num_images, num_kept=num_kept)
        self._samples: UInt8[np.ndarray, "n h w c"] | None = None
        if partial is not None and goes_on:
            self._restore(partial)

    @property
    def count(self) -> int:
        """Images that are done."""
        return self._accumulator.count

    @property
    def samples(self) -> UInt8[np.ndarray, "n h w c"]:
        """The first images.

        Raises:
          ValueError: there is none yet.
        """
        if self._samples is None:
            raise ValueError("got no image, expected at least one before there are samples")
        return self._samples

    def statistics(self) -> Statistics:
        """Of all images, when they are done."""
        return self._accumulator.statistics()

    def add(self, outputs: Outputs, images: UInt8[np.ndarray, "n h w c"]) -> None:
        """The next images, and what the network says of them; writes the file when it is time."""
        more = images[: max(self._num_samples - self.count, 0)]
        self._samples = more if self._samples is None else np.concatenate([self._samples, more])
        self._accumulator.add(outputs)
        if self._partial is not None and time.monotonic() - self._saved >= self._partial.save_every_seconds:
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        """Writes the file, if this is the process that does and there has been an image."""
        partial = self._partial
        if partial is not None and partial.writes and self.count:
            partial.before_write()
            arrays = self._accumulator.to_arrays() | {_SAMPLES: self.samples}
            files.save(partial.path, arrays, {"kind": _KIND, "key": partial.key})

    def remove_file(self) -> None:
        """When what the pass was for has been written."""
        if self._partial is not None and self._partial.writes:
            epath.Path(self._partial.path).unlink(missing_ok=True)

    def _restore(self, partial: Partial) -> None:
        try:
            arrays, card = files.load(partial.path)
        except FileNotFoundError:
            return
        except ValueError as error:
            logging.warning("Starting the pass again: %s", error)
            return
        if (card.get("kind"), card.get("key")) == (_KIND, partial.key):
            self._accumulator, self._samples = Accumulator.from_arrays(arrays), arrays[_SAMPLES]


def over(
    batches: Iterable[UInt8[np.ndarray, "n h w c"]],
    network: Callable[[np.ndarray], Outputs],
    gathering: Gathering | None,
    *,
    watch: Callable[[int], None] = lambda num_images: None,
) -> None:
    """Shows all batches to the network and gathers what it says; None: only takes part, another process gathers.

    `watch` is told the number of images of each batch when it is done.
    """
    for images in batches:
        outputs = network(images)
        if gathering is not None:
            gathering.add(outputs, images)
            watch(len(images))
