"""Event files read back: what a kill has made void is left out, and what is no event ends a file."""

import os
import struct
import time

import pytest

from mscm.report import events
from mscm.report.writer import Writer


def test_what_was_written_is_read(tmp_path):
    """Scalars in their order, and of each job when it was, what it has reported and on what it ran."""
    before = time.time()
    with Writer(tmp_path, first_step=1) as writer:
        writer.write_texts(0, {events.HARDWARE: "8 x TPU v5e"})
        writer.write_scalars(2, {"loss": 0.5, "loss_segment/1": 0.25})
        writer.write_scalars(4, {"loss": 0.125})
    with Writer(tmp_path, first_step=5) as writer:
        writer.write_scalars(6, {"loss": 0.0625})
    found = events.read(tmp_path)
    assert found.scalars == [(2, "loss", 0.5), (2, "loss_segment/1", 0.25), (4, "loss", 0.125), (6, "loss", 0.0625)]
    assert [session[2:] for session in found.sessions] == [(2, 4, "8 x TPU v5e"), (6, 6, None)]
    first, second = found.sessions
    assert before <= first.started <= first.ended <= second.started <= second.ended <= time.time()


def test_steps_that_were_done_again_count_once(tmp_path):
    """As TensorBoard has it: from the first step of a later job on, what came before is void."""
    for first_step, loss in ((1, 1.0), (3, 2.0)):
        with Writer(tmp_path, first_step=first_step) as writer:
            for step in range(first_step, 5):
                writer.write_scalars(step, {"loss": loss})
    assert events.read(tmp_path).scalars == [(1, "loss", 1.0), (2, "loss", 1.0), (3, "loss", 2.0), (4, "loss", 2.0)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-3],
        lambda data: data + b"\x05",
        lambda data: data + struct.pack("<Q", 2**63) + bytes(100),  # says that it is larger than any file
        lambda data: data + struct.pack("<Q", 8) + bytes(4) + b"\xff" * 12,  # no event
    ],
)
def test_a_file_is_read_as_far_as_it_can_be(tmp_path, spoil):
    with Writer(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 0.5})
        writer.write_scalars(2, {"loss": 0.25})
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(spoil(data))
    whole = [(1, "loss", 0.5), (2, "loss", 0.25)]
    assert events.read(tmp_path).scalars == (whole if len(spoil(data)) > len(data) else whole[:1])


def test_no_more_is_read_than_a_limit(tmp_path, monkeypatch):
    """The newest files; and a folder that is not there has none."""
    for step in (1, 2, 3):
        with Writer(tmp_path) as writer:
            writer.write_scalars(step, {"loss": 0.5})
    size = max(os.path.getsize(file) for file in tmp_path.iterdir())
    monkeypatch.setattr(events, "MAX_BYTES", 2 * size)
    assert [scalar.step for scalar in events.read(tmp_path).scalars] == [2, 3]
    assert events.read(tmp_path / "nowhere") == ([], [])
