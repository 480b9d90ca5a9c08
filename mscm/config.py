"""Reading of configs: the file, its sections, and the sentence about a key that is wrong.

Imports no jax, so that an error in a config is an answer within a second.
"""

import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mscm import remote

# Where and how fast a training runs, what it writes, and what scores it: keys that may change while it goes on.
_DECIDES_NOTHING = (
    "eval", "mesh", "data.path", "data.num_threads", "data.num_workers", "model.attention", "model.remat",
    "teacher.workdir", "train.num_microbatches", "train.steps_per_dispatch", "train.log_every_steps",
    "train.save_every_steps", "train.keep_checkpoints", "train.max_bad_steps", "ema.snapshot_every_steps",
)


_INT_LIMIT = 2**31  # what a device counts to


class ConfigError(ValueError):
    """The config asks for something that is not there; the message says what was got, expected and to do."""


class Section:
    """One level of a config that remembers which of its keys were read."""

    def __init__(self, values: Mapping[str, Any] | ConfigDict, path: str = "config"):
        self._values, self._path = dict(values.items()), path
        self._unread = set(self._values)
        self._known: set[str] = set()  # what may be given, for the hint at a typing error
        self._sections: list[Section] = []

    def has(self, key: str) -> bool:
        """Whether `key` is there: for the few that may be left out."""
        self._known.add(key)
        return key in self._values

    def take(self, key: str) -> Any:
        """The value of `key`; every key is required, so that a config shows all that it decides."""
        if key not in self._values:
            raise ConfigError(f"{self._path}: got no key {key!r}{nearest(key, self._values)}, expected it")
        self._unread.discard(key)
        return self._values[key]

    def choose(self, key: str, choices: Mapping[str, Any] | tuple[str, ...]) -> Any:
        """The choice that the value of `key` names: the value of a mapping, the name itself of a tuple."""
        name = self.take(key)
        if name not in choices:
            hint = nearest(str(name), choices)
            raise ConfigError(f"{self._path}.{key}: got {name!r}{hint}, expected one of {', '.join(choices)}")
        return choices[name] if isinstance(choices, Mapping) else name

    def number(self, key: str, *, minimum: int | float, below: int | float | None = None) -> Any:
        """The number of `key`, at least `minimum` and less than `below`; a whole one where `minimum` is."""
        value, is_whole = self.take(key), isinstance(minimum, int)
        is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
        if not is_number or value < minimum or (below is not None and value >= below):
            limit = "" if below is None else f" and below {below}"
            kind = "whole number" if is_whole else "number"
            raise ConfigError(f"{self._path}.{key}: got {value!r}, expected a {kind} of at least {minimum}{limit}")
        if is_whole and value >= _INT_LIMIT:
            raise ConfigError(f"{self._path}.{key}: got {value!r}, expected a number below {_INT_LIMIT}")
        return value

    def text(self, key: str) -> str:
        """The text of `key`."""
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self._path}.{key}: got {value!r}, expected a text")
        return value

    def optional_text(self, key: str) -> str | None:
        """The text of `key`, or None where the config says None."""
        return None if self.take(key) is None else self.text(key)

    def name(self, key: str) -> str:
        """The text of `key`, which becomes a part of the names of files."""
        value = self.text(key)
        if not re.fullmatch(r"[\w.-]+", value):
            raise ConfigError(f"{self._path}.{key}: got {value!r}, expected letters, digits, dots, - and _")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts in the sequence `key`, at least one of them."""
        values = self.take(key)
        if not isinstance(values, tuple | list) or not values or not all(isinstance(text, str) for text in values):
            raise ConfigError(f"{self._path}.{key}: got {values!r}, expected texts, such as ('addim', 'ddim')")
        return tuple(values)

    def whole_numbers(self, key: str, *, minimum: int = 1, distinct: bool = False) -> tuple[int, ...]:
        """The numbers of `key`, at least one of them; `distinct`: none of them twice."""
        values = self.take(key)
        is_sequence = isinstance(values, tuple | list)
        if not is_sequence or not values or not all(type(n) is int and minimum <= n < _INT_LIMIT for n in values):
            raise ConfigError(
                f"{self._path}.{key}: got {values!r}, expected whole numbers from {minimum}, such as (1, 4)"
            )
        if distinct and len(set(values)) < len(values):
            raise ConfigError(f"{self._path}.{key}: got {values!r}, expected each of them once")
        return tuple(values)

    def section(self, key: str) -> "Section":
        """The section below `key`."""
        value = self.take(key)
        if not isinstance(value, Mapping | ConfigDict):
            raise ConfigError(f"{self._path}.{key}: got {value!r}, expected a section of keys")
        child = Section(value, f"{self._path}.{key}")
        self._sections.append(child)
        return child

    def optional_section(self, key: str) -> "Section | None":
        """The section below `key`, or None where the config says None."""
        return None if self.take(key) is None else self.section(key)

    def keys(self) -> list[str]:
        """The names of all keys, sorted."""
        return sorted(self._values)

    def sections(self) -> list["Section"]:
        """All keys as sections, in the order of their names."""
        return [self.section(key) for key in self.keys()]

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its keyword-only arguments from the keys of this section; absent ones keep their default."""
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        self._known.update(names)
        given = {name: self.take(name) for name in names if name in self._values or name in required}
        return functools.partial(function, **given)

    def refuse_unread(self) -> None:
        """Raises ConfigError for a key, here or below, that nobody took."""
        for key in sorted(self._unread):
            known = self._known | (self._values.keys() - self._unread)
            raise ConfigError(f"{self._path}.{key}: nothing reads this key{nearest(key, known)}; remove or rename it")
        for child in self._sections:
            child.refuse_unread()


