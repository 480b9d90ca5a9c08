"""Draws images from a checkpoint: a PNG grid, a folder of PNGs, or one npz file.

  python -m mscm.sample --config=configs/digits_cd4.py --workdir=DIR --output=samples.png
  python -m mscm.sample --config=configs/digits_teacher.py --workdir=DIR --sampler=heun:grid=karras --num_steps=18

  python -m mscm.sample --config=configs/captioned_digits_cd8.py --workdir=DIR --teacher --prompt="a seven above a two"

The name of --output decides: FILE.png is a grid, FILE.npz holds `images` (uint8, n h w c) and `labels` or `captions`,
any other name is a folder with one PNG per image, written batch by batch. Image i depends on --seed, i and its label or
caption only.
"""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from mscm import cli, run_flags, sampler_flags, terminal

if TYPE_CHECKING:
    import numpy as np

    from mscm.evaluation import Shown
    from mscm.experiment import Experiment

flags.adopt_module_key_flags(run_flags)  # so that --help lists them
flags.adopt_module_key_flags(sampler_flags)

OUTPUT = flags.DEFINE_string("output", None, "FILE.png, FILE.npz or a folder. Default: WORKDIR/samples.png")
NUM_IMAGES = flags.DEFINE_integer("num_images", 50, "Number of images.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**31 - 1)
LABELS = flags.DEFINE_list("labels", None, "Class indices, repeated as needed. Default: all classes in turn.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; several times for several, which are repeated as needed.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Text file with a caption a line, after those of --prompt.")
TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Directory of the text encoder, where the model was trained on what one makes of captions."
)
TEACHER = flags.DEFINE_bool("teacher", False, "In a grid, a student's teacher beside it, from the same noise.")

# Nobody means a folder by these.
_OTHER_FILES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".svg", ".npy", ".zip")


def main() -> None:
    """Checks, samples, writes."""
    import numpy as np  # here and not above: --help must not wait for jax

    from mscm import atomic, averages, evaluation
    from mscm.config import ConfigError
    from mscm.experiment import build
    from mscm.report import grid

    experiment, workdir = build(run_flags.CONFIG.value).for_evaluation(), cli.path_of(run_flags.WORKDIR)
    spec, average = sampler_flags.chosen(experiment)
    if OUTPUT.value is None:
        output, is_folder = os.path.join(workdir, "samples.png"), False
        cli.check_can_write(workdir)
    else:
        if OUTPUT.value.lower().endswith(_OTHER_FILES):
            raise ConfigError(f"--output: got {OUTPUT.value!r}, expected FILE.png, FILE.npz or a folder")
        is_folder = not OUTPUT.value.endswith((".png", ".npz"))
        output = cli.output_of(OUTPUT, "folder" if is_folder else "file")
    teacher = experiment.diffusion_teacher(workdir) if TEACHER.value else None
    if TEACHER.value and (teacher is None or not output.endswith(".png")):
        raise ConfigError(
            f"--teacher: got {experiment.name!r} and {output!r}, expected a student and a grid, whose name ends in .png"
        )
    shown = _what_to_show(experiment)
    if is_folder:
        _refuse_others(output)

    params = averages.read(experiment, workdir, average, sampler_flags.STEP.value)
    title = f"{experiment.name}, {spec}" + (f", ema {average}" if average else "")
    models = {title: (experiment, params, spec)}
    if teacher is not None:
        of_teacher = evaluation.diffusion_samplers(experiment)[-1]
        if spec.guidance:  # an input of both
            of_teacher = of_teacher.guided(spec.guidance)
        params = evaluation.read_ema(teacher.experiment, teacher.workdir)
        models[f"{teacher.experiment.name}, {of_teacher}"] = teacher.experiment, params, of_teacher
    drawn = {
        name: evaluation.generate(
            *model,
            num_images=NUM_IMAGES.value,
            batch_size=min(NUM_IMAGES.value, experiment.eval.batch_size),
            seed=SEED.value,
            conditions=shown.conditions,
        )
        for name, model in models.items()
    }
    if is_folder:
        _write_folder(output, _in_progress(title, drawn[title]))
    else:
        panels = {name: np.concatenate(list(_in_progress(name, batches))) for name, batches in drawn.items()}
        if output.endswith(".png"):
            columns = min(NUM_IMAGES.value, shown.columns)
            grid.save_png(output, grid.side_by_side(panels, columns=columns, captions=shown.texts))
        else:
            of_images = {"labels": shown.labels} if shown.texts is None else {"captions": np.array(shown.texts)}
            with atomic.writing(output) as file:
                np.savez(file, images=panels[title], **of_images)
    nfe = evaluation.num_evaluations(experiment, spec)
    print(f"{NUM_IMAGES.value} images of {title}, NFE {nfe}: {output}", flush=True)


