"""Five steps of a small distillation on each mesh that the command line names; run by test_partition on eight devices.

Prints, as JSON by mesh: the losses, bytes of the parameters in all and on one device, and writes the parameters to an
`.npz` file for each mesh.
"""

import json
import sys

import jax
import numpy as np

from configs import digits
from mscm import experiment as experiments
from mscm import training_loop
from mscm.checkpoint import Checkpoints


def small(config):
    """Every width divides by 8, two scanned blocks, dropout."""
    config.model.middle.update(dict(width=64, num_blocks=2, dropout=0.1))
    config.model.update(dict(emb_dim=32, head_dim=16, scan_blocks=True))
    config.train.update(dict(batch_size=16, steps_per_dispatch=1))
    config.optimizer.eps = 1e-4  # with 1e-12 Adam makes a full step of a gradient that is rounding noise
    return config


def main(directory: str, meshes: list[str]) -> None:
    load = experiments.load_config
    experiments.load_config = lambda path: small(load(path))
    results = {}
    for name in meshes:
        config = small(digits.student(student_steps=2, distil=True))
        data, fsdp, tensor = map(int, name.split("x"))
        config.mesh = dict(data=data, fsdp=fsdp, tensor=tensor)
        experiment = experiments.build(config)
        source = experiment.data.open()
        teacher = experiment.teacher.experiment
        with Checkpoints(f"{directory}/{name}", keep=1) as checkpoints:
            frozen = training_loop.initial_state(teacher, checkpoints, {}).params
            # The last layer of a new network is 0, and with it most gradients.
            frozen = jax.jit(lambda p: jax.tree.map(lambda a: a + 0.01, p), out_shardings=teacher.state_shardings().params)(frozen)
            state = training_loop.initial_state(experiment, checkpoints, frozen)
            steps, losses = experiment.train_steps(), []
            batches = training_loop.on_device(experiment, training_loop.batches(experiment, source, 0))
            for _ in range(5):
                state, averages = steps(state, frozen, next(batches), jax.random.key(1))
                losses.append(float(averages["loss"].compute()))
            checkpoints.save(state, experiment.facts())
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        local = sum(leaf.addressable_shards[0].data.nbytes for _, leaf in leaves)
        results[name] = {"losses": losses, "bytes": sum(leaf.nbytes for _, leaf in leaves), "local": local}
        np.savez(f"{directory}/{name}.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
