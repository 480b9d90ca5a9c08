"""What the commands share: flags, quiet logs, one sentence for an error, the files of a work directory."""

import errno
import json
import logging as python_logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from absl import app, flags, logging
from etils import epath

from mscm import atomic, failures, output, processes, remote
from mscm.config import ConfigError, check_override, find_config, load_config

# Their progress notes are not this program's, their warnings are; what they print as an error they also raise.
_QUIET = ("orbax", "jax", "grain", "matplotlib")
# Of the files that a user names, and not of a machine that has trouble.
_WRONG_PLACE = (FileExistsError, IsADirectoryError, NotADirectoryError)
_INTERRUPTED = ("interrupted; run the same command again to continue", 130)  # as a shell says it

# --config.PATH, or --noconfig.PATH of what is true or false.
_OVERRIDE = re.compile(r"--?(?:no)?config\.(.+)")

_Value = TypeVar("_Value")

flags.disclaim_key_flags()  # the flag below is the command's, whose --help lists it


def run(main: Callable[[], None], *, doc: str, required: Sequence[str]) -> None:
    """Runs a command: parses flags, and prints errors of the user's making as one sentence (exit code 2).

    Also those of the machine's and a directory that another holds, each kind with an exit code of its own: `failures`.
    """
    flags.mark_flags_as_required(list(required))
    _define_verbose(flags.FLAGS)

    def wrapped(_: list[str]) -> None:
        _keep_compiled_programs()
        from mscm import distributed
        from mscm.checkpoint import CheckpointError
        from mscm.data.images import BrokenImage
        from mscm.lease import LeaseError
        from mscm.stopping import Stopped

        remote.look_each_time()
        logging.set_verbosity(logging.INFO)
        handler = logging.get_absl_handler()
        handler.addFilter(_is_ours)
        for name in _QUIET:
            python_logging.getLogger(name).setLevel(python_logging.WARNING)
        # Its warnings are of fonts, and of a cache that costs a second where it cannot be kept.
        python_logging.getLogger("matplotlib").setLevel(python_logging.ERROR)
        # They print a traceback for every write of a save that has failed, which is also raised.
        python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
        sys.unraisablehook = _without_closed_loops
        try:
            if signal.getsignal(signal.SIGINT) is _end_at_once:  # from here on there may be something to leave
                signal.signal(signal.SIGINT, signal.default_int_handler)
            main()
        except (ConfigError, CheckpointError, LeaseError, FloatingPointError, BrokenImage, *_WRONG_PLACE) as error:
            sentence = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                sentence = f"{error.filename}: {error.strerror}"
            status = failures.EX_UNAVAILABLE if isinstance(error, LeaseError) else 2
            _trace_if_verbose()
            distributed.end_all(sentence, status)
            _fail(sentence, status)
        except Exception as error:
            explained = failures.explain(error)
            if explained is not None:
                _trace_if_verbose()
                distributed.end_all(*explained)
                if isinstance(error, processes.Died):
                    _fail_now(*explained)
                _fail(*explained)
            traceback.print_exc()
            distributed.end_all(f"{type(error).__name__}: {error}", 1)
            sys.exit(1)
        except Stopped as stopped:
            if stopped.alone:
                distributed.end_all(str(stopped), stopped.status)
            print(stopped, file=sys.stderr)
            sys.exit(stopped.status)
        except KeyboardInterrupt:
            sentence, status = _INTERRUPTED
            distributed.end_all(sentence, status)
            print(sentence, file=sys.stderr)
            sys.exit(status)
        if printed.error is not None:
            _fail(
                f"standard output: got an error ({printed.error.strerror}), expected to print to it; all else is done: "
                "make room, or print elsewhere",
                failures.EX_CANTCREAT,
            )

    sys.modules["__main__"].__doc__ = doc  # what --help prints above the flags
    with output.lasting() as printed:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end_at_once)
        app.run(wrapped, flags_parser=_parse)


def _end_at_once(number: int, frame: object) -> NoReturn:
    """What Ctrl-C does while there is nothing to end but imports.

    Compiled libraries make an ImportError of a KeyboardInterrupt, or a segmentation fault.
    """
    del number, frame
    sentence, status = _INTERRUPTED
    print(sentence, file=sys.stderr, flush=True)
    os._exit(status)


def path_of(flag: flags.FlagHolder) -> str:
    """The path that a flag gives.

    Raises:
      ConfigError: it is empty, or cannot be read here.
    """
    if not flag.value:
        raise ConfigError(f"--{flag.name}: got an empty path, expected one")
    try:
        remote.check(flag.value)
    except ValueError as error:
        raise ConfigError(f"--{flag.name}: {error}") from error
    return flag.value


