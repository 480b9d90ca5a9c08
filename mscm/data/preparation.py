"""Images on disk -> records at the training resolution, on all cores; can be interrupted and continued.

One task makes one shard. A finished shard has a note beside it, `SHARD.done.json`, with what the card needs of it; a
run that finds a note of the same settings skips the shard. The card is written last, and then the notes go.
"""

import base64
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from mscm.data import images, records
from mscm.data.folders import ImageFiles
from mscm.data.tfds_source import TfdsFiles

# (images done, images in all, seconds of this run, images done in this run)
ReportFn = Callable[[int, int, float, int], None]


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
    images_per_shard: int = 8192
    skip_broken: bool = False

    def __post_init__(self):
        for what, got, choices in (
            ("transform", self.transform, tuple(images.TRANSFORMS)),
            ("encoding", self.encoding, records.ENCODINGS),
            ("channels", self.channels, (1, 3)),
        ):
            if got not in choices:
                raise ValueError(f"{what}: got {got!r}, expected one of {', '.join(map(str, choices))}")
        if self.resolution < 1 or self.images_per_shard < 1:
            raise ValueError(
                f"got resolution {self.resolution} and {self.images_per_shard} images per shard, expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One task, and, once done, what it found."""

    path: str
    start: int  # of the entries
    stop: int
    key: str  # of the settings and the entries; a note of another key is not ours


def prepare(
    files: ImageFiles | TfdsFiles,
    output: str | os.PathLike,
    settings: Settings,
    *,
    split: str,
    num_workers: int,
    report: ReportFn,
    report_every_seconds: float = 10.0,
) -> records.Card:
    """Writes the split `split` of `output`, or what is missing of it.

    Raises:
      ValueError: the split is there already, an unfinished one has other settings, or an image is broken.
    """
    output = Path(output)
    if records.card_path(output, split).exists():
        raise ValueError(f"{records.card_path(output, split)} exists already; remove it, or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    shards = _shards(files, output, settings, split)
    for leftover in output.glob(f"{split}-*-of-*.array_record.*.tmp"):
        leftover.unlink()
    notes = {shard: note for shard in shards if (note := _read_note(shard)) is not None}
    waiting = [shard for shard in shards if shard not in notes]
    total, before = len(files.entries), sum(shard.stop - shard.start for shard in notes)
    started = reported = time.monotonic()
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
                    report(before + counter.value, total, now - started, counter.value)
                    reported = now
        except BaseException:
            stop.set()  # the workers would finish their shards first
            pool.shutdown(cancel_futures=True)
            raise
    card = _card(files, settings, split, [notes[shard] for shard in shards], shards, output)
    for shard in shards:
        _note_path(shard).unlink()
    return card


def _shards(files: ImageFiles | TfdsFiles, output: Path, settings: Settings, split: str) -> list[_Shard]:
    size, total = settings.images_per_shard, len(files.entries)
    count = -(-total // size)
    key = hashlib.sha256(
        json.dumps([dataclasses.asdict(settings), files.class_names, files.entries], sort_keys=True).encode()
    ).hexdigest()
    paths = [output / f"{split}-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    for path in output.glob(f"{split}-*-of-*.array_record.done.json"):
        if json.loads(path.read_text())["key"] != key:
            raise ValueError(
                f"{path}: got an unfinished run of other settings or other images, expected the same to continue; "
                "remove it, or choose another --output"
            )
    return [_Shard(str(path), i * size, min(total, (i + 1) * size), key) for i, path in enumerate(paths)]


def _note_path(shard: _Shard) -> Path:
    return Path(f"{shard.path}.done.json")


def _read_note(shard: _Shard) -> dict | None:
    done = _note_path(shard).exists() and Path(shard.path).exists()
    return json.loads(_note_path(shard).read_text()) if done else None


# Shared by the workers of a pool: how many images they have done, and whether they should end.
_counter, _stop = None, None


def _share(counter, stop) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop


def _write_shard(files: ImageFiles | TfdsFiles, settings: Settings, shard: _Shard) -> dict:
    """Writes a shard and its note. Runs in a worker process."""
    transform = images.TRANSFORMS[settings.transform]
    temporary = f"{shard.path}.{os.getpid()}.tmp"
    # Records one by one for random access. PNG does not compress further; raw pixels do.
    options = "group_size:1,uncompressed" if settings.encoding == "png" else "group_size:1"
    writer = ArrayRecordWriter(temporary, options)
    digests, labels, broken, num_enlarged = [], [], [], 0
    try:
        for index, entry in enumerate(files.entries):
            if _stop.is_set():
                raise InterruptedError("another worker failed")
            try:
                pixels = images.decode(files.read(index), channels=settings.channels)
            except (images.BrokenImage, OSError, zlib.error) as error:
                if not settings.skip_broken:
                    raise ValueError(
                        f"{files.path}: got a broken image, {entry.name} ({error}); remove it or give --skip_broken"
                    ) from error
                broken.append(entry.name)
                continue
            num_enlarged += min(pixels.shape[:2]) < settings.resolution
            pixels = np.ascontiguousarray(transform(pixels, settings.resolution))
            writer.write(records.encode(pixels, settings.encoding))
            digests.append(hashlib.sha256(pixels.tobytes()).digest())
            labels.append(entry.label)
            with _counter.get_lock():
                _counter.value += 1
    except BaseException:
        writer.close()
        os.unlink(temporary)
        raise
    writer.close()
    os.replace(temporary, shard.path)
    note = {
        "key": shard.key,
        "digests": base64.b64encode(b"".join(digests)).decode(),
        "labels": labels,
        "broken": broken,
        "num_enlarged": num_enlarged,
    }
    _write_text(_note_path(shard), json.dumps(note))
    return note


def _card(
    files: ImageFiles | TfdsFiles, settings: Settings, split: str, notes: list[dict], shards: list[_Shard], output: Path
) -> records.Card:
    labels = np.concatenate([np.array(note["labels"], np.int32) for note in notes])
    digests = [base64.b64decode(note["digests"]) for note in notes]
    counts = np.bincount(labels, minlength=len(files.class_names))
    if not counts.all():
        lost = files.class_names[int(np.argmin(counts))]
        raise ValueError(f"{files.path}: got no whole image in class {lost!r}, expected at least one; remove the class")
    card = records.Card(
        source=os.path.basename(os.path.normpath(files.path)),
        split=split,
        transform=settings.transform,
        resolution=settings.resolution,
        channels=settings.channels,
        encoding=settings.encoding,
        num_examples=len(labels),
        class_names=files.class_names,
        class_counts=tuple(int(count) for count in counts),
        shards=tuple(os.path.basename(shard.path) for shard in shards),
        shard_sizes=tuple(len(note["labels"]) for note in notes),
        checksum=records.checksum(digests, labels),
        num_enlarged=sum(note["num_enlarged"] for note in notes),
        broken=tuple(name for note in notes for name in note["broken"]),
    )
    temporary = records.labels_path(output, split).with_suffix(".tmp.npy")
    np.save(temporary, labels)
    os.replace(temporary, records.labels_path(output, split))
    _write_text(records.card_path(output, split), card.to_json())
    return card


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
