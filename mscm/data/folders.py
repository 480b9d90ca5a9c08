"""Labelled image files: a folder, a zip or a tar with one folder per class.

    files = open_files("photos.zip", split="train")
    files.class_names                       # ("cat", "dog"), sorted: the label is the index
    files.entries[0]                        # Entry(name="photos/train/cat/0001.jpg", label=0)
    files.read(0)                           # its bytes

The class of a file is the folder that holds it; all class folders are equally deep. `split` keeps the files that have
a folder of that name above their class, as in photos/train/cat/0001.jpg. A tar may hold one tar per class, as ILSVRC's
does; the class is then its name.
"""

import collections
import dataclasses
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absl import logging

from mscm import remote
from mscm.data import reading
from mscm.data.images import MAX_BYTES, SUFFIXES, BrokenImage

_ZIP_START = b"PK\x03\x04"  # of its first file


class NoSuchSplit(ValueError):
    """The chosen split is no folder above the classes."""


class _Refused(Exception):
    """One sentence about an archive that is whole."""


class Entry(NamedTuple):
    """One image file: its name within the source, and its label."""

    name: str
    label: int


class Place(NamedTuple):
    """Where the bytes of a file are: a range of the file `path`."""

    path: str
    offset: int = 0
    size: int = -1  # to the end
    deflated: bool = False


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The image files of a source, sorted by name; can be sent to other processes."""

    path: str
    split: str | None
    class_names: tuple[str, ...]
    entries: tuple[Entry, ...]
    _places: tuple[Place, ...]  # where each entry's bytes are
    captions: tuple[tuple[str, ...], ...] | None = None  # of each entry, at least one; None: there are none

    def part(self, start: int, stop: int) -> "ImageFiles":
        """The files from `start` to before `stop`."""
        return self.chosen(range(start, min(stop, len(self.entries))))

    def chosen(self, indices: Iterable[int]) -> "ImageFiles":
        """The files at `indices`."""
        indices = tuple(indices)
        chosen = {name: getattr(self, name) for name in ("entries", "_places", "captions")}
        chosen = {name: items and tuple(items[i] for i in indices) for name, items in chosen.items()}
        return dataclasses.replace(self, **chosen)

    def size(self, index: int) -> int:
        """The number of bytes of a file as it is stored."""
        return size_of(self._places[index])

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
          BrokenImage: it has more than an image may have, packed or not.
          OSError: with its path: it is not there any more, or its disk does not answer, also after some time.
          zlib.error: it is packed and damaged.
        """
        return read_place(self._places[index])


def size_of(place: Place) -> int:
    """The number of bytes of a file as it is stored."""
    return os.path.getsize(place.path) if place.size < 0 else place.size


def read_place(place: Place) -> bytes:
    """The bytes of a file, as `ImageFiles.read`."""

    def read() -> bytes:
        _check_size(size_of(place))
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    data = reading.patiently(read, place.path)
    if not place.deflated:
        return data
    unpacker = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    data = unpacker.decompress(data, MAX_BYTES + 1)
    _check_size(len(data))
    if not unpacker.eof:
        raise zlib.error("incomplete or truncated stream")
    return data


def open_files(path: str | os.PathLike, *, split: str | None = None) -> ImageFiles:
    """Lists a folder, zip or tar.

    Raises:
      ValueError: no such path, not one of the three, cut, compressed so that files cannot be read one by one, a folder
        that may not be read, no images, no such split, several splits and none chosen, an empty class folder, class
        folders of different depth, or two classes of one name.
      PermissionError: as `list_files`.
    """
    path = os.fspath(path)
    images, others, folders = _images_in(path, "CLASS/NAME.jpg")
    parents = {str(PurePosixPath(name).parent) for name in images}
    # Of a file too: an archive need not name its folders.
    folders = {*folders, *(str(PurePosixPath(name).parent) for name in others)}
    empty = {folder for folder in folders if not _is_hidden(folder) and folder not in parents}
    if split is not None:
        chosen = {parent for parent in parents if split in PurePosixPath(parent).parts[:-1]}
        if not chosen:
            names = sorted({part for parent in parents for part in PurePosixPath(parent).parts[:-1]})
            choices = (
                f", one of {', '.join(names[:20])}"
                if names
                else "; there is none: all of it is the split 'train' of a config, and mscm.prepare takes no --split"
            )
            raise NoSuchSplit(f"{path}: got split {split!r}, expected a folder above the class folders{choices}")
        empty = {folder for folder in empty if split in PurePosixPath(folder).parts[:-1]}
        parents = chosen
    _check_classes(path, parents, empty)
    class_names = tuple(sorted(PurePosixPath(parent).name for parent in parents))
    label_of = {parent: class_names.index(PurePosixPath(parent).name) for parent in parents}
    names = sorted(name for name in images if str(PurePosixPath(name).parent) in parents)
    entries = tuple(Entry(name, label_of[str(PurePosixPath(name).parent)]) for name in names)
    return ImageFiles(path, split, class_names, entries, tuple(images[name] for name in names))


