"""The loop's own measurement: waiting for data is what the device could not work through."""

import types

import numpy as np
import pytest
from clu.metrics import Average

from mscm import training_loop
from mscm.config import load_config
from mscm.experiment import build
from mscm.report.writer import Writer
from mscm.training_loop import Progress


class _Result(np.ndarray):
    """An array of a step, as far as the loop looks at it."""

    def is_ready(self) -> bool:
        return bool(self == 0)


class _Scalars(Writer):
    """Keeps what is written."""

    def __init__(self):
        self.scalars = {}

    def write_scalars(self, step, scalars):
        self.scalars |= scalars


@pytest.mark.parametrize("is_busy", [True, False])
def test_waiting_is_counted_where_the_device_has_nothing_to_do(is_busy, monkeypatch):
    """Of four slow items the first finds the device without work, the others only where the last step is done."""
    clock = [100.0]

    def items():
        for i in range(4):
            clock[0] += 1.0
            yield i

    monkeypatch.setattr(training_loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    writer = _Scalars()
    progress = Progress(build(load_config("configs/digits_teacher.py")), 0, writer)
    for _ in progress.waiting_for(items()):
        clock[0] += 1.5  # the loop's own time is nobody's waiting
        total = np.asarray(float(is_busy)).view(_Result)
        progress.add({"loss": Average(total=total, count=np.ones(()).view(_Result))})
    progress.report(4)
    assert writer.scalars["data_wait_fraction"] == (0.1 if is_busy else 0.4)
    assert writer.scalars["steps_per_second"] == 0.4
