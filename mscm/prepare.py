"""Writes a data set as records at the training resolution, and a card that says what they are.

  python -m mscm.prepare --source=photos.zip --output=DIR --resolution=64
  python -m mscm.prepare --source=imagenet/ --split=train --output=DIR --resolution=128 --encoding=png

--source is a folder, zip or tar with one folder per class (CLASS/NAME.jpg, or SPLIT/CLASS/NAME.jpg with --split),
ILSVRC's tar of tars, or tfds:NAME, a prepared data set of TensorFlow Datasets. Labels are the index in the sorted class
names (of tfds:NAME, its own). With --captions images have no class but captions: NAME.txt beside NAME.jpg, a table
(*.jsonl, *.csv) with `file_name` and `caption`, or a folder of tars as webdataset's.

Uses all cores; killed, it continues where it was when it is run again. Then train with --config.data.path=DIR. Later,
--output=DIR --verify reads a split and compares it with its card.
"""

import os
from typing import TYPE_CHECKING

from absl import flags, logging

from mscm import cli, remote, terminal

if TYPE_CHECKING:
    from mscm.data.embeddings import Encoder

SOURCE = flags.DEFINE_string("source", None, "Folder, zip or tar of images, or tfds:NAME.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write to.")
RESOLUTION = flags.DEFINE_integer("resolution", None, "Side of the images in pixels.", lower_bound=1)
CAPTIONS = flags.DEFINE_bool("captions", False, "The images have captions and no classes.")
TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", None, "Directory of a T5 and its tokeniser: with --captions, what it makes of them is stored too."
)
TEXT_LENGTH = flags.DEFINE_integer("text_length", 128, "Tokens of a caption that it is given at most.", lower_bound=1)
SPLIT = flags.DEFINE_string(
    "split", None, "Folder above the class folders to read (default: there is none), or the split of tfds:NAME."
)
NAME = flags.DEFINE_string("name", None, "What config.data.split calls the result. Default: --split, else train.")
TRANSFORM = flags.DEFINE_string("transform", "area", "area, adm or lanczos.")
ENCODING = flags.DEFINE_enum("encoding", "png", ["png", "raw"], "png: smaller; raw: faster to read.")
CHANNELS = flags.DEFINE_integer("channels", 3, "3: RGB, 1: grey.")
IMAGES_PER_SHARD = flags.DEFINE_integer(
    "images_per_shard", None, "Images in one file. Default: a 64th of them, from 256 to 8192.", lower_bound=1
)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes.", lower_bound=1)
SKIP_BROKEN = flags.DEFINE_bool("skip_broken", False, "Leave broken images out, count and list them.")
VERIFY = flags.DEFINE_bool("verify", False, "Write nothing; read a finished split and compare it with its card.")


def main() -> None:
    """Lists, transforms, writes; or verifies."""
    from mscm.config import ConfigError
    from mscm.data import records, t5

    if TEXT_ENCODER.value is not None and not CAPTIONS.value:
        raise ConfigError("--text_encoder: got it without --captions, expected both")
    if TEXT_LENGTH.present and TEXT_ENCODER.value is None:
        raise ConfigError("--text_length: got it without --text_encoder, expected both")
    try:
        if VERIFY.value:
            _verify()
            return
        if TEXT_ENCODER.value is None:
            _prepare()
            return
        encoder = t5.load(TEXT_ENCODER.value, length=TEXT_LENGTH.value)
        # Of a split that is there already, or was when this was killed.
        if not records.card_path(_output(), _split_name()).exists():
            _prepare()
        _embed(encoder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _prepare() -> None:
    from mscm.data import captioned_files, folders, preparation, tfds_source

    source, output = cli.given(SOURCE), _output()
    settings = preparation.Settings(
        resolution=cli.given(RESOLUTION),
        transform=TRANSFORM.value,
        encoding=ENCODING.value,
        channels=CHANNELS.value,
        images_per_shard=IMAGES_PER_SHARD.value,
        skip_broken=SKIP_BROKEN.value,
    )
    files: folders.ImageFiles | tfds_source.TfdsFiles
    if source.startswith(tfds_source.PREFIX):
        files = tfds_source.open_tfds_files(source, split=SPLIT.value, captioned=CAPTIONS.value)
    else:
        list_files = captioned_files.open_captioned if CAPTIONS.value else folders.open_files
        files = list_files(source, split=SPLIT.value)
    if files.captions is not None:
        what = f"{sum(map(len, files.captions))} captions"
    else:
        what = f"{len(files.class_names)} classes"
    logging.info("%d images and %s in %s", len(files.entries), what, files.path)
    with terminal.Progress(f"{OUTPUT.value}/{_split_name()}", len(files.entries)) as progress:
        card = preparation.prepare(
            files, output, settings, split=_split_name(), num_workers=WORKERS.value, report=progress.reach
        )
    counts = card.class_counts
    of_classes = "" if CAPTIONS.value else f" of {len(counts)} classes ({min(counts)} to {max(counts)} in each)"
    print(
        f"{card.num_examples} images{of_classes}, "
        f"{card.resolution} pixels, {card.num_enlarged} enlarged, {len(card.broken)} broken left out: {OUTPUT.value}"
    )
    for broken in card.broken:
        print(f"broken: {broken}")


def _embed(encoder: "Encoder") -> None:
    """Of all captions of a finished split."""
    from mscm.data import embeddings, records

    output = _output()
    source = records.RecordSource("records", output, split=_split_name())
    if source.captions is None or source.card.captions_sha256 is None:
        raise ValueError(f"{OUTPUT.value}: got split {_split_name()!r} without captions; prepare it again with them")
    captions = [text for said in source.captions for text in said]
    with terminal.Progress(f"{OUTPUT.value}/{_split_name()}", len(captions), "captions") as progress:
        card = embeddings.write(
            output, _split_name(), captions, source.card.captions_sha256, encoder, report=progress.reach
        )
    print(f"{card.num_captions} captions as {card.encoder} reads them, {card.features} features: {OUTPUT.value}")


def _verify() -> None:
    from mscm.data import embeddings, records

    output = _output()
    source = records.RecordSource("records", output, split=_split_name())
    source.verify()
    print(f"{len(source)} images are what the card says, checksum {source.card.checksum}: {OUTPUT.value}")
    if embeddings.card_path(output, _split_name()).exists():
        embedded = source.open_embeddings()
        embedded.verify()
        print(f"{len(embedded)} captions are what {embedded.card.encoder} has made of them: {OUTPUT.value}")


def _output() -> str:
    """Raises ConfigError where it is no folder of a disk."""
    from mscm.config import ConfigError

    if remote.is_url(cli.given(OUTPUT)):
        raise ConfigError(f"--output: got {OUTPUT.value!r}, expected a folder of a disk: no data is read from a bucket")
    return cli.path_of(OUTPUT)


def _split_name() -> str:
    return NAME.value or SPLIT.value or "train"


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("output",))
