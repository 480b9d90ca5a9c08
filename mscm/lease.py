"""One holder at a time of a directory: a file says who, and one that has died is found out and replaced.

    with lease.holding("DIR/eval/owner.json", "evaluation") as held:
        ...
        held.check()  # before something is written: is it still ours?

The file names host, process and command, and a thread renews it every `RENEW_SECONDS`. Nothing else is asked of the
file system than that a file is replaced whole: disks that machines share and buckets have no locks to rely on. Whether
the holder lives is known at once where it runs here; elsewhere its file is watched, and one that is not renewed for
`STALE_SECONDS` is dead. Clocks are not compared. A holder that slept for longer than that finds another in its place,
and `check` says so.
"""

import contextlib
import json
import os
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from mscm import atomic, processes

RENEW_SECONDS = 10.0
STALE_SECONDS = 90.0  # several renewals: a file system may stall
# Who writes waits so long before it looks whether it was the last who did: longer than another needs from looking to
# writing. Where it was not enough, the first finds the second in its place.
_SETTLE_SECONDS = 0.5


class LeaseError(ValueError):
    """Another holds what was asked for; the message names it."""


class Lease:
    """What `holding` gives."""

    def __init__(self, path: epath.Path, what: str):
        self._path, self._what = path, what
        self._record = _this_process() | {"token": uuid.uuid4().hex, "renewals": 0}
        self._lost_to: dict[str, Any] | None = None
        self._stop = threading.Event()

    def check(self) -> None:
        """Raises LeaseError if another has taken over, because this process was not heard of for too long."""
        try:
            self._look()  # after a sleep of the whole machine the renewals have not noticed it yet
        except Exception as error:  # each storage has its own; what is written next says more
            logging.warning("%s: could not read it: %s", self._path, error)
        if self._lost_to is not None:
            raise LeaseError(
                f"{self._path}: this process was not heard of for {STALE_SECONDS:.0f} s, and {_name(self._lost_to)} "
                f"has taken over its {self._what}; run it again where that one is to end"
            )

    def _take(self) -> bool:
        """Writes the file; whether it is ours then."""
        self._write()
        _pause(_SETTLE_SECONDS)
        return self._is_ours(_read(self._path))

    def _is_ours(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder["token"] == self._record["token"]

    def _write(self) -> None:
        atomic.write_text(self._path, json.dumps(self._record, indent=1))

    def _renew(self) -> None:
        """The next sign of life, unless another has taken over."""
        self._look()
        if self._lost_to is None:
            self._record["renewals"] += 1
            self._write()

    def _look(self) -> None:
        """Notes where another has taken over."""
        holder = _read(self._path)
        if holder is not None and not self._is_ours(holder):
            self._lost_to = holder

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS) and self._lost_to is None:
            try:
                self._renew()
            except Exception as error:  # each storage has its own; it may be back at the next renewal
                logging.warning("%s: could not renew it: %s", self._path, error)

    def _give_back(self) -> None:
        if self._is_ours(_read(self._path)):
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(path: str | os.PathLike, what: str, *, wait: bool = False) -> Iterator[Lease]:
    """Holds `path`, a file of this module's, for `what` (a word for the sentences).

    Args:
      wait: wait until the holder has ended, instead of refusing.

    Raises:
      LeaseError: another process holds it.
    """
    path = epath.Path(path)
    lease = Lease(path, what)
    seen, since, said = None, _now(), False
    while True:
        holder = _read(path)
        renewed = holder is not None and seen is not None and holder != seen and holder["token"] == seen["token"]
        if holder != seen:
            seen, since = holder, _now()
        if holder is None or _is_dead(holder, silent_for=_now() - since):
            if holder is not None:
                logging.warning("%s: taking over from %s, which has died", path, _name(holder))
            if lease._take():
                break
            continue  # another was faster
        if not wait and (renewed or _is_here(holder)):
            raise LeaseError(
                f"{path}: {_name(holder)} is at work on this {what}, expected one at a time; wait for its end, or "
                "end it"
            )
        if not said:
            what_for = "the end" if wait else "a sign of life"
            logging.info("%s: waiting for %s of %s", path, what_for, _name(holder))
            said = True
        _pause(RENEW_SECONDS / 4)
    thread = threading.Thread(target=lease._keep, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease._stop.set()
        thread.join()
        lease._give_back()


_now = time.monotonic


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def _this_process() -> dict[str, Any]:
    return {
        "place": processes.place(),
        "pid": os.getpid(),
        "process_start": processes.start_of(os.getpid()),
        "command": " ".join(shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]]).split()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _is_here(holder: dict[str, Any]) -> bool:
    return holder["place"] == processes.place()


def _is_dead(holder: dict[str, Any], *, silent_for: float) -> bool:
    if not _is_here(holder):
        return silent_for >= STALE_SECONDS
    return not processes.is_alive(holder["pid"], holder["process_start"])


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['place'][0]} ({holder['command']}, since {holder['since']})"


def _read(path: epath.Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
        return holder if {"place", "pid", "process_start", "command", "since", "token"} <= holder.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):  # none, or damaged: nobody
        return None
