"""Arrays from .npy and .npz files of any origin: nothing is unpickled, and no more allocated than the file holds.

A file of a few bytes may claim an array of terabytes, or unpack to them. So each header is compared with the bytes that
follow it, and an archive may be `MAX_GROWTH` times as large unpacked as it is.
"""

import math
import os
import zipfile
from collections.abc import Collection
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

MAX_GROWTH = 100  # compressed images of one colour
_PIECE = 2**24  # bytes: an archive's member is read through a copy


@runtime_checkable
class _Readable(Protocol):
    """A file, or a member of an archive."""

    def read(self, size: int = -1, /) -> bytes: ...

    def tell(self) -> int: ...


def read_npz(path: str | os.PathLike, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or those of `names` that are there.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, claims more than it holds, or has pickled objects.
    """
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = [name for name in members if names is None or name in names]
            size, unpacked = file.seek(0, os.SEEK_END), sum(members[name].file_size for name in wanted)
            if unpacked > MAX_GROWTH * size:
                raise ValueError(f"{unpacked} bytes unpacked from {size}, at most {MAX_GROWTH} times as many are read")
            arrays = {}
            for name in wanted:
                with archive.open(members[name]) as member:
                    arrays[name] = _read(member, members[name].file_size)
            return arrays
    except FileNotFoundError:
        raise
    # Not a list: zipfile, the decompressors and numpy's parser of headers raise a dozen types for damaged bytes, among
    # them TypeError, SyntaxError, TokenError, RuntimeError (one bit says encrypted), OverflowError and MemoryError.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def names_in_npz(path: str | os.PathLike) -> set[str]:
    """Of the arrays of a file; none where it is no .npz."""
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # as in `read_npz`
        return set()


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of an .npy file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: as `read_npz`.
    """
    try:
        with epath.Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _read(file, size)
    except FileNotFoundError:
        raise
    except Exception as error:  # as in `read_npz`
        raise ValueError(str(error) or type(error).__name__) from error


def _read(file: _Readable, size: int) -> np.ndarray:
    """The array at the start of a file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"an array of format {version}, (1, 0) or (2, 0) is read")
    if dtype.hasobject:
        raise ValueError("pickled objects, which are not read")
    expected, left = math.prod(shape) * dtype.itemsize, size - file.tell()
    if min(shape, default=0) < 0 or expected != left:
        raise ValueError(f"an array of shape {shape}, that is {expected} bytes, where {left} are")
    data, done = bytearray(expected), 0
    while done < expected:
        piece = file.read(min(_PIECE, expected - done))
        if not piece:
            raise EOFError(f"{done} of {expected} bytes of an array")
        data[done : done + len(piece)] = piece
        done += len(piece)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
