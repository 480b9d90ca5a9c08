"""The training loop and what ends it: read from top to bottom."""

import collections
import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath

from mscm import atomic, distributed, evaluation, failures, planning, run_report, score_rows, stopping, terminal
from mscm.checkpoint import (
    CHECKPOINTS,
    SNAPSHOTS,
    CheckpointError,
    Checkpoints,
    is_there,
    reading,
    set_damaged_aside,
    snapshots,
)
from mscm.config import ConfigError, differences, run_hash, run_of
from mscm.data import pipeline, sources
from mscm.evaluation_loop import Evaluation
from mscm.experiment import Experiment, Member, given_teacher
from mscm.report import events, grid
from mscm.report.writer import Writer
from mscm.training import partition
from mscm.training.step import Averages, Batch, TrainState
from mscm.types import Key, Params

_BAD = "bad_steps_in_a_row"  # of a checkpoint's facts
RATE = "steps_per_second"  # the same: in the last report before it
_AHEAD = 2  # batches that are copied to the devices


class _Origin(TypedDict):
    """Which checkpoint a student began from."""

    run: str  # as `config.run_of` has it
    step: int


def run(experiment: Experiment, workdir: str) -> None:
    """Trains the teacher if there is none, the phases if there are some, then the experiment, and scores all.

    Raises:
      ConfigError, CheckpointError, LeaseError: before anything is compiled.
    """
    started = time.monotonic()
    make_directory(workdir)
    with holding(experiment, workdir) as check_ours:
        if distributed.is_main():
            for member in experiment.lineage(workdir):
                if not member.is_given:
                    set_damaged_aside(member.workdir)
        distributed.barrier()
        source = check(experiment, workdir)
        members = experiment.lineage(workdir)
        with reporting(workdir):
            for older, member in zip([None, *members], members, strict=False):
                if member.is_given:
                    continue
                params: Params = {}
                teacher: _Origin | None = None
                if older is not None:
                    teacher = distributed.agree(newest(older))  # a given one may be training: all read the same step
                    params = evaluation.read_ema(older.experiment, older.workdir, teacher["step"])
                logging.info("Training %s in %s", member.experiment.name, member.workdir)
                train(member.experiment, member.workdir, source, params, teacher=teacher, check_ours=check_ours)
            finish(experiment, workdir)
    logging.info("Done in %s", terminal.duration(time.monotonic() - started))


@contextlib.contextmanager
def holding(experiment: Experiment, workdir: str) -> Iterator[Callable[[], None]]:
    """Holds every directory that training writes to; gives what raises LeaseError when another has taken one over.

    The teacher's and the phases' too: each may also be the work directory of a command of its own.
    """
    with contextlib.ExitStack() as stack:
        checks = []
        for member in reversed(experiment.lineage(workdir)):
            if not member.is_given:
                owner = os.path.join(member.workdir, "owner.json")
                checks.append(stack.enter_context(distributed.holding(owner, "training")))

        def check_ours() -> None:
            for check in checks:
                check()

        yield check_ours


@contextlib.contextmanager
def reporting(workdir: str) -> Iterator[None]:
    """Writes the report where the block ends: well, by a signal, or by a loss that is not finite."""
    try:
        yield
    except (stopping.Stopped, FloatingPointError) as ended:
        run_report.update(workdir)
        if isinstance(ended, Diverged):
            distributed.barrier()  # all raise it, and the first one to end ends those that still write
        raise
    run_report.update(workdir)


def _write_config(experiment: Experiment, workdir: str) -> None:
    """As config.json, with the teacher's directory also where this start left it to the one before."""
    config = copy.deepcopy(experiment.config)
    if config["teacher"] is not None and config["teacher"]["workdir"] is None:
        config["teacher"]["workdir"] = given_teacher(workdir)
    atomic.write_text(os.path.join(workdir, "config.json"), json.dumps(config, indent=2) + "\n")


