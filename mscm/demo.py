"""What the method does, in a picture, without training: digits in 1, 2, 4 and 8 steps, teacher and student.

  python -m mscm.demo

The networks are in the package: those of configs/digits_teacher.py and configs/digits_cd{1,2,4,8}.py after their whole
training, which takes minutes (README). Each column starts from the same noise in all rows.
"""

from absl import flags

from mscm import cli

OUTPUT = flags.DEFINE_string("output", "demo.png", "FILE.png to write.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 20, "Images a row.", lower_bound=1, upper_bound=100)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)


def main() -> None:
    """Samples, draws, says what was measured."""
    import numpy as np  # here and not above: --help must not wait for jax

    from mscm import demonstration, sampling
    from mscm.config import ConfigError
    from mscm.report import grid, table

    if not OUTPUT.value.endswith(".png"):
        raise ConfigError(f"--output: got {OUTPUT.value!r}, expected a name that ends in .png")
    output = cli.output_of(OUTPUT)
    rows, real = demonstration.sample(NUM_IMAGES.value, SEED.value)
    images = np.concatenate([row.images for row in rows])
    grid.save_png(output, grid.image_grid(images, columns=NUM_IMAGES.value, row_titles=[row.title for row in rows]))

    distances = {(row.who, row.num_steps): row.distance for row in rows}
    counts = sorted({row.num_steps for row in rows})
    header = ["fd_classifier", *map(sampling.steps_in_words, counts)]
    lines = [[who, *(distances.get((who, count)) for count in counts)] for who in ("teacher", "student")]
    print(table.format_table(header, lines))
    print(
        "As measured when the networks were put there: the Frechet distance of 1,797 images to the real ones in the "
        f"features of a digit classifier, less is better; between halves of the real ones {real}."
    )
    print(f"{len(rows)} rows of images: {output}", flush=True)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=())
