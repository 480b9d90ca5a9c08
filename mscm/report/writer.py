"""Event files for TensorBoard, with the method names of clu's metric writers (which import TensorFlow)."""

import os
import re
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check

from mscm import failures

_FLUSH_SECONDS = 10.0


class Writer:
    """Writes scalars and images of a run below `logdir`; a context manager.

    A reader sees them after `flush` or the exit, and otherwise with the first that come `_FLUSH_SECONDS` later.
    """

    # Not tensorboardX's SummaryWriter: its `flush` leaves behind what is still on the way to its thread, and where that
    # has met a full disk the next write waits for it for ever.

    def __init__(self, logdir: str | os.PathLike, *, active: bool = True, first_step: int | None = None):
        """`active` False writes nothing: one of several processes does.

        `first_step`: what was written for this and later steps by a run that was killed is void.

        Raises:
          OSError: it cannot write there; so do all methods.
        """
        self._logdir, self._events, self._flushed = os.fspath(logdir), None, time.monotonic()
        if active:
            with failures.naming(self._logdir):
                directory_check(self._logdir)
                # With its own end: a name of the second and the host alone is that of another job of the same second,
                # whose file would be emptied. Readers take files in the order of their names.
                self._events = EventsWriter(os.path.join(self._logdir, "events"), f".{time.time_ns()}")
        if first_step is not None:
            self._write(first_step, session_log=SessionLog(status=SessionLog.START))

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
        for name, value in scalars.items():
            # As tensorboardX does, which would log a line for each.
            name = re.sub(r"[^-/\w.]", "_", name).lstrip("/")
            self._write(step, summary=summary.scalar(name, float(value)))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts by name at `step`."""
        for name, text in texts.items():
            self._write(step, summary=summary.text(name, text))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images `h w c`, uint8, by name at `step`."""
        for name, image in images.items():
            self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def _write(self, step: int, **content: object) -> None:
        if self._events is None:
            return
        with failures.naming(self._logdir):
            self._events.write_event(Event(step=step, wall_time=time.time(), **content))
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()
