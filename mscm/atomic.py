"""Files that a reader sees whole: the old one or the new one, on a local disk or a bucket."""

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends well, and leaves nothing when it does not."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: processes that write at the same time cannot mix their files. Not mkstemp's, which only the
    # owner may read: an evaluator may be another user.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a small file whole."""
    with writing(path) as file:
        file.write(text.encode())
