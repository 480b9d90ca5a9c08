"""Which process this is, and whether another one on this machine lives; children and parents that die; waiting."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LOOK_SECONDS = 1.0


class Died(RuntimeError):
    """A process of this one's was killed; the message says which, and what to do."""


def in_thread(call: Callable[..., Any], *words: Any) -> concurrent.futures.Future:
    """What `call` will give or raise: a wait that does not keep this process from looking around, or from ending."""
    answer: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(call(*words))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def end_with_parent() -> None:
    """Ends this process, which multiprocessing has started, when its parent has ended: it would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _end_after(parent.join)


def end_with(parent: int) -> None:
    """Ends this process when its parent, whose number is given, has ended: nobody would read its answer."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)

    _end_after(wait)


def _end_after(wait: Callable[[], None]) -> None:
    def end() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def place() -> list[str]:
    """Where a process number means something: host, its boot, and the container's numbering; all that are known."""
    boot, numbering = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        return [platform.node(), boot.read_text().strip(), os.readlink(numbering)]
    return [platform.node()]


def start_of(pid: int) -> str:
    """When a process started, in ticks: its number may be used again. Empty where it has ended or nobody says it."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def is_alive(pid: int, start: str) -> bool:
    """Whether the process of this place that had the number `pid` and started at `start` lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return start_of(pid) == start