def make_directory(workdir: str) -> None:
    """The directory of a run, also where it exists.

    Raises:
      ConfigError: it cannot be one.
    """
    folder = epath.Path(workdir)
    for path in (folder, folder / CHECKPOINTS):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--workdir: got {str(path)!r}, which is a file, expected a directory to write to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir: got {workdir!r}, expected a directory to write to: {error.strerror or error}"
        ) from error


def check(experiment: Experiment, workdir: str) -> sources.Source:
    """All that can be wrong is found here, before anything is compiled: data, devices, checkpoints, teacher."""
    source = experiment.data.open()
    logging.info("Mesh: %s", dict(experiment.mesh.shape))  # refuses what does not fit the devices
    members = experiment.lineage(workdir)
    for older, member in zip([None, *members], members, strict=False):
        if member.is_given:
            with reading(member.workdir) as checkpoints:
                check_finished(checkpoints, checkpoints.check(member.experiment.facts()))
            continue
        member.experiment.read_features()  # refuses what is not there
        if is_there(member.workdir):
            with reading(member.workdir) as checkpoints:
                if checkpoints.steps() or checkpoints.damaged:
                    check_config(member, checkpoints)
                    check_dispatches(member, checkpoints.check(checkpoint_facts(member.experiment, source)))
                    if older is not None:
                        check_teacher(member, checkpoints, older)
        if is_there(member.workdir, SNAPSHOTS):  # of this training, or they would be mixed with its own
            with reading(member.workdir, SNAPSHOTS) as taken:
                if taken.steps():
                    check_config(member, taken)
                    taken.check(checkpoint_facts(member.experiment, source))
    if experiment.eval.at_end:
        evaluation.check(experiment, source)
    distributed.barrier()  # nobody has written yet: all have seen the same
    return source


def check_config(member: Member, checkpoints: Checkpoints) -> None:
    """Refuses another config than the one that has made the newest checkpoint: the same training goes on, or none.

    Where, how fast and how long it trains may change, and what it writes.
    """
    config, remembered, done = member.experiment.config, checkpoints.facts()["config"], checkpoints.latest()
    differing = differences(config, remembered)
    # Not fewer steps than are done; old checkpoints have more than their config's, a dispatch having gone beyond.
    num_steps = config["train"]["num_steps"]
    if num_steps >= done:
        differing.pop("train.num_steps", None)
    elif "train.num_steps" in differing:
        differing["train.num_steps"] = f"train.num_steps: got {num_steps}, expected at least {done}"
    if differing:
        raise ConfigError(
            f"{member.workdir}: got another config than its checkpoint of step {done} was trained with: "
            f"{'; '.join(differing.values())}; use that config, or another work directory"
        )


def check_dispatches(member: Member, done: int) -> None:
    """Refuses dispatches that from step `done` on would pass over the steps to save, to report and to end at."""
    spec = member.experiment.train
    if done < spec.num_steps and done % spec.steps_per_dispatch:
        raise ConfigError(
            f"{member.workdir}: config.train.steps_per_dispatch: got {spec.steps_per_dispatch}, expected a divisor of "
            f"{done}, the step of the newest checkpoint, or no dispatch would end at a step to save at; use "
            f"{math.gcd(done, spec.steps_per_dispatch)}"
        )


def newest(member: Member) -> _Origin:
    """Run and step of the newest checkpoint of a model, or of the last that training in its directory will make."""
    found: _Origin = {"run": run_hash(member.experiment.config), "step": 0}
    if is_there(member.workdir):
        with reading(member.workdir) as checkpoints:
            step = checkpoints.latest()
            if step is not None:
                found = {"run": run_of(checkpoints.facts(step)), "step": step}
    return found if member.is_given else found | {"step": max(found["step"], member.experiment.train.num_steps)}


def check_finished(checkpoints: Checkpoints, step: int) -> None:
    """Warns of a given teacher whose training has not ended with its newest checkpoint, that of `step`."""
    last = checkpoints.facts(step)["config"]["train"]["num_steps"]
    if step < last:
        logging.warning("%s: the teacher is taken as it is, at step %d of %d: not finished", checkpoints, step, last)


