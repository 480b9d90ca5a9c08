"""Scoring of checkpoints, one after the other, in a way that a kill at any moment costs little and changes nothing.

    WORKDIR/eval/scores.jsonl        one line for each checkpoint, sampler and seed: written once, never changed
    WORKDIR/eval/partial.npz         the evaluation under way
    WORKDIR/eval/samples/...         the first images of each, .png and .npz
    WORKDIR/eval/best/STEP           a work directory with the best checkpoint so far; STEP-RUN: of a run before
    WORKDIR/eval/events...           the scores by step (TensorBoard)
    WORKDIR/eval/owner.json          which process does this: one at a time
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from absl import logging
from etils import epath

from mscm import atomic, averages, cli, distributed, evaluation, run_report, score_rows, stopping, terminal
from mscm.arrays import read_npz
from mscm.checkpoint import CheckpointError, Checkpoints, UnreadableCheckpoint, reading
from mscm.config import run_of
from mscm.evaluation import Scorer
from mscm.experiment import Experiment
from mscm.metrics import gathering
from mscm.metrics.gathering import Gathering, Partial
from mscm.report import events, grid
from mscm.report.writer import Writer
from mscm.sampling import SamplerSpec
from mscm.types import Params

_Read = TypeVar("_Read")

_POLL_SECONDS = 10.0
_LOOKS, _LOOK_SECONDS = 16, 2.0  # at a checkpoint that cannot be read: half a minute


class Evaluation:
    """The scores of a run: its checkpoints, and its teacher's, under the run's settings; a context manager."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: str,
        *,
        allow_mismatch: bool = False,
        save_every_seconds: float = 60.0,
        averages: Sequence[str | None] = (None,),
        wait: bool = False,
    ):
        """Takes the directory, makes network and reference, and reads the scores that are there.

        Args:
          averages: those of the parameters that are scored, as `averages.chosen` gives them; of a teacher the main one.
          wait: for the end of another job on the directory, instead of refusing.

        Raises:
          LeaseError: there is another.
          ConfigError: as `Scorer`.
        """
        self.experiment, self._workdir = experiment, workdir
        self.directory = os.path.join(workdir, "eval")
        self.scores_file = os.path.join(self.directory, "scores.jsonl")
        self._partial = os.path.join(self.directory, "partial.npz")
        self._save_every_seconds, self._averages = save_every_seconds, averages
        with contextlib.ExitStack() as stack:
            owner = os.path.join(self.directory, "owner.json")
            self._check_ours = stack.enter_context(distributed.holding(owner, "evaluation", wait=wait))
            score_rows.read(self.scores_file)  # refuses what is none, before what takes long
            self.scorer = Scorer(experiment, self.directory, allow_mismatch=allow_mismatch)
            self._writer = stack.enter_context(Writer(self.directory, active=distributed.is_main()))
            self._writer.write_texts(0, {events.HARDWARE: distributed.hardware()})
            self._open = stack.pop_all()

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def rows(self) -> list[dict[str, Any]]:
        """The scores that are there and comparable with new ones, in the order in which they were made."""
        spec = self.scorer.spec
        settings = (spec.num_images, spec.labels)
        return [
            row
            for row in score_rows.read(self.scores_file)
            if row["identity"] == self.scorer.identity
            # The row of real images has no labels.
            if row["labels"] is None or ((row["num_images"], row["labels"]) == settings and row["seed"] in spec.seeds)
        ]

    def watch(self, *, once: bool) -> None:
        """Scores the checkpoints of the work directory as they appear, until training has ended.

        Args:
          once: end when all that are there have scores.
        """
        waiting, scored = False, set()
        while True:
            steps = distributed.agree(self._steps())
            specs = evaluation.default_samplers(self.experiment)
            new = {
                step
                for step in steps
                if step not in scored and self.score(self.experiment, self._workdir, step, specs)
            }
            if new:
                run_report.update(self._workdir)
            scored |= new
            if once or distributed.agree(bool(steps) and self._is_last(steps[-1])):
                return
            if not waiting:
                logging.info("Waiting for checkpoints of %s in %s", self.experiment.name, self._workdir)
                waiting = True
            time.sleep(_POLL_SECONDS)
            stopping.end_if_asked()

    def _steps(self) -> list[int]:
        try:
            with reading(self._workdir) as checkpoints:
                return checkpoints.steps()
        except CheckpointError:  # there is no directory yet
            return []

    def _is_last(self, step: int) -> bool:
        """Whether training has ended with the checkpoint of `step`."""
        facts = self._unless_deleted(self._workdir, step, lambda: _facts_of(self._workdir, step))
        return facts is not None and step >= facts["config"]["train"]["num_steps"]

    def _unless_deleted(self, workdir: str, step: int, read: Callable[[], _Read]) -> _Read | None:
        """What `read` gives; None where it fails because training has deleted the checkpoint.

        Which takes its time: the arrays go before the folder, and a step is still listed that cannot be read.
        """
        for looks_left in reversed(range(_LOOKS)):
            try:
                return read()
            except Exception as error:  # whatever Orbax raises when files vanish under it
                with reading(workdir) as checkpoints:
                    if step not in checkpoints.steps():
                        break
                is_final = isinstance(error, CheckpointError) and not isinstance(error, UnreadableCheckpoint)
                if not looks_left or is_final:  # of another model, say
                    raise
            time.sleep(_LOOK_SECONDS)
        logging.warning("Step %d in %s: training has deleted it before it had a score", step, workdir)
        return None

    def score(
        self, model: Experiment, workdir: str, step: int, specs: list[SamplerSpec], *, make: bool = True
    ) -> list[dict[str, Any]]:
        """The rows of a checkpoint, made where they are not there; none where training has deleted it meanwhile.

        Args:
          make: False gives only those that are there.

        Raises:
          ConfigError: it was trained on images that were resized otherwise than those of the reference.
          CheckpointError: it does not have the averages.
        """
        facts = distributed.agree(self._unless_deleted(workdir, step, lambda: _facts_of(workdir, step)))
        if facts is None:
            return []
        run = run_of(facts)
        mismatch = self.scorer.differences(evaluation.reference_facts(self.experiment, facts))
        said = {}
        for average in self._averages if model is self.experiment else (None,):
            described = self._unless_deleted(
                workdir, step, functools.partial(averages.describe, self.experiment, workdir, average, step)
            )
            said[average] = distributed.agree(described)
        if None in said.values():
            return []
        wanted = {
            average: [
                self._key(model, run, step, spec, seed, mismatch) | described
                for spec in specs
                for seed in self.scorer.spec.seeds
            ]
            for average, described in said.items()
        }
        keys = [key for of_one in wanted.values() for key in of_one]
        done = distributed.agree([[_key_of(row), row] for row in self.rows()])
        done = {tuple(key): row for key, row in done}
        if not make:
            return [done[_key_of(key)] for key in keys if _key_of(key) in done]
        for average, of_one in wanted.items():
            missing = [key for key in of_one if _key_of(key) not in done]
            # Not kept where a kill came between the last row and the copy.
            keeps = average is None and model is self.experiment
            keeps = keeps and (bool(missing) or distributed.agree(self._lacks_best(run, step)))
            if missing or keeps:
                read = functools.partial(averages.read, model, workdir, average, step)
                params = self._unless_deleted(workdir, step, read)
                if not distributed.everyone(params is not None):
                    return []
                for key in missing:
                    done[_key_of(key)] = self._make(model, params, key)
                if keeps and distributed.agree(self._lacks_best(run, step)):
                    self._keep_best(params, step, facts)
        return [done[_key_of(key)] for key in keys]

    def _key(
        self, model: Experiment, run: str, step: int, spec: SamplerSpec, seed: int, mismatch: list[str]
    ) -> dict[str, Any]:
        settings = self.scorer.spec
        nfe = evaluation.num_evaluations(model, spec)
        return {
            "step": step,
            "run": run,
            "model": model.name,
            "sampler": spec.sampler,
            "nfe": nfe,
            **({"num_steps": spec.num_steps} if spec.num_steps != nfe else {}),
            "seed": seed,
            "num_images": settings.num_images,
            "labels": settings.labels,
            **self.scorer.describe(mismatch),
        }

    def _make(self, model: Experiment, params: Params, key: dict[str, Any]) -> dict[str, Any]:
        """One row: generates the images, going on where an interrupted evaluation of it stopped, and writes it."""
        spec = SamplerSpec.of_row(key)
        under_way = None  # the main process gathers; the others only take part
        if distributed.is_main():
            under_way = Gathering(
                key["num_images"],
                num_kept=self.scorer.spec.num_kept,
                num_samples=evaluation.GRID_IMAGES,
                partial=Partial(self._partial, key, self._save_every_seconds, before_write=self._check_ours),
            )
        start = distributed.agree(under_way.count if under_way else None)
        what = f"{model.name}, step {key['step']}, {spec}" + (f", seed {key['seed']}" if key["seed"] else "")
        what += f", ema {key['ema']}" if "ema" in key else ""
        if start:
            logging.info("%s: continuing after %d images", what, start)
        batches = evaluation.generate(
            model,
            params,
            spec,
            num_images=key["num_images"],
            batch_size=self.scorer.spec.batch_size,
            seed=key["seed"],
            conditions=evaluation.conditions_of_images(self.experiment, key["seed"]),
            start=start,
        )
        network = self.scorer.network_for(key["seed"], start)
        with terminal.Progress(what, key["num_images"], done=start) as progress:
            gathering.over(batches, network, under_way, watch=progress.add)
        row = key | self._compare(under_way)
        logging.info("%s: %s %.4g", what, self.scorer.metric, row[self.scorer.metric])
        if under_way:
            self._write(row, under_way)
        distributed.barrier()  # who reads what belongs to the row finds it
        return row

    def score_images(self, batches: Iterable[np.ndarray], num_images: int, name: str) -> dict[str, Any]:
        """A row for images of any origin; it is not written."""
        whole = Gathering(num_images, num_kept=self.scorer.spec.num_kept)
        with terminal.Progress(name, num_images) as progress:
            gathering.over(batches, self.scorer.network, whole, watch=progress.add)
        return {"model": name, "num_images": num_images, **self.scorer.describe(), **self._compare(whole)}

    def newest(self) -> tuple[int, list[dict[str, Any]]]:
        """Step and rows of the newest checkpoint that has scores.

        Raises:
          CheckpointError: none has.
        """
        rows = [row for row in distributed.agree(self.rows()) if row["model"] == self.experiment.name]
        if not rows:
            raise CheckpointError(
                f"{self._workdir}: got no checkpoint that stayed long enough to be scored; keep more of them with "
                "config.train.keep_checkpoints"
            )
        rows = score_rows.newest(rows)
        return rows[0]["step"], rows

    def ancestor_rows(self, specs: list[SamplerSpec], *, make: bool = True) -> list[dict[str, Any]]:
        """The rows of the newest checkpoint of all that the model comes from, oldest first, as `score`.

        A diffusion model's under `specs`, those of a phase under its own sampler; none of a model that is not here.
        """
        rows = []
        for member in self.experiment.lineage(self._workdir)[:-1]:
            model, step = member.experiment, None
            try:
                with reading(member.workdir) as checkpoints:
                    step = checkpoints.check(model.facts())
            except CheckpointError as error:
                logging.warning("No scores of %s: %s", model.name, error)
            step = distributed.agree(step)
            if step is not None:
                own = specs if model.student_steps is None else evaluation.default_samplers(model)
                rows += self.score(model, member.workdir, step, own, make=make)
        return rows

    def real_rows(self, *, make: bool = True) -> list[dict[str, Any]]:
        """The reference point of a table, half of the images of the reference against the other half.

        None where the reference is a file, and, with `make` False, where it is not there.
        """
        if self.scorer.spec.reference:
            return []
        count = self.scorer.size_of_half()
        row = dict.fromkeys(score_rows.KEY) | {"model": "real, half against half", "nfe": 0, "num_images": count}
        row |= self.scorer.describe()
        there = distributed.agree([other for other in self.rows() if _key_of(other) == _key_of(row)])
        if there or not make:
            return there
        row |= self.scorer.half_against_half()
        if distributed.is_main():
            self._check_ours()
            cli.append_json_line(self.scores_file, row)
        return [row]

    def _compare(self, gathered: Gathering | None) -> dict[str, float]:
        # By one process: the last digits may differ between hosts.
        scores = None
        if gathered is not None and distributed.is_main():
            scores = self.scorer.compare(gathered.statistics())
        return distributed.agree(scores)

    def _write(self, row: dict[str, Any], gathered: Gathering) -> None:
        """All that belongs to a row, and then the row: who finds it there finds the rest."""
        self._check_ours()
        samples_path, samples = score_rows.samples_path(self.directory, row), gathered.samples
        panel = {os.path.basename(samples_path): samples}
        grid.save_png(f"{samples_path}.png", evaluation.grid_of(self.experiment, panel, row["seed"]))
        with atomic.writing(f"{samples_path}.npz") as file:
            np.savez(file, images=samples)
        name, metrics = score_rows.name_of(row), score_rows.metrics_of(row)
        self._writer.write_scalars(row["step"], {f"{metric}/{name}": value for metric, value in metrics.items()})
        self._writer.flush()
        cli.append_json_line(self.scores_file, row)
        gathered.remove_file()

    def _lacks_best(self, run: str, step: int) -> bool:
        """Whether `step` is the best of its run so far and its copy is not there."""
        if self.best(run)[0] != step:
            return False
        return not self._has_copy(run, step)

    def _has_copy(self, run: str, step: int) -> bool:
        return _run_of_copy(self.best_workdir(step)) == run

    def _keep_best(self, params: Params, step: int, facts: dict[str, Any]) -> None:
        """Copies a checkpoint that is better than all before, because training keeps only its newest.

        A copy of another run stays: there may be no other of it.
        """
        self._check_ours()
        where, run = self.best_workdir(step), run_of(facts)
        if distributed.is_main() and epath.Path(where).exists():
            other_run = _run_of_copy(where)
            if other_run in (None, run):
                epath.Path(where).rmtree()
            else:
                epath.Path(where).rename(f"{where}-{other_run}")
        distributed.barrier()
        with Checkpoints(where, keep=1) as checkpoints:
            checkpoints.save_ema(step, params, facts)
        logging.info("Best so far by %s: step %d, kept in %s", self.scorer.metric, step, where)
        if distributed.is_main():
            for other in epath.Path(where).parent.iterdir():
                if other.name != str(step) and _run_of_copy(other) in (None, run):
                    other.rmtree()

    def best_workdir(self, step: int) -> str:
        """Where the copy of the best checkpoint is: a work directory for `mscm.sample`."""
        return os.path.join(self.directory, "best", str(step))

    def grid(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """The first images of some rows side by side: image i is of the same noise and class in all of them."""
        panels = {}
        for row in rows:
            images = read_npz(f"{score_rows.samples_path(self.directory, row)}.npz")["images"]
            panels[f"{row['model']}, {SamplerSpec.of_row(row)}"] = images
        return evaluation.grid_of(self.experiment, panels, rows[0]["seed"])

    def best(self, run: str) -> tuple[int | None, float]:
        """Step and distance of a run's best checkpoint as `mscm.sample` reads it by default, a mean over seeds.

        Of those that are still there or have a copy: one that training deleted before it was copied is lost.
        """
        spec, metric = evaluation.default_samplers(self.experiment)[-1], self.scorer.metric
        values: dict[int, list[float]] = {}
        for row in self.rows():
            if row["run"] == run and "ema" not in row and SamplerSpec.of_row(row) == spec:
                values.setdefault(row["step"], []).append(row[metric])
        there = self._steps()
        means = {
            step: score_rows.mean_and_spread(distances)[0]
            for step, distances in values.items()
            if step in there or self._has_copy(run, step)
        }
        if not means:
            return None, np.inf
        best = min(means, key=means.__getitem__)
        return best, means[best]


def _facts_of(workdir: str, step: int) -> dict[str, Any]:
    """What a checkpoint says of its model and its data."""
    with reading(workdir) as checkpoints:
        return checkpoints.facts(step)


def _run_of_copy(workdir: str | os.PathLike) -> str | None:
    """Of the copy of a best checkpoint; None where there is none that is whole."""
    try:
        with reading(workdir) as checkpoints:
            return run_of(checkpoints.facts())
    except CheckpointError:
        return None


def _key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return *(row[name] for name in score_rows.KEY), row.get("num_steps"), row.get("ema")
