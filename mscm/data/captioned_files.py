"""Image files with captions: a folder, zip or tar, or a folder of tars as webdataset writes them.

    files = open_captioned("photos/", split=None)
    files.captions[0]    # ("a cat on a mat", "the cat sits"): at least one of each image

Captions stand in one of two places:

- beside the image, NAME.txt with a caption a line, or NAME.json with a text or texts under `caption` or `text`;
- in tables, *.jsonl or *.csv, which name each image by its path from the table's folder (`file_name`).

All images are of one class: what they show is what is said of them.
"""

import csv
import io
import json
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from mscm.data import folders
from mscm.data.folders import Entry, ImageFiles, Place

CLASS_NAMES = ("captioned",)

_FILE_KEYS, _CAPTION_KEYS = ("file_name", "file", "image", "path"), ("caption", "captions", "text", "texts")
_MAX_BESIDE = 2**20  # bytes of the captions of one image
_TABLES = (".jsonl", ".csv")


def open_captioned(path: str | os.PathLike, *, split: str | None = None) -> ImageFiles:
    """Lists images and their captions; `split` keeps those below a folder of that name.

    Raises:
      ValueError: as `folders.open_files`, but for its classes; or an image without a caption, a table that is none, or
        a row of an image that is not there.
      folders.NoSuchSplit: there is no such folder.
    """
    path = os.fspath(path)
    found, _ = folders.list_files(path)
    if os.path.isdir(path):
        for name in [name for name in found if name.endswith(".tar")]:
            inside, _ = folders.list_files(found.pop(name).path)
            found |= {posixpath.join(name.removesuffix(".tar"), inner): place for inner, place in inside.items()}
    if split is not None:
        chosen = {name: place for name, place in found.items() if split in PurePosixPath(name).parts[:-1]}
        if not any(map(folders.is_image, chosen)):
            raise folders.NoSuchSplit(f"{path}: got split {split!r}, expected a folder of that name with images")
        found = chosen
    names = sorted(filter(folders.is_image, found))
    if not names:
        raise ValueError(f"{path}: got {len(found)} files and no image, expected files such as NAME.jpg and NAME.txt")
    tables = sorted(name for name in found if name.endswith(_TABLES))
    captions: dict[str, list[str]] = {}
    for table in tables:
        for image, said in _rows(f"{path}: {table}", table, found[table]):
            if image not in found:
                raise ValueError(f"{path}: got a row of {image} in {table}, expected that file; repair the table")
            captions.setdefault(image, []).extend(said)
    if not tables:
        captions = {name: _beside(path, name, found) for name in names}
    lost = [name for name in names if not captions.get(name)]
    if lost:
        where = "a row of it" if tables else f"{PurePosixPath(lost[0]).with_suffix('.txt')}"
        raise ValueError(
            f"{path}: got no caption of {lost[0]}{f' and {len(lost) - 1} others' * (len(lost) > 1)}, expected {where}; "
            "add it, or remove the image"
        )
    entries = tuple(Entry(name, 0) for name in names)
    of_images = tuple(tuple(captions[name]) for name in names)
    return ImageFiles(path, split, CLASS_NAMES, entries, tuple(found[name] for name in names), of_images)


def _rows(where: str, table: str, place: Place) -> Iterator[tuple[str, list[str]]]:
    """Image and captions of each row."""
    text = _text(where, place)
    rows: Iterable[tuple[int, Any]]
    if table.endswith(".csv"):
        rows = enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2)
    else:
        rows = ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
    try:
        for number, row in rows:
            row = json.loads(row) if isinstance(row, str) else row
            file, said = _first(row, _FILE_KEYS), _first(row, _CAPTION_KEYS)
            texts = _texts(said)
            if not isinstance(file, str) or not texts:
                raise ValueError(
                    f"row {number} is {str(row)!r:.200}, expected {_FILE_KEYS[0]} and {_CAPTION_KEYS[0]}"
                )
            yield posixpath.normpath(posixpath.join(posixpath.dirname(table), file)), texts
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{where}: got a table that cannot be read ({error}), expected one of captions") from error


def _beside(path: str, image: str, found: dict[str, Place]) -> list[str]:
    stem = PurePosixPath(image)
    for suffix in (".txt", ".json"):
        name = str(stem.with_suffix(suffix))
        if name not in found:
            continue
        where = f"{path}: {name}"
        if folders.size_of(found[name]) > _MAX_BESIDE:
            raise ValueError(f"{where}: got a file of more than {_MAX_BESIDE} bytes, expected captions of one image")
        text = _text(where, found[name])
        if suffix == ".txt":
            return _texts(text.splitlines())
        try:
            return _texts(_first(json.loads(text), _CAPTION_KEYS))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: got a file that is no JSON ({error}), expected a caption") from error
    return []


def _text(where: str, place: Place) -> str:
    try:
        return folders.read_place(place).decode()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{where}: got a file that is no text ({error}), expected UTF-8") from error


def _first(row: Any, keys: tuple[str, ...]) -> Any:
    """The value of the first of some keys that is there."""
    return next((row[key] for key in keys if key in row), None) if isinstance(row, dict) else None


def _texts(said: Any) -> list[str]:
    """One text or several, without those that are empty; nothing where they are no texts."""
    several = [said] if isinstance(said, str) else said
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        return []
    return [text.strip() for text in several if text.strip()]
