"""Prepared data sets: square images of one size in ArrayRecord shards, and the card that says what they are.

    DIR/train.json                            the card: source, transform, sizes, classes, counts, checksum
    DIR/train-labels.npy                      int32, one per image
    DIR/train-00000-of-00013.array_record     the images in the order of the labels, PNG files or raw pixels
    DIR/train-captions.jsonl                  of captioned images: a list of texts, one line per image

`mscm.prepare` writes them; `RecordSource` is how training and evaluation read them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from mscm.arrays import read_npy
from mscm.data import images, png
from mscm.data.embeddings import Embeddings
from mscm.data.shards import Shards

FORMAT = "mscm records 2"
ENCODINGS = ("png", "raw")


@dataclasses.dataclass(frozen=True)
class Card:
    """What a prepared split is; training and evaluation check it, and statistics of it quote `checksum`."""

    source: str  # where the images came from
    split: str
    transform: str | None  # one of images.TRANSFORMS; None: every image had the size, which all of them leave as it is
    resolution: int
    channels: int
    encoding: str  # one of ENCODINGS
    num_examples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[str, ...]  # file names
    shard_sizes: tuple[int, ...]  # images in each
    checksum: str  # sha256 of the pixels and labels, whatever the encoding and the number of shards
    labels_sha256: str
    num_enlarged: int  # images that were smaller than the resolution
    broken: tuple[str, ...]  # files that were skipped
    captions_sha256: str | None = None  # of the file of captions; None: there are none
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


def captions_path(directory: str | os.PathLike, split: str) -> Path:
    """Where the captions of a split are, if it has some."""
    return Path(directory) / f"{split}-captions.jsonl"


def are_at(path: str | os.PathLike) -> bool:
    """Whether a path is a directory of records, finished or not, rather than of images."""
    directory = Path(path)
    return any(directory.glob("*.array_record")) or any(directory.glob("*-labels.npy"))


def note_path(shard: str | os.PathLike) -> Path:
    """Where `mscm.prepare` says that it has finished a shard, until the card is written."""
    return Path(f"{os.fspath(shard)}.done.json")


def read_card(directory: str | os.PathLike, split: str) -> Card:
    """The card of a split.

    Raises:
      ValueError: no such directory or split, or a card of another format.
    """
    path = card_path(directory, split)
    if not path.is_file():
        names = (p.name for p in Path(directory).glob("*-labels.npy"))
        there = sorted(name.removesuffix("-labels.npy") for name in names)
        if any(Path(directory).glob(note_path(f"{split}-*").name)):
            expected = "a finished one: run the same python -m mscm.prepare again"
        else:
            expected = f"one of {', '.join(there)}" if there else "a directory made by python -m mscm.prepare"
        raise ValueError(f"{directory}: got no {path.name} for split {split!r}, expected {expected}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: got a file that is no JSON ({error}), expected a card; prepare it again") from error
    got = values.get("format") if isinstance(values, dict) else None
    fields = {field.name for field in dataclasses.fields(Card)}
    since = {"captions_sha256"}  # cards that are older have no such key
    if got != FORMAT or not fields - since <= values.keys() <= fields:
        raise ValueError(f"{path}: got format {got!r}, expected {FORMAT!r} with all its keys; prepare the data again")
    wrong = _wrong_key(values)
    if wrong is not None:
        raise ValueError(f"{path}: got {wrong} = {values[wrong]!r:.100}, which no card has; prepare the data again")
    of_card: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Card(**of_card)


def _wrong_key(values: dict[str, Any]) -> str | None:
    """A key of a card as JSON whose value cannot be right, whatever the images are."""

    def are(items: Any, kind: type) -> bool:
        return isinstance(items, list) and all(type(item) is kind for item in items)

    kinds = {"source": str, "split": str, "checksum": str, "labels_sha256": str, "num_enlarged": int}
    kinds |= {"resolution": int, "channels": int, "num_examples": int}
    lists = {"class_names": str, "class_counts": int, "shards": str, "shard_sizes": int, "broken": str}
    wrong = [key for key, kind in kinds.items() if type(values[key]) is not kind]
    wrong += [key for key, kind in lists.items() if not are(values[key], kind)]
    if wrong:
        return wrong[0]
    shards, sizes = values["shards"], values["shard_sizes"]
    is_right = {
        "transform": values["transform"] in (None, *images.TRANSFORMS),
        "encoding": values["encoding"] in ENCODINGS,
        "channels": values["channels"] in (1, 3),
        "resolution": 1 <= values["resolution"] <= images.MAX_SIDE,
        # Names only: a shard lies beside its card.
        "shards": len(shards) == len(sizes) and all(os.path.basename(name) == name for name in shards),
        "shard_sizes": min(sizes, default=0) >= 0,
        "captions_sha256": isinstance(values.get("captions_sha256"), str | None),
        "num_examples": values["num_examples"] == sum(sizes),
    }
    return next((key for key, right in is_right.items() if not right), None)


def encode(pixels: images.Square, encoding: str) -> bytes:
    """One record."""
    return png.encode(pixels) if encoding == "png" else pixels.tobytes()


def decode(records: Sequence[bytes], card: Card) -> UInt8[np.ndarray, "b s s c"]:
    """The pixels of some records.

    Raises:
      ValueError: a record is not what the card says.
    """
    if card.encoding == "png":
        return png.decode(records, side=card.resolution, channels=card.channels)
    pixels = np.empty((len(records), card.resolution, card.resolution, card.channels), np.uint8)
    for row, record in zip(pixels.reshape(len(records), -1), records, strict=True):
        if len(record) != row.size:
            raise ValueError(f"got a record of {len(record)} bytes, expected {row.size}")
        row[:] = np.frombuffer(record, np.uint8)
    return pixels


def checksum(digests: Sequence[bytes], labels: Int32[np.ndarray, "n"]) -> str:
    """sha256 over the sha256 of each image's pixels, in order, and the labels."""
    total = hashlib.sha256(b"".join(digests))
    total.update(labels.astype("<i4").tobytes())
    return total.hexdigest()


