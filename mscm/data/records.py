"""Prepared data sets: square images of one size in ArrayRecord shards, and the card that says what they are.

    DIR/train.json                            the card: source, transform, sizes, classes, counts, checksum
    DIR/train-labels.npy                      int32, one per image
    DIR/train-00000-of-00013.array_record     the images in the order of the labels, PNG files or raw pixels

`mscm.prepare` writes them; `RecordSource` is how training and evaluation read them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int32, Integer, UInt8

from mscm.data import images

FORMAT = "mscm records 1"
ENCODINGS = ("png", "raw")


@dataclasses.dataclass(frozen=True)
class Card:
    """What a prepared split is; training and evaluation check it, and statistics of it quote `checksum`."""

    source: str  # where the images came from
    split: str
    transform: str  # one of images.TRANSFORMS
    resolution: int
    channels: int
    encoding: str  # one of ENCODINGS
    num_examples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[str, ...]  # file names
    shard_sizes: tuple[int, ...]  # images in each
    checksum: str  # sha256 of the pixels and labels, whatever the encoding and the number of shards
    num_enlarged: int  # images that were smaller than the resolution
    broken: tuple[str, ...]  # files that were skipped
    format: str = FORMAT

    def to_json(self) -> str:
        """As the file holds it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def card_path(directory: str | os.PathLike, split: str) -> Path:
    """Where the card of a split is; it is written last, so that a split without one is unfinished."""
    return Path(directory) / f"{split}.json"


def labels_path(directory: str | os.PathLike, split: str) -> Path:
    """Where the labels of a split are."""
    return Path(directory) / f"{split}-labels.npy"


def read_card(directory: str | os.PathLike, split: str) -> Card:
    """The card of a split.

    Raises:
      ValueError: no such directory or split, or a card of another format.
    """
    path = card_path(directory, split)
    if not path.is_file():
        there = sorted(p.stem for p in Path(directory).glob("*.json")) if path.parent.is_dir() else []
        expected = f"one of {', '.join(there)}" if there else "a directory made by python -m mscm.prepare"
        raise ValueError(f"{directory}: got no {path.name} for split {split!r}, expected {expected}")
    values = json.loads(path.read_text())
    if values.get("format") != FORMAT:
        raise ValueError(f"{path}: got format {values.get('format')!r}, expected {FORMAT!r}; prepare the data again")
    return Card(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def encode(pixels: images.Square, encoding: str) -> bytes:
    """One record."""
    return images.encode_png(pixels) if encoding == "png" else pixels.tobytes()


def decode(record: bytes, card: Card) -> images.Square:
    """The pixels of one record."""
    if card.encoding == "png":
        return images.decode(record, channels=card.channels)
    return np.frombuffer(record, np.uint8).reshape(card.resolution, card.resolution, card.channels)


def checksum(digests: Sequence[bytes], labels: Int32[np.ndarray, "n"]) -> str:
    """sha256 over the sha256 of each image's pixels, in order, and the labels."""
    total = hashlib.sha256(b"".join(digests))
    total.update(labels.astype("<i4").tobytes())
    return total.hexdigest()


class RecordSource:
    """A `Source` over a prepared split; can be sent to other processes."""

    def __init__(self, name: str, directory: str | os.PathLike, *, split: str):
        """Checks the files against the card.

        Raises:
          ValueError: from `read_card`, or a file is missing or has another number of images than the card says.
        """
        self.name, self.split = name, split
        self.card = read_card(directory, split)
        paths = [Path(directory) / shard for shard in self.card.shards]
        for path in (*paths, labels_path(directory, split)):
            if not path.is_file():
                raise ValueError(f"{card_path(directory, split)}: got no file {path.name} beside it; prepare it again")
        self.labels = np.load(labels_path(directory, split))
        self._records = ArrayRecordDataSource([os.fspath(path) for path in paths])
        if not len(self._records) == len(self.labels) == self.card.num_examples:
            raise ValueError(
                f"{card_path(directory, split)}: got {len(self._records)} images and {len(self.labels)} labels, "
                f"expected {self.card.num_examples} of each; prepare it again"
            )

    num_classes = property(lambda self: len(self.card.class_names))
    class_names = property(lambda self: self.card.class_names)
    resolution = property(lambda self: self.card.resolution)
    channels = property(lambda self: self.card.channels)
    fingerprint = property(lambda self: self.card.checksum)

    def __len__(self) -> int:
        return self.card.num_examples

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, read in one request."""
        records = self._records.__getitems__([int(i) for i in indices])
        pixels: UInt8[np.ndarray, "b h w c"] = np.stack([decode(record, self.card) for record in records])
        return {"image": pixels, "label": self.labels[indices]}

