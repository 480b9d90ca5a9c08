"""Checkpoints of a work directory: the only file that knows Orbax and where checkpoints lie.

    WORKDIR/checkpoints/STEP/{params,ema,opt,facts}    and ema_NAME of each further average
    WORKDIR/checkpoints/STEP/files.json                the files that it had when it was finished: sizes and checksums
    WORKDIR/damaged/STEP                               moved there by training: files are missing, cut or altered
    WORKDIR/ema_snapshots/STEP/{ema_NAME,facts}        power-function averages on the way, none of which is deleted

The items of a step are separate, so that a sampler reads `ema` and `facts` alone. `facts` is JSON: what a sampler
must know of the model (schedule, prediction, student steps, shapes, the whole config).

A save that was cut has no name yet, and nobody sees it. What is damaged later (a copy that was cut, a disk that was
full, a hand) is found by the files' sizes: the newest whole checkpoint counts, and a warning says why. Bytes that have
changed within a file are found by its checksum, which is compared before the file is read: training goes on from the
newest checkpoint without such a one, and who else reads it is refused.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN
from orbax.checkpoint.options import MultiprocessingOptions

from mscm import atomic, failures, remote
from mscm.training.step import TrainState
from mscm.types import Params

# Facts without which the same parameters are another function: checked wherever a checkpoint is used.
_MEANING = ("student_steps", "schedule", "prediction", "logsnr_input")
# Of a diffusion model with such a prediction the schedule decides nothing: input, condition and output of the network
# are functions of z / alpha and sigma / alpha.
ON_ANY_SCHEDULE = ("edm",)

_FILES = "files.json"
_NOTE = "_CHECKPOINT_METADATA"  # which Orbax writes
CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema_snapshots"
_ALL = 2**31  # to keep
_CHUNK = 2**22
_FILE_THREADS = 32  # a bucket answers each question in its time


class CheckpointError(ValueError):
    """A checkpoint is absent or does not fit; the message says which, what was expected and what to do."""


class UnreadableCheckpoint(CheckpointError):
    """Its files are damaged, or go while it is read because training deletes it."""


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX whether a signal asks to end, which `stopping.reached` does.

    JAX agrees on a number above the last one that any process has asked with. Orbax asks with the step, `stopping` with
    the number of its calls, and it might never come to the number that was agreed on after a save.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints of one work directory; a context manager, because saving goes on in the background."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int | None = None, folder: str = CHECKPOINTS):
        """`keep` is the number of newest checkpoints to keep when saving; None for reading only.

        `folder`: SNAPSHOTS for those of averages, which have the same form.
        """
        self._directory = remote.absolute(workdir) / folder
        self._saved: int | None = None  # the save that is under way
        self._listing: concurrent.futures.Future | None = None  # of the files of the one before
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        # Readers do not wait for each other: what one process sees of a directory, another may not see yet.
        alone = MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        together = MultiprocessingOptions(barrier_sync_key_prefix=None if folder == CHECKPOINTS else folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(keep),
            multiprocessing_options=together if keep is not None else alone,
            cleanup_tmp_directories=keep is not None,  # a reader must not touch what a trainer is writing
            create=keep is not None,
        )
        # The arguments of each save and restore say how an item is written.
        self._manager = _Manager(self._directory, options=options)

    def __str__(self) -> str:
        return str(self._directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
            self._pool.shutdown()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return [step for step in sorted(self._manager.all_steps()) if step not in self.damaged]

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return max(self.steps(), default=None)

    @functools.cached_property
    def damaged(self) -> dict[int, str]:
        """Steps whose files are not those that they had when they were finished, and what is wrong with them."""
        reasons = {step: _damage(self._directory / str(step)) for step in sorted(self._manager.all_steps())}
        found = {step: reason for step, reason in reasons.items() if reason is not None}
        for step, reason in found.items():
            logging.warning("%s: step %d is damaged and not used: %s", self._directory, step, reason)
        return found

    def save(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Starts to save `state` under its step; saving the newest step again does nothing.

        Raises:
          OSError: this save could not begin, or the one before it has failed.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self.wait()
        saved = self._start(
            step,
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            opt=ocp.args.StandardSave(_rest(state)),
            facts=ocp.args.JsonSave(facts),
            **{_item(name): ocp.args.StandardSave(average) for name, average in state.further.items()},
        )
        if not saved:  # Orbax says nothing else when a newer step is already there
            raise CheckpointError(
                f"{self._directory}: got step {step} to save after step {self._manager.latest_step()}, expected a "
                "newer step; remove the newer checkpoints or use an empty work directory"
            )
        self._saved = step

    def wait(self) -> None:
        """Until what `save` has started is finished, and its files are written down.

        Raises:
          OSError: it has failed, which leaves a checkpoint without a name.
        """
        self._end_save()
        listing, self._listing = self._listing, None
        if listing is not None:
            listing.result()

    def check_save(self) -> None:
        """What `wait` does, where that need not wait: a save that has failed is noticed before the next one."""
        if self._saved is not None and not self._manager.is_saving_in_progress():
            self._end_save()
        if self._listing is not None and self._listing.done():
            self.wait()

    def _end_save(self) -> None:
        step, self._saved = self._saved, None  # one that has failed has no files
        with failures.naming(self._directory):
            self._manager.wait_until_finished()
        if step is not None and jax.process_index() == 0:
            # In the background: all bytes are read once more.
            self._listing = self._pool.submit(_write_list, self._directory / str(step))

    def save_ema(self, step: int, ema: Params, facts: dict[str, Any]) -> None:
        """Saves averaged parameters alone: enough to sample from."""
        if self._start(step, ema=ocp.args.StandardSave(ema), facts=ocp.args.JsonSave(facts)):
            self._saved = step

    def save_snapshot(self, step: int, averages: Mapping[str, Params], facts: dict[str, Any]) -> None:
        """Starts to save averages alone; where there is a snapshot of the step, nothing: it is the same.

        Raises:
          OSError: as `save`.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        items = {_item(name): ocp.args.StandardSave(average) for name, average in averages.items()}
        # Forced, because a later one may be there, and this one have been removed.
        self._start(step, force=True, facts=ocp.args.JsonSave(facts), **items)
        self._saved = step

    def facts(self, step: int | None = None) -> dict[str, Any]:
        """What the checkpoint of `step` (None: the newest) says of its model."""
        step = self._existing(step)
        facts = self._restore(step, facts=ocp.args.JsonRestore())["facts"]
        with self._naming_damage(step):
            if not isinstance(facts["config"], dict) or not isinstance(facts["parameters"], dict):
                raise ValueError("facts without a config and parameters")
        return facts

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The whole training state; `abstract` gives structure, shapes and types."""
        step = self._existing(step)
        self._check_shapes(self.facts(step)["parameters"], parameter_shapes(abstract.params), step)
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            ema=ocp.args.StandardRestore(abstract.ema),
            opt=ocp.args.StandardRestore(_rest(abstract)),
            **{_item(name): ocp.args.StandardRestore(average) for name, average in abstract.further.items()},
        )
        opt, further = restored["opt"], {name: restored[_item(name)] for name in abstract.further}
        return TrainState(
            opt["step"], restored["params"], restored["ema"], opt["opt_state"], opt.get("target", {}), further
        )

    def restore_ema(self, abstract: Params, step: int | None = None, *, name: str | None = None) -> Params:
        """The averaged parameters alone; `name`: of a further average."""
        step = self._existing(step)
        self._check_shapes(self.facts(step)["parameters"], parameter_shapes(abstract), step)
        item = _item(name)
        return self._restore(step, **{item: ocp.args.StandardRestore(abstract)})[item]

    def has_average(self, name: str, step: int) -> bool:
        """Whether the checkpoint of `step` holds a further average."""
        return (self._directory / str(step) / _item(name)).is_dir()

    def check(self, facts: dict[str, Any], step: int | None = None) -> int:
        """Step of a checkpoint (None: the newest) that is of the model of `facts`; reads no array.

        Raises:
          CheckpointError: there is none, its shapes differ, its parameters mean something else, or, where `facts` says
            which data, they were trained on other data.
        """
        step = self._existing(step)
        there = self.facts(step)
        self._check_shapes(there["parameters"], facts["parameters"], step)
        is_free = there.get("prediction") in ON_ANY_SCHEDULE and there.get("student_steps") is None
        # A score may be against other data; only who goes on training says what the data is.
        for key in (*_MEANING, "data") if "data" in facts else _MEANING:
            if key == "schedule" and is_free:
                continue
            if there.get(key) != facts.get(key):
                raise CheckpointError(
                    f"{self._directory}/{step}: got a checkpoint of {there.get('name')!r} with {key} = "
                    f"{there.get(key)}, expected {facts.get(key)} as {facts.get('name')!r} has; use the config that it "
                    "was trained with"
                )
        return step

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Mapping[str, Any]:
        self._refuse_altered(step, *items)
        with self._naming_damage(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _start(self, step: int, *, force: bool = False, **items: ocp.args.CheckpointArgs) -> bool:
        with failures.naming(self._directory):
            return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

    @contextlib.contextmanager
    def _naming_damage(self, step: int) -> Iterator[None]:
        """For what the files' sizes do not tell: no list of them was written, or their bytes are others."""
        try:
            with _unwrapped():
                yield
        # What Orbax raises for files; another type says that a device is too small, say.
        except PermissionError:
            raise
        except (KeyError, TypeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableCheckpoint(
                f"{self._directory}/{step}: got a checkpoint that cannot be read ({type(error).__name__}: "
                f"{reason:.300}), expected a whole one of mscm; remove it or bring it back from a copy"
            ) from error

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps and self.damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in self.damaged.items())
            raise CheckpointError(
                f"{self._directory}: got damaged checkpoints only ({reasons}), expected a whole one; bring back their "
                "files from a copy, or use another work directory"
            )
        if not steps:
            raise CheckpointError(
                f"{self._directory}: got no finished checkpoint, expected at least one; "
                "name the work directory of a finished training"
            )
        if step is not None and step not in steps:
            raise CheckpointError(f"{self._directory}: got step {step}, expected one of {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _refuse_altered(self, step: int, *items: str) -> None:
        # By one of several processes, whose error ends the others: each reads only its part of large arrays.
        reason = _alteration(self._directory / str(step), items) if jax.process_index() == 0 else None
        if reason is not None:
            others = [other for other in self.steps() if other != step]
            way_out = (
                f"name another step ({', '.join(map(str, others)) or 'there is none'}), bring back its files from a "
                "copy, or train again, which moves it aside if there is another"
            )
            if self._directory.name == SNAPSHOTS:
                way_out = "bring back its files from a copy, or remove it: averages are then made of the others"
            raise CheckpointError(
                f"{self._directory}/{step}: got a damaged checkpoint ({reason}), expected one whose bytes have not "
                f"changed; {way_out}"
            )

    def _check_shapes(self, got: dict[str, list[int]], expected: dict[str, list[int]], step: int) -> None:
        mismatch = first_mismatch(got, expected)
        if mismatch:
            name, got, expected = mismatch
            raise CheckpointError(
                f"{self._directory}/{step}: got another architecture than the config's: parameter {name} has shape "
                f"{got}, expected {expected}; use the config that it was trained with"
            )


def set_damaged_aside(workdir: str | os.PathLike) -> None:
    """Moves damaged checkpoints to WORKDIR/damaged, so that training can make their steps again.

    Where no whole one is left they stay: who reads them will say so.
    """
    if not is_there(workdir):
        return
    with reading(workdir) as checkpoints:
        damaged = dict(checkpoints.damaged)
        for step in reversed(checkpoints.steps()):  # to the newest that can be read
            reason = _alteration(checkpoints._directory / str(step))
            if reason is None:
                break
            damaged[step] = reason
        whole = [step for step in checkpoints.steps() if step not in damaged]
        for step in damaged if whole else ():
            names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
            paths = (remote.absolute(workdir) / "damaged" / name for name in names)
            aside = next(path for path in paths if not path.exists())
            aside.parent.mkdir(exist_ok=True)
            (checkpoints._directory / str(step)).rename(aside)
            logging.warning("Moved to %s (%s); step %d is the newest that is whole", aside, damaged[step], whole[-1])


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Raises what ended the reading of an array: damage, no memory, a signal. Orbax makes a bare Exception of each."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception or error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _write_list(folder: epath.Path) -> None:
    """Writes down size and checksum of the files of a checkpoint that is finished."""
    with failures.naming(folder):
        files = _each(lambda path: [remote.size(path), _checksum(path)], _files_below(folder))
        files = {os.fspath(path.relative_to(folder)): entry for path, entry in files.items()}
        atomic.write_text(folder / _FILES, json.dumps(files, indent=0))


def _listed(folder: epath.Path) -> dict[str, list[int]]:
    """Size and checksum of the files of a checkpoint when it was finished; the size alone before there were checksums.

    Nothing where nobody has written it down: training was killed in that moment, or has written `ema` alone.

    Raises:
      ValueError: the list is damaged itself.
    """
    try:
        listed = json.loads((folder / _FILES).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{_FILES} is no JSON ({error})") from error
    if not isinstance(listed, dict):
        raise ValueError(f"{_FILES} is no list of files and sizes")
    return {name: entry if isinstance(entry, list) else [entry] for name, entry in listed.items()}


def _heads(folder: epath.Path) -> list[str]:
    """The files without which nothing of a checkpoint's items is read: Orbax's note of the items, and a file of each.

    Raises:
      ValueError: the note is damaged.
    """
    try:
        items = list(json.loads((folder / _NOTE).read_text())["item_handlers"])
    except FileNotFoundError:
        return [_NOTE]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_NOTE} does not name the items ({type(error).__name__}: {error})") from error
    return [_NOTE, *(f"{item}/{'metadata' if item == 'facts' else '_METADATA'}" for item in items)]


def _damage(folder: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint by their sizes; None where they are as when it was finished.

    Where nobody has written these down, an item that is not there; what else is missing its reader finds.

    Raises:
      PermissionError: this user may not look.
    """
    try:
        expected = _listed(folder)
        names = expected or _heads(folder)
    except ValueError as error:
        return str(error)

    def size(name: str) -> int | None:
        try:
            return remote.size(folder / name)
        except PermissionError:
            raise
        except OSError:
            return None

    for name, got in _each(size, names).items():
        if got is None:
            return f"{name} is missing"
        if name in expected and got != expected[name][0]:
            return f"{name} has {got} bytes, expected {expected[name][0]}"
    return None


def _alteration(folder: epath.Path, items: Sequence[str] | None = None) -> str | None:
    """Which file of some items (None: all) has other bytes than when the checkpoint was finished; reads them all."""
    expected = {
        name: entry[1]
        for name, entry in _listed(folder).items()
        if len(entry) > 1 and (items is None or name.split("/")[0] in items)
    }
    for name, got in _each(lambda name: _checksum(folder / name), expected).items():
        if got != expected[name]:
            return f"{name} has other bytes than it was written with"
    return None


def _checksum(path: epath.Path) -> int:
    """CRC-32: against accidents, not against people."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _each(function: Callable[[Any], Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """`function` of each key, several at once."""
    keys = list(keys)
    with concurrent.futures.ThreadPoolExecutor(_FILE_THREADS) as pool:
        return dict(zip(keys, pool.map(function, keys), strict=True))


def _item(name: str | None) -> str:
    """Where an average is, None being the one from which images are sampled."""
    return "ema" if name is None else f"ema_{name}"


def _rest(state: TrainState) -> dict[str, Any]:
    """What only training needs; without a target network as before there was one."""
    target = {"target": state.target} if state.target else {}
    return {"step": state.step, "opt_state": state.opt_state} | target


def parameter_shapes(params: Params) -> dict[str, list[int]]:
    """Shape of every parameter by its path, as JSON keeps it."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def num_bytes(arrays: Any) -> int:
    """Of all arrays of a tree, also of those that are shapes and types alone."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def first_mismatch(got: dict[str, list[int]], expected: dict[str, list[int]]) -> tuple[str, Any, Any] | None:
    """Name, shape got and shape expected of the first parameter whose shapes differ; None where all agree."""
    for name in sorted(got.keys() | expected.keys()):
        if got.get(name) != expected.get(name):
            return name, got.get(name, "absent"), expected.get(name, "absent")
    return None


def is_there(workdir: str | os.PathLike, folder: str = CHECKPOINTS) -> bool:
    """Whether a work directory has a folder of checkpoints, in which there may be none yet.

    Raises:
      PermissionError: this user may not look.
    """
    path = epath.Path(workdir) / folder
    return remote.exists(path) and path.is_dir()


@contextlib.contextmanager
def reading(workdir: str | os.PathLike, folder: str = CHECKPOINTS) -> Iterator[Checkpoints]:
    """The checkpoints of an existing work directory, for reading; `folder` as `Checkpoints` has it.

    Raises:
      CheckpointError: the directory holds no checkpoints.
      PermissionError: as `is_there`.
    """
    if not is_there(workdir, folder):
        raise CheckpointError(
            f"{workdir}: got no directory {folder}/ below it, expected the work directory of a training; "
            "check the path or train first"
        )
    with Checkpoints(workdir, folder=folder) as checkpoints:
        yield checkpoints


def snapshots(workdir: str | os.PathLike) -> Checkpoints:
    """The snapshots of averages of a work directory, for writing."""
    return Checkpoints(workdir, keep=_ALL, folder=SNAPSHOTS)
