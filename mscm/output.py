"""Standard output and error that may not last: the reader of a pipe has seen enough, a terminal ends, a disk is full.

    with output.lasting() as printed:
        ...  # the work, which prints
        if printed.error is not None:
            ...  # say so

What cannot be printed is lost, and all after it: as an error it would end the work, which is worth more.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

# The reader of a pipe has closed it; a terminal is gone.
_NOBODY_READS = (errno.EPIPE, errno.EIO)


class Stream:
    """Stands in for a stream, and writes to nowhere once that has failed."""

    def __init__(self, stream: Any):  # TextIO, or what tests and notebooks have in its place
        self._stream = stream
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As that of a file."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """As that of a file."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    @property
    def error(self) -> OSError | None:
        """Why something is lost that somebody waits for."""
        self.flush()
        return self._error if self._error is not None and self._error.errno not in _NOBODY_READS else None

    def _give_up(self, error: OSError) -> None:
        self._error = error
        # Below the stream, which keeps what it could not write and tries again, also when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def lasting() -> Iterator[Stream]:
    """Within it no print fails; gives standard output."""
    before = sys.stdout, sys.stderr
    # A process may be started without them; who opens a file next would get their numbers.
    out, err = (Stream(stream or open(os.devnull, "w")) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
