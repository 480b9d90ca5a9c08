"""The batches of a training run: a pure function of (seed, step), read ahead by Grain.

The examples of all epochs form one endless sequence (a new permutation each epoch); step i owns the positions
`i * batch_size` to before `(i + 1) * batch_size` of it, of which a process loads the rows that its devices hold. So the
position is the step number (nothing else is saved to resume), and the global batch is the same row by row whatever the
number of processes. Indices are batched first, and a batch is loaded in one request.

Records and arrays are read by code that lets other threads run, so threads of the training process are enough for them
and pass batches on without a copy. Image files are decoded in Python's time: worker processes are for those.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from mscm import processes
from mscm.data.captions import WithTokens
from mscm.data.sources import Source

_AHEAD = 2  # items that each thread prepares in advance
_LOOK_SECONDS = 0.2  # between two looks whether the workers live, while an item is waited for
# Modules of the objects that can hold, each in the next, the queue of a worker: one may still be in a thread's future.
_HOLDERS = ("grain", "queue", "collections", "concurrent")

Item = dict[str, np.ndarray]


@runtime_checkable
class Items(Iterator[Item], Protocol):
    """What `batches` gives."""

    def close(self) -> None:
        """Ends what loads them."""


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Integer[np.ndarray, "rows"] | None = None,
    steps_per_item: int = 1,
    num_workers: int = 0,
    num_threads: int = 1,
) -> Items:
    """Endless iterator over some rows of the global batches of steps `start_step`, `start_step + 1`, ...

    Each item is `{'image': uint8 'rows h w c', 'label': int32 'rows'}`, and the tokens of captions with them where the
    source has some; for `steps_per_item` = k > 1 it is the batches of k consecutive steps, stacked along a new leading
    axis of size k.
    Every example appears once per epoch; a batch may span two epochs. Call `close()` when done.

    Args:
      batch_size: of the global batch, over all processes.
      seed: of the order of the examples, 0 to 2**32 - 1.
      rows: which of the rows 0 to batch_size - 1 of every batch to load, in this order; None: all.
      start_step: first step to deliver; any step, a multiple of `steps_per_item` or not.
      num_workers: processes that load; 0 is this process. The batches are the same.
      num_threads: threads of each process that load. The batches are the same.

    Raises:
      ValueError: for an empty source, or sizes that are not positive or do not divide.
      processes.Died: from the iterator, within seconds, where a worker was killed.
    """
    rows = np.arange(batch_size) if rows is None else rows
    _check(source, batch_size, start_step, rows, steps_per_item, num_workers, num_threads)
    loader = _Loader(source, batch_size, seed, start_step, rows, steps_per_item)
    items: Any = grain.MapDataset.range(sys.maxsize // (batch_size * steps_per_item) - start_step).map(loader)
    # Grain's defaults (16 threads, 500 elements) are meant for single records; an element here is whole batches.
    items = items.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=_AHEAD * num_threads))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags, also where no command has parsed any
            flags.FLAGS.mark_as_parsed()
        # Through pipes. Shared memory is no faster for images that have to be decoded, a container has 64 MB of it, and
        # Grain leaves some behind when it is closed.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        items = grain.experimental.WithOptionsIterDataset(items, options)
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_AHEAD)
        return _OfWorkers(items.mp_prefetch(options, worker_init_fn=_start_worker))
    return iter(items)


def _start_worker(index: int, count: int) -> None:
    del index, count
    processes.end_with_parent()


class _OfWorkers:
    """Items that worker processes load; notices that one was killed.

    Which Grain does not where that met it while it was sending: it waits for the rest of the item.
    """

    def __init__(self, items: grain.IterDataset):
        self._others = frozenset(multiprocessing.active_children())
        self._items = iter(items)  # which may start workers
        self._workers: set[Any] = set()
        self._is_broken = False

    def __iter__(self) -> "_OfWorkers":
        return self

    def __next__(self) -> Item:
        answer = processes.in_thread(next, self._items)
        while not concurrent.futures.wait([answer], _LOOK_SECONDS).done:
            self._look()
            if killed := self._killed():
                raise self._died(signal.Signals(-killed[0].exitcode).name)
        self._look()
        error = answer.exception()
        if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
            raise self._died(str(error).partition(". ")[0]) from error
        return answer.result()

    def _look(self) -> None:
        # With every item: later `active_children` does not name those that have died.
        self._workers |= frozenset(multiprocessing.active_children()) - self._others

    def _killed(self) -> list[Any]:
        return [worker for worker in self._workers if (worker.exitcode or 0) < 0]

    def _died(self, how: str) -> processes.Died:
        self._is_broken = True
        for worker in self._workers:
            worker.kill()
        return processes.Died(
            f"got a killed worker process of the data ({how}), expected all to live: SIGKILL is what a system sends "
            "that is out of memory; lower config.data.num_workers (0: none) or config.train.steps_per_dispatch"
        )

    def close(self) -> None:
        """Ends the workers."""
        if self._is_broken:  # Grain would wait for the one that was killed
            return
        # A worker ends when what it had to say has been heard. Grain does not listen: it kills it after 25 s.
        queues = _queues_of(self._items)
        closing = threading.Thread(target=self._items.close, daemon=True)
        closing.start()
        for worker_queue in queues:
            threading.Thread(target=_empty, args=(worker_queue, closing), daemon=True).start()
        while closing.is_alive() and not self._killed():
            closing.join(_LOOK_SECONDS)


def _queues_of(items: grain.DatasetIterator) -> list[Queue]:
    """Those through which workers and Grain speak, wherever among its objects it keeps them."""
    found: list[Queue] = []
    seen, left = set(), [items]
    while left:
        for thing in gc.get_referents(left.pop()):
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if type(thing) is Queue:
                found.append(thing)
            elif isinstance(thing, (dict, list, tuple)) or type(thing).__module__.partition(".")[0] in _HOLDERS:
                left.append(thing)
    return found


def _empty(worker_queue: Queue, closing: threading.Thread) -> None:
    while closing.is_alive():
        with contextlib.suppress(queue.Empty):
            worker_queue.get(timeout=0.05)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Item number -> batch; a class at the top of a module, so that it can go to a worker process."""

    source: Source
    batch_size: int
    seed: int
    start_step: int
    rows: Integer[np.ndarray, "rows"]
    steps_per_item: int

    def __call__(self, item: int) -> dict[str, np.ndarray]:
        first = self.start_step + item * self.steps_per_item
        if self.steps_per_item == 1:
            return self._load_step(first)
        steps = [self._load_step(step) for step in range(first, first + self.steps_per_item)]
        return {name: np.stack([step[name] for step in steps]) for name in steps[0]}

    def _load_step(self, step: int) -> dict[str, np.ndarray]:
        epochs, within = np.divmod(step * self.batch_size + self.rows, len(self.source))
        indices = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = _permutation(len(self.source), self.seed, epoch)[within[here]]
        if isinstance(self.source, WithTokens):
            return self.source.load_in_epochs(indices, epochs)
        return self.source.load(indices)


@functools.lru_cache(maxsize=4)  # threads may be at an epoch's two sides; 8 bytes an example each
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy froze its stream, and a run must find its place under another version.
    return np.random.RandomState([seed, epoch]).permutation(size)


def _check(
    source: Source,
    batch_size: int,
    start_step: int,
    rows: Integer[np.ndarray, "rows"],
    steps_per_item: int,
    num_workers: int,
    num_threads: int,
) -> None:
    if not len(source):
        raise ValueError(f"source {source.name!r} split {source.split!r} has 0 examples, expected at least 1.")
    for name, value in (
        ("batch_size", batch_size), ("steps_per_item", steps_per_item), ("num_threads", num_threads),
    ):
        if value < 1:
            raise ValueError(f"batches: got {name} = {value}, expected at least 1.")
    if num_workers < 0:
        raise ValueError(f"batches: got num_workers = {num_workers}, expected 0 or more.")
    if start_step < 0:
        raise ValueError(f"batches: got start_step = {start_step}, expected 0 or more; it counts finished steps.")
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"batches: got rows {rows}, expected some from 0 to {batch_size - 1}.")