def given(flag: flags.FlagHolder[_Value | None]) -> _Value:
    """The value of a flag that has no default and is needed.

    Raises:
      ConfigError: it is absent.
    """
    if flag.value is None:
        raise ConfigError(f"--{flag.name}: got none, expected a value; see --help")
    return flag.value


def output_of(flag: flags.FlagHolder, what: Literal["file", "folder"] = "file") -> str:
    """What a flag gives to write to; its folder is made now, before what takes long.

    Raises:
      ConfigError: it is something else, or its folder cannot be made or written to.
    """
    path = epath.Path(path_of(flag))
    folder = path.parent if what == "file" else path
    try:
        if what == "file" and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        check_can_write(folder)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--{flag.name}: got {flag.value!r}, expected a {what} to write to: {reason}") from error
    return flag.value


def check_can_write(folder: str | os.PathLike) -> None:
    """Looks at a folder before what takes long; a bucket says it only when it is written to.

    Raises:
      PermissionError: this process may not write there.
    """
    if not remote.is_url(folder) and os.path.isdir(folder) and not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(folder))


def _keep_compiled_programs() -> None:
    """Lets JAX find what an earlier process compiled: a run that goes on should not wait for the compiler again.

    In JAX_COMPILATION_CACHE_DIR, or else for each user and host: code for one CPU may not run on another that shares
    the home directory. Called before jax is imported.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(home, "mscm", f"jax-{platform.node()}")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and _can_write_to(cache):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache


def _can_write_to(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _parse(argv: list[str]) -> list[str]:
    """Flags and config overrides; what is wrong with them is a sentence, not a traceback."""
    try:
        rest = flags.FLAGS(_checked([_without_tilde(word) for word in _joined(argv)]))
        if len(rest) > 1:
            raise ConfigError(f"got {' '.join(rest[1:])}, expected flags only, such as --workdir=DIR")
    except (ConfigError, flags.Error) as error:
        _trace_if_verbose()
        _fail(str(error))
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        # ml_collections hands on the repr of a KeyError: escapes within quotes.
        text = str(error).replace("\\n", " ").replace("\\'", "'").removeprefix("'").removesuffix("'")
        _trace_if_verbose()
        _fail(f"--config: {text}")
    return rest


def _define_verbose(values: flags.FlagValues) -> None:
    text = "Print the traceback of every error, not only the sentence."
    flags.DEFINE_bool("verbose", False, text, flag_values=values)


def _trace_if_verbose() -> None:
    """Prints the traceback of the error that is handled, where --verbose asks for it, whatever the other flags are."""
    alone = flags.FlagValues()
    _define_verbose(alone)
    try:
        alone(sys.argv, known_only=True)
    except flags.Error:
        return
    if alone.verbose:
        traceback.print_exc()


def _fail(sentence: str, status: int = 2) -> NoReturn:
    """Ends the process with one line."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(status)


def _fail_now(sentence: str, status: int) -> NoReturn:
    """The same without waiting for threads: one may wait for the rest of what a process that was killed has sent."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _joined(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`."""
    words = list(argv)
    for i in range(len(words) - 2, 0, -1):
        if words[i] in ("-config", "--config"):
            words[i : i + 2] = [f"--config={words[i + 1]}"]
    return words


def _without_tilde(word: str) -> str:
    """`--workdir=~/DIR` with the home directory: shells leave it as it is after an equals sign."""
    name, equals, value = word.partition("=")
    paths = (os.path.expanduser(path) if path.startswith("~/") else path for path in value.split(","))
    return f"{name}{equals}{','.join(paths)}"


def _checked(words: Sequence[str]) -> list[str]:
    """The words, with the path at which the file of --config was found.

    The flag's own errors are tracebacks, and of an override the name of the key alone.

    Raises:
      ConfigError: the config cannot be loaded, or has no such key as one that is overridden.
    """
    config, checked = None, []
    for word in words:
        name, _, path = word.partition("=")
        override = _OVERRIDE.fullmatch(name)
        if name in ("-config", "--config"):
            config = load_config(path)
            file, _, variant = path.partition(":")
            word = f"--config={find_config(file)}" + (f":{variant}" if variant else "")  # as load_config takes it
        elif config is not None and override:
            check_override(config, override[1])
        checked.append(word)
    return checked


def _without_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_ours(record: python_logging.LogRecord) -> bool:
    theirs = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in _QUIET)
    if theirs:
        record.exc_info = None  # the traceback of an error that this program puts into a sentence
    return not theirs or record.levelno == python_logging.WARNING


def append_json_line(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Appends one JSON object as one line; written whole, because a bucket has no appending."""
    lines = [*read_json_lines(path), record]
    atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """The values of a file of JSON lines; none where there is no file."""
    file = epath.Path(path)
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except ValueError as error:
        raise ConfigError(f"{path}: got a line that is no JSON ({error}), expected one object a line") from error
