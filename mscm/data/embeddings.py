"""What a frozen text encoder has made of the captions of a prepared split, beside its images.

    DIR/train-text.json                          the card: encoder, length, features, numbers, checksums
    DIR/train-text-00000-of-00013.array_record   a record for each caption: float16 `tokens features`, as many as it has

`mscm.prepare --captions --text_encoder=...` writes them once; training reads them and never loads the encoder. The
captions are counted image by image.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Integer

from mscm import atomic
from mscm.data.shards import Shards, writing_shard
from mscm.types import Text

FORMAT = "mscm text 1"
_PER_SHARD = 4096
_AT_A_TIME = 64  # captions that the encoder is given

# Captions -> what each becomes, `tokens features` with its own number of tokens
Encode = Callable[[Sequence[str]], list[Float16[np.ndarray, "_ e"]]]
ReportFn = Callable[[int, int], None]  # captions done, and those of them that were done before


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen text encoder."""

    name: str
    fingerprint: str  # of its weights
    length: int  # tokens of a caption at most
    features: int
    encode: Encode


@dataclasses.dataclass(frozen=True)
class Card:
    """What the embeddings of a split are."""

    encoder: str
    encoder_fingerprint: str
    length: int
    features: int
    captions_sha256: str  # of the file of captions that they are of
    num_captions: int
    shards: tuple[str, ...]
    shard_sizes: tuple[int, ...]
    shard_sha256: tuple[str, ...]
    format: str = FORMAT


def card_path(directory: str | os.PathLike, split: str) -> Path:
    """Where the card of a split's embeddings is; it is written last."""
    return Path(directory) / f"{split}-text.json"


