"""Shards of records in ArrayRecord: written whole, read one by one by their number over all shards."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Integer

from mscm import failures
from mscm.data import reading


@contextlib.contextmanager
def writing_shard(path: str | os.PathLike) -> Iterator[ArrayRecordWriter]:
    """A shard that is there when the block has ended, and not before.

    Raises:
      OSError: with its path.
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    # Records one by one for random access. PNG does not compress further; raw pixels are for who wants speed.
    writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
    try:
        with failures.naming(path):  # of ArrayRecord's RuntimeError
            yield writer
            writer.close()
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(RuntimeError):
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


class Shards:
    """Records of several files one after the other; can be sent to other processes."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        """Opens them, of which each process does for itself.

        Raises:
          RuntimeError, ValueError, OSError: ArrayRecord's, about a file that is none of its own.
        """
        self.paths = [os.fspath(path) for path in paths]
        self.sizes = tuple(reader.num_records() for reader in self._readers)
        self._starts = np.cumsum((0, *self.sizes[:-1]))

    @functools.cached_property
    def _readers(self) -> list[ArrayRecordReader]:
        return [ArrayRecordReader(path) for path in self.paths]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}  # each process opens its own

    def places(self, numbers: Integer[np.ndarray, "b"]) -> list[tuple[int, int]]:
        """Shard and number within it of each record."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        return list(zip(shards.tolist(), (numbers - self._starts[shards]).tolist(), strict=True))

    def read(self, shard: int, i: int) -> bytes:
        """One record: to ask ArrayRecord for many at once wakes threads for them and takes twice the time.

        Raises:
          RuntimeError, IndexError: it is damaged.
          OSError: its file cannot be read, also after some time, or not any more.
        """

        def read() -> bytes:
            try:
                return self._readers[shard].read([i])[0]
            except RuntimeError:  # a reader that has failed fails again
                self._readers[shard] = ArrayRecordReader(self.paths[shard])
                raise

        return reading.patiently(read, self.paths[shard])
