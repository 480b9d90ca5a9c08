"""What share of a training's time its checkpoints cost.

  python -m benchmarks.save_cost --config=configs/digits_teacher.py
  python -m benchmarks.save_cost --config=configs/digits_cd4.py --every=500 --rounds=10

Steps and saves in turn, in one process, because a shared machine's speed drifts; the table shows medians. A save holds
the steps up while the state is copied (blocked), and goes on beside them until its files and their checksums are
written. The shares are of a training that saves every `--every` steps: the time for which its steps are held up, and
the processor time of its saves, which is what they cost where the steps leave no core idle, as on a CPU.
"""

import functools
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from mscm.checkpoint import Checkpoints
from mscm.experiment import build
from mscm.planning import random_inputs
from mscm.report.table import format_table

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits_teacher.py", "Config file.")
EVERY = flags.DEFINE_integer("every", 500, "Steps between two saves.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements; the table shows medians.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "Optimiser steps of one measurement.", lower_bound=1)

HEADER = ("ms per step", "blocked (ms)", "until written (ms)", "share of time, blocked", "share of processor time")


def cost(function: Callable[[], None]) -> np.ndarray:
    """Seconds that a call takes, and seconds of all processors in this process meanwhile."""
    started = np.array([time.perf_counter(), time.process_time()])
    function()
    return np.array([time.perf_counter(), time.process_time()]) - started


def main(_: list[str]) -> None:
    """Measures, prints the table."""
    logging.set_verbosity(logging.WARNING)
    experiment = build(CONFIG.value)
    state, *others = random_inputs(experiment)
    run_steps, facts = experiment.train_steps(), experiment.facts()
    dispatches = max(1, STEPS.value // experiment.train.steps_per_dispatch)

    def train() -> None:
        nonlocal state
        for _ in range(dispatches):
            state, _ = run_steps(state, *others)
        jax.block_until_ready(state)

    train()  # compiles
    rows = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=experiment.train.keep_checkpoints) as saves:
        saves.save(state, facts)  # the first is slower
        saves.wait()
        for _ in range(ROUNDS.value):
            step = cost(train) / (dispatches * experiment.train.steps_per_dispatch)
            blocked = cost(functools.partial(saves.save, state, facts))
            rows.append((step, blocked, blocked + cost(saves.wait)))
    rows = np.array(rows)  # measurement, what, kind of seconds
    step, blocked, written = np.median(rows[:, :, 0], axis=0)
    saving = np.stack([rows[:, 1, 0], rows[:, 2, 1]])
    shares = np.median(saving / (saving + EVERY.value * rows[:, 0].T), axis=1)
    device = experiment.mesh.devices.flat[0].device_kind
    print(f"{experiment.name}, {experiment.mesh.size} x {device}, a save every {EVERY.value} steps")
    milliseconds = [f"{1e3 * value:.1f}" for value in (step, blocked, written)]
    print(format_table(HEADER, [[*milliseconds, *(f"{100 * share:.2f} %" for share in shares)]]))


if __name__ == "__main__":
    app.run(main)
