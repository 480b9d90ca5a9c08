"""Trains a model: the teacher first, if the student has none.

  python -m mscm.main --config=configs/digits_cd4.py --workdir=DIR

Run again with the same flags, it continues from the last checkpoint; SIGTERM (exit code 75) or Ctrl-C makes one. Any
key of the config can be overridden: --config.train.num_steps=100. Writes below DIR: checkpoints/, events (TensorBoard),
report/ (index.html, which shows all, samples.png, scores.json), and teacher/ (the teacher's own work directory, unless
config.teacher.workdir names one).

--dry_run checks all that can be checked, prints what would happen, and writes nothing.
Where it ends because a loss or a gradient is not finite, --replay=STEP finds the step; it writes nothing.
"""

from absl import flags

from mscm import cli, process_flags, run_flags

flags.adopt_module_key_flags(run_flags)  # so that --help lists them
flags.adopt_module_key_flags(process_flags)

REPLAY = flags.DEFINE_integer("replay", None, "Repeat the steps before a divergence that was noticed at this one.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print what would happen, and write nothing.")


def main() -> None:
    """Builds, checks, trains, scores."""
    from mscm import distributed, stopping, training_loop  # here and not above: --help must not wait for jax
    from mscm.config import ConfigError
    from mscm.experiment import build

    process_flags.start()
    experiment, workdir = build(run_flags.CONFIG.value), cli.path_of(run_flags.WORKDIR)
    if REPLAY.value is not None and DRY_RUN.value:
        raise ConfigError("--replay: got it with --dry_run, expected one of them")
    if REPLAY.value is not None:
        from mscm.replay import replay

        sentence = replay(experiment, workdir, REPLAY.value)
        if distributed.is_main():
            print(sentence)
        return
    if DRY_RUN.value:
        from mscm.dry_run import dry_run

        text = dry_run(experiment, workdir)
        if distributed.is_main():
            print(text)
        return
    stopping.listen()
    training_loop.run(experiment, workdir)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=run_flags.REQUIRED)
