"""A signal that asks a training to end: it saves first, and all its processes end at the same step.

    stopping.listen()
    with stopping.deferred():
        ...
        if stopping.reached():  # after every dispatch, in all processes
            ...  # save

Outside of `deferred` there is nothing to save, and the signal ends the process where it is, and with it the others, if
there are several. Of these, SIGTERM ends all where they next call `end_if_asked`, because JAX takes it.
"""

import contextlib
import itertools
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# As sysexits.h has it: a failure that passes. What starts trainings again does not count it as one.
EX_TEMPFAIL = 75
_INTERRUPTED = 128 + signal.SIGINT  # as a shell says it: the operator meant it

_asked: int | None = None  # the first signal
_is_deferred = False
_calls = itertools.count()


class Stopped(BaseException):  # not Exception, which libraries catch
    """A signal ended this process; `status` is its exit status, and the message says how to go on.

    `alone`: not all of several processes raise it, and the others have to be told.
    """

    def __init__(self, sentence: str, *, alone: bool = False):
        super().__init__(f"{sentence}; run the same command again to continue")
        self.alone = alone
        self.status = _INTERRUPTED if _asked == signal.SIGINT else EX_TEMPFAIL


def listen() -> None:
    """From now on SIGTERM, SIGHUP and the first SIGINT are what this module says; a second SIGINT ends it at once."""
    signal.signal(signal.SIGINT, _on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _on_signal)
    if jax.process_count() == 1:  # of several, each listens in JAX, which tells the others
        signal.signal(signal.SIGTERM, _on_signal)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal is noted, which `reached` tells.

    Raises:
      Stopped: at the end, where one came too late for `reached`.
    """
    global _is_deferred
    _is_deferred = True
    try:
        yield
    finally:
        _is_deferred = False
    if _asked is not None:
        raise Stopped("stopped by a signal", alone=True)


def reached() -> bool:
    """Whether all processes stop here; they call it in the same order."""
    if jax.process_count() > 1:  # nobody else may ask JAX, whose numbers would not be these (`checkpoint._Manager`)
        return multihost_utils.reached_preemption_sync_point(next(_calls))
    return _asked is not None


def end_if_asked() -> None:
    """Ends all of several processes where one was asked to; they call it in the same order, outside of `deferred`.

    Raises:
      Stopped: then.
    """
    if jax.process_count() > 1 and reached():
        raise Stopped("stopped by a signal")


def _on_signal(number: int, frame: object) -> None:
    del frame
    global _asked
    _asked = _asked or number
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if number != signal.SIGTERM and jax.process_count() > 1 and _is_deferred:
        signal.raise_signal(signal.SIGTERM)
    if not _is_deferred:
        raise Stopped("stopped by a signal", alone=True)
