"""The batches of a training run: a pure function of (seed, step), read ahead by Grain.

The examples of all epochs form one endless sequence `order` (a new permutation each epoch); step i owns
`order[i * batch_size : (i + 1) * batch_size]` and process p of P the p-th contiguous part of it. So the position is the
step number (nothing else is saved to resume), and the parts of all processes, one after the other, are the same global
batch row by row whatever P is. Indices are batched first and loaded at once, which is several times faster than loading
record by record.
"""

import sys
from typing import Any

import grain
import numpy as np

from mscm.data.sources import Source


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    steps_per_item: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless iterator over this process's part of the global batches of steps `start_step`, `start_step + 1`, ...

    Each item is `{'image': uint8 'b h w c', 'label': int32 'b'}` with b = batch_size / process_count; for
    `steps_per_item` = k > 1 it is the batches of k consecutive steps, stacked along a new leading axis of size k.
    Every example appears once per epoch; a batch may span two epochs. Call `close()` when done.

    Args:
      batch_size: of the global batch, over all processes.
      seed: of the order of the examples.
      start_step: first step to deliver; any step, a multiple of `steps_per_item` or not.

    Raises:
      ValueError: for an empty source, or sizes that are not positive or do not divide.
    """
    _check(source, batch_size, start_step, process_index, process_count, steps_per_item)
    local_size = batch_size // process_count
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def load_step(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size + process_index * local_size
        return source.load(np.array([order[i] for i in range(first, first + local_size)], np.int64))

    def load_item(item: int) -> dict[str, np.ndarray]:
        first = start_step + item * steps_per_item
        if steps_per_item == 1:
            return load_step(first)
        steps = [load_step(step) for step in range(first, first + steps_per_item)]
        return {name: np.stack([step[name] for step in steps]) for name in steps[0]}

    items: Any = grain.MapDataset.range(sys.maxsize // (batch_size * steps_per_item) - start_step).map(load_item)
    # Grain's defaults (16 threads, 500 elements) are meant for single records; an element here is whole batches.
    return iter(items.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _check(source, batch_size, start_step, process_index, process_count, steps_per_item) -> None:
    if not len(source):
        raise ValueError(f'source {source.name!r} split {source.split!r} has 0 examples, expected at least 1.')
    for name, value in (
        ('batch_size', batch_size), ('process_count', process_count), ('steps_per_item', steps_per_item),
    ):
        if value < 1:
            raise ValueError(f'batches: got {name} = {value}, expected at least 1.')
    if start_step < 0:
        raise ValueError(f'batches: got start_step = {start_step}, expected 0 or more; it counts finished steps.')
    if not 0 <= process_index < process_count:
        raise ValueError(
            f'batches: got process_index = {process_index}, expected 0 to {process_count - 1} for '
            f'process_count = {process_count}.'
        )
    if batch_size % process_count:
        raise ValueError(
            f'batches: got batch_size = {batch_size}, expected a multiple of the {process_count} processes; '
            f'choose {batch_size // process_count * process_count or process_count}.'
        )
