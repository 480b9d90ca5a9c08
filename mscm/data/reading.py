"""Reads that a network file system refuses for a moment are tried again."""

import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from mscm import failures

_T = TypeVar("_T")

_PAUSES = (1.0, 5.0, 25.0)  # seconds: a server that restarts is back within half a minute


def patiently(read: Callable[[], _T], path: str) -> _T:
    """What `read` gives, asked again after each of some pauses where the system says an error that may pass.

    Raises:
      OSError: another error, or the last one; it names `path`.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            try:
                return read()
            except Exception as error:  # named here alone: a context manager costs a tenth of the reading of a record
                with failures.naming(path):
                    raise error
        except OSError as error:
            pause = next(pauses, None)
            if error.errno not in failures.TRANSIENT or pause is None:
                raise
            logging.warning("%s: could not be read (%s); trying it again in %g s", path, error.strerror, pause)
        time.sleep(pause)
