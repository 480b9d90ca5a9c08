"""One pass over images: a kill costs what came after the last copy, and changes nothing."""

import numpy as np
import pytest

from mscm.metrics import files, gathering
from mscm.metrics.features import Outputs
from mscm.metrics.gathering import Gathering, Partial

PIXELS = np.random.RandomState(0).randint(0, 256, (30, 4, 4, 3)).astype(np.uint8)


def network(images):
    rows = images.reshape(len(images), -1)[:, :5].astype(np.float32)
    return Outputs(rows, probabilities=np.full((len(rows), 2), 0.5, np.float32))


def batches(start=0, size=7):
    return (PIXELS[first : first + size] for first in range(start, len(PIXELS), size))


@pytest.fixture
def over(monkeypatch):
    """The function without the checks of its annotations: a plain function is network enough."""
    return gathering.over.__wrapped__


def made(**settings):
    return Gathering(len(PIXELS), num_kept=10, num_samples=9, **settings)


@pytest.fixture
def whole(over):
    result = made()
    over(batches(), network, result)
    np.testing.assert_array_equal(result.samples, PIXELS[:9])
    return result


def assert_same(one, two):
    for name, array in one.statistics().to_arrays().items():
        np.testing.assert_array_equal(array, two.statistics().to_arrays()[name])
    np.testing.assert_array_equal(one.samples, two.samples)


class _Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_it_goes_on_after_a_kill(over, whole, tmp_path, killed_at):
    """To the same statistics and first images; what the last copy has is not asked for again."""
    path, asked = tmp_path / "partial.npz", []
    partial = Partial(path, {"of": "digits"}, save_every_seconds=0.0)

    def failing(images):
        asked.append(len(images))
        if len(asked) == killed_at + 1:
            raise _Killed
        return network(images)

    with pytest.raises(_Killed):
        over(batches(), failing, made(partial=partial))
    again, watched = made(partial=partial), []
    assert again.count == 7 * killed_at
    over(batches(again.count), network, again, watch=watched.append)
    assert sum(watched) == 30 - 7 * killed_at
    assert_same(again, whole)
    again.remove_file()
    assert not path.exists()


def test_a_whole_pass_is_kept_too(over, whole, tmp_path):
    """What comes after it may be killed as well."""
    partial = Partial(tmp_path / "partial.npz", "key")
    done = made(partial=partial)
    over(batches(), network, done)
    assert not (tmp_path / "partial.npz").exists()  # a minute has not passed
    done.save()
    assert_same(made(partial=partial), whole)


@pytest.mark.parametrize("settings", [{"key": "other"}, {"goes_on": False}])
def test_another_pass_is_not_continued(over, tmp_path, settings):
    first = made(partial=Partial(tmp_path / "partial.npz", "key"))
    over(list(batches())[:2], network, first)
    first.save()
    partial = Partial(tmp_path / "partial.npz", settings.pop("key", "key"))
    assert made(partial=partial, **settings).count == 0


def test_a_damaged_file_costs_only_time(tmp_path):
    (tmp_path / "partial.npz").write_bytes(b"PK\x03\x04 cut")
    assert made(partial=Partial(tmp_path / "partial.npz", "key")).count == 0
    files.save(tmp_path / "partial.npz", {"x": np.zeros(2)}, {"kind": "mscm reference 1", "key": "key"})
    assert made(partial=Partial(tmp_path / "partial.npz", "key")).count == 0


def test_one_process_writes_and_may_refuse(over, tmp_path):
    def refuse():
        raise PermissionError("another has taken over")

    silent = made(partial=Partial(tmp_path / "partial.npz", "key", save_every_seconds=0.0, writes=False))
    over(batches(), network, silent)
    silent.remove_file()
    lost = made(partial=Partial(tmp_path / "partial.npz", "key", save_every_seconds=0.0, before_write=refuse))
    with pytest.raises(PermissionError):
        over(batches(), network, lost)
    assert not list(tmp_path.iterdir())


def test_who_only_takes_part_gathers_nothing(over):
    seen = []
    over(batches(), lambda images: seen.append(len(images)), None)
    assert sum(seen) == 30