def check_teacher(member: Member, checkpoints: Checkpoints, older: Member) -> None:
    """Refuses to go on with a student whose loss would ask another teacher than before.

    Older checkpoints do not say which it was: they take what is there.
    """
    expected, got = checkpoints.facts().get("teacher"), newest(older)
    if member.experiment.distil and expected is not None and got != expected:
        way_out = "give a copy of that one" if older.is_given else "leave its train.num_steps as it was"
        raise ConfigError(
            f"{older.workdir}: got a teacher of {_in_words(got)}, expected {_in_words(expected)}, with which the "
            f"training in {member.workdir} began; {way_out}, or use another work directory"
        )


def _in_words(origin: _Origin) -> str:
    return f"step {origin['step']} of run {origin['run']}"


def checkpoint_facts(experiment: Experiment, source: sources.Source) -> dict[str, Any]:
    """What a checkpoint says of its model and of the data that it was trained on."""
    data = f"{len(source)} images, fingerprint {source.fingerprint[:16]}"
    return experiment.facts() | {"data": data, "transform": source.transform}


def train(
    experiment: Experiment,
    workdir: str,
    source: sources.Source,
    teacher_params: Params,
    *,
    teacher: _Origin | None = None,
    check_ours: Callable[[], None],
) -> None:
    """Trains from the newest checkpoint of `workdir`, or from the teacher's weights, to the last step.

    `teacher` says whose weights these are. `check_ours` raises where another process has taken the directory over;
    called before each save.

    Raises:
      Stopped: a signal asked for it, and the state is saved.
    """
    spec = experiment.train
    is_main = distributed.is_main()
    if is_main:
        _write_config(experiment, workdir)
    with (
        stopping.deferred(),
        Checkpoints(workdir, keep=spec.keep_checkpoints) as checkpoints,
        snapshots(workdir) if experiment.snapshot_every_steps else contextlib.nullcontext() as taken,
        Writer(workdir, active=is_main, first_step=(checkpoints.latest() or 0) + 1) as writer,
        noting_divergence(experiment, workdir, checkpoints),
        device_memory(experiment),
        contextlib.ExitStack() as stack,
    ):
        if (checkpoints.latest() or 0) >= spec.num_steps:
            logging.info("%s: all %d steps are done", experiment.name, spec.num_steps)
            return
        writer.write_texts(checkpoints.latest() or 0, {events.HARDWARE: distributed.hardware()})
        state = initial_state(experiment, checkpoints, teacher_params)
        step = int(state.step)
        run_steps, every = experiment.train_steps(), experiment.snapshot_every_steps
        root = jax.random.key(experiment.seed + 1)  # not the key of the initialisation
        frozen = experiment.frozen(teacher_params)
        facts = checkpoint_facts(experiment, source) | beginning(experiment, checkpoints, teacher)
        progress = stack.enter_context(Progress(experiment, step, writer, bad_in_a_row=bad_steps_before(checkpoints)))
        for batch in progress.waiting_for(on_device(experiment, batches(experiment, source, step))):
            state, averages = run_steps(state, frozen, batch, root)
            step += spec.steps_per_dispatch
            progress.add(averages)
            done = step >= spec.num_steps
            stops = stopping.reached()
            saves = step % spec.save_every_steps == 0 or done or stops
            takes = every is not None and step % every == 0
            if step % spec.log_every_steps == 0 or saves or takes:
                # Before the checkpoint: what has diverged is not kept, and no metric is left for after it.
                progress.report(step)
                for saving in filter(None, (taken, checkpoints)):
                    saving.check_save()  # not at the next save, which may be hours away
            if taken is not None and takes:
                check_ours()
                taken.save_snapshot(step, experiment.power_averages(state), facts)
            if saves:
                check_ours()
                if taken is not None:
                    taken.wait()  # who goes on from this checkpoint takes none of those before it again
                writer.flush()  # who goes on from this checkpoint does not report again what was before
                of_run = {_BAD: progress.bad_in_a_row, RATE: progress.rate}
                checkpoints.save(state, facts | of_run)
            if stops:
                checkpoints.wait()
                distributed.barrier()  # the end of one process ends the others
                raise stopping.Stopped(
                    f"{experiment.name}: stopped after step {step} of {spec.num_steps}, which is saved"
                )
            if done:
                break


