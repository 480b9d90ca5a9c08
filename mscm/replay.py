"""Finds the step at which a training diverged: from its last checkpoint, step by step. Writes nothing."""

import dataclasses
import json

import jax
from absl import logging
from etils import epath

from mscm import evaluation, training_loop
from mscm.checkpoint import reading
from mscm.config import ConfigError
from mscm.experiment import Experiment, Member


def replay(experiment: Experiment, workdir: str, step: int) -> str:
    """Repeats the steps up to `step`, the last before a divergence was noticed; a sentence about the first bad one.

    Raises:
      ConfigError: nothing is written down about `step`.
      CheckpointError: the checkpoint before it is gone.
    """
    members = experiment.lineage(workdir)
    model, before = _member(members, step)
    record = json.loads(epath.Path(training_loop.diverged_path(model.workdir, step)).read_text())
    source = training_loop.check(experiment, workdir)
    teacher_params = evaluation.read_ema(before.experiment, before.workdir) if before else {}
    ours = model.experiment
    # One at a time, and also what training has skipped.
    train = dataclasses.replace(ours.train, steps_per_dispatch=1, max_bad_steps=0)
    ours = dataclasses.replace(ours, train=train)
    start, (first, last) = record["checkpoint"], record["steps"]
    if start:
        with reading(model.workdir) as checkpoints:
            state = checkpoints.restore(ours.placed_state(), start)
    else:
        state = training_loop.first_state(ours, teacher_params)
    logging.info("%s: repeating the steps %d to %d", ours.name, start + 1, last)
    run_steps, root = ours.train_steps(), jax.random.key(ours.seed + 1)
    frozen = ours.frozen(teacher_params)
    batches = training_loop.on_device(ours, training_loop.batches(ours, source, start))
    for number, batch in zip(range(start + 1, last + 1), batches, strict=False):
        state, averages = run_steps(state, frozen, batch, root)
        loss, norm = (float(averages[name].compute()) for name in ("loss", "gradient_norm"))
        if not jax.numpy.isfinite(loss + norm):
            position = (number - 1) * train.batch_size
            epoch, within = divmod(position, len(source))
            return (
                f"{ours.name}: step {number} is the first that is not finite: loss {loss}, gradient norm {norm}; its "
                f"batch is the examples {position} to {position + train.batch_size - 1} of the run: epoch {epoch}, "
                f"from {within} of {len(source)} on"
            )
    return (
        f"{ours.name}: loss and gradient norm of the steps {start + 1} to {last} are finite when they are repeated one "
        f"by one; those of the steps {first} to {last} were not with train.steps_per_dispatch = "
        f"{model.experiment.train.steps_per_dispatch}"
    )


def _member(members: list[Member], step: int) -> tuple[Member, Member | None]:
    """The youngest of a lineage that diverged at `step`, and the one that it comes from."""
    for i in reversed(range(len(members))):
        path = epath.Path(training_loop.diverged_path(members[i].workdir, step))
        if not members[i].is_given and path.exists():
            return members[i], members[i - 1] if i else None
    folders = [epath.Path(training_loop.diverged_path(member.workdir, step)).parent for member in members]
    there = sorted({int(path.stem) for folder in folders if folder.exists() for path in folder.glob("*.json")})
    raise ConfigError(
        f"--replay: got {step}, expected a step at which a divergence was noticed: "
        f"{', '.join(map(str, there)) or 'there was none'}"
    )
