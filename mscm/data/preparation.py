"""Images on disk -> records at the training resolution, on all cores; can be interrupted and continued.

One task makes one shard. A finished shard has a note beside it, `SHARD.done.json`, with what the card needs of it; a
run that finds a note of the same settings and files skips the shard. The card is written last, and then the notes go.
"""

import base64
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mscm import atomic, processes
from mscm.data import images, records
from mscm.data.folders import ImageFiles
from mscm.data.shards import writing_shard
from mscm.data.tfds_source import TfdsFiles

# Images done, and those of them that were done before.
ReportFn = Callable[[int, int], None]

# Images in a shard: so many shards that all cores have work, each large enough to be worth a file.
_NUM_SHARDS, _MIN_SHARD, _MAX_SHARD = 64, 256, 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the records of a split.

    Raises:
      ValueError: an unknown transform or encoding, or a size that is not positive.
    """

    resolution: int
    transform: str = "area"
    encoding: str = "png"
    channels: int = 3
    images_per_shard: int | None = None  # None: a 64th of them, from 256 to 8192
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for what, got, choices in (
            ("transform", self.transform, tuple(images.TRANSFORMS)),
            ("encoding", self.encoding, records.ENCODINGS),
            ("channels", self.channels, (1, 3)),
        ):
            if got not in choices:
                raise ValueError(f"{what}: got {got!r}, expected one of {', '.join(map(str, choices))}")
        for what, number in (("resolution", self.resolution), ("images_per_shard", self.images_per_shard)):
            if number is not None and number < 1:
                raise ValueError(f"{what}: got {number}, expected at least 1")
        if self.resolution > images.MAX_SIDE:
            raise ValueError(f"resolution: got {self.resolution}, expected at most {images.MAX_SIDE}")


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One task, and, once done, what it found."""

    path: str
    start: int  # of the entries
    stop: int
    settings: str  # hash of what decides all records
    files: str  # hash of the names, labels and sizes of its files


