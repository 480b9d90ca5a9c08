"""Images per second of the input pipeline, against a PyTorch DataLoader over the same files with the same work.

  pip install -e .[dev,benchmark]
  python benchmarks/input_pipeline.py --source=tiny_imagenet_50.zip --split=train

Writes some images of the source as records (PNG and raw) at each resolution, and reads batches of uint8 images and
labels from the records and from the files as they are, with as many worker processes for either loader, turn by turn.
Without PyTorch it measures this pipeline alone. The last column is what one host of the paper's set-up needs, batches
of 2048 at 2.7 steps/s over 8 hosts, in cores.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app, flags

from mscm.data import folders, pipeline, preparation, records, sources
from mscm.report.table import format_table

SOURCE = flags.DEFINE_string("source", None, "Folder, zip or tar of images.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Folder above the class folders.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 8192, "Images to read, again and again.", lower_bound=1)
RESOLUTIONS = flags.DEFINE_multi_integer("resolution", [32, 64, 128], "Sides in pixels.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images of a batch.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Worker processes of either loader.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 5.0, "Length of one measurement.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each; the table shows the median.", lower_bound=1)

PAPER_RATE = 2048 * 2.7 / 8  # images per second and host, arXiv:2403.06807v3: 64 chips of v5e are 8 hosts

Batches = Iterator[object]


def ours(source: sources.Source) -> Batches:
    """The pipeline that training uses."""
    return pipeline.batches(source, batch_size=BATCH_SIZE.value, seed=0, num_workers=WORKERS.value)


class OneByOne:
    """A map-style data set, as PyTorch wants it, over any source."""

    def __init__(self, source: sources.Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        example = self._source.load(np.array([index]))
        return example["image"][0], int(example["label"][0])


def theirs(source: sources.Source) -> Batches:
    """Shuffled batches of a PyTorch DataLoader, epoch after epoch."""
    from torch.utils import data

    loader = data.DataLoader(
        OneByOne(source),
        BATCH_SIZE.value,
        shuffle=True,
        num_workers=WORKERS.value,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    while True:
        yield from loader


def images_per_second(batches: Batches) -> float:
    """Rate over one measurement, after the batches that the workers have prepared."""
    for _ in range(4 * WORKERS.value):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS.value:
        next(batches)
        count += BATCH_SIZE.value
    return count / (time.perf_counter() - started)


def storages(directory: str, files: folders.ImageFiles, resolution: int) -> dict[str, sources.Source]:
    """The same images as records and as they are."""
    found = {}
    for encoding in records.ENCODINGS:
        path = os.path.join(directory, f"{encoding}_{resolution}")
        settings = preparation.Settings(resolution=resolution, encoding=encoding)
        preparation.prepare(
            files, path, settings, split="train", num_workers=WORKERS.value, report=lambda *numbers: None
        )
        found[f"records, {encoding}"] = records.RecordSource("benchmark", path, split="train")
    found["files"] = sources.FileSource("benchmark", files, resolution=resolution)
    return found


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
    loaders: dict[str, Callable[[sources.Source], Batches]] = {"ours": ours}
    if has_torch():
        loaders["PyTorch"] = theirs
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for resolution in RESOLUTIONS.value:
            for storage, source in storages(directory, files, resolution).items():
                rates = {name: [] for name in loaders}
                for _ in range(ROUNDS.value):
                    for name, loader in loaders.items():
                        with contextlib.closing(loader(source)) as batches:
                            rates[name].append(images_per_second(batches))
                rate = statistics.median(rates["ours"])
                row = [resolution, storage, f"{rate:.0f}", f"{rate / WORKERS.value:.0f}"]
                if "PyTorch" in rates:
                    ratios = [a / b for a, b in zip(rates["ours"], rates["PyTorch"], strict=True)]
                    row += [f"{statistics.median(rates['PyTorch']):.0f}", f"{statistics.median(ratios):.2f}"]
                row.append(f"{PAPER_RATE / (rate / WORKERS.value):.1f}")
                rows.append(row)
                print(*row, flush=True)
    header = ["pixels", "storage", "images/s", "per core"]
    header += ["PyTorch images/s", "ratio"] if "PyTorch" in loaders else []
    print(f"\n{len(files.entries)} images, batches of {BATCH_SIZE.value}, {WORKERS.value} workers")
    print(format_table([*header, f"cores for {PAPER_RATE:.0f} images/s"], rows))


if __name__ == "__main__":
    app.run(main)