def device_memory(experiment: Experiment) -> contextlib.AbstractContextManager[None]:
    """Says of training what needs the memory of the devices, in a block that runs out of it."""
    spec, count = experiment.train, experiment.mesh.devices.size
    return failures.device_memory(
        f"{experiment.name}: training steps on {spec.batch_size} images on {count} devices",
        f"set config.model.remat=full or cut the state over devices with config.mesh.fsdp (now "
        f"{experiment.mesh.shape['fsdp']}), which change no result, or raise config.train.num_microbatches (now "
        f"{spec.num_microbatches}), which changes what is drawn at random and not what is learned",
    )


class Diverged(FloatingPointError):
    """A number of some steps, the first and the last of which are given, is not finite."""

    def __init__(self, sentence: str, first: int, last: int):
        super().__init__(sentence)
        self.first, self.last = first, last


@contextlib.contextmanager
def noting_divergence(experiment: Experiment, workdir: str, checkpoints: Checkpoints) -> Iterator[None]:
    """Writes WORKDIR/diverged/STEP.json, from which `mscm.replay` finds the step, where the block raises Diverged.

    Raises:
      Diverged: then, with a sentence that says all.
    """
    try:
        yield
    except Diverged as diverged:
        checkpoints.wait()
        start, path = checkpoints.latest() or 0, diverged_path(workdir, diverged.last)
        batch_size = experiment.train.batch_size
        record = {
            "model": experiment.name,
            "what": str(diverged),
            "steps": [diverged.first, diverged.last],
            "checkpoint": start,
            "examples": [(diverged.first - 1) * batch_size, diverged.last * batch_size - 1],
        }
        if distributed.is_main():
            atomic.write_text(path, json.dumps(record, indent=2) + "\n")
        raise Diverged(
            f"{experiment.name}: {diverged}; what was saved is {f'step {start}' if start else 'nothing'}. The same "
            f"command with --replay={diverged.last} finds the step from {path}; then lower "
            "config.optimizer.learning_rate in another work directory, or go on with --config.train.max_bad_steps=3, "
            "which skips as many in a row",
            diverged.first,
            diverged.last,
        ) from diverged


def diverged_path(workdir: str, step: int) -> str:
    """The file about a divergence that was noticed after `step`."""
    return os.path.join(workdir, "diverged", f"{step}.json")


def initial_state(experiment: Experiment, checkpoints: Checkpoints, teacher_params: Params) -> TrainState:
    """The newest checkpoint; else the state before the first step."""
    if checkpoints.latest() is not None:
        logging.info("%s: continuing from step %d", experiment.name, checkpoints.latest())
        return checkpoints.restore(experiment.placed_state())
    return first_state(experiment, teacher_params)


def beginning(experiment: Experiment, checkpoints: Checkpoints, teacher: _Origin | None) -> dict[str, Any]:
    """Of the facts those that stay while a training goes on: its run, and its teacher as far as that is known."""
    if checkpoints.latest() is None:
        return {"run": run_hash(experiment.config), "teacher": teacher}
    before = checkpoints.facts()
    return {"run": run_of(before), "teacher": before.get("teacher")}


def bad_steps_before(checkpoints: Checkpoints) -> int:
    """How many steps in a row, up to the newest checkpoint, were skipped."""
    return 0 if checkpoints.latest() is None else checkpoints.facts().get(_BAD, 0)


def first_state(experiment: Experiment, teacher_params: Params) -> TrainState:
    """The state before the first step: the teacher's weights (students); else random ones."""
    if experiment.teacher is not None:

        def from_teacher(params: Params, key: Key) -> TrainState:
            return experiment.init_state(experiment.from_teacher(params, key))

        make_state = jax.jit(from_teacher, out_shardings=experiment.state_shardings())
        return make_state(teacher_params, jax.random.key(experiment.seed))
    count = parameter_overview.count_parameters(experiment.abstract_params())
    logging.info("%s: %d parameters", experiment.name, count)
    return experiment.random_state(jax.random.key(experiment.seed))


