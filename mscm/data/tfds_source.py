"""TensorFlow Datasets without TensorFlow: prepared as array_record, read by index, decoded here.

Preparing one of the stock data sets needs TensorFlow, once: `pip install mscm[prepare]` and
`tfds build NAME --file_format=array_record`. Reading does not.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from mscm.data import images
from mscm.data.captioned_files import CLASS_NAMES
from mscm.data.folders import Entry

_BLOCK = 1024  # examples in memory while labels are read

PREFIX = "tfds:"  # of a data set's name where a path could stand


class TfdsSource:
    """A `Source` over a prepared data set with an image and a label; made by `open_tfds`."""

    transform: None = None
    captions: None = None

    def __init__(self, name: str, split: str, builder: Any, keys: tuple[str, str]):
        features = builder.info.features
        self._image, self._label = keys
        self.name, self.split = name, split
        self.resolution, _, self.channels = features[self._image].shape
        self.class_names = tuple(features[self._label].names)
        self._identity = f"{builder.info.full_name} {builder.info.splits[split].shard_lengths}"
        self._records = builder.as_data_source(split, decoders={self._image: _skip_decoding()})

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def labels(self) -> Int32[np.ndarray, "n"]:
        return _labels(self._records, self._label, len(self.class_names), self.name, self.split)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def load(self, indices: Integer[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, read in one request."""
        examples = self._read(indices)
        return {
            "image": np.stack([images.decode(example[self._image], channels=self.channels) for example in examples]),
            "label": np.array([example[self._label] for example in examples], np.int32),
        }

    def _read(self, indices: Integer[np.ndarray, "b"]) -> list[dict]:
        return self._records.__getitems__([int(i) for i in indices])


@dataclasses.dataclass(frozen=True)
class TfdsFiles:
    """The encoded images of a prepared data set, of any size, as `folders.ImageFiles` has them for `mscm.prepare`."""

    path: str  # tfds:NAME
    split: str
    class_names: tuple[str, ...]
    entries: tuple[Entry, ...]
    _image: str  # name of the feature
    _directory: str  # where it is prepared: a worker process may not know the builder's class
    _first: int = 0  # where the entries start in the data set
    captions: tuple[tuple[str, ...], ...] | None = None  # of each image; None: labels are read

    def part(self, start: int, stop: int) -> "TfdsFiles":
        """The images from `start` to before `stop`."""
        said = self.captions and self.captions[start:stop]
        return dataclasses.replace(self, entries=self.entries[start:stop], _first=self._first + start, captions=said)

    def size(self, index: int) -> int:
        """0: not known without reading it; the entry's name carries the version of the data set."""
        return 0

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        return self._records[self._first + index][self._image]

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._directory)
        return builder.as_data_source(self.split, decoders={self._image: _skip_decoding()})


def open_tfds_files(path: str, *, split: str | None, captioned: bool = False) -> TfdsFiles:
    """The images of `tfds:NAME`, to prepare them.

    Raises:
      ValueError: as `open_tfds`, but for the sizes; or there is no split, or, with `captioned`, no captions.
    """
    name = path.removeprefix(PREFIX)
    builder, split = _builder(name, split)
    if captioned:
        return _captioned_files(path, builder, split)
    image, label = _keys(builder)
    records = builder.as_data_source(split, decoders={image: _skip_decoding()})
    # The order of the class names is the data set's own: its labels are kept.
    class_names = tuple(builder.info.features[label].names)
    labels = _labels(records, label, len(class_names), name, split)
    full_name = builder.info.full_name
    entries = tuple(Entry(f"{full_name}/{split}/{i:08d}", int(k)) for i, k in enumerate(labels))
    return TfdsFiles(path, split, class_names, entries, image, str(builder.data_path))