def write(
    directory: str | os.PathLike,
    split: str,
    captions: Sequence[str],
    captions_sha256: str,
    encoder: Encoder,
    *,
    report: ReportFn,
) -> Card:
    """Embeds all captions of a split; one that was killed goes on with its next shard.

    Raises:
      ValueError: there are embeddings already, or some of another encoder are unfinished.
      OSError: the disk is full.
    """
    if card_path(directory, split).exists():
        raise ValueError(f"{card_path(directory, split)} exists already; remove it to embed the captions again")
    count = -(-len(captions) // _PER_SHARD)
    of_all = [encoder.name, encoder.fingerprint, encoder.length, captions_sha256, count]
    notes, before = [], 0
    for i in range(count):
        start, stop = i * _PER_SHARD, min(len(captions), (i + 1) * _PER_SHARD)
        path = Path(directory) / f"{split}-text-{i:05d}-of-{count:05d}.array_record"
        note = _read_note(path, of_all)
        if note is None:
            note = _write_shard(path, of_all, captions[start:stop], encoder)
        else:
            before += stop - start
        notes.append(note)
        report(stop, before)
    card = Card(
        encoder=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        length=encoder.length,
        features=encoder.features,
        captions_sha256=captions_sha256,
        num_captions=len(captions),
        shards=tuple(note["shard"] for note in notes),
        shard_sizes=tuple(note["size"] for note in notes),
        shard_sha256=tuple(note["sha256"] for note in notes),
    )
    atomic.write_text(card_path(directory, split), json.dumps(dataclasses.asdict(card), indent=2) + "\n")
    for note in notes:
        _note_path(Path(directory) / note["shard"]).unlink()
    return card


def _note_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.done.json")


def _read_note(shard: Path, of_all: list[Any]) -> dict[str, Any] | None:
    try:
        note = json.loads(_note_path(shard).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if note.get("of") != of_all:
        raise ValueError(
            f"{shard.parent}: got an unfinished run of another encoder or of other captions, expected the same to "
            f"continue; remove {re.sub('-[0-9]{5}-of.*', '', shard.name)}-*"
        )
    return note if shard.exists() else None


def _write_shard(path: Path, of_all: list[Any], captions: Sequence[str], encoder: Encoder) -> dict[str, Any]:
    digest = hashlib.sha256()
    with writing_shard(path) as writer:
        for start in range(0, len(captions), _AT_A_TIME):
            for row in encoder.encode(captions[start : start + _AT_A_TIME]):
                record = np.ascontiguousarray(row, np.float16).tobytes()
                digest.update(record)
                writer.write(record)
    note = {"of": of_all, "shard": path.name, "size": len(captions), "sha256": digest.hexdigest()}
    atomic.write_text(_note_path(path), json.dumps(note))
    return note


class Embeddings:
    """The embeddings of a split; can be sent to other processes."""

    def __init__(self, directory: str | os.PathLike, split: str, *, captions_sha256: str | None):
        """Checks the card and the numbers of records.

        Raises:
          ValueError: there are none, they are of other captions, or a file is not what the card says.
        """
        path = card_path(directory, split)
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ValueError(
                f"got no {path.name} in {directory}, expected what a text encoder made of the captions; run python -m "
                f"mscm.prepare --captions --text_encoder=... --output={directory}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: got a file that is no JSON ({error}); embed the captions again") from error
        self.card = _checked(path, values)
        if self.card.captions_sha256 != captions_sha256:
            raise ValueError(f"{path}: got embeddings of other captions than the split's; embed them again")
        try:
            self._shards = Shards([Path(directory) / name for name in self.card.shards])
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{directory}: got a broken shard ({error}); embed the captions again") from error
        sizes = self._shards.sizes
        if sizes != self.card.shard_sizes:
            expected = self.card.shard_sizes
            raise ValueError(f"{path}: got shards of {sizes} captions, expected {expected}; embed the captions again")

    def __len__(self) -> int:
        return self.card.num_captions

    def texts(self, numbers: Integer[np.ndarray, "b"], length: int) -> Text:
        """The captions of some numbers, with zeros to a length.

        Raises:
          ValueError: a record is damaged.
          OSError: its file cannot be read, or not any more.
        """
        tokens = np.zeros((len(numbers), length, self.card.features), np.float16)
        mask = np.zeros(tokens.shape[:2], bool)
        for row, there, (shard, i) in zip(tokens, mask, self._shards.places(numbers), strict=True):
            embedded = self._read(shard, i)[:length]
            row[: len(embedded)], there[: len(embedded)] = embedded, True
        return Text(tokens, mask)

    def _read(self, shard: int, i: int) -> Float16[np.ndarray, "_ e"]:
        try:
            return np.frombuffer(self._shards.read(shard, i), np.float16).reshape(-1, self.card.features)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{self._shards.paths[shard]}: got a broken record, number {i} ({error}); embed the captions again"
            ) from error

    def verify(self) -> None:
        """Reads all and compares with the card's checksums.

        Raises:
          ValueError: they are not what was written.
        """
        for shard, (size, expected) in enumerate(zip(self.card.shard_sizes, self.card.shard_sha256, strict=True)):
            digest = hashlib.sha256()
            for i in range(size):
                digest.update(self._read(shard, i).tobytes())
            if digest.hexdigest() != expected:
                path = self._shards.paths[shard]
                raise ValueError(f"{path}: got other bytes than were written; embed the captions again")


def _checked(path: Path, values: Any) -> Card:
    fields = {field.name for field in dataclasses.fields(Card)}
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.keys() != fields:
        got = values.get("format") if isinstance(values, dict) else None
        raise ValueError(f"{path}: got format {got!r}, expected {FORMAT!r} with all its keys; embed the captions again")

    def are(items: Any, kind: type) -> bool:
        return isinstance(items, list) and all(type(item) is kind for item in items)

    shards, sizes, sums = values["shards"], values["shard_sizes"], values["shard_sha256"]
    is_right = are(shards, str) and are(sizes, int) and are(sums, str) and len(shards) == len(sizes) == len(sums)
    is_right = is_right and all(os.path.basename(name) == name for name in shards) and min(sizes, default=0) >= 0
    is_right = is_right and all(type(values[key]) is int and values[key] > 0 for key in ("length", "features"))
    if not is_right or values["num_captions"] != sum(sizes):
        raise ValueError(f"{path}: got values that no card has; embed the captions again")
    of_card: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Card(**of_card)
