"""Work directories in a bucket: gs://BUCKET/... and s3://BUCKET/...

Files are read and written through etils.epath, which asks fsspec, which needs a library for each kind of bucket.
"""

import importlib.util
import os

from etils import epath
from fsspec import config

# By the start of a path: the libraries of which one reads it, and what installs the first.
_LIBRARIES = {"gs": (("gcsfs", "tensorflow"), "mscm[gs]"), "s3": (("s3fs", "tensorflow"), "mscm[s3]")}


def is_url(path: str | os.PathLike) -> bool:
    """Whether it is no path of this machine's disks."""
    return "://" in os.fspath(path)


def check(path: str | os.PathLike) -> None:
    """Looks whether files of this path can be read here.

    Raises:
      ValueError: it is of a kind that is not known, or its library is not installed.
    """
    protocol, separator, _ = os.fspath(path).partition("://")
    if not separator:
        return
    if protocol not in _LIBRARIES:
        raise ValueError(f"got {os.fspath(path)!r}, expected a local path, or one that begins with gs:// or s3://")
    libraries, extra = _LIBRARIES[protocol]
    if not any(importlib.util.find_spec(library) for library in libraries):
        raise ValueError(
            f"got {os.fspath(path)!r}, which needs the library {libraries[0]}; install it with pip install {extra}"
        )


def absolute(path: str | os.PathLike) -> epath.Path:
    """The same path from any directory; epath's own would take gs: for a folder."""
    return epath.Path(path) if is_url(path) else epath.Path(path).absolute()


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or a directory.

    Raises:
      PermissionError: this user may not look, which epath takes for absence.
    """
    if epath.Path(path).exists():
        return True
    if not is_url(path):
        try:
            os.stat(path)
        except PermissionError:
            raise
        except (OSError, ValueError):  # absent, or nothing can be called so
            pass
    return False


def size(path: str | os.PathLike) -> int:
    """Bytes of a file; epath would also ask for its owner's name, who may have none in a container.

    Raises:
      OSError: it is not there, or nobody says it.
    """
    return epath.Path(path).stat().length if is_url(path) else os.path.getsize(path)


def look_each_time() -> None:
    """Lets no listing of a bucket come from memory: who watches for checkpoints would never see a new one."""
    for protocol in ("gcs", "s3"):  # as epath calls them
        config.conf.setdefault(protocol, {})["use_listings_cache"] = False