def _captioned_files(path: str, builder: Any, split: str) -> TfdsFiles:
    import tensorflow_datasets as tfds

    features, info = builder.info.features, builder.info
    images_of = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    read = {key: reader for key in features if (reader := _caption_reader(features[key])) is not None}
    if len(images_of) != 1 or len(read) != 1:
        raise ValueError(
            f"got data set {info.name!r} with the images {images_of} and the texts {sorted(read)}, expected one of each"
        )
    (image,), ((key, texts_of),) = images_of, read.items()
    records = builder.as_data_source(split, decoders={image: _skip_decoding()})
    blocks = np.array_split(np.arange(len(records)), -(-len(records) // _BLOCK))
    said = [texts_of(record[key]) for block in blocks for record in records.__getitems__(block.tolist())]
    entries = tuple(Entry(f"{info.full_name}/{split}/{i:08d}", 0) for i in range(len(said)))
    lost = [entry.name for entry, texts in zip(entries, said, strict=True) if not texts]
    if lost:
        raise ValueError(f"got no caption of {lost[0]}, expected one of each image")
    return TfdsFiles(
        path, split, CLASS_NAMES, entries, image, str(builder.data_path), captions=tuple(map(tuple, said))
    )


def _caption_reader(feature: Any) -> Callable[[Any], list[str]] | None:
    """From the value of a feature to texts; None: it is not one of texts."""
    import tensorflow_datasets as tfds

    def texts(values: Iterable[Any]) -> list[str]:
        decoded = (value.decode() if isinstance(value, bytes) else str(value) for value in values)
        return [text.strip() for text in decoded if text.strip()]

    if isinstance(feature, tfds.features.Text):
        return lambda value: texts([value])
    if not isinstance(feature, tfds.features.Sequence):
        return None
    if isinstance(feature.feature, tfds.features.Text):
        return texts
    if "text" in getattr(feature.feature, "keys", tuple)():  # as COCO's, of which each has a number too
        return lambda value: texts(value["text"])
    return None


def open_tfds(name: str, *, split: str, others: Iterable[str] = ()) -> TfdsSource:
    """The data set `name` of TensorFlow Datasets, with all its images of one square size.

    `others`: names of data sets that are not its, for the sentence about a name that nobody knows.

    Raises:
      ValueError: no such data set, not prepared as array_record, no such split, no image and label, or images of other
        sizes; the message says what to do.
    """
    builder, _ = _builder(name, split, others)
    keys = _keys(builder)
    shape = builder.info.features[keys[0]].shape
    if None in shape or shape[0] != shape[1]:
        raise ValueError(
            f"got images of shape {shape} in {name!r}, expected one square size; run python -m mscm.prepare "
            f"--source={PREFIX}{name} --split={split} and give config.data.path"
        )
    return TfdsSource(name, split, builder, keys)


def _labels(records: Any, key: str, num_classes: int, name: str, split: str | None) -> Int32[np.ndarray, "n"]:
    """All labels of a data set, read in blocks: an example has its image too."""
    blocks = np.array_split(np.arange(len(records)), -(-len(records) // _BLOCK))
    values = [record[key] for block in blocks for record in records.__getitems__(block.tolist())]
    labels = np.array(values, np.int32)
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"got labels from {labels.min()} to {labels.max()} in split {split!r} of {name!r}, expected 0 to "
            f"{num_classes - 1}: the labels of this split are hidden"
        )
    return labels


def _builder(name: str, split: str | None, others: Iterable[str] = ()) -> tuple[Any, str]:
    """The builder of a prepared data set, and the split, which it has."""
    import tensorflow_datasets as tfds  # here: half a second that only its users pay

    path = "or give config.data.path: a folder, zip or tar of images, or a directory made by python -m mscm.prepare"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        known = ", ".join([*others, "or a name that TensorFlow Datasets knows"]).removeprefix("or ")
        raise ValueError(f"got data set {name!r}, expected {known}, {path}") from error
    if not builder.is_prepared():
        raise ValueError(
            f"got data set {name!r}, which is not prepared in {builder.data_path}; prepare it once with pip install "
            f"mscm[prepare] and tfds build {name} --file_format=array_record, {path}"
        )
    if split is None or split not in builder.info.splits:
        raise ValueError(f"got split {split!r} of {name!r}, expected one of {', '.join(builder.info.splits)}")
    return builder, split


def _keys(builder: Any) -> tuple[str, str]:
    """The features that are an image and its class."""
    keys, features = builder.info.supervised_keys, builder.info.features
    has_both = keys is not None and len(keys) == 2 and len(features[keys[0]].shape) == 3
    if not has_both or not hasattr(features[keys[1]], "names"):
        raise ValueError(f"got data set {builder.info.name!r} without an image and a class label, expected both")
    image, label = keys
    return image, label


def _skip_decoding() -> Any:
    import tensorflow_datasets as tfds

    return tfds.decode.SkipDecoding()
