"""Puts the networks of a finished run of the digits into the package, for mscm.demo, and scores what is put there.

  python -m benchmarks.demo_networks --runs=runs/methods/seed_0

The directory is one of launch/reproduce_digits.sh: a work directory for each of teacher, cd1, cd2, cd4 and cd8. The
networks are kept as float16, half the size; the table shows what that costs.
"""

from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from mscm import demonstration as demo
from mscm import evaluation
from mscm.experiment import Experiment
from mscm.metrics import files, gathering
from mscm.report.table import format_table
from mscm.sampling import SamplerSpec
from mscm.types import Params

RUNS = flags.DEFINE_string("runs", None, "Directory with the work directories.")


def score(scorer: evaluation.Scorer, experiment: Experiment, params: Params, spec: SamplerSpec) -> float:
    """fd_classifier of as many images as there are real ones."""
    settings = scorer.spec
    under_way = gathering.Gathering(settings.num_images, num_kept=settings.num_kept)
    images = evaluation.generate(
        experiment,
        params,
        spec,
        num_images=settings.num_images,
        batch_size=settings.batch_size,
        seed=0,
        conditions=evaluation.conditions_of_images(experiment, 0),
    )
    gathering.over(images, scorer.network, under_way)
    return scorer.compare(under_way.statistics())[scorer.metric]


def main(_: list[str]) -> None:
    """Reads, rounds, scores, writes."""
    logging.set_verbosity(logging.WARNING)
    root = Path(RUNS.value)
    steps_of = {demo.TEACHER: [*demo.STUDENTS, demo.LARGEST]} | {name: [n] for n, name in demo.STUDENTS.items()}
    networks, distances, lines, scorer = {}, {}, [], None
    for name, counts in steps_of.items():
        experiment = demo.experiment_of(name)
        workdir = root / name.removeprefix("digits_")
        scorer = scorer or evaluation.Scorer(experiment, str(workdir / "eval"))
        params = jax.device_get(evaluation.read_ema(experiment, str(workdir)))
        networks[name] = jax.tree.map(lambda leaf: leaf.astype(np.float16), params)
        distances[name] = {}
        for num_steps in counts:
            spec = demo.sampler_of(experiment, num_steps)
            whole, half = (score(scorer, experiment, p, spec) for p in (params, demo.widened(networks[name])))
            lines.append([name, num_steps, whole, half])
            distances[name][str(num_steps)] = round(half, 2)
    distances["real"] = round(scorer.half_against_half()[scorer.metric], 2)
    print(format_table(["network", "steps", "fd_classifier", "of float16"], lines))
    files.save(demo.NETWORKS, files.flat(networks), {"fd_classifier": distances})
    print(f"{demo.NETWORKS}: {Path(demo.NETWORKS).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    flags.mark_flag_as_required("runs")
    app.run(main)