def labels_sha256(labels: Int32[np.ndarray, "n"]) -> str:
    """sha256 of the labels alone, which is checked whenever they are read."""
    return hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()


class RecordSource:
    """A `Source` over a prepared split; can be sent to other processes."""

    def __init__(self, name: str, directory: str | os.PathLike, *, split: str):
        """Checks labels and numbers of images against the card; `verify` checks the pixels.

        Raises:
          ValueError: from `read_card`, or a file is missing, or holds something else than the card says.
        """
        self.name, self.split, self._directory = name, split, os.fspath(directory)
        self.card = read_card(directory, split)
        paths = [Path(directory) / shard for shard in self.card.shards]
        for path in (*paths, labels_path(directory, split)):
            if not path.is_file():
                raise ValueError(f"{card_path(directory, split)}: got no file {path.name} beside it; prepare it again")
        try:
            self.labels = read_npy(labels_path(directory, split))
        except ValueError as error:
            raise ValueError(f"{labels_path(directory, split)}: got no labels ({error}); prepare it again") from error
        try:
            self._shards = Shards(paths)
        except (RuntimeError, ValueError) as error:  # ArrayRecord's
            raise ValueError(f"{directory}: got a broken shard ({error}); prepare it again") from error
        sizes = self._shards.sizes
        if sizes != self.card.shard_sizes:
            i = next(i for i, size in enumerate(sizes) if size != self.card.shard_sizes[i])
            raise ValueError(
                f"{paths[i]}: got {sizes[i]} images, expected {self.card.shard_sizes[i]} as {split}.json says; "
                "prepare it again"
            )
        num_classes = len(self.card.class_names)
        is_right = self.labels.shape == (self.card.num_examples,) and self.labels.dtype == np.int32
        if not is_right or labels_sha256(self.labels) != self.card.labels_sha256:
            raise ValueError(
                f"{labels_path(directory, split)}: got other labels than those of {split}.json; prepare it again"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < num_classes:
            raise ValueError(
                f"{labels_path(directory, split)}: got labels from {self.labels.min()} to {self.labels.max()}, "
                f"expected 0 to {num_classes - 1}; prepare it again"
            )
        self.captions = None if self.card.captions_sha256 is None else self._read_captions(directory)
        if len(self):
            self.load(np.array([0]))  # refuses records of another encoding or size

    def open_embeddings(self) -> Embeddings:
        """What a text encoder has made of the captions.

        Raises:
          ValueError: as `Embeddings`.
        """
        return Embeddings(self._directory, self.split, captions_sha256=self.card.captions_sha256)

    def _read_captions(self, directory: str | os.PathLike) -> tuple[tuple[str, ...], ...]:
        path = captions_path(directory, self.split)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ValueError(f"{path}: got no such file, expected the captions; prepare it again") from error
        if hashlib.sha256(data).hexdigest() != self.card.captions_sha256:
            raise ValueError(f"{path}: got other captions than those of {self.split}.json; prepare it again")
        return tuple(tuple(json.loads(line)) for line in data.decode().splitlines())

    num_classes = property(lambda self: len(self.card.class_names))
    class_names = property(lambda self: self.card.class_names)
    resolution = property(lambda self: self.card.resolution)
    channels = property(lambda self: self.card.channels)
    transform = property(lambda self: self.card.transform)

    @property
    def fingerprint(self) -> str:
        """The card's checksum, and that of the captions with it where there are some."""
        card = self.card
        if card.captions_sha256 is None:
            return card.checksum
        return hashlib.sha256(f"{card.checksum} {card.captions_sha256}".encode()).hexdigest()

    def __len__(self) -> int:
        return self.card.num_examples

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`.

        Raises:
          BrokenImage: a record is damaged; names its file.
          OSError: its file cannot be read, or not any more.
        """
        places = self._shards.places(indices)
        encoded = [self._read(shard, i) for shard, i in places]
        try:
            pixels = decode(encoded, self.card)
        except ValueError:
            for (shard, i), record in zip(places, encoded, strict=True):
                self._decode_one(shard, i, record)
            raise
        return {"image": pixels, "label": self.labels[indices]}

    def _read(self, shard: int, i: int) -> bytes:
        try:
            return self._shards.read(shard, i)
        except (RuntimeError, IndexError) as error:
            raise self._broken(shard, i, error) from error

    def _decode_one(self, shard: int, i: int, record: bytes) -> None:
        """To say which."""
        try:
            decode([record], self.card)
        except ValueError as error:
            raise self._broken(shard, i, error) from error

    def _broken(self, shard: int, i: int, error: Exception) -> images.BrokenImage:
        path = self._shards.paths[shard]
        return images.BrokenImage(f"{path}: got a broken record, number {i} ({error}); prepare it again")

    def verify(self) -> None:
        """Reads every image and compares with the card's checksum.

        Raises:
          ValueError: they are not the images that were written.
        """
        digests = []
        for indices in np.array_split(np.arange(len(self)), -(-len(self) // 1024)):
            digests += [hashlib.sha256(pixels.tobytes()).digest() for pixels in self.load(indices)["image"]]
        got = checksum(digests, self.labels)
        if got != self.card.checksum:
            raise ValueError(
                f"{self.card.source}, split {self.split!r}: got checksum {got[:12]}..., expected "
                f"{self.card.checksum[:12]}... as its card says; prepare it again"
            )