def _in_progress(title: str, batches: Iterable["np.ndarray"]) -> Iterator["np.ndarray"]:
    """The same batches, while a line says how far they are."""
    with terminal.Progress(title, NUM_IMAGES.value) as progress:
        for batch in batches:
            yield batch
            progress.add(len(batch))


def _write_folder(folder: str, batches: Iterable["np.ndarray"]) -> None:
    """Each batch as it is drawn: many do not fit into memory, and hours of them are not lost with the last."""
    from mscm.report import grid

    num_written = 0
    for batch in batches:
        if num_written == 0:  # ended before its end, the folder is not half of an older one
            for name in _images_in(folder) & _own_names():
                (epath.Path(folder) / name).unlink()
        for i, image in enumerate(batch, start=num_written):
            grid.save_png(os.path.join(folder, _name_of(i)), image)
        num_written += len(batch)


def _name_of(i: int) -> str:
    return f"{i:06d}.png"


def _own_names() -> set[str]:
    return {_name_of(i) for i in range(NUM_IMAGES.value)}


def _images_in(folder: str) -> set[str]:
    return {path.name for path in epath.Path(folder).iterdir() if path.name.endswith(".png")}


def _refuse_others(folder: str) -> None:
    """Images that this command does not write over would be scored with those that it writes."""
    from mscm.config import ConfigError

    others = sorted(_images_in(folder) - _own_names())
    if others:
        raise ConfigError(
            f"--output: got {folder!r} with {len(others)} other images, such as {others[0]}, expected an empty folder, "
            f"or one of up to {NUM_IMAGES.value} images of this command; name another, or empty it"
        )


def _lines(path: str | None) -> list[str]:
    """The lines of a file that are not empty."""
    from mscm.config import ConfigError

    if path is None:
        return []
    try:
        with open(path) as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file: got {path!r} ({error}), expected a text with a caption a line") from error
    if not any(lines):
        raise ConfigError(f"--prompt_file: got {path!r} without any text, expected a caption a line")
    return [line for line in lines if line]


def _what_to_show(experiment: "Experiment") -> "Shown":
    """The labels or captions of the images that the flags ask for.

    Raises:
      ConfigError: flags of the other kind, more of them than images, no such label, or a file that cannot be read.
    """
    import numpy as np

    from mscm import evaluation
    from mscm.config import ConfigError
    from mscm.data import t5

    indices, data = np.arange(NUM_IMAGES.value), experiment.data
    prompts = PROMPT.value + _lines(PROMPT_FILE.value)
    takes = "labels" if data.text is None else "captions"
    for flag, is_given, kind in (
        (LABELS, LABELS.value, "labels"),
        (PROMPT, PROMPT.value, "captions"),
        (PROMPT_FILE, prompts, "captions"),
        (TEXT_ENCODER, TEXT_ENCODER.value, "captions"),
    ):
        if is_given and kind != takes:
            raise ConfigError(f"--{flag.name}: got it for {experiment.name!r}, expected none: its images have {takes}")
    num_given = len(LABELS.value or prompts)
    if num_given > NUM_IMAGES.value:
        raise ConfigError(
            f"--num_images: got {NUM_IMAGES.value} for {num_given} {takes}, expected an image for each at least"
        )
    if data.text is not None:
        if not prompts:
            return evaluation.Shown.of_data(experiment, NUM_IMAGES.value)
        prompts = [prompts[i % len(prompts)] for i in indices]
        try:
            encoder = t5.load(TEXT_ENCODER.value, length=data.text.length) if TEXT_ENCODER.value else None
            return evaluation.Shown.of_captions(data.text, prompts, encoder)
        except ValueError as error:
            raise ConfigError(f"--text_encoder: {error}") from error
    labels = indices % data.num_classes
    if LABELS.value:
        if not all(text.isdecimal() and int(text) < data.num_classes for text in LABELS.value):
            raise ConfigError(
                f"--labels: got {','.join(LABELS.value)}, expected numbers from 0 to {data.num_classes - 1}"
            )
        labels = np.resize(np.array(LABELS.value, np.int32), NUM_IMAGES.value)
    return evaluation.Shown.of_labels(labels, data.num_classes)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=run_flags.REQUIRED)
