"""Files that a reader sees whole: the old one or the new one, on a local disk or a bucket."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from mscm import failures, processes

_ENDING = ".tmp"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and leaves nothing when it does not.

    Raises:
      OSError: with the path, also where the system does not say it: a disk that is full.
    """
    target = epath.Path(path)
    with failures.naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        # A name of its own: processes that write at the same time, also on other hosts, cannot mix their files. Not
        # mkstemp's, which only the owner may read: an evaluator may be another user.
        pid = os.getpid()
        temporary = target.with_name(f"{target.name}.{_place()}.{pid}.{processes.start_of(pid)}{_ENDING}")
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@functools.lru_cache(maxsize=64)  # once for each folder: it may hold many files
def _remove_leftovers(folder: epath.Path) -> None:
    """Removes what processes of this place have left that were killed."""
    for path in folder.iterdir():
        if not path.name.endswith(_ENDING):
            continue
        _, *of_process = path.name.removesuffix(_ENDING).rsplit(".", 3)
        if len(of_process) == 3 and of_process[0] == _place():
            if not processes.is_alive(int(of_process[1]), of_process[2]):
                path.unlink(missing_ok=True)


def _place() -> str:
    """Short for where this process runs."""
    return hashlib.sha256("\n".join(processes.place()).encode()).hexdigest()[:12]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a small file whole."""
    with writing(path) as file:
        file.write(text.encode())
