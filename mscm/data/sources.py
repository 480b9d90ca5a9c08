"""Sources: a data set as labelled uint8 images with random access by index.

Everything downstream (the pipeline, the feature network, the references of the metrics) sees a data set only through
`Source`, so a new kind of storage is one class and one line in `SOURCES`.

    source = open_source("digits", split="all")
    batch = source.load(np.array([3, 1, 4]))  # {"image": uint8 "3 8 8 1", "label": int32 "3"}
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8


@runtime_checkable
class Source(Protocol):
    """Labelled images of one size with random access; `load` may be called from several threads at once."""

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]
    resolution: int
    channels: int

    @property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """The label of every example, without loading an image."""

    def __len__(self) -> int:
        """Number of examples."""

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, all at once: `{'image': uint8 'b h w c', 'label': int32 'b'}`."""


@dataclasses.dataclass(frozen=True, eq=False)  # eq: two arrays have no single truth value
class ArraySource:
    """A `Source` over an array in memory (or a memory map)."""

    name: str
    split: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]

    def __post_init__(self):
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2]:
            raise ValueError(
                f"source {self.name!r}: got images of shape {shape} and type {self.images.dtype}, expected square "
                "uint8 images 'n h w c'; crop and quantise them first."
            )
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int32:
            raise ValueError(
                f'source {self.name!r}: got labels of shape {self.labels.shape} and type {self.labels.dtype}, expected '
                f'int32 of shape {shape[:1]}; give one class index per image.'
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(
                f'source {self.name!r}: got labels from {self.labels.min()} to {self.labels.max()}, expected 0 to '
                f'{self.num_classes - 1}; class_names must name every class.'
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def resolution(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, copied."""
        return {'image': np.asarray(self.images[indices]), 'label': np.asarray(self.labels[indices])}


def stratified_halves(labels: Integer[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """Two disjoint sorted index sets that cover `labels`, with class counts that differ by at most one."""
    # RandomState, not default_rng: NumPy froze its stream, and the halves must be the same images for everybody.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind='stable')]
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])


def _digits(split: str) -> ArraySource:
    """The 1,797 real handwritten digits that come with scikit-learn, 8 x 8, grey; values 0..16 become 0..255."""
    _check_choice("split of 'digits'", split, ('all', 'half_a', 'half_b'))
    from sklearn import datasets  # here, so that only who opens it needs scikit-learn

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255.0 / 16.0)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    if split != 'all':
        indices = stratified_halves(labels)[('half_a', 'half_b').index(split)]
        images, labels = images[indices], labels[indices]
    return ArraySource('digits', split, images, labels, tuple(str(name) for name in digits.target_names))


SOURCES: Mapping[str, Callable[[str], Source]] = {'digits': _digits}


def open_source(name: str, *, split: str) -> Source:
    """The data set registered in `SOURCES` under `name`.

    Raises:
      ValueError: for an unknown name or split; the message lists the choices.
    """
    _check_choice('data set', name, SOURCES)
    return SOURCES[name](split)


def _check_choice(what: str, got: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if got in choices:
        return
    nearest = difflib.get_close_matches(got, choices, n=1)
    hint = f'; did you mean {nearest[0]!r}?' if nearest else '.'
    raise ValueError(f"unknown {what}: got {got!r}, expected one of {', '.join(choices)}{hint}")
