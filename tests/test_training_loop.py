"""The loop's own measurement: waiting for data is what the device could not work through."""

import time

import numpy as np
import pytest
from clu.metrics import Average

from mscm.config import load_config
from mscm.experiment import build
from mscm.report.writer import Writer
from mscm.training_loop import Progress

SECONDS = 0.05


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


def _slow_items():
    for i in range(4):
        time.sleep(SECONDS)
        yield i


@pytest.mark.parametrize("is_busy", [True, False])
def test_waiting_is_counted_where_the_device_has_nothing_to_do(is_busy):
    """Of four slow items the first finds the device without work, the others only where the last step is done."""
    writer = _Scalars()
    progress = Progress(build(load_config("configs/digits_teacher.py")), 0, writer)
    started = time.monotonic()
    for _ in progress.waiting_for(_slow_items()):
        total = np.asarray(float(is_busy)).view(_Result)
        progress.add({"loss": Average(total=total, count=np.ones(()).view(_Result))})
    elapsed = time.monotonic() - started
    progress.report(4)
    waited = writer.scalars["data_wait_fraction"] * elapsed
    assert SECONDS <= waited < 2 * SECONDS if is_busy else waited > 4 * SECONDS * 0.99
