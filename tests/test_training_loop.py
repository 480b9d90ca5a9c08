"""The loop's own measurement: waiting for data is what the device could not work through."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from clu.metrics import Average

from mscm import planning, training_loop
from mscm.config import load_config
from mscm.cost import chips
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
    assert "model_flops_utilisation" not in writer.scalars  # nobody knows the peak of a CPU


def test_utilisation_is_the_part_of_the_peak_that_the_mathematics_takes(monkeypatch):
    """Of all chips: operations of a step, times steps per second, by the operations per second of the chips."""
    known = dataclasses.replace(chips.CHIPS[1], kinds=(jax.devices()[0].device_kind,), flops=1e9)
    monkeypatch.setattr(chips, "CHIPS", (known,))
    experiment, writer = build(load_config("configs/digits_teacher.py")), _Scalars()
    progress = Progress(experiment, 0, writer)
    progress.add({"loss": Average(total=np.ones(()).view(_Result), count=np.ones(()).view(_Result))})
    progress.report(4)
    flops = planning.model_flops(experiment)[1] * writer.scalars["steps_per_second"]
    assert writer.scalars["model_flops_utilisation"] == pytest.approx(flops / 1e9)