def find_config(file: str) -> Path:
    """A config file: relative to here, else to the repository.

    Raises:
      ConfigError: there is no such file.
    """
    candidates = [Path(file), Path(__file__).resolve().parents[1] / file]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    near = {path.stem for candidate in candidates for path in candidate.parent.glob("*.py")}
    hint = nearest(candidates[0].stem, near)
    raise ConfigError(f"got config file {file!r}{hint}, expected an existing file; tried {candidates[0].absolute()}")


def load_config(path: str) -> ConfigDict:
    """The config of `configs/name.py` or `configs/name.py:variant`.

    Raises:
      ConfigError: there is no such file, it has no such variant, or it is no config.
    """
    file, _, variant = path.partition(":")
    found = find_config(file)
    spec = importlib.util.spec_from_file_location(found.stem, found)
    if spec is None or spec.loader is None:
        raise ConfigError(f"got config file {file!r}, expected a Python file with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(_in_file(file, error)) from error
    get_config = getattr(module, "get_config", None)
    if not inspect.isfunction(get_config):
        raise ConfigError(f"got config file {file!r} without get_config(), expected a function of that name")
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"got {path!r}, expected {file!r}: this config has no variants")
    try:
        config = get_config(variant) if variant else get_config()
    except ValueError as error:  # an unknown variant
        raise ConfigError(f"{file}: {error}") from error
    except Exception as error:
        raise ConfigError(_in_file(file, error)) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: got {type(config).__name__} from get_config(), expected a ConfigDict")
    return config


def check_override(config: ConfigDict, path: str) -> None:
    """Refuses an override, by its dotted path, of what a config does not have; an index of a value is not looked at.

    Raises:
      ConfigError: a name on the path is not in its section, or that is a value.
    """
    section, above = config, "config"
    for name in path.partition("[")[0].split("."):
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"{above}: got an override of {name!r} below it, expected a section: it is {section!r}")
        if name not in section:
            hint = _meant(config, section, above, name)
            choices = ", ".join(sorted(section))
            raise ConfigError(
                f"{above}.{name}: got an override of a key that is not there{hint}, expected one of {choices}"
            )
        section, above = section[name], f"{above}.{name}"


def _meant(config: ConfigDict, section: ConfigDict, above: str, name: str) -> str:
    """A hint at the path that was meant: a similar name in the section, or the same name in another."""
    close = difflib.get_close_matches(name, sorted(section), n=1)
    elsewhere = [path for path in flat(config.to_dict(), "config.") if path.endswith(f".{name}")]
    paths = [f"{above}.{near}" for near in close] or elsewhere
    return f" (did you mean {' or '.join(map(repr, paths))}?)" if paths else ""


def _in_file(file: str, error: Exception) -> str:
    return f"{file}: got {type(error).__name__} ({error}), expected a Python file that runs; --verbose says where"


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config that a work directory was trained with, as JSON; None where it has none.

    Raises:
      ConfigError: its file holds something else.
      PermissionError: this user may not read it.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text()) if remote.exists(path) else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: got a file that is no JSON ({error}), expected a config") from error
    if not isinstance(config, dict | None):
        raise ConfigError(f"{path}: got {type(config).__name__}, expected the sections of a config")
    return config


def decides(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Of a config as JSON, or of its section `prefix`: what decides the parameters."""
    return {
        name: decides(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in config.items()
        if prefix + name not in _DECIDES_NOTHING
    }


def run_hash(config: dict[str, Any]) -> str:
    """Hash of what decides the parameters: another training in the same directory is another run."""
    return hashlib.sha256(json.dumps(decides(config), sort_keys=True).encode()).hexdigest()[:8]


def run_of(facts: Mapping[str, Any]) -> str:
    """The run of a checkpoint, by its facts: the hash of the config with which its training began.

    Not of its own, whose `train.num_steps` may be another since. Older checkpoints do not say it: of their own, then.
    """
    return facts.get("run") or run_hash(facts["config"])


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config as JSON by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, str]:
    """Of two configs as JSON: what decides the parameters and differs, by its dotted path, as words."""
    got, expected = flat(decides(got)), flat(decides(expected))
    return {
        path: f"{path}: got {got.get(path, 'no such key')!r}, expected {expected.get(path, 'no such key')!r}"
        for path in sorted(got.keys() | expected.keys())
        if path not in got or path not in expected or got[path] != expected[path]
    }


def nearest(name: str, choices: Any) -> str:
    """A hint at the choice that was meant, or nothing."""
    close = difflib.get_close_matches(name, sorted(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
