"""Sources: a data set as labelled uint8 images with random access by index.

Everything downstream (the pipeline, the feature network, the references of the metrics) sees a data set only through
`Source`, so a new kind of storage is one class and one line in `open_source`, a new data set one function in `SOURCES`.

    source = open_source("digits", split="all")
    batch = source.load(np.array([3, 1, 4]))  # {"image": uint8 "3 8 8 1", "label": int32 "3"}

    open_source("digits", split="all")                                   # inside scikit-learn
    open_source("synthetic", split="train", resolution=64, channels=3, num_classes=1000)
    open_source("captioned_digits", split="train")                       # two digits each, and a caption
    open_source("mixture", split="train")                                # two Gaussians, one pixel
    open_source("photos", split="train", path="DIR")                     # records made by mscm.prepare
    open_source("photos", split="train", path="x.zip", resolution=64)    # a folder, zip or tar, resized while read
    open_source("cifar10", split="train")                                # TensorFlow Datasets, prepared as array_record
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8

from mscm.data import captioned_digits, captioned_files, folders, images, records, tfds_source

_FINGERPRINT_FILES = 256
_MAX_SYNTHETIC = 2**34  # bytes: 2,000 pixels a side

# Folders of these names above the classes say that their images are a part of a data set.
_SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")


@runtime_checkable
class Source(Protocol):
    """Labelled images of one size with random access; `load` may be called from several threads at once."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def transform(self) -> str | None:
        """How they were resized, one of images.TRANSFORMS; None: they were not."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def resolution(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def captions(self) -> Sequence[tuple[str, ...]] | None:
        """Of each example, at least one; None: there are none."""

    @property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """The label of every example, without loading an image."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the examples are: scores and networks of another one are not comparable."""

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
    captions: tuple[tuple[str, ...], ...] | None = None
    transform: None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2]:
            raise ValueError(
                f"source {self.name!r}: got images of shape {shape} and type {self.images.dtype}, expected square "
                "uint8 images 'n h w c'; crop and quantise them first."
            )
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int32:
            raise ValueError(
                f"source {self.name!r}: got labels of shape {self.labels.shape} and type {self.labels.dtype}, expected "
                f"int32 of shape {shape[:1]}; give one class index per image."
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(
                f"source {self.name!r}: got labels from {self.labels.min()} to {self.labels.max()}, expected 0 to "
                f"{self.num_classes - 1}; class_names must name every class."
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

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        if self.captions is not None:
            digest.update(repr(self.captions).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, copied."""
        return {"image": np.asarray(self.images[indices]), "label": np.asarray(self.labels[indices])}


def stratified_halves(labels: Integer[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """Two disjoint sorted index sets that cover `labels`, with class counts that differ by at most one."""
    # RandomState, not default_rng: NumPy froze its stream, and the halves must be the same images for everybody.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])


def _digits(split: str) -> ArraySource:
    """The 1,797 real handwritten digits that come with scikit-learn, 8 x 8, grey; values 0..16 become 0..255."""
    _check_choice("split of 'digits'", split, ("all", "half_a", "half_b"))
    images, labels, names = _load_digits()
    if split != "all":
        indices = stratified_halves(labels)[("half_a", "half_b").index(split)]
        images, labels = images[indices], labels[indices]
    return ArraySource("digits", split, images, labels, names)


def _load_digits() -> tuple[UInt8[np.ndarray, "n 8 8 1"], Int32[np.ndarray, "n"], tuple[str, ...]]:
    from sklearn import datasets  # here, so that only who opens it needs scikit-learn

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255.0 / 16.0)).astype(np.uint8)
    return images, digits.target.astype(np.int32), tuple(str(name) for name in digits.target_names)


def _captioned_digits(split: str) -> ArraySource:
    """Pairs of those digits and what they are."""
    _check_choice("split of 'captioned_digits'", split, ("train",))
    digits, labels, _ = _load_digits()
    composed = captioned_digits.compose(digits, labels)
    return ArraySource(
        "captioned_digits",
        split,
        composed.images,
        composed.labels,
        captioned_digits.CLASS_NAMES,
        captions=composed.captions,
    )


class FileSource:
    """A `Source` over image files, decoded and resized while they are read; can be sent to other processes.

    For small data sets and first tries: `mscm.prepare` does the same once, and reading is then many times faster.
    """

    def __init__(self, name: str, files: folders.ImageFiles, *, resolution: int, channels: int = 3):
        self.name, self.split = name, files.split or "train"
        self.resolution, self.channels = resolution, channels
        self.class_names, self.captions = files.class_names, files.captions
        self.labels = np.array([entry.label for entry in files.entries], np.int32)
        self._files = files
        self.transform  # noqa: B018 decodes some: a broken one is refused before anything is compiled

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def transform(self) -> str | None:
        """`area`; None where the files that the fingerprint reads have the size, which `area` leaves as it is."""
        shapes = {self._decoded(i).shape[:2] for i in self._some}
        return None if shapes == {(self.resolution, self.resolution)} else "area"

    @property
    def _some(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, _FINGERPRINT_FILES).astype(int)).tolist()

    @functools.cached_property
    def fingerprint(self) -> str:
        # Not the path: a copy elsewhere is the same data. Not all bytes: that would be reading the whole data set.
        sizes = [self._files.size(i) for i in range(len(self))]
        digests = [hashlib.sha256(self._files.read(i)).hexdigest() for i in self._some]
        what = [self._files.entries, sizes, digests, self.class_names, self.resolution, self.channels]
        what += [] if self.captions is None else [self.captions]
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, under the transform `area`.

        Raises:
          BrokenImage: names the file.
          OSError: it cannot be read, or not any more.
        """
        return {"image": np.stack([self._load(int(i)) for i in indices]), "label": self.labels[indices]}

    def _load(self, index: int) -> images.Square:
        return images.area(self._decoded(index), self.resolution)

    def _decoded(self, index: int) -> images.Pixels:
        try:
            return images.decode(self._files.read(index), channels=self.channels)
        except (images.BrokenImage, zlib.error) as error:
            name = self._files.entries[index].name
            raise images.BrokenImage(
                f"{self._files.path}: got a broken image, {name} ({error}); repair it, or prepare the data with "
                "python -m mscm.prepare --skip_broken"
            ) from error


def _synthetic(*, split: str, resolution: int | None, channels: int | None, num_classes: int | None) -> ArraySource:
    """1,024 images of noise, the same for everybody: what a benchmark trains on when the data is not the question."""
    if resolution is None or channels is None or num_classes is None:
        raise ValueError("source 'synthetic': expected resolution, channels and num_classes: it has none itself")
    num_bytes = 1024 * resolution**2 * channels
    if num_bytes > _MAX_SYNTHETIC:
        raise ValueError(f"source 'synthetic': got {num_bytes} bytes of pixels, expected at most {_MAX_SYNTHETIC}")
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (1024, resolution, resolution, channels), dtype=np.uint8)
    labels = (np.arange(len(pixels)) % num_classes).astype(np.int32)
    return ArraySource("synthetic", split, pixels, labels, tuple(str(i) for i in range(num_classes)))


class Mixture(NamedTuple):
    """A mixture of one-dimensional Gaussians, on the scale of images in [-1, 1]."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]


MIXTURE = Mixture(weights=(0.5, 0.5), means=(-0.5, 0.5), stds=(0.12, 0.12))
_MIXTURE_SIZE = 16_384


def _mixture(split: str) -> ArraySource:
    """Images of one pixel whose values are `MIXTURE`, in one class.

    The quantiles of each component, not draws from it: the moments are the mixture's, but for the 256 levels of a
    pixel, whose rounding has a standard deviation of 0.0023.
    """
    _check_choice("split of 'mixture'", split, ("train",))
    values = []
    for weight, mean, std in zip(*MIXTURE, strict=True):
        count, component = round(weight * _MIXTURE_SIZE), statistics.NormalDist(mean, std)
        values += [component.inv_cdf((i + 0.5) / count) for i in range(count)]
    levels = np.clip(np.round((np.array(values) + 1) * 127.5), 0, 255).astype(np.uint8)
    return ArraySource("mixture", split, levels.reshape(-1, 1, 1, 1), np.zeros(len(levels), np.int32), ("mixture",))


# Data sets that need no path, by their names in a config: from a split to the source.
SOURCES: dict[str, Callable[[str], Source]] = {
    "digits": _digits,
    "captioned_digits": _captioned_digits,
    "mixture": _mixture,
}


def open_source(
    name: str,
    *,
    split: str,
    path: str | os.PathLike | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    captioned: bool = False,
) -> Source:
    """The data set at `path` (records, or a folder, zip or tar of images), or the one called `name`.

    `captioned`: images at `path` have captions and no classes. Sizes are for sources that have none of their own; the
    caller checks those of the others.

    Raises:
      ValueError: no such data set, split or path; the message says what there is.
    """
    if path is not None:
        if records.are_at(path):
            return records.RecordSource(name, path, split=split)
        if resolution is None:
            raise ValueError(f"{path}: got a folder or archive of images, expected a resolution to resize them to")
        return FileSource(name, _files_of(path, split, captioned), resolution=resolution, channels=channels or 3)
    if name in SOURCES:
        return SOURCES[name](split)
    if name == "synthetic":
        return _synthetic(split=split, resolution=resolution, channels=channels, num_classes=num_classes)
    return tfds_source.open_tfds(name, split=split, others=[*SOURCES, "synthetic"])


def _files_of(path: str | os.PathLike, split: str, captioned: bool) -> folders.ImageFiles:
    """Files without splits, that is with all class folders in one folder of no telling name, are the split train."""
    list_files = captioned_files.open_captioned if captioned else folders.open_files
    try:
        return list_files(path, split=split)
    except folders.NoSuchSplit:
        if split != "train":
            raise
        files = list_files(path)
        if captioned:
            return files
        above = {PurePosixPath(entry.name).parent.parent for entry in files.entries}
        if len(above) > 1 or above.pop().name.lower() in _SPLIT_NAMES:
            raise
        return files


def _check_choice(what: str, got: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if got in choices:
        return
    nearest = difflib.get_close_matches(got, choices, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"unknown {what}: got {got!r}, expected one of {', '.join(choices)}{hint}")
