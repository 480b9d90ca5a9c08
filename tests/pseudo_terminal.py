"""Runs a command in a terminal of its own, and tells what stands on the screen when it has ended."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Seen(NamedTuple):
    """What a terminal has got from a command."""

    code: int
    data: bytes

    @property
    def screen(self) -> list[str]:
        """Its lines, as wide as they are: what a carriage return lets be written over is gone."""
        lines = []
        for text in self.data.decode(errors="replace").split("\n"):
            cells: list[str] = []
            for part in text.split("\r"):
                cells[: len(part)] = part
            lines.append("".join(cells).rstrip())
        return lines

    @property
    def drawn(self) -> list[str]:
        """Everything that was written from the start of a line."""
        return [part.rstrip() for line in self.data.decode(errors="replace").split("\n") for part in line.split("\r")]


def run(
    words: Sequence[str],
    *,
    columns: int = 100,
    interrupt: Callable[[bytes], bool] | None = None,
    timeout: float = 300.0,
    **env: str,
) -> Seen:
    """Runs `words`; Ctrl-C is sent once `interrupt` says yes of what was written so far."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | env
    # Where a shell has started the tests in its background, they and what they start ignore Ctrl-C.
    words = ["env", "--default-signal=INT", *words]
    process = subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT, start_new_session=True
    )
    os.close(slave)
    data, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    piece = os.read(master, 2**16)
                except OSError:  # nobody writes any more
                    break
                data += piece
            elif process.poll() is not None:
                break
            if interrupt is not None and interrupt(data):
                process.send_signal(signal.SIGINT)
                interrupt = None
        return Seen(process.wait(timeout=max(1.0, deadline - time.monotonic())), data)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        os.close(master)