def prepare(
    files: ImageFiles | TfdsFiles,
    output: str | os.PathLike,
    settings: Settings,
    *,
    split: str,
    num_workers: int,
    report: ReportFn,
    report_every_seconds: float = 1.0,
) -> records.Card:
    """Writes the split `split` of `output`, or what is missing of it.

    Raises:
      ValueError: the split is there already, an unfinished one has other settings, another process writes to `output`,
        or an image is broken.
      OSError: the disk is full, or something cannot be read.
      processes.Died: a worker was killed.
    """
    output = Path(output)
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ValueError(f"got split {split!r}, expected a name of letters, digits, dots, - and _")
    if records.card_path(output, split).exists():
        raise ValueError(f"{records.card_path(output, split)} exists already; remove it, or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        return _prepare(files, output, settings, split, num_workers, report, report_every_seconds)


def _prepare(
    files: ImageFiles | TfdsFiles,
    output: Path,
    settings: Settings,
    split: str,
    num_workers: int,
    report: ReportFn,
    report_every_seconds: float,
) -> records.Card:
    shards = _shards(files, output, settings, split)
    for leftover in _of_split(output, split, r"\.\d+\.tmp"):
        leftover.unlink()
    notes = {shard: note for shard in shards if (note := _read_note(shard, settings)) is not None}
    waiting = [shard for shard in shards if shard not in notes]
    before = sum(shard.stop - shard.start for shard in notes)
    reported = time.monotonic()
    # spawn: a fork of a process that has threads can hang.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        max(1, min(num_workers, len(waiting))), mp_context=context, initializer=_share, initargs=(counter, stop)
    ) as pool:
        running = {pool.submit(_write_shard, files.part(s.start, s.stop), settings, s): s for s in waiting}
        try:
            while running:
                done, _ = concurrent.futures.wait(
                    running, timeout=report_every_seconds, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    notes[running.pop(future)] = future.result()
                now = time.monotonic()
                if not running or now - reported >= report_every_seconds:
                    report(before + counter.value, before)
                    reported = now
        except concurrent.futures.process.BrokenProcessPool as error:
            raise processes.Died(
                "got a killed worker process, expected all to live: SIGKILL is what a system sends that is out of "
                "memory; lower --workers"
            ) from error
        except BaseException:
            stop.set()  # the workers would finish their shards first
            pool.shutdown(cancel_futures=True)
            raise
    card = _card(files, settings, split, [notes[shard] for shard in shards], shards, output)
    for shard in shards:
        records.note_path(shard.path).unlink()
    return card


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds a directory while it is written to; the lock goes with the process, however that ends."""
    directory = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{output}: another mscm.prepare writes to it; wait for its end") from error
        yield
    finally:
        os.close(directory)


def _of_split(output: Path, split: str, ending: str) -> list[Path]:
    """Files of the shards of a split: `train` has no part in those of `train-small`."""
    pattern = re.compile(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.array_record{ending}")
    return sorted(path for path in output.iterdir() if pattern.fullmatch(path.name))


def _shards(files: ImageFiles | TfdsFiles, output: Path, settings: Settings, split: str) -> list[_Shard]:
    total = len(files.entries)
    size = settings.images_per_shard or min(_MAX_SHARD, max(_MIN_SHARD, -(-total // _NUM_SHARDS)))
    count = -(-total // size)
    # Not skip_broken: a whole shard is the same with and without it.
    decides = dataclasses.asdict(settings) | {"images_per_shard": size, "skip_broken": None, "format": records.FORMAT}
    key, shards = _hash(decides), []
    for i in range(count):
        part = range(i * size, min(total, (i + 1) * size))
        path = output / f"{split}-{i:05d}-of-{count:05d}.array_record"
        said = files.captions and files.captions[part.start : part.stop]
        of_files = _hash([[[*files.entries[j], files.size(j)] for j in part], *([said] if said else [])])
        shards.append(_Shard(str(path), part.start, part.stop, key, of_files))
    ours = {records.note_path(shard.path) for shard in shards}
    for note in _of_split(output, split, r"\.done\.json"):
        if note not in ours or _read(note).get("settings", key) != key:
            raise ValueError(
                f"{output}: got an unfinished run of other settings for split {split!r}, expected the same to "
                f"continue; remove {split}-*, or choose another --output"
            )
    return shards


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(note: Path) -> dict:
    """A note; nothing where it was cut."""
    try:
        found = json.loads(note.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_note(shard: _Shard, settings: Settings) -> dict | None:
    """What an earlier run found in a shard, if it is the shard that this run would write."""
    note = records.note_path(shard.path)
    if not note.exists() or not Path(shard.path).exists():
        return None
    found = _read(note)
    # Without num_resized, an earlier version's.
    ours = found.get("files") == shard.files and "num_resized" in found
    return found if ours and (settings.skip_broken or not found["broken"]) else None


# Shared by the workers of a pool: how many images they have done, and whether they should end.
_counter: Synchronized
_stop: Event


def _share(counter: Synchronized, stop: Event) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    processes.end_with_parent()


def _write_shard(files: ImageFiles | TfdsFiles, settings: Settings, shard: _Shard) -> dict:
    """Writes a shard and its note. Runs in a worker process."""
    with writing_shard(shard.path) as writer:
        found = _write_images(writer, files, settings)
    note = {"settings": shard.settings, "files": shard.files, **found}
    atomic.write_text(records.note_path(shard.path), json.dumps(note))
    return note


def _write_images(writer: ArrayRecordWriter, files: ImageFiles | TfdsFiles, settings: Settings) -> dict:
    """Writes the records; returns what the card needs of them."""
    digests, labels, broken, num_enlarged, num_resized = [], [], [], 0, 0
    for index, entry in enumerate(files.entries):
        if _stop.is_set():
            raise InterruptedError("another worker failed")
        try:
            pixels = images.decode(files.read(index), channels=settings.channels)
            square = np.ascontiguousarray(images.TRANSFORMS[settings.transform](pixels, settings.resolution))
        except (images.BrokenImage, zlib.error) as error:
            if not settings.skip_broken:
                raise ValueError(
                    f"{files.path}: got a broken image, {entry.name} ({error}); remove it or give --skip_broken"
                ) from error
            broken.append(entry.name)
        else:
            num_enlarged += min(pixels.shape[:2]) < settings.resolution
            num_resized += pixels.shape != square.shape
            writer.write(records.encode(square, settings.encoding))
            digests.append(hashlib.sha256(square.tobytes()).digest())
            labels.append(entry.label)
        with _counter.get_lock():
            _counter.value += 1
    return {
        "digests": base64.b64encode(b"".join(digests)).decode(),
        "labels": labels,
        "broken": broken,
        "num_enlarged": num_enlarged,
        "num_resized": num_resized,
    }


def _card(
    files: ImageFiles | TfdsFiles, settings: Settings, split: str, notes: list[dict], shards: list[_Shard], output: Path
) -> records.Card:
    labels = np.concatenate([np.array(note["labels"], np.int32) for note in notes])
    digests = [base64.b64decode(note["digests"]) for note in notes]
    counts = np.bincount(labels, minlength=len(files.class_names))
    if not counts.all():
        name = files.class_names[int(np.argmin(counts))]
        raise ValueError(f"{files.path}: got no whole image in class {name!r}, expected at least one; remove the class")
    broken = tuple(name for note in notes for name in note["broken"])
    captions = b""
    if files.captions is not None:
        kept = zip(files.entries, files.captions, strict=True)
        lost = set(broken)
        lines = (json.dumps(said) + "\n" for entry, said in kept if entry.name not in lost)
        captions = "".join(lines).encode()
    card = records.Card(
        source=os.path.basename(os.path.normpath(files.path)),
        split=split,
        transform=settings.transform if any(note["num_resized"] for note in notes) else None,
        resolution=settings.resolution,
        channels=settings.channels,
        encoding=settings.encoding,
        num_examples=len(labels),
        class_names=files.class_names,
        class_counts=tuple(int(count) for count in counts),
        shards=tuple(os.path.basename(shard.path) for shard in shards),
        shard_sizes=tuple(len(note["labels"]) for note in notes),
        checksum=records.checksum(digests, labels),
        labels_sha256=records.labels_sha256(labels),
        num_enlarged=sum(note["num_enlarged"] for note in notes),
        broken=broken,
        captions_sha256=None if files.captions is None else hashlib.sha256(captions).hexdigest(),
    )
    if files.captions is not None:
        with atomic.writing(records.captions_path(output, split)) as file:
            file.write(captions)
    with atomic.writing(records.labels_path(output, split)) as file:
        np.save(file, labels)
    atomic.write_text(records.card_path(output, split), card.to_json())
    return card
