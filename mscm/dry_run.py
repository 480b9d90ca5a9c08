"""What a training would do here, found out without writing anything."""

import os
import shutil

from mscm import planning, remote, terminal, training_loop
from mscm.checkpoint import is_there, num_bytes, reading
from mscm.config import ConfigError
from mscm.cost import chips
from mscm.experiment import Experiment, Member


def dry_run(experiment: Experiment, workdir: str) -> str:
    """A line for each model of the lineage, and what the checkpoints need; checks all that a training checks first.

    Raises:
      ConfigError, CheckpointError: what training would refuse, a work directory that cannot be made, a full disk.
    """
    folder = _existing(workdir)
    source = training_loop.check(experiment, workdir)
    devices = experiment.mesh.devices
    lines = [
        f"{experiment.name}: {len(source)} images, {devices.size} {devices.flat[0].device_kind} of mesh "
        f"{dict(experiment.mesh.shape)}"
    ]
    needed = 0
    for member in experiment.lineage(workdir):
        line, size = _plan(member)
        lines.append(line)
        needed += size
    if folder is None:
        lines.append(f"New checkpoints need {_gigabytes(needed)}; nobody says what is free in {workdir}")
        return "\n".join(lines)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"--workdir: got {_gigabytes(free)} free in {folder}, expected {_gigabytes(needed)} for checkpoints; lower "
            "config.train.keep_checkpoints, or take another disk"
        )
    lines.append(f"New checkpoints need {_gigabytes(needed)} of {_gigabytes(free)} that are free")
    return "\n".join(lines)


def _plan(member: Member) -> tuple[str, int]:
    """What happens to a model, and the bytes of its checkpoints that would be there at the same time."""
    experiment, spec = member.experiment, member.experiment.train
    done, rate = 0, None
    if is_there(member.workdir):
        with reading(member.workdir) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None:
                done, rate = latest, checkpoints.facts().get(training_loop.RATE)
    what = f"{experiment.name} in {member.workdir}: "
    if member.is_given:
        return f"{what}only read, its step {done}", 0
    _ = experiment.mesh  # refuses a batch that does not fit the devices
    if done >= spec.num_steps:
        return f"{what}all {spec.num_steps} steps are done", 0
    last = spec.num_steps
    count = last // spec.save_every_steps - done // spec.save_every_steps + bool(last % spec.save_every_steps)
    size = num_bytes(experiment.abstract_state())
    text = f"{done} of {last} steps are done, {_time(experiment, last - done, rate)}, {count} checkpoints of "
    text += f"{_gigabytes(size)} to come, {spec.keep_checkpoints} kept"
    # An old one goes after the new one has come.
    needed = size * min(count, spec.keep_checkpoints + 1)
    if every := experiment.snapshot_every_steps:
        count, size = last // every - done // every, num_bytes(experiment.power_averages(experiment.abstract_state()))
        text += f", {count} snapshots of averages of {_gigabytes(size)}, all kept"
        needed += count * size
    return f"{what}{text}", needed


def _time(experiment: Experiment, num_steps: int, rate: float | None) -> str:
    """What the rest takes: at the rate that it had, or at the peak of chips that are known."""
    if rate:
        return f"{terminal.duration(num_steps / rate)} left at the {rate:.3g} steps/s of before"
    seconds = planning.least_seconds(experiment)
    chip = chips.chip_of_kind(experiment.mesh.devices.flat[0].device_kind)
    if seconds is None or chip is None:
        return "which take a time that python -m mscm.plan --topology=host measures"
    return f"{terminal.duration(num_steps * seconds)} left or more: so long the {chip.name} would compute at their peak"


def _existing(workdir: str) -> str | None:
    """The directory, or the nearest above it that exists; None in a bucket.

    Raises:
      ConfigError: the work directory cannot be made there.
    """
    if remote.is_url(workdir):
        return None
    path = os.path.abspath(workdir)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir: got {workdir!r}, expected a directory to write to: {path} is none")
    return path


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
