"""How long a training step takes, and what several optimiser steps in one dispatch save.

  python benchmarks/train_step.py --config=configs/digits_cd4.py

Prints one table: milliseconds per optimiser step for each number of steps per dispatch, and the ratio to one step per
dispatch measured in the same process, turn by turn, because a shared machine's speed drifts.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from mscm.config import load_config
from mscm.experiment import Experiment, build
from mscm.planning import random_inputs
from mscm.report.table import format_table

CONFIG = flags.DEFINE_string("config", "configs/digits_cd4.py", "Config file.")
STEPS_PER_DISPATCH = flags.DEFINE_multi_integer("steps_per_dispatch", [1, 5, 10], "Numbers to compare; the first is 1.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each; the table shows the median.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Optimiser steps of one measurement.", lower_bound=1)


class Runner:
    """One compiled number of steps per dispatch, with its own state."""

    def __init__(self, experiment: Experiment, steps_per_dispatch: int):
        self.steps_per_dispatch = steps_per_dispatch
        train = dataclasses.replace(experiment.train, steps_per_dispatch=steps_per_dispatch)
        self._state, *self._others = random_inputs(dataclasses.replace(experiment, train=train))
        self._run = experiment.train_steps()
        self.seconds_per_step(steps_per_dispatch)  # compiles

    def seconds_per_step(self, steps: int) -> float:
        """Wall-clock time of one optimiser step, over about `steps` of them."""
        dispatches = max(1, steps // self.steps_per_dispatch)
        started = time.perf_counter()
        for _ in range(dispatches):
            self._state, _ = self._run(self._state, *self._others)
        jax.block_until_ready(self._state.params)
        return (time.perf_counter() - started) / (dispatches * self.steps_per_dispatch)


def main(_: list[str]) -> None:
    """Measures in turns, prints the table."""
    experiment = build(load_config(CONFIG.value))
    runners = [Runner(experiment, k) for k in STEPS_PER_DISPATCH.value]
    seconds = np.array([[runner.seconds_per_step(STEPS.value) for runner in runners] for _ in range(ROUNDS.value)])
    rows = []
    for i, runner in enumerate(runners):
        ratio = statistics.median(seconds[:, 0] / seconds[:, i])
        rows.append([runner.steps_per_dispatch, f"{1e3 * statistics.median(seconds[:, i]):.1f}", f"{ratio:.2f}"])
    device = jax.devices()[0]
    print(f"{experiment.name}, batch {experiment.train.batch_size}, {device.device_kind}")
    print(format_table(["steps per dispatch", "ms per step", "speed relative to the first"], rows))


if __name__ == "__main__":
    app.run(main)
