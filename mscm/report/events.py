"""Reads event files as TensorBoard does.

    for scalar in events.read("DIR").scalars:
        print(scalar.step, scalar.name, scalar.value)

The files may be of any origin: one that is cut, or not what it seems, is read as far as it can be.
"""

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mscm import remote

HARDWARE = "hardware"  # name of the text that says on what a session ran
MAX_BYTES = 2**28  # of all files of a folder: the newest are read


class Scalar(NamedTuple):
    """A number at a step."""

    step: int
    name: str
    value: float


class Session(NamedTuple):
    """What one job has written: a file."""

    started: float  # seconds since 1970, of the first and the last event
    ended: float
    first_step: int | None  # of its scalars; None: there are none
    last_step: int | None
    hardware: str | None


class Events(NamedTuple):
    """What the event files of a folder say; sessions in the order of time."""

    scalars: list[Scalar]
    sessions: list[Session]


def read(folder: str | os.PathLike) -> Events:
    """The events of a folder, none where it is not there.

    What a session wrote before it was killed, for steps that a later one has done again, is left out of the scalars.
    """
    place = epath.Path(folder)
    files = sorted(place.glob("events.*")) if place.is_dir() else []
    left, newest = MAX_BYTES, []
    for file in reversed(files):
        size = remote.size(file)
        if size <= left:
            newest.append(file)
        left -= size
    scalars: list[Scalar] = []
    sessions = []
    for file in reversed(newest):
        times, steps, hardware = [], [], None
        for event in _events(file.read_bytes()):
            times.append(event.wall_time)
            if event.session_log.status == SessionLog.START:
                scalars = [scalar for scalar in scalars if scalar.step < event.step]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind == "simple_value":
                    scalars.append(Scalar(event.step, value.tag, value.simple_value))
                    steps.append(event.step)
                elif kind == "tensor" and value.tag.partition("/")[0] == HARDWARE:
                    hardware = b"".join(value.tensor.string_val).decode(errors="replace")
        if times:
            sessions.append(
                Session(times[0], max(times), min(steps, default=None), max(steps, default=None), hardware)
            )
    return Events(scalars, sorted(sessions, key=lambda session: session.started))


def _events(data: bytes) -> Iterator[Event]:
    """Those of a file, up to where a kill has cut it."""
    start = 0
    while len(data) - start > 12:
        size = struct.unpack_from("<Q", data, start)[0]  # then 4 bytes of checksum, the event, 4 bytes of checksum
        if len(data) - start < size + 16:
            return
        try:
            yield Event.FromString(data[start + 12 : start + 12 + size])
        except DecodeError:
            return
        start += size + 16
