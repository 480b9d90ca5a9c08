"""What a machine refuses in the middle of a run, as one sentence and an exit status: room, permission, memory, data.

    with failures.naming("DIR/checkpoints"):  # where the thing is known: an error in it says what it is about
        ...
    sentence, status = failures.explain(error)  # once, where the command ends

C++ libraries raise a ValueError or a RuntimeError in whose text the system's message stands; `naming` makes it the
OSError that it was.
"""

import contextlib
import errno
import getpass
import os
import shutil
from collections.abc import Iterator

from mscm import remote
from mscm.processes import Died

# As sysexits.h has them.
EX_UNAVAILABLE = 69  # another process is at work there
EX_OSERR = 71  # out of memory, or a process was killed
EX_CANTCREAT = 73  # no room, or no permission
EX_IOERR = 74  # data cannot be read

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
CANNOT_WRITE = (*_NO_ROOM, *_NO_PERMISSION)
# What a network file system says when a server restarts: it may be back in a moment.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ENOTCONN, errno.EAGAIN)
_KNOWN = (*CANNOT_WRITE, *TRANSIENT, errno.ENOENT, errno.EMFILE, errno.ENOTDIR)

_GOES_ON = "the same command then goes on from what is saved"


class OutOfDeviceMemory(RuntimeError):
    """A program and its arrays do not fit a device; the message says which, and what makes it smaller."""


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the system within the block name `path`, if they do not name another.

    Raises:
      OSError: also where a library has made another error of it.
    """
    name = os.fspath(path)
    try:
        yield
    except OSError as error:
        # Nor the name of a temporary file beside it.
        if error.errno is not None and (error.filename is None or os.fspath(error.filename).startswith(name)):
            error.filename = name
        raise
    except (ValueError, RuntimeError) as error:
        code = next((code for code in _KNOWN if os.strerror(code) in str(error)), None)
        if code is None or type(error) not in (ValueError, RuntimeError):  # their subclasses are not the libraries'
            raise
        raise OSError(code, os.strerror(code), name) from error


@contextlib.contextmanager
def device_memory(what: str, ways_out: str) -> Iterator[None]:
    """Says what needs the memory of the devices.

    Raises:
      OutOfDeviceMemory: where the block runs out of it.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_device_memory(error):
            raise
        raise OutOfDeviceMemory(
            f"{what}: got more than the memory of a device ({_first_line(error)}), expected less: {ways_out}; python "
            "-m mscm.plan says what fits"
        ) from error


def explain(error: BaseException) -> tuple[str, int] | None:
    """A sentence and an exit status; None for what is not the machine's."""
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        return _of_storage(error)
    if isinstance(error, MemoryError):
        return (
            f"got no more memory on this host ({_first_line(error)}), expected some; lower config.data.num_workers, "
            f"config.data.num_threads, config.train.steps_per_dispatch or config.eval.batch_size; {_GOES_ON}",
            EX_OSERR,
        )
    if isinstance(error, (OutOfDeviceMemory, Died)):
        return f"{error}; {_GOES_ON}", EX_OSERR
    if _is_out_of_device_memory(error):
        return (
            f"got more than the memory of a device ({_first_line(error)}), expected less; lower config.eval.batch_size "
            f"where this was sampling or scoring, or cut the parameters with config.mesh.fsdp; {_GOES_ON}",
            EX_OSERR,
        )
    return None


def _of_storage(error: OSError) -> tuple[str, int]:
    path, what = os.fspath(error.filename), error.strerror
    if error.errno in _NO_ROOM:
        return f"{path}: got no room ({what}{_free(path)}), expected some; make room: {_GOES_ON}", EX_CANTCREAT
    if error.errno in _NO_PERMISSION:
        return (
            f"{path}: got no permission ({what}), expected one for the user {_user()}; give it, or take another "
            f"directory: {_GOES_ON}",
            EX_CANTCREAT,
        )
    return f"{path}: could not be read or written ({what}); bring it back: {_GOES_ON}", EX_IOERR


def _free(path: str) -> str:
    """What is left on the disk of a path; nothing where nobody says it."""
    if remote.is_url(path):
        return ""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return f"; {shutil.disk_usage(folder).free} bytes are free in {folder} now"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, in a container
        return str(os.getuid())


def _is_out_of_device_memory(error: BaseException) -> bool:
    from jax.errors import JaxRuntimeError  # here: the data commands do without it

    if "RESOURCE_EXHAUSTED" not in str(error):
        return False
    # A program that has run before is called without Python, and its errors become ValueErrors there. A bucket's limits
    # are ValueErrors too, of the library that writes to it.
    return isinstance(error, JaxRuntimeError) or (isinstance(error, ValueError) and "allocat" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