def open_unlabelled(path: str | os.PathLike) -> ImageFiles:
    """Lists the images of a folder, zip or tar, at any depth, all of one class.

    Raises:
      ValueError: no such path, not one of the three, damaged, or no images.
      PermissionError: as `list_files`.
    """
    path = os.fspath(path)
    images, _, _ = _images_in(path, "NAME.png")
    names = sorted(images)
    entries = tuple(Entry(name, 0) for name in names)
    return ImageFiles(path, None, ("any",), entries, tuple(images[name] for name in names))


def _images_in(path: str, example: str) -> tuple[dict[str, Place], list[str], Iterable[str]]:
    """The images of a source by name, the names of its other files, and its folders."""
    found, folders = list_files(path)
    images = {name: place for name, place in found.items() if is_image(name)}
    if not images:
        raise ValueError(f"{path}: got {len(found)} files and no image, expected files such as {example}")
    others = sorted(found.keys() - images.keys())
    if others:
        logging.info("%s: %d files are no images by their names, such as %s", path, len(others), others[0])
    return images, others, folders


def _check_classes(path: str, parents: set[str], empty: set[str]) -> None:
    if "." in parents:
        raise ValueError(f"{path}: got images that are in no folder, expected one folder per class: CLASS/NAME.jpg")
    by_name = collections.defaultdict(list)
    for parent in sorted(parents):
        by_name[PurePosixPath(parent).name].append(parent)
    twice = [places for places in by_name.values() if len(places) > 1]
    if twice:
        above = sorted({PurePosixPath(place).parent.name for places in twice for place in places})
        raise ValueError(
            f"{path}: got {len(twice)} classes with two folders of their name, such as {' and '.join(twice[0][:2])}, "
            f"expected one; choose one of {', '.join(above)} as the split, or rename them"
        )
    by_depth = {len(PurePosixPath(parent).parts): parent for parent in sorted(parents)}
    if len(by_depth) > 1:
        shallow, deep = by_depth[min(by_depth)], by_depth[max(by_depth)]
        raise ValueError(
            f"{path}: got images in folders of different depth, {shallow} and {deep}, expected one folder per class; "
            "choose a folder above the classes as the split, or move the images"
        )
    # A folder beside class folders that has no image of its own would silently shift the labels of the others.
    grand = {str(PurePosixPath(parent).parent) for parent in parents}
    lost = sorted(folder for folder in empty if str(PurePosixPath(folder).parent) in grand and folder not in grand)
    if lost:
        raise ValueError(f"{path}: got no image in the class folder {lost[0]}, expected at least one; remove it")


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise BrokenImage(f"got a file of {num_bytes} bytes or more, expected at most {MAX_BYTES}")


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def list_files(path: str) -> tuple[dict[str, Place], Iterable[str]]:
    """The files of a folder, zip or tar by name, and its folders.

    Without the resource forks that some archivers add, and other hidden files.

    Raises:
      ValueError: no such path, not one of the three, empty, damaged, or compressed so that files cannot be read one by
        one.
      PermissionError: this user may not read the zip or tar.
    """
    found, folders = _list(path)
    return {name: place for name, place in found.items() if not _is_hidden(name)}, folders