def batches(experiment: Experiment, source: sources.Source, start_step: int) -> Iterator[pipeline.Item]:
    """This process's rows of the batches, with a leading axis of the steps of a dispatch."""
    spec = experiment.train
    items = pipeline.batches(
        source,
        batch_size=spec.batch_size,
        seed=experiment.seed,
        start_step=start_step,
        rows=partition.local_rows(spec.batch_size, experiment.mesh),
        steps_per_item=spec.steps_per_dispatch,
        num_workers=experiment.data.num_workers,
        num_threads=experiment.data.num_threads,
    )
    try:
        for item in items:
            stacked = spec.steps_per_dispatch > 1
            yield item if stacked else {name: array[None] for name, array in item.items()}
    finally:
        items.close()


def on_device(experiment: Experiment, items: Iterator[pipeline.Item]) -> Iterator[Batch]:
    """The whole batches, copied to the devices while the steps before them run."""
    batch_size, mesh = experiment.train.batch_size, experiment.mesh
    rows = partition.local_rows(batch_size, mesh)
    queue: collections.deque[Batch] = collections.deque()
    for item in items:
        queue.append(partition.global_batch(item, rows, batch_size, mesh))
        if len(queue) > _AHEAD:
            yield queue.popleft()


class Progress(terminal.Line):
    """Metrics since the last report: one event and one log line each time, or the line of a terminal all the time."""

    def __init__(self, experiment: Experiment, step: int, writer: Writer, *, bad_in_a_row: int = 0):
        super().__init__(self._say)
        self._experiment, self._writer = experiment, writer
        self._pending: list[Averages] = []
        self._step, self._time, self._waited = step, time.monotonic(), 0.0
        self._started, self._said = self._time, ""
        self.bad_in_a_row = bad_in_a_row  # steps that were skipped, up to the last report
        self.rate: float | None = None  # steps per second of the last report
        self._least_seconds = planning.least_seconds(experiment) if distributed.is_main() else None

    def waiting_for(self, items: Iterator[Batch]) -> Iterator[Batch]:
        """The same items, counting the time in which the device has nothing to do: it has finished when they come."""
        iterator = iter(items)
        while True:
            started = time.monotonic()
            item = next(iterator, None)
            if not self._pending or jax.tree.leaves(self._pending[-1])[0].is_ready():
                self._waited += time.monotonic() - started
            if item is None:
                return
            yield item

    def _say(self) -> str:
        """What the devices have done by now, at the speed of the last report."""
        spec = self._experiment.train
        # Steps are given to a device long before it comes to them.
        ready = sum(jax.tree.leaves(averages)[0].is_ready() for averages in [*self._pending])
        step = min(self._step + ready * spec.steps_per_dispatch, spec.num_steps)
        said = f"{self._experiment.name}: step {step}/{spec.num_steps}"
        if self.rate is None or step >= spec.num_steps:
            said += f", {terminal.duration(time.monotonic() - self._started)}"
        else:
            said += f", {terminal.duration((spec.num_steps - step) / self.rate)} left"
        return f"{said}, {self._said}" if self._said else said

    def add(self, averages: Averages) -> None:
        """Keeps sums on the device: fetching them would wait for the step."""
        self._pending.append(averages)

    def report(self, step: int) -> None:
        """Writes what was added since the last report.

        Raises:
          Diverged: loss or gradient norm is not finite, or too many steps in a row were skipped.
        """
        spec = self._experiment.train
        pending, first = jax.device_get(self._pending), self._step + 1
        if spec.max_bad_steps:
            skipped = np.concatenate([np.atleast_1d(averages.pop("skipped_steps").total) for averages in pending])
            for bad in skipped:
                self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
                if self.bad_in_a_row > spec.max_bad_steps:
                    raise Diverged(
                        f"got a loss or a gradient that is not finite in {self.bad_in_a_row} steps in a row within "
                        f"the steps {first} to {step}, expected at most train.max_bad_steps = {spec.max_bad_steps}",
                        first,
                        step,
                    )
        totals = jax.tree.map(lambda *sums: np.sum(np.stack(sums), axis=0), *pending)
        scalars = {name: float(average.compute()) for name, average in totals.items() if average.count > 0}
        for name, what in (("loss", "loss"), ("gradient_norm", "gradient norm")):
            if not np.isfinite(scalars.get(name, 0.0)):
                raise Diverged(
                    f"got a {what} of {scalars[name]} in steps {first} to {step}, expected a finite number", first, step
                )
        if spec.max_bad_steps:
            scalars["skipped_steps"] = float(np.sum(skipped))
        now = time.monotonic()
        rate = self.rate = (step - self._step) / (now - self._time)
        scalars |= {
            RATE: rate,
            "images_per_second": rate * spec.batch_size,
            "data_wait_fraction": self._waited / (now - self._time),
        }
        if self._least_seconds is not None:
            scalars["model_flops_utilisation"] = rate * self._least_seconds
        self._writer.write_scalars(step, scalars)
        loss = scalars.get("loss", np.nan)  # all were skipped
        if not self.is_drawn:
            logging.info(
                "%s: step %d/%d, loss %.4f, %.1f steps/s, %.0f images/s, %s left",
                self._experiment.name,
                step,
                spec.num_steps,
                loss,
                rate,
                scalars["images_per_second"],
                terminal.duration((spec.num_steps - step) / rate),
            )
        self._said = (
            f"loss {loss:.4f}, {scalars['images_per_second']:.0f} images/s, "
            f"{scalars['data_wait_fraction']:.0%} waiting for data"
        )
        self._pending, self._step, self._time, self._waited = [], step, now, 0.0


