"""Event files for TensorBoard, with the method names of clu's metric writers (which import TensorFlow)."""

import os
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import directory_check

from mscm import failures

_FLUSH_SECONDS = 10.0


class Writer:
    """Writes scalars and images of a run below `logdir`; a context manager.

    A reader sees them at the next write after `_FLUSH_SECONDS`, and all of them after the exit.
    """

    # Not tensorboardX's SummaryWriter: where the thread that it writes in has met a full disk, the next write waits
    # for it for ever.

    def __init__(self, logdir: str | os.PathLike, *, active: bool = True):
        """`active` False writes nothing: one of several processes does.

        Raises:
          OSError: it cannot write there; so do all methods.
        """
        self._logdir, self._events, self._flushed = os.fspath(logdir), None, time.monotonic()
        if active:
            with failures.naming(self._logdir):
                directory_check(self._logdir)
                self._events = EventsWriter(os.path.join(self._logdir, "events"))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def flush(self) -> None:
        """Writes what there is."""
        if self._events is not None:
            with failures.naming(self._logdir):
                self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        events, self._events = self._events, None
        if events is not None:
            with failures.naming(self._logdir):
                events.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars by name at `step`."""
        self._write(step, [summary.scalar(name, float(value)) for name, value in scalars.items()])

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images `h w c`, uint8, by name at `step`."""
        self._write(step, [summary.image(name, image, dataformats="HWC") for name, image in images.items()])

    def _write(self, step: int, values: list) -> None:
        if self._events is None:
            return
        with failures.naming(self._logdir):
            for value in values:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=value))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()
