"""Draws images from a checkpoint: a PNG grid, a folder of PNGs, or one npz file.

  python -m mscm.sample --config=configs/digits_cd4.py --workdir=DIR --output=samples.png
  python -m mscm.sample --config=configs/digits_teacher.py --workdir=DIR --sampler=heun:grid=karras --num_steps=18

The name of --output decides: FILE.png is a grid, FILE.npz holds `images` (uint8, n h w c) and `labels`, any other name
is a folder with one PNG per image. Image i depends on --seed and i only.
"""

import os

from absl import flags

from mscm import cli, run_flags

flags.adopt_module_key_flags(run_flags)  # so that --help lists them

OUTPUT = flags.DEFINE_string("output", None, "FILE.png, FILE.npz or a folder. Default: WORKDIR/samples.png")
NUM_IMAGES = flags.DEFINE_integer("num_images", 50, "Number of images.", lower_bound=1)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps. Default: a student's own; a teacher's largest.")
SAMPLER = flags.DEFINE_string(
    "sampler", None, "Such as ddim:eta=0.5, see README. Default: ddim for a student, a teacher's last in config.eval."
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to read. Default: the newest.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)
LABELS = flags.DEFINE_list("labels", None, "Class indices, repeated as needed. Default: all classes in turn.")
FORCE = flags.DEFINE_bool("force", False, "Sample a student with a sampler that it was not trained for.")


def main() -> None:
    """Checks, samples, writes."""
    import numpy as np  # here and not above: --help must not wait for jax

    from mscm import atomic, evaluation
    from mscm.config import ConfigError
    from mscm.experiment import build
    from mscm.report import grid
    from mscm.sampling import SamplerSpec, own_steps

    experiment, workdir = build(run_flags.CONFIG.value).for_evaluation(), cli.path_of(run_flags.WORKDIR)
    default = evaluation.default_samplers(experiment)[-1]
    sampler, num_steps = default.sampler if SAMPLER.value is None else SAMPLER.value, NUM_STEPS.value
    if num_steps is None:
        num_steps = own_steps(sampler) or default.num_steps
    spec = SamplerSpec(sampler, num_steps)
    evaluation.check_sampler(experiment, spec, force=FORCE.value)
    num_classes = experiment.data.num_classes
    indices = np.arange(NUM_IMAGES.value)
    labels = indices % num_classes
    if LABELS.value:
        if not all(text.isdecimal() and int(text) < num_classes for text in LABELS.value):
            raise ConfigError(f"--labels: got {','.join(LABELS.value)}, expected numbers from 0 to {num_classes - 1}")
        labels = np.resize(np.array(LABELS.value, np.int32), NUM_IMAGES.value)

    params = evaluation.read_ema(experiment, workdir, STEP.value)
    if OUTPUT.value is None:
        output = os.path.join(workdir, "samples.png")
    else:
        output = cli.output_of(OUTPUT, "file" if OUTPUT.value.endswith((".png", ".npz")) else "folder")
    images = np.concatenate(
        list(
            evaluation.generate(
                experiment,
                params,
                spec,
                num_images=NUM_IMAGES.value,
                batch_size=min(NUM_IMAGES.value, experiment.eval.batch_size),
                seed=SEED.value,
                labels=labels,
            )
        )
    )
    if output.endswith(".png"):
        columns = min(len(images), num_classes, 10)
        grid.save_png(output, grid.image_grid(images, columns=columns, title=f"{experiment.name}, {spec}"))
    elif output.endswith(".npz"):
        with atomic.writing(output) as file:
            np.savez(file, images=images, labels=labels)
    else:
        for i, image in enumerate(images):
            grid.save_png(os.path.join(output, f"{i:06d}.png"), image)
    nfe = evaluation.num_evaluations(experiment, spec)
    print(f"{len(images)} images of {experiment.name}, {spec}, NFE {nfe}: {output}", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=run_flags.REQUIRED)
