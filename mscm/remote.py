"""Work directories in a bucket: gs://BUCKET/... and s3://BUCKET/...

Files are read and written through etils.epath, which asks fsspec, which needs a library for each kind of bucket.
"""

import importlib.util
import os

from etils import epath
from fsspec import config

# By the start of a path: the libraries of which one reads it, and what installs the first.
_LIBRARIES = {"gs": (("gcsfs", "tensorflow"), "mscm[gs]"), "s3": (("s3fs", "tensorflow"), "mscm[s3]")}


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
    return epath.Path(path) if "://" in os.fspath(path) else epath.Path(path).absolute()


def look_each_time() -> None:
    """Lets no listing of a bucket come from memory: who watches for checkpoints would never see a new one."""
    for protocol in ("gcs", "s3"):  # as epath calls them
        config.conf.setdefault(protocol, {})["use_listings_cache"] = False
