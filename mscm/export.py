"""Writes a trained sampler as one file of StableHLO, with its parameters inside; JAX runs it without this package.

  python -m mscm.export --config=configs/digits_cd4.py --workdir=DIR --output=digits_cd4.stablehlo
  python -m mscm.export --config=configs/digits_teacher.py --workdir=DIR --sampler=heun --num_steps=18 --output=FILE

FILE runs on CPUs, NVIDIA GPUs and TPUs, with any number of images in a call; FILE.json says what it is and what its
inputs are. Its images are those of mscm.sample: image i of a seed with its label or caption. docs/howto/export.md has a
program that loads it. JAX can run it for six months of its own releases; to keep a model longer, keep its directory.
"""

from absl import flags

from mscm import cli, run_flags, sampler_flags

flags.adopt_module_key_flags(run_flags)  # so that --help lists them
flags.adopt_module_key_flags(sampler_flags)

OUTPUT = flags.DEFINE_string("output", None, "File to write; what it is goes to FILE.json.")


def main() -> None:
    """Checks, traces, writes."""
    import json  # here and not above: --help must not wait for jax

    from mscm import atomic, averages, exporting
    from mscm.checkpoint import reading
    from mscm.config import run_of
    from mscm.experiment import build

    experiment, workdir = build(run_flags.CONFIG.value).for_evaluation(), cli.path_of(run_flags.WORKDIR)
    spec, average = sampler_flags.chosen(experiment)
    exporting.check(experiment)
    with reading(workdir) as checkpoints:
        step = checkpoints.check(experiment.facts(), sampler_flags.STEP.value)
        run = run_of(checkpoints.facts(step))
    output = cli.output_of(OUTPUT)
    content = exporting.serialised(experiment, averages.read(experiment, workdir, average, step), spec)
    card = exporting.describe(
        experiment, spec, step=step, average=average or sampler_flags.EMA.value, run=run, content=content
    )
    with atomic.writing(output) as file:
        file.write(content)
    atomic.write_text(f"{output}.json", json.dumps(card, indent=2) + "\n")
    print(
        f"{experiment.name}, step {step}, {spec}, NFE {card['nfe']}, for {', '.join(exporting.PLATFORMS)}: {output}, "
        f"{len(content)} bytes",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=(*run_flags.REQUIRED, "output"))
