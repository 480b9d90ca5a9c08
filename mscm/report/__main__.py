"""Writes the report of a run, one file for any browser: WORKDIR/report/index.html.

  python -m mscm.report --workdir=DIR

Of any work directory, also of one that is being trained: config, curves, scores, samples over training from the same
noise, hardware and time. mscm.main writes it where it ends, mscm.eval after each checkpoint that it has scored.
"""

from absl import flags

from mscm import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training.")


def main() -> None:
    """Reads, writes, says where."""
    from mscm import run_report  # here and not above: --help must not wait for jax

    print(run_report.write(cli.path_of(WORKDIR)), flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("workdir",))