def _list(path: str) -> tuple[dict[str, Place], Iterable[str]]:
    if os.path.isdir(path):
        return _list_folder(path)
    if remote.is_url(path):
        raise ValueError(f"got {path!r}, expected a folder, zip or tar of a disk: no data is read from a bucket")
    if not remote.exists(path):
        raise ValueError(f"got {path!r}, expected an existing folder, zip or tar of images")
    with open(path, "rb") as file:  # here: zipfile and tarfile would find fault with a file that may not be read
        start = file.read(len(_ZIP_START))
    if not start:
        raise ValueError(f"{path}: got an empty file, expected a folder, zip or tar of images; copy it again")
    if zipfile.is_zipfile(path):
        try:
            return _list_zip(path)
        except _Refused as refusal:
            raise ValueError(f"{path}: {refusal}") from refusal
        except Exception as error:  # zipfile raises a dozen types for damaged bytes
            raise ValueError(f"{path}: got a damaged zip ({error}), expected a whole one") from error
    if start == _ZIP_START:
        raise ValueError(
            f"{path}: got a cut or damaged zip (no list of files at its end), expected a whole one; copy it again"
        )
    try:
        tar = tarfile.open(path, "r:")
    except tarfile.ReadError as error:
        if tarfile.is_tarfile(path):
            raise ValueError(
                f"{path}: got a compressed tar, expected a plain one, whose files can be read in any order"
            ) from error
        raise ValueError(
            f"{path}: got a file that is neither zip nor tar, expected a folder, zip or tar of images"
        ) from error
    except Exception as error:  # as below
        raise ValueError(f"{path}: got a damaged tar ({error}), expected a whole one") from error
    with tar:
        try:
            return _list_tar(tar, path, 0, "")
        except _Refused as refusal:
            raise ValueError(f"{path}: {refusal}") from refusal
        except Exception as error:  # tarfile raises a dozen types for damaged bytes
            raise ValueError(f"{path}: got a damaged or cut tar ({error}), expected a whole one") from error


def _list_folder(path: str) -> tuple[dict[str, Place], Iterable[str]]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{path}: got the folder {error.filename}, expected to be allowed to read it") from error

    files: dict[str, Place] = {}
    folders: set[str] = set()
    seen: dict[str, str] = {}
    # os.walk leaves out what it cannot read, and the labels of other classes would shift.
    for directory, _, names in os.walk(path, followlinks=True, onerror=refuse):
        real = os.path.realpath(directory)
        if directory.startswith(seen.setdefault(real, directory) + os.sep):  # without an end, and ever more of them
            raise ValueError(f"{path}: got {directory}, a link to a folder above it, expected none; remove it")
        folder = Path(directory).relative_to(path).as_posix()
        folders.add(folder)
        for name in names:
            full = os.path.join(directory, name)
            files[(PurePosixPath(folder) / name).as_posix()] = Place(full)
    return files, folders - {"."}


def _list_zip(path: str) -> tuple[dict[str, Place], Iterable[str]]:
    files, folders = {}, set()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for info in archive.infolist():
            name = PurePosixPath(info.filename).as_posix()  # without a leading ./
            if info.is_dir():
                folders.add(name)
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise _Refused(
                    f"got {info.filename}, which is encrypted or compressed in a rare way, expected a plain or "
                    "deflated file; unpack the zip and give the folder"
                )
            # The local header repeats the name, with an extra field of its own length.
            raw.seek(info.header_offset + 26)
            lengths = raw.read(4)
            skip = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            files[name] = Place(path, info.header_offset + skip, info.compress_size, deflated)
    return files, folders


def _list_tar(tar: tarfile.TarFile, path: str, base: int, prefix: str) -> tuple[dict[str, Place], Iterable[str]]:
    files: dict[str, Place] = {}
    folders: set[str] = set()
    links: dict[str, str] = {}
    for member in tar:
        name = PurePosixPath(prefix, member.name).as_posix()
        if member.isdir():
            folders.add(name)
        elif member.issparse():
            raise _Refused(f"got {name}, which is stored with holes, expected plain files; unpack the tar")
        elif member.isfile() and name.endswith(".tar"):
            if prefix:
                raise _Refused(f"got {name}, a tar in a tar in a tar, expected one per class; unpack it")
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                inside, more = _list_tar(inner, path, base + member.offset_data, name.removesuffix(".tar"))
            files |= inside
            folders |= {name.removesuffix(".tar"), *more}
        elif member.isfile():
            files[name] = Place(path, base + member.offset_data, member.size)
        elif member.islnk():
            links[name] = PurePosixPath(prefix, member.linkname).as_posix()
        elif member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    # tarfile takes a damaged header for the end; the true end is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no valid header at byte {base + tar.offset}")
    for name, goal in links.items():
        if goal in files:
            files[name] = files[goal]
        elif is_image(name):
            raise _Refused(f"got {name}, a link to {goal}, expected that file in the tar; unpack it first")
    return files, folders
