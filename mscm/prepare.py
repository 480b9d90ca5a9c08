"""Writes a data set as records at the training resolution, and a card that says what they are.

  python -m mscm.prepare --source=photos.zip --output=DIR --resolution=64
  python -m mscm.prepare --source=imagenet/ --split=train --output=DIR --resolution=128 --encoding=png

--source is a folder, zip or tar with one folder per class (CLASS/NAME.jpg, or SPLIT/CLASS/NAME.jpg with --split),
ILSVRC's tar of tars, or tfds:NAME, a prepared data set of TensorFlow Datasets. Labels are the index in the sorted class
names (of tfds:NAME, its own). Uses all cores; killed, it continues where it was when it is run again. Then train with
--config.data.path=DIR. Later, --output=DIR --verify reads a split and compares it with its card.
"""

import os

from absl import flags, logging

from mscm import cli

SOURCE = flags.DEFINE_string("source", None, "Folder, zip or tar of images, or tfds:NAME.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
RESOLUTION = flags.DEFINE_integer("resolution", None, "Side of the images in pixels.", lower_bound=1)
SPLIT = flags.DEFINE_string("split", None, "Folder above the class folders to read. Default: there is none.")
NAME = flags.DEFINE_string("name", None, "What config.data.split calls the result. Default: --split, else train.")
TRANSFORM = flags.DEFINE_string("transform", "area", "area, adm or lanczos.")
ENCODING = flags.DEFINE_enum("encoding", "png", ["png", "raw"], "png: smaller; raw: faster to read.")
CHANNELS = flags.DEFINE_integer("channels", 3, "3: RGB, 1: grey.")
IMAGES_PER_SHARD = flags.DEFINE_integer(
    "images_per_shard", None, "Images in one file. Default: a 64th of them, from 256 to 8192.", lower_bound=1
)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1)
SKIP_BROKEN = flags.DEFINE_bool("skip_broken", False, "Leave broken images out, count and list them.")
VERIFY = flags.DEFINE_bool("verify", False, "Write nothing; read a finished split and compare it with its card.")


def main() -> None:
    """Lists, transforms, writes; or verifies."""
    from mscm.config import ConfigError

    try:
        _verify() if VERIFY.value else _prepare()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _prepare() -> None:
    from mscm.data import folders, preparation, tfds_source

    for flag in (SOURCE, RESOLUTION):
        if flag.value is None:
            raise ValueError(f"--{flag.name}: got none, expected a value; see --help")
    settings = preparation.Settings(
        resolution=RESOLUTION.value,
        transform=TRANSFORM.value,
        encoding=ENCODING.value,
        channels=CHANNELS.value,
        images_per_shard=IMAGES_PER_SHARD.value,
        skip_broken=SKIP_BROKEN.value,
    )
    is_tfds = SOURCE.value.startswith(tfds_source.PREFIX)
    files = (tfds_source.open_tfds_files if is_tfds else folders.open_files)(SOURCE.value, split=SPLIT.value)
    logging.info("%d images of %d classes in %s", len(files.entries), len(files.class_names), files.path)
    card = preparation.prepare(
        files, OUTPUT.value, settings, split=_split_name(), num_workers=WORKERS.value, report=_report
    )
    counts = card.class_counts
    print(
        f"{card.num_examples} images of {len(counts)} classes ({min(counts)} to {max(counts)} in each), "
        f"{card.resolution} pixels, {card.num_enlarged} enlarged, {len(card.broken)} broken left out: {OUTPUT.value}"
    )
    for broken in card.broken:
        print(f"broken: {broken}")


def _verify() -> None:
    from mscm.data import records

    source = records.RecordSource("records", OUTPUT.value, split=_split_name())
    source.verify()
    print(f"{len(source)} images are what the card says, checksum {source.card.checksum}: {OUTPUT.value}")


def _split_name() -> str:
    return NAME.value or SPLIT.value or "train"


def _report(done: int, total: int, seconds: float, done_now: int) -> None:
    rate = done_now / max(seconds, 1e-9)
    left = cli.duration((total - done) / rate) if rate else "unknown time"
    logging.info("%d/%d images, %.0f images/s, %s left", done, total, rate, left)


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("output",))
