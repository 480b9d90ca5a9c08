"""Scores the checkpoints of a work directory as training writes them, and ends when training has ended.

  python -m mscm.eval --config=configs/digits_cd4.py --workdir=DIR
  python -m mscm.eval --config=configs/digits_cd4.py --workdir=DIR --images=samples.npz
  python -m mscm.eval --config=configs/digits_averaged.py --workdir=DIR --once --ema=main,0.05,0.1,0.15

Writes below DIR/eval: scores.jsonl (one line for each checkpoint, sampler and seed), samples/, events (TensorBoard)
and best/STEP, a copy of the best checkpoint; and DIR/report/index.html, the report of the run. Killed, it continues
inside the evaluation that it was in. At the end it prints the newest checkpoint beside the reference points of the same
axis: the teacher, and one half of the real images against the other (with --checkpoint only those that are there).
config.eval says what is measured: in the features of a small classifier (fd_classifier, not FID), or with
--config.eval.network=inception FID, sFID, KID, the Inception score, precision and recall. Where config.mesh does not
fit the devices, each of them has a copy of the parameters.
"""

import os
from typing import TYPE_CHECKING

from absl import flags

from mscm import cli, process_flags, run_flags

if TYPE_CHECKING:
    from mscm.experiment import Experiment

flags.adopt_module_key_flags(run_flags)  # so that --help lists them
flags.adopt_module_key_flags(process_flags)

ONCE = flags.DEFINE_bool("once", False, "Score the checkpoints that are there, and end.")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Score the checkpoint of this step, and nothing else.")
IMAGES = flags.DEFINE_string("images", None, "Score these: a folder, zip or tar of images, or an .npz.")
EMA = flags.DEFINE_list(
    "ema", ["main"], "Averages of the parameters to score: main, names in config.ema.further, or a sigma_rel each."
)
ALLOW_MISMATCH = flags.DEFINE_bool(
    "allow_mismatch", False, "Score against a reference of other images than the config's; the scores are marked."
)
SAVE_EVERY = flags.DEFINE_float(
    "save_every_seconds", 60.0, "Time between two copies of the evaluation under way.", lower_bound=0.0
)


def main() -> None:
    """Scores what is new, prints all."""
    _refuse_flags_without_effect()
    from mscm import (  # here and not above: --help must not wait for jax
        averages,
        distributed,
        evaluation,
        run_report,
        score_rows,
    )
    from mscm.checkpoint import reading
    from mscm.config import ConfigError
    from mscm.evaluation_loop import Evaluation
    from mscm.experiment import build

    process_flags.start()
    experiment, workdir = build(run_flags.CONFIG.value).for_evaluation(), cli.path_of(run_flags.WORKDIR)
    experiment.mesh  # noqa: B018 refuses an attention that does not fit before hours of reference statistics
    chosen = averages.chosen(experiment, EMA.value)
    if IMAGES.value is not None:
        _score_images(experiment, workdir)
        return
    if ONCE.value or CHECKPOINT.value is not None:
        with reading(workdir) as checkpoints:
            checkpoints.check(experiment.facts(), CHECKPOINT.value)
    with Evaluation(
        experiment, workdir, allow_mismatch=ALLOW_MISMATCH.value, save_every_seconds=SAVE_EVERY.value, averages=chosen
    ) as job:
        if CHECKPOINT.value is not None:
            step = CHECKPOINT.value
            rows = job.score(experiment, workdir, step, evaluation.default_samplers(experiment))
            if not rows:
                raise ConfigError(f"--checkpoint: got step {step}, which was deleted before it had a score")
        else:
            job.watch(once=ONCE.value)
            step, rows = job.newest()
        make = CHECKPOINT.value is None
        rows = [*rows, *job.ancestor_rows(evaluation.diffusion_samplers(experiment), make=make)]
        rows += job.real_rows(make=make)
    run_report.update(workdir)
    if distributed.is_main():
        print(f"\nstep {step}\n{score_rows.table(rows)}\n\nall checkpoints: {job.scores_file}\n", flush=True)


def _refuse_flags_without_effect() -> None:
    from mscm.config import ConfigError

    given = [f"--{flag.name}" for flag in (IMAGES, CHECKPOINT) if flag.value is not None]
    given += ["--once"] if ONCE.value else []
    if IMAGES.value is not None and EMA.present:
        raise ConfigError("--ema: got it with --images, expected none: no checkpoint is read")
    if IMAGES.value is not None and SAVE_EVERY.present:
        raise ConfigError("--save_every_seconds: got it with --images, expected none: images are scored in one go")
    if len(given) > 1:
        raise ConfigError(f"got {' and '.join(given)}, expected one of them: each says what to score")
    if IMAGES.value == "":
        raise ConfigError("--images: got an empty name, expected a folder, zip or tar of images, or an .npz")


def _score_images(experiment: "Experiment", workdir: str) -> None:
    """Prints a table of one line, and writes the line to a file beside the other scores."""
    from mscm import distributed, score_rows
    from mscm.config import ConfigError
    from mscm.data import loose
    from mscm.evaluation_loop import Evaluation

    data, name = experiment.data, cli.given(IMAGES)
    try:
        images = loose.open_images(name, resolution=data.resolution, channels=data.channels)
    except ValueError as error:
        raise ConfigError(f"--images: {error}") from error
    if len(images) < 4:
        raise ConfigError(f"--images: got {len(images)} images, expected at least 4 to compare with others")
    next(images.batches(1))  # refuses a wrong size before hours of reference statistics
    with Evaluation(experiment, workdir, allow_mismatch=ALLOW_MISMATCH.value) as job:
        row = job.score_images(images.batches(experiment.eval.batch_size), len(images), name)
        rows = [row, *job.real_rows()]
    if distributed.is_main():
        path = os.path.join(job.directory, "images.jsonl")
        cli.append_json_line(path, row)
        print(f"\n{score_rows.table(rows)}\n\nalso in {path}\n", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=run_flags.REQUIRED)
