"""Trains a small distillation on a mesh, or goes on with one; run by test_partition in processes of several devices.

  run_on_meshes.py FAMILY DIRECTORY NAME:MESH:STEPS... [HOST:PORT,PROCESSES,INDEX]

Each job trains DIRECTORY/NAME on MESH, such as 2x2x2, to STEPS steps in all. Process 0 prints, as JSON, a line for each
job: the losses of its steps, bytes of the parameters in all and on one device; and writes the parameters and their
averages, one of which is made of snapshots, to NAME.npz. FAMILY is digits or captioned_digits, whose teacher is guided.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs import base, captioned_digits, digits
from mscm import averages as averages_lib
from mscm import distributed, training_loop
from mscm.checkpoint import Checkpoints, snapshots
from mscm.config import load_config
from mscm.experiment import build


def captioned_student():
    """With eight steps of the teacher: of 256 one is so short that the loss is mostly rounding."""
    config = captioned_digits.student(student_steps=2)
    config.objective.teacher_steps.update(dict(start=8.0, end=8.0))
    return config


def small(config):
    """Every width divides by 8, two scanned blocks, dropout."""
    config.model.middle.update(dict(width=64, num_blocks=2, dropout=0.1))
    config.model.update(dict(emb_dim=32, head_dim=16, scan_blocks=True))
    if "text" in config.model:
        config.model.text.update(dict(width=64, num_blocks=1))
    config.train.update(dict(batch_size=16, steps_per_dispatch=1))
    base.with_power_averages(config, snapshot_every_steps=2)
    config.optimizer.eps = 1e-4  # with 1e-12 Adam makes a full step of a gradient that is rounding noise
    return config


STUDENTS = {
    "digits": lambda: digits.student(student_steps=2, distil=True),
    "captioned_digits": captioned_student,
}


def train(family: str, directory: str, name: str, mesh: str, num_steps: int) -> None:
    """One job."""
    config = small(STUDENTS[family]())
    data, fsdp, tensor = map(int, mesh.split("x"))
    config.mesh = dict(data=data, fsdp=fsdp, tensor=tensor)
    experiment = build(config, load=lambda file, _: small(load_config(file)))
    source = experiment.data.open()
    teacher = experiment.teacher.experiment
    with Checkpoints(f"{directory}/{name}", keep=1) as checkpoints, snapshots(f"{directory}/{name}") as taken:
        with Checkpoints(f"{directory}/none", keep=1) as none:
            frozen = training_loop.initial_state(teacher, none, {}).params
        # The last layer of a new network is 0, and with it most gradients.
        fill = jax.jit(lambda p: jax.tree.map(lambda a: a + 0.01, p), out_shardings=teacher.state_shardings().params)
        frozen = fill(frozen)
        state = training_loop.initial_state(experiment, checkpoints, frozen)
        steps, losses = experiment.train_steps(), []
        first = int(state.step)
        batches = training_loop.on_device(experiment, training_loop.batches(experiment, source, first))
        for step in range(first + 1, num_steps + 1):
            state, averages = steps(state, experiment.frozen(frozen), next(batches), jax.random.key(1))
            losses.append(float(averages["loss"].compute()))
            if step % experiment.snapshot_every_steps == 0:
                taken.save_snapshot(step, experiment.power_averages(state), experiment.facts())
        batches.close()
        checkpoints.save(state, experiment.facts())
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    made = averages_lib.read(experiment, f"{directory}/{name}", "0.08")
    whole = {
        jax.tree_util.keystr(path): multihost_utils.process_allgather(leaf, tiled=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path([state.params, state.ema, state.further, made])
    }
    if distributed.is_main():
        np.savez(f"{directory}/{name}.npz", **whole)
        local = sum(leaf.addressable_shards[0].data.nbytes for _, leaf in leaves)
        total = sum(leaf.nbytes for _, leaf in leaves)
        print(json.dumps({"name": name, "losses": losses, "bytes": total, "local": local}), flush=True)


def main(family: str, directory: str, jobs: list[str]) -> None:
    """All jobs, in the process that the last argument may name."""
    if "," in jobs[-1]:
        distributed.start(jobs.pop())
    for job in jobs:
        name, mesh, num_steps = job.split(":")
        train(family, directory, name, mesh, int(num_steps))


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
