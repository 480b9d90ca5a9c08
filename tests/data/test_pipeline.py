"""The pipeline is a pure function of (seed, step): restarts, processes and stacking change nothing."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mscm.data import pipeline, sources

NUM = 23  # no multiple of any batch size here, so that batches span epochs
ORDER = [19, 6, 11, 2, 8, 3]  # positions 18 to 23 under seed 7: the end of an epoch, the first of the next


def make_source():
    images = np.arange(NUM * 4, dtype=np.uint8).reshape(NUM, 2, 2, 1)
    return sources.ArraySource("count", "all", images, np.arange(NUM, dtype=np.int32), tuple(map(str, range(NUM))))


def take(num, **kwargs):
    arguments = {"batch_size": 4, "seed": 0} | kwargs
    with contextlib.closing(pipeline.batches(make_source(), **arguments)) as iterator:
        return list(itertools.islice(iterator, num))


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, two in zip(got, expected, strict=True):
        assert one.keys() == two.keys() == {"image", "label"}
        for name in one:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name])


def test_shapes_types_and_pairing():
    (batch,) = take(1)
    assert batch["image"].shape == (4, 2, 2, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"], make_source().images[batch["label"]])


def test_every_example_once_per_epoch_in_a_new_order():
    labels = np.concatenate([batch["label"] for batch in take(3 * NUM)])
    epochs = labels.reshape(-1, NUM)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(NUM), (len(epochs), 1)))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("start", [1, 5, 6, 40])
def test_restart_at_any_step(start):
    assert_same(take(3, start_step=start), take(start + 3)[start:])


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_processes_share_one_global_sequence(process_count, start):
    parts = [take(9, start_step=start, rows=rows) for rows in np.split(np.arange(4), process_count)]
    together = [
        {name: np.concatenate([part[i][name] for part in parts]) for name in ("image", "label")} for i in range(9)
    ]
    assert_same(together, take(9, start_step=start))


def test_rows_come_in_the_order_asked_for():
    """Devices of a process may hold any rows of the global batch."""
    whole = take(5)
    expected = [{name: array[[3, 0]] for name, array in batch.items()} for batch in whole]
    assert_same(take(5, rows=np.array([3, 0])), expected)


@pytest.mark.parametrize("num_workers, num_threads", [(0, 3), (1, 1), (2, 2)])
def test_workers_and_threads_change_nothing(num_workers, num_threads):
    """The same batches in the same order, from any step, stacked and of half of the rows."""
    arguments = {"start_step": 3, "rows": np.array([2, 3]), "steps_per_item": 2}
    assert_same(take(7, num_workers=num_workers, num_threads=num_threads, **arguments), take(7, **arguments))


def test_workers_leave_nothing_behind(tmp_path):
    """Closed in the middle, when they have much to say: each ends by itself, and no message follows it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from mscm.data import pipeline, sources\n"
        "def main():\n"
        "    source = sources.open_source('synthetic', split='train', resolution=32, channels=3, num_classes=2)\n"
        "    items = pipeline.batches(source, batch_size=64, seed=0, num_workers=2)\n"
        "    print(next(items)['image'].shape)\n"
        "    time.sleep(2)\n"  # each has loaded more than a pipe holds
        "    workers = multiprocessing.active_children()\n"
        "    items.close()\n"
        "    print([worker.exitcode for worker in workers])\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("(64, 32, 32, 3)\n[0, 0]\n", "")


def test_the_order_stays():
    """A run that continues under another version of a library meets the examples that are left: these numbers stay."""
    np.testing.assert_array_equal(take(1, batch_size=6, seed=7, start_step=3)[0]["label"], ORDER)


def test_orders_of_neighbouring_seeds_share_no_epoch():
    first, second = (
        np.concatenate([batch["label"] for batch in take(3, batch_size=NUM, seed=seed)]).reshape(3, NUM)
        for seed in (0, 1)
    )
    assert not {tuple(epoch) for epoch in first} & {tuple(epoch) for epoch in second}


@pytest.mark.parametrize("start", [0, 3, 4])
def test_stacked_steps_are_consecutive_steps(start):
    single = take(8, start_step=start, rows=np.array([2, 3]))
    stacked = take(2, start_step=start, rows=np.array([2, 3]), steps_per_item=4)
    assert stacked[0]["image"].shape == (4, 2, 2, 2, 1)
    assert_same([{name: item[name][i] for name in item} for item in stacked for i in range(4)], single)


def test_seeds_differ_and_repeat():
    assert_same(take(4, seed=3), take(4, seed=3))
    assert not np.array_equal(take(1, seed=3)[0]["label"], take(1, seed=4)[0]["label"])


def test_batch_larger_than_the_source():
    (batch,) = take(1, batch_size=2 * NUM)
    np.testing.assert_array_equal(np.sort(batch["label"]), np.repeat(np.arange(NUM), 2))


def test_far_step_costs_nothing():
    assert take(1, start_step=10**9)[0]["label"].shape == (4,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"start_step": -1}, "start_step = -1"),
        ({"rows": np.array([0, 4])}, r"got rows \[0 4\], expected some from 0 to 3"),
        ({"rows": np.array([], np.int64)}, "expected some from 0 to 3"),
        ({"steps_per_item": 0}, "steps_per_item = 0"),
        ({"num_workers": -1}, "num_workers = -1"),
        ({"num_threads": 0}, "num_threads = 0"),
    ],
)
def test_bad_sizes_are_sentences(arguments, message):
    with pytest.raises(ValueError, match=message):
        take(1, **arguments)


def test_empty_source_is_refused():
    empty = sources.ArraySource("none", "all", np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32), ("a",))
    with pytest.raises(ValueError, match="has 0 examples"):
        pipeline.batches(empty, batch_size=1, seed=0)
