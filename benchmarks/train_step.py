"""How long a training step takes, how much of the devices' speed that is, and what several steps in one dispatch save.

  python benchmarks/train_step.py --config=configs/digits_cd4.py
  python benchmarks/train_step.py --config=configs/imagenet64_cd8.py --config.mesh.fsdp=1 --steps_per_dispatch=1 \
      --batch_size=32 --batch_size=64 --batch_size=128

For each batch (default: the config's) and each number of steps per dispatch: time to trace and compile, memory of one
device, median time of a step on random images, images per second, operations of the mathematics (`mscm.plan` counts
them) per second, and these as a share of what a product of two large matrices reaches in the network's type, in the
same process. The last column is the speed relative to the first number of steps per dispatch, measured turn by turn,
because a shared machine's speed drifts. A batch that does not fit ends the table.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mscm.experiment import Experiment, build
from mscm.planning import model_flops, random_inputs
from mscm.report.table import format_table

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits_cd4.py", "Config file.")
BATCH_SIZE = flags.DEFINE_multi_integer("batch_size", None, "Global batches to measure, ascending.", lower_bound=1)
STEPS_PER_DISPATCH = flags.DEFINE_multi_integer("steps_per_dispatch", [1, 5, 10], "Numbers to compare.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each; the table shows the median.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 20, "Optimiser steps of one measurement.", lower_bound=1)

HEADER = (
    "batch", "steps per dispatch", "compiled in (s)", "memory (GiB)", "ms per step", "images/s", "TFLOP/s",
    "of a matrix product", "speed relative to the first",
)  # fmt: skip


class Runner:
    """One compiled number of steps per dispatch, with its own state."""

    def __init__(self, experiment: Experiment, steps_per_dispatch: int):
        self.steps_per_dispatch = steps_per_dispatch
        train = dataclasses.replace(experiment.train, steps_per_dispatch=steps_per_dispatch)
        self._state, *self._others = random_inputs(dataclasses.replace(experiment, train=train))
        started = time.perf_counter()
        self._run = experiment.train_steps().lower(self._state, *self._others).compile()
        self.compile_seconds = time.perf_counter() - started
        self.memory = self._run.memory_analysis().peak_memory_in_bytes
        self.seconds_per_step(steps_per_dispatch)  # the first is slower

    def seconds_per_step(self, steps: int) -> float:
        """Wall-clock time of one optimiser step, over about `steps` of them."""
        dispatches = max(1, steps // self.steps_per_dispatch)
        started = time.perf_counter()
        for _ in range(dispatches):
            self._state, _ = self._run(self._state, *self._others)
        jax.block_until_ready(self._state.params)
        return (time.perf_counter() - started) / (dispatches * self.steps_per_dispatch)


class MatrixProducts:
    """Large ones, in the network's type, on one device."""

    def __init__(self, dtype: jnp.dtype, platform: str):
        size, self._repeats = (1024, 8) if platform == "cpu" else (8192, 16)
        self._flops = 2 * size**3 * self._repeats
        self._matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5
        self._run = jax.jit(lambda a: jax.lax.fori_loop(0, self._repeats, lambda _, x: (x @ a).astype(dtype), a))
        self.flops_per_second()  # compiles

    def flops_per_second(self) -> float:
        """Operations per second of one device."""
        started = time.perf_counter()
        jax.block_until_ready(self._run(self._matrix))
        return self._flops / (time.perf_counter() - started)


def rows(experiment: Experiment, products: MatrixProducts) -> list[list]:
    """The lines of one batch size."""
    runners = [Runner(experiment, k) for k in STEPS_PER_DISPATCH.value]
    rates, seconds = [], []
    for _ in range(ROUNDS.value):
        seconds.append([runner.seconds_per_step(STEPS.value) for runner in runners])
        rates.append(products.flops_per_second())
    seconds, batch_size = np.array(seconds), experiment.train.batch_size
    _, flops = model_flops(experiment)
    lines = []
    for i, runner in enumerate(runners):
        median = statistics.median(seconds[:, i])
        share = flops / median / experiment.mesh.size / statistics.median(rates)
        relative = statistics.median(seconds[:, 0] / seconds[:, i])
        cost = [f"{runner.compile_seconds:.0f}", f"{runner.memory / 2**30:.2f}", f"{1e3 * median:.1f}"]
        speed = [f"{batch_size / median:.0f}", f"{flops / median / 1e12:.2f}", f"{100 * share:.0f}%", f"{relative:.2f}"]
        lines.append([batch_size, runner.steps_per_dispatch, *cost, *speed])
    return lines


def main(_: list[str]) -> None:
    """Measures, prints the table."""
    table = []
    for batch_size in BATCH_SIZE.value or [CONFIG.value.train.batch_size]:
        CONFIG.value.train.batch_size = batch_size
        experiment = build(CONFIG.value)
        products = MatrixProducts(experiment.model.dtype, experiment.platform)
        try:
            table += rows(experiment, products)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            table.append([batch_size, *[None] * 3, "does not fit", *[None] * 4])
            break
    device = experiment.mesh.devices.flat[0]
    print(f"{experiment.name}, {experiment.mesh.size} x {device.device_kind}, {jnp.dtype(experiment.model.dtype).name}")
    print(format_table(HEADER, table))


if __name__ == "__main__":
    app.run(main)
