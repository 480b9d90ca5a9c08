"""Event files."""

import time

import numpy as np

from benchmarks.kill_test import scalars
from mscm.report.writer import Writer


def test_scalars_and_images_are_in_the_event_file(tmp_path):
    """What was written is there after the exit, under its name."""
    with Writer(tmp_path) as writer:
        writer.write_scalars(3, {"loss": 0.5, "loss_segment/1": np.float32(0.25)})
        writer.write_images(3, {"samples": np.zeros((8, 8, 3), np.uint8)})
    (events,) = tmp_path.glob("events.*")
    content = events.read_bytes()
    assert all(name in content for name in (b"\x04loss", b"loss_segment/1", b"samples"))
    values = (np.float32(number).tobytes() for number in (0.5, 0.25))
    assert all(value in content for value in values)


def test_names_are_those_that_tensorboard_takes(tmp_path, caplog):
    """Without a line of tensorboardX for each."""
    with caplog.at_level("INFO"), Writer(tmp_path) as writer:
        writer.write_scalars(3, {"fid/digits_teacher, guidance 1_ddim:eta=0.5": 0.5})
    assert scalars(tmp_path) == [(3, "fid/digits_teacher__guidance_1_ddim_eta_0.5", 0.5)] and not caplog.records


def test_close_writes_what_is_left(tmp_path):
    """For those who hold a writer without a block; twice is as good as once."""
    writer = Writer(tmp_path)
    writer.write_scalars(1, {"fid": 0.125})
    writer.close()
    writer.close()
    (events,) = tmp_path.glob("events.*")
    assert b"fid" in events.read_bytes() and np.float32(0.125).tobytes() in events.read_bytes()


def test_flush_leaves_nothing_behind(tmp_path):
    """Who is killed after it has lost nothing: all is in the file, in order."""
    writer = Writer(tmp_path)
    for step in range(50):
        writer.write_scalars(step, {"loss": step / 64})
    writer.flush()
    (events,) = tmp_path.glob("events.*")
    content = events.read_bytes()
    places = [content.find(np.float32(step / 64).tobytes()) for step in range(1, 50)]
    assert places[0] > 0 and places == sorted(places)
    writer.close()
    assert events.read_bytes() == content


def test_one_of_several_processes_writes(tmp_path):
    with Writer(tmp_path, active=False, first_step=3) as writer:
        writer.write_scalars(3, {"loss": 0.5})
        writer.flush()
    assert not list(tmp_path.iterdir())


def test_writers_of_one_second_have_a_file_each(tmp_path, monkeypatch):
    """A job that is done within a second leaves its events to the next, in the order of the files' names."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for step in range(3):
        with Writer(tmp_path) as writer:
            writer.write_scalars(step, {"loss": 2.0**step})
    assert scalars(tmp_path) == [(0, "loss", 1.0), (1, "loss", 2.0), (2, "loss", 4.0)]
