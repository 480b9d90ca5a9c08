"""Compares runs: one figure and one table of score against number of function evaluations, and samples side by side.

  python -m mscm.compare --workdir=DIR1,DIR2,... --output=DIR

Each directory is that of a training with scores (mscm.main writes some at its end, mscm.eval all), and counts with its
newest scored checkpoint and its teacher's. Runs that differ in config.seed only are one model with a spread. Writes
below --output: compare.html, which has all of it; compare.png, compare.svg, compare.csv, compare.md; samples.png, where
image i of every row is from the same noise; and for configs/toy_mixture.py trajectories.png and .svg. Times are
measured here, on one device. Runs whose configs import a module of yours (docs/extend) need --modules=NAME.
"""

import importlib

from absl import flags

from mscm import cli

WORKDIR = flags.DEFINE_list("workdir", None, "Work directories of trainings, with commas between them.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
METRIC = flags.DEFINE_string("metric", None, "Score of the figure. Default: the Frechet distance.")
TIME = flags.DEFINE_bool("time", True, "Measure the time per image; --notime does not.")
MODULES = flags.DEFINE_list("modules", [], "Modules to import first: those that the configs of the runs import.")


def main() -> None:
    """Reads, draws, writes, prints the table."""
    from mscm import comparison  # here and not above: --help must not wait for jax
    from mscm.config import ConfigError

    if not WORKDIR.value:
        raise ConfigError("--workdir: got none, expected one or more with commas between them")
    for name in MODULES.value:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--modules: got {name!r} ({error}), expected modules that can be imported") from error
    found = comparison.compare(WORKDIR.value)
    metric = comparison.choose_metric(found, METRIC.value)  # before what takes long
    output = cli.output_of(OUTPUT, "folder")
    drawn = comparison.draw(found, timed=TIME.value)
    written = comparison.write(found, drawn, output, metric=metric)
    print(f"\n{comparison.markdown(found, drawn)}\n{', '.join(written)}\n", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("workdir", "output"))
