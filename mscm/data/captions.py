"""Captions of images, and the tokens that a network reads of them.

    source = WithTokens(open_source("captioned_digits", split="train"), TextSpec("bytes", length=32))
    source.load(np.array([3]))  # also {"tokens": uint8 "1 32", "mask": bool "1 32"}
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from mscm.data.embeddings import Embeddings, Encoder
from mscm.data.records import RecordSource
from mscm.data.sources import Source
from mscm.types import Text

BYTES = "bytes"


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """What the tokens of captions are.

    Raises:
      ValueError: an encoder of bytes with features, or another one without.
    """

    encoder: str  # BYTES: they are those of UTF-8; else the name of the frozen encoder that has read the captions
    length: int  # tokens at most: of longer captions, the first
    features: int | None = None  # of an embedding

    def __post_init__(self) -> None:
        if (self.encoder == BYTES) != (self.features is None):
            raise ValueError(f"got the encoder {self.encoder!r} with {self.features} features, expected None of bytes")

    @property
    def of_tokens(self) -> tuple[tuple[int, ...], Any]:
        """Shape and type of the tokens of one caption."""
        return ((self.length,), np.uint8) if self.features is None else ((self.length, self.features), np.float16)


def encode(captions: Sequence[str], spec: TextSpec, encoder: Encoder | None = None) -> Text:
    """The tokens of some captions, with zeros where there are none; `encoder`: the frozen one, where there is one.

    Raises:
      ValueError: it is not the one of `spec`, or absent.
    """
    if spec.encoder == BYTES and encoder is not None:
        raise ValueError(f"got the text encoder {encoder.name!r}, expected none: the model reads bytes")
    if spec.encoder == BYTES:
        rows = [np.frombuffer(caption.encode()[: spec.length], np.uint8) for caption in captions]
    elif encoder is None:
        raise ValueError(f"got no text encoder, expected {spec.encoder!r}, which has read the captions of the training")
    else:
        if (encoder.name, encoder.features) != (spec.encoder, spec.features):
            raise ValueError(
                f"got the text encoder {encoder.name!r} of {encoder.features} features, expected {spec.encoder!r} of "
                f"{spec.features}"
            )
        rows = [row[: spec.length] for row in encoder.encode(captions)]
    shape, dtype = spec.of_tokens
    tokens = np.zeros((len(captions), *shape), dtype)
    mask = np.zeros((len(captions), spec.length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Text(tokens, mask)


class WithTokens:
    """A `Source` whose examples have the tokens of one of their captions; can be sent to other processes."""

    # What is the source's own.
    name: str
    split: str
    transform: str | None
    num_classes: int
    class_names: tuple[str, ...]
    resolution: int
    channels: int
    labels: Int32[np.ndarray, "n"]
    captions: Sequence[tuple[str, ...]]

    def __init__(self, source: Source, text: TextSpec):
        """Opens what a frozen encoder has made of the captions, where the tokens are that.

        Raises:
          ValueError: it has no captions, or not these tokens.
        """
        self.source, self.text = source, text
        said = _captions_of(source)
        self._embeddings = None
        if text.encoder != BYTES:
            self._embeddings = _open_embeddings(source, text)
            self._starts = np.cumsum([0, *map(len, said)])

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """Of the images and captions, and of the encoder: a training does not go on with the tokens of another one."""
        if self._embeddings is None:
            return self.source.fingerprint
        of_both = f"{self.source.fingerprint} {self._embeddings.card.encoder_fingerprint}"
        return hashlib.sha256(of_both.encode()).hexdigest()

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, with the first caption of each."""
        return self.load_in_epochs(indices, np.zeros_like(indices))

    def load_in_epochs(
        self, indices: Integer[np.ndarray, "b"], epochs: Integer[np.ndarray, "b"]
    ) -> dict[str, np.ndarray]:
        """The same as they are in some epochs: of several captions of an image, each epoch has the next."""
        tokens, mask = self.texts(indices, epochs)
        return self.source.load(indices) | {"tokens": np.asarray(tokens), "mask": np.asarray(mask)}

    def texts(self, indices: Integer[np.ndarray, "b"], epochs: Integer[np.ndarray, "b"]) -> Text:
        """The tokens alone."""
        if self._embeddings is None:
            return encode(in_epochs(self.source, indices, epochs), self.text)
        counts = self._starts[indices + 1] - self._starts[indices]
        return self._embeddings.texts(self._starts[indices] + epochs % counts, self.text.length)


for _name in WithTokens.__annotations__:
    setattr(WithTokens, _name, property(attrgetter(f"source.{_name}")))


def without_tokens(source: Source) -> Source:
    """The source of images and labels alone: an encoder's tokens are larger than the images."""
    return source.source if isinstance(source, WithTokens) else source


def _captions_of(source: Source) -> Sequence[tuple[str, ...]]:
    if source.captions is None:
        raise ValueError(f"got {source.name!r}, whose images have no captions, expected a captioned data set")
    return source.captions


def _open_embeddings(source: Source, text: TextSpec) -> Embeddings:
    if not isinstance(source, RecordSource):
        raise ValueError(
            f"got {source.name!r} as it is, expected a directory of python -m mscm.prepare, in which "
            f"{text.encoder!r} has read the captions"
        )
    embeddings = source.open_embeddings()
    card = embeddings.card
    got, expected = (card.encoder, card.features), (text.encoder, text.features)
    if got != expected or card.length < text.length:
        raise ValueError(
            f"got embeddings of {card.encoder!r} with {card.features} features and up to {card.length} tokens, "
            f"expected those of {text.encoder!r} with {text.features} and up to {text.length}"
        )
    return embeddings


def in_epochs(source: Source, indices: Integer[np.ndarray, "b"], epochs: Integer[np.ndarray, "b"]) -> list[str]:
    """One caption of each of some images: of several, each epoch has the next."""
    said = _captions_of(source)
    of_images = (said[i] for i in indices.tolist())
    return [several[epoch % len(several)] for several, epoch in zip(of_images, epochs.tolist(), strict=True)]
