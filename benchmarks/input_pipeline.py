"""Images per second of the input pipeline, against a PyTorch DataLoader over the same files with the same work.

  pip install -e .[dev,benchmark]
  python benchmarks/input_pipeline.py --source=tiny_imagenet_50.zip --split=train

Writes some images of the source as records (PNG and raw) at each resolution, and reads shuffled batches of uint8 images
and labels from the records and from the files as they are, turn by turn. This pipeline reads records with threads and
files with worker processes, PyTorch both with worker processes; either has --workers of them. PyTorch reads example by
example and decodes PNG with Pillow, as its data sets are written; once more it asks for all records of a batch at once
and decodes them with our function, to tell what the rest of a loader costs. Without PyTorch it measures this pipeline
alone. One host of the paper's set-up needs batches of 2048 at 2.7 steps/s over 16 hosts; the table says how many cores
that takes.
"""

import contextlib
import io
import multiprocessing.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app, flags
from grain.sources import ArrayRecordDataSource
from PIL import Image

from mscm.data import folders, images, pipeline, preparation, records, sources
from mscm.report.table import format_table

SOURCE = flags.DEFINE_string("source", None, "Folder, zip or tar of images.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Folder above the class folders.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 8192, "Images to read, again and again.", lower_bound=1)
RESOLUTIONS = flags.DEFINE_multi_integer("resolution", [32, 64, 128], "Sides in pixels.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images of a batch.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Threads or processes of either loader.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 5.0, "Length of one measurement.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each; the table shows the median.", lower_bound=1)

PAPER_RATE = 2048 * 2.7 / 16  # images per second and host, arXiv:2403.06807v3: 64 chips of v5e are 16 hosts

Batches = Iterator[object]
Loaders = dict[str, Callable[[], Batches]]


def ours(source: sources.Source, **loaders) -> Batches:
    """The pipeline that training uses."""
    return pipeline.batches(source, batch_size=BATCH_SIZE.value, seed=0, **loaders)


class Records:
    """A map-style data set, as PyTorch wants it, over the same record files: one read, one decoding an example."""

    def __init__(self, directory: str):
        self._card = records.read_card(directory, "train")
        self._labels = np.load(records.labels_path(directory, "train"))
        self._records = ArrayRecordDataSource([os.path.join(directory, shard) for shard in self._card.shards])

    def __len__(self) -> int:
        return self._card.num_examples

    def __getitem__(self, index: int):
        record = self._records[index]
        if self._card.encoding == "png":
            pixels = np.array(Image.open(io.BytesIO(record)))
        else:
            side = self._card.resolution
            pixels = np.frombuffer(bytearray(record), np.uint8).reshape(side, side, -1)
        return pixels, int(self._labels[index])


class BatchedRecords(Records):
    """The same with the batched reads that PyTorch uses where a data set offers them, and our decoding."""

    def __getitems__(self, indices: list[int]):
        pixels = records.decode([self._records[i] for i in indices], self._card)
        return list(zip(pixels, self._labels[indices].tolist(), strict=True))


class Files:
    """A map-style data set over the image files."""

    def __init__(self, files: folders.ImageFiles, resolution: int):
        self._files, self._resolution = files, resolution

    def __len__(self) -> int:
        return len(self._files.entries)

    def __getitem__(self, index: int):
        pixels = images.decode(self._files.read(index), channels=3)
        return images.area(pixels, self._resolution), self._files.entries[index].label


def theirs(dataset: Records | Files) -> Batches:
    """Shuffled batches of a PyTorch DataLoader, epoch after epoch."""
    from torch.utils import data

    loader = data.DataLoader(
        dataset,
        BATCH_SIZE.value,
        shuffle=True,
        num_workers=WORKERS.value,
        persistent_workers=True,
        multiprocessing_context="spawn",
        worker_init_fn=_end_without_cleaning,
    )
    while True:
        yield from loader


def _end_without_cleaning(worker: int) -> None:
    # ArrayRecord's threads abort a worker that ends as Python does.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)


def images_per_second(batches: Batches) -> float:
    """Rate over one measurement, after the batches that the workers have prepared."""
    for _ in range(4 * WORKERS.value):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS.value:
        next(batches)
        count += BATCH_SIZE.value
    return count / (time.perf_counter() - started)


def storages(directory: str, files: folders.ImageFiles, resolution: int) -> Iterator[tuple[str, Loaders]]:
    """Each way to store the images, and the loaders of it by their name."""
    for encoding in records.ENCODINGS:
        path = os.path.join(directory, f"{encoding}_{resolution}")
        settings = preparation.Settings(resolution=resolution, encoding=encoding)
        preparation.prepare(
            files, path, settings, split="train", num_workers=WORKERS.value, report=lambda *numbers: None
        )
        yield f"records, {encoding}", {
            "ours": lambda path=path: ours(
                records.RecordSource("benchmark", path, split="train"), num_threads=WORKERS.value
            ),
            "PyTorch": lambda path=path: theirs(Records(path)),
            "PyTorch, our decoding": lambda path=path: theirs(BatchedRecords(path)),
        }
    yield "files", {
        "ours": lambda: ours(
            sources.FileSource("benchmark", files, resolution=resolution), num_workers=WORKERS.value
        ),
        "PyTorch": lambda: theirs(Files(files, resolution)),
    }


def has_torch() -> bool:
    """Whether there is something to compare with."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def main(_: list[str]) -> None:
    """Measures in turns, prints the table."""
    files = folders.open_files(SOURCE.value, split=SPLIT.value)
    chosen = np.random.RandomState(0).permutation(len(files.entries))[: NUM_IMAGES.value]
    files = files.chosen(sorted(int(i) for i in chosen))
    names = ("ours", "PyTorch", "PyTorch, our decoding") if has_torch() else ("ours",)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for resolution in RESOLUTIONS.value:
            for storage, loaders in storages(directory, files, resolution):
                rows.append([resolution, storage, *measured({name: loaders.get(name) for name in names})])
                print(*rows[-1], flush=True)
    header = ["pixels", "storage", "images/s", "per core", f"cores for {PAPER_RATE:.0f} images/s"]
    for name in names[1:]:
        header += [f"{name}: images/s", "ratio"]
    print(f"\n{len(files.entries)} images, batches of {BATCH_SIZE.value}, {WORKERS.value} threads or processes")
    print(format_table(header, rows))


def measured(loaders: dict[str, Callable[[], Batches] | None]) -> list[str]:
    """Median rates, turn by turn, and the median of the ratios of each turn."""
    rates = {name: [] for name, loader in loaders.items() if loader is not None}
    for _ in range(ROUNDS.value):
        for name in rates:
            with contextlib.closing(loaders[name]()) as batches:
                rates[name].append(images_per_second(batches))
    rate = statistics.median(rates["ours"])
    per_core = rate / WORKERS.value
    cells = [f"{rate:.0f}", f"{per_core:.0f}", f"{PAPER_RATE / per_core:.1f}"]
    for name in list(loaders)[1:]:
        if name not in rates:
            cells += ["", ""]
            continue
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        cells += [f"{statistics.median(rates[name]):.0f}", f"{ratio:.2f}"]
    return cells


if __name__ == "__main__":
    app.run(main)
