"""What a person sees who waits: one line at the end of a terminal, drawn again in place; log lines where nobody looks.

    with terminal.Progress("photos/train", 1000) as progress:
        for batch in batches:
            ...
            progress.add(len(batch))

    with terminal.Elapsed("Compiling"):
        ...

The line is written with spaces and carriage returns alone, so that there are no colours or codes to switch off. It is
cut to the width of the terminal, log lines and warnings come above it, and what it says last stays when the block ends,
also by an error or a signal. Several processes have one line: the others do not log progress either.
"""

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from absl import logging

_REDRAW_SECONDS = 0.2
_LOG_SECONDS = 10.0
_COLUMNS = 80  # of a terminal that does not say it

_Line = TypeVar("_Line", bound="Line")

_lines: list["Line"] = []  # that are drawn: the last one is seen


def duration(seconds: float) -> str:
    """`3h 05m`, `4m 10s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class Line:
    """A line that says `text()`, every moment anew, while its block runs and somebody looks."""

    def __init__(self, text: Callable[[], str]):
        """`text` is called by a thread of its own: it reads what the work has noted, and does not wait."""
        self._text, self._stop = text, threading.Event()
        self._screen: _Screen | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether it is in a terminal; else the work logs lines."""
        return self._screen is not None

    def __enter__(self: _Line) -> _Line:
        if _is_watched():
            self._screen = (_lines[-1]._screen if _lines else None) or _Screen(sys.stderr)
            _lines.append(self)
            self._thread = threading.Thread(target=self._draw, args=(self._screen,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._screen is None:
            return
        self._stop.set()
        self._thread.join()
        _lines.remove(self)
        self._screen.write_line(self._text())
        if not _lines:
            self._screen.close()
        self._screen = None

    def _draw(self, screen: "_Screen") -> None:
        while not self._stop.is_set():
            if _lines[-1:] == [self]:
                screen.draw(self._text())
            self._stop.wait(_REDRAW_SECONDS)


class Elapsed(Line):
    """Says what is being done, and for how long; the log says it once."""

    def __init__(self, what: str):
        self._what, self._since = what, time.monotonic()
        super().__init__(lambda: f"{what}, {duration(time.monotonic() - self._since)}")

    def __enter__(self) -> "Elapsed":
        super().__enter__()
        if not self.is_drawn:
            logging.info("%s", self._what)
        return self


class Progress(Line):
    """Says how far work is, how fast, and how long it will take; the log says it every ten seconds."""

    def __init__(self, what: str, total: int, unit: str = "images", *, done: int = 0):
        """`done` of `total` were done before: they do not count for the speed."""
        super().__init__(self._say)
        self._what, self._total, self._unit, self._done, self._before = what, total, unit, done, done
        self._since = self._logged = time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        self._log()

    def reach(self, done: int, before: int) -> None:
        """So many are done in all, `before` of them before this work began; the log says the end too."""
        self._done, self._before = done, before
        self._log(always=done >= self._total)

    def _log(self, *, always: bool = False) -> None:
        now = time.monotonic()
        if not self.is_drawn and (always or now - self._logged >= _LOG_SECONDS):
            self._logged = now
            logging.info("%s", self._say())

    def _say(self) -> str:
        seconds, done = time.monotonic() - self._since, self._done
        said = f"{self._what}: {done}/{self._total} {self._unit}"
        if done == self._before or seconds <= 0:
            return f"{said}, {duration(seconds)}"
        rate = (done - self._before) / seconds
        if done >= self._total and self.is_drawn:
            return f"{said}, {rate:.1f} {self._unit}/s, {duration(seconds)}"
        return f"{said}, {rate:.1f} {self._unit}/s, {duration((self._total - done) / rate)} left"


def _is_watched() -> bool:
    """Whether the errors and log of this process go to a terminal that can return to the start of its line."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    return is_terminal and logging.get_verbosity() >= logging.INFO


class _Screen:
    """A terminal with a line at its end; stands in for sys.stderr, and for the log's stream, until it is closed."""

    def __init__(self, stream: TextIO):
        self._stream, self._lock, self._width, self._at_start = stream, threading.RLock(), 0, True
        self._handler = logging.get_absl_handler().python_handler
        self._of_handler = self._handler.stream
        sys.stderr = self._handler.stream = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Text of others, above the line."""
        with self._lock:
            if text:
                self._clear()
                self._at_start = text.endswith("\n")
            count = self._stream.write(text)
            self._stream.flush()
            return count

    def draw(self, text: str) -> None:
        """The line in place of the one before; not into a line that somebody has not ended."""
        with self._lock:
            if not self._at_start:
                return
            text, width = _fitting(text, _columns(self._stream) - 1)
            self._stream.write(f"\r{text}{' ' * (self._width - width)}")
            self._stream.flush()
            self._width = width

    def write_line(self, text: str) -> None:
        """The line as it stays."""
        with self._lock:
            self.write("" if self._at_start else "\n")
            self.draw(text)
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def close(self) -> None:
        """Puts back what it stood in for."""
        if sys.stderr is self:
            sys.stderr = self._stream
        if self._handler.stream is self:
            self._handler.stream = self._of_handler

    def _clear(self) -> None:
        if self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._width = 0


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except OSError:  # it is gone
        return _COLUMNS


def _fitting(text: str, columns: int) -> tuple[str, int]:
    """What of a text fits into so many columns, without what would move the cursor; and its width."""
    kept, width = [], 0
    for character in text:
        wide = 2 if unicodedata.east_asian_width(character) in "WF" else 0 if unicodedata.combining(character) else 1
        if width + wide > columns:
            break
        kept.append(character if character.isprintable() else "?")
        width += wide
    return "".join(kept), width
