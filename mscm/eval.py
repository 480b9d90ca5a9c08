"""Scores every checkpoint of a work directory that has not been scored yet.

  python -m mscm.eval --config=configs/digits_cd4.py --workdir=DIR

Writes one JSON line per checkpoint to DIR/eval/scores.jsonl: fd_classifier, the Frechet distance to the data set in the
features of a small classifier trained on it (not FID), under each sampler. Then prints the newest checkpoint beside the
reference points of the same axis: the teacher under aDDIM, and one half of the real images against the other.
"""

import os
import time

from absl import flags

from mscm import cli, run_flags

flags.adopt_module_key_flags(run_flags)  # so that --help lists them


def main() -> None:
    """Scores what is new, prints all."""
    from absl import logging  # here and not above: --help must not wait for jax

    from mscm import distributed, evaluation
    from mscm.checkpoint import reading
    from mscm.experiment import build

    if run_flags.DISTRIBUTED.value:
        distributed.start(run_flags.DISTRIBUTED.value)
    experiment, workdir = build(run_flags.CONFIG.value), run_flags.WORKDIR.value
    source = experiment.data.open()
    with reading(workdir) as checkpoints:
        newest = checkpoints.check(experiment.facts())
        steps = checkpoints.steps()
    teacher = experiment.teacher
    if teacher is not None:
        teacher_params = evaluation.read_ema(teacher.experiment, evaluation.teacher_workdir_of(experiment, workdir))

    directory = os.path.join(workdir, "eval")
    scorer = evaluation.Scorer(source, directory, experiment.eval)
    specs = evaluation.default_samplers(experiment)
    scores_file = os.path.join(directory, "scores.jsonl")
    identity = evaluation.identity(experiment, scorer, specs)
    scored = {line["step"]: line for line in cli.read_json_lines(scores_file) if line["identity"] == identity}
    for step in steps:
        if step in scored:
            continue
        started = time.monotonic()
        params = evaluation.read_ema(experiment, workdir, step)
        rows = [scorer.score(experiment, params, spec).row() for spec in specs]
        seconds = round(time.monotonic() - started, 3)
        scored[step] = {"step": step, "identity": identity, "seconds": seconds, "scores": rows}
        if distributed.is_main():
            cli.append_json_line(scores_file, scored[step])
        logging.info("Step %d scored in %s", step, cli.duration(seconds))

    rows = list(scored[newest]["scores"])
    if teacher is not None:
        teacher_specs = evaluation.diffusion_samplers(experiment)
        rows += [scorer.score(teacher.experiment, teacher_params, spec).row() for spec in teacher_specs]
    rows.append(evaluation.real_row(scorer))
    if distributed.is_main():
        print(f"\nstep {newest}\n{evaluation.result_table(rows)}\n\nall checkpoints: {scores_file}\n", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=run_flags.REQUIRED)