def finish(experiment: Experiment, workdir: str) -> None:
    """Scores, sample grid, and the table that ends a run; or the grid alone."""
    report = os.path.join(workdir, "report")
    grid_path = os.path.join(report, "samples.png")
    teacher, specs = experiment.diffusion_teacher(workdir), evaluation.default_samplers(experiment)
    if not experiment.eval.at_end:
        models = [(experiment, evaluation.read_ema(experiment, workdir), specs[-1])]
        if teacher is not None:
            of_teacher = evaluation.short_teacher_samplers(experiment)[-1]
            models.append((teacher.experiment, evaluation.read_ema(teacher.experiment, teacher.workdir), of_teacher))
        _write_grid(report, experiment, evaluation.sample_grid(models, experiment.eval.batch_size))
        logging.info("samples: %s; python -m mscm.eval gives the scores", grid_path)
        return
    logging.info("Scoring %d images a sampler", experiment.eval.num_images)
    with reading(workdir) as checkpoints:
        newest = checkpoints.check(experiment.facts())
    with Evaluation(experiment, workdir, wait=True) as job:
        rows = job.score(experiment, workdir, newest, specs)
        shown = rows[-1:]
        if teacher is not None:
            ancestors = job.ancestor_rows(evaluation.short_teacher_samplers(experiment))
            rows += ancestors
            shown += [row for row in ancestors if row["model"] == teacher.experiment.name][-1:]
        if shown and distributed.is_main():  # the others need not see its files
            _write_grid(report, experiment, job.grid(shown))
        if not rows:
            raise CheckpointError(
                f"{workdir}: got no score, because step {newest} was deleted before it had one; run it again"
            )
        rows += job.real_rows()
    if distributed.is_main():
        atomic.write_text(os.path.join(report, "scores.json"), json.dumps(rows, indent=2) + "\n")
        print(f"\n{score_rows.table(rows)}\n\nsamples: {grid_path}\n", flush=True)


def _write_grid(report: str, experiment: Experiment, samples: np.ndarray) -> None:
    if distributed.is_main():
        grid.save_png(os.path.join(report, "samples.png"), samples)
        with Writer(report) as writer:
            writer.write_images(experiment.train.num_steps, {"samples": samples})
