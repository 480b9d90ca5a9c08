"""Sources: what digits are, and that the halves are a stratified partition."""

import inspect
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mscm.data import images, sources
from mscm.report import grid

ROOT = Path(__file__).resolve().parents[2]


def test_digits_are_the_1797_real_ones():
    from sklearn.datasets import load_digits

    source = sources.open_source("digits", split="all")
    assert isinstance(source, sources.Source)
    assert (len(source), source.num_classes, source.resolution, source.channels) == (1797, 10, 8, 1)
    assert source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.round(source.images[..., 0] / 255 * 16), load_digits().images)
    assert source.images.min() == 0 and source.images.max() == 255
    batch = source.load(np.array([3, 1, 4, 1]))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"], source.images[[3, 1, 4, 1]])
    np.testing.assert_array_equal(batch["label"], source.labels[[3, 1, 4, 1]])


def test_load_does_not_lend_its_memory():
    source = sources.open_source("digits", split="all")
    source.load(np.arange(2))["image"][:] = 7
    assert not (source.images[:2] == 7).all()


def test_halves_partition_the_set_and_are_stratified():
    everything, a, b = (sources.open_source("digits", split=split) for split in ("all", "half_a", "half_b"))
    rows = lambda s: sorted(image.tobytes() + bytes([label]) for image, label in zip(s.images, s.labels, strict=True))  # noqa: E731
    assert sorted(rows(a) + rows(b)) == rows(everything)
    assert abs(len(a) - len(b)) == 1
    assert np.abs(np.bincount(a.labels) - np.bincount(b.labels)).max() <= 1
    first, second = sources.stratified_halves(everything.labels)
    assert not set(first) & set(second)


def test_unknown_names_say_what_there_is():
    known = ", ".join(sources.SOURCES)
    with pytest.raises(ValueError, match=f"got data set 'digit', expected {known}, synthetic, or a name that Tensor"):
        sources.open_source("digit", split="all")
    with pytest.raises(ValueError, match="expected one of all, half_a, half_b; did you mean 'half_a'"):
        sources.open_source("digits", split="half_aa")


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 4, 5, 1), np.uint8), np.zeros(2, np.int32), "expected square uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "one class index per image"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 2], np.int32), "labels from 0 to 2, expected 0 to 1"),
    ],
)
def test_array_source_refuses(images, labels, message):
    check = inspect.unwrap(sources.ArraySource.__post_init__)
    broken = object.__new__(sources.ArraySource)
    broken.__dict__.update(name="x", split="all", images=images, labels=labels, class_names=("a", "b"))
    with pytest.raises(ValueError, match=message):
        check(broken)


def test_synthetic_has_the_sizes_that_are_asked_for():
    """Noise of every class, the same twice."""
    sizes = dict(split="train", resolution=16, channels=3, num_classes=7)
    source, again = (sources.open_source("synthetic", **sizes) for _ in range(2))
    assert (source.resolution, source.channels, source.num_classes) == (16, 3, 7)
    assert set(source.labels) == set(range(7)) and source.images.std() > 70
    assert source.fingerprint == again.fingerprint
    with pytest.raises(ValueError, match="expected resolution, channels and num_classes"):
        sources.open_source("synthetic", split="train")


def test_fingerprints_tell_data_sets_apart():
    prints = [sources.open_source("digits", split=split).fingerprint for split in ("all", "half_a", "half_b", "all")]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


def test_a_folder_is_the_same_data_wherever_it_lies(tmp_path):
    """A copy has the fingerprint of its original; another file in it, or another size of the images, has not."""
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "here" / name).mkdir(parents=True)
        grid.save_png(tmp_path / "here" / name / "1.png", np.full((9, 9, 3), 50 * i, np.uint8))
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def fingerprint(place: str, resolution: int = 8) -> str:
        return sources.open_source("x", split="train", path=tmp_path / place, resolution=resolution).fingerprint

    original = fingerprint("here")
    assert fingerprint("there") == original and fingerprint("here", resolution=4) != original
    grid.save_png(tmp_path / "there" / "dog" / "1.png", np.arange(243, dtype=np.uint8).reshape(9, 9, 3))
    assert fingerprint("there") != original


def test_images_that_have_the_size_are_not_resized(tmp_path):
    """`area` leaves them as they are: they are the images of a source that has no transform."""
    for i, side in enumerate((8, 8, 9)):
        grid.save_png(tmp_path / "of_8" / f"{i}" / "1.png", np.zeros((8, 8, 3), np.uint8))
        grid.save_png(tmp_path / "mixed" / f"{i}" / "1.png", np.zeros((side, 8, 3), np.uint8))

    def transform(folder, resolution):
        return sources.open_source("x", split="train", path=tmp_path / folder, resolution=resolution).transform

    assert (transform("of_8", 8), transform("of_8", 4), transform("mixed", 8)) == (None, "area", "area")


@pytest.mark.parametrize("folder", ["val", "Test", "training"])
def test_another_split_is_not_taken_for_the_training_images(tmp_path, folder):
    """Without splits all is `train`; a folder that names another split is no such thing."""
    for name in ("cat", "dog"):
        grid.save_png(tmp_path / "x" / folder / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=f"got split 'train', expected a folder above the class .*, one of .*{folder}"):
        sources.open_source("x", split="train", path=tmp_path / "x", resolution=8)
    assert len(sources.open_source("x", split=folder, path=tmp_path / "x", resolution=8)) == 2
    (tmp_path / "x" / folder).rename(tmp_path / "x" / "photos")
    assert len(sources.open_source("x", split="train", path=tmp_path / "x", resolution=8)) == 2


def test_a_broken_file_is_named(tmp_path):
    """In a sentence that cli.run prints, whatever breaks it."""
    for name in ("cat", "dog"):
        grid.save_png(tmp_path / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    source = sources.open_source("x", split="train", path=tmp_path, resolution=8)
    sentence = "got a broken image, cat/1.png .*; repair it, or prepare the data"
    (tmp_path / "cat" / "1.png").write_bytes(b"text")
    with pytest.raises(images.BrokenImage, match=sentence):
        source.load(np.array([0]))
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="No such file .*/cat/1.png"):
        source.load(np.array([0]))


def test_data_brings_in_neither_tensorflow_nor_pytorch(tmp_path):
    """Training on a pod must not pay for them."""
    modules = "mscm.data.sources, mscm.data.pipeline, mscm.data.preparation, mscm.data.transforms"
    heavy = "tensorflow", "torch", "tensorflow_datasets"
    for name in heavy[:2]:  # not installed here: a stub is what an import would find
        (tmp_path / f"{name}.py").touch()
    script = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_mixture_has_the_moments_and_the_shape_of_a_mixture():
    """Two Gaussians on one pixel: moments in closed form, and the share below every value; the same for everybody."""
    source = sources.open_source("mixture", split="train")
    assert isinstance(source, sources.Source)
    assert (source.resolution, source.channels, source.num_classes, source.transform) == (1, 1, 1, None)
    assert source.fingerprint == sources.open_source("mixture", split="train").fingerprint
    x = source.load(np.arange(len(source)))["image"].ravel() / 127.5 - 1
    np.testing.assert_allclose(np.sort(x), np.sort(-x), rtol=0, atol=1e-6)  # to the last level
    weights, means, stds = (np.array(part) for part in sources.MIXTURE)
    mean = weights @ means
    assert abs(x.mean() - mean) < 1e-4
    assert abs(x.var() - (weights @ (stds**2 + means**2) - mean**2)) < 2e-4
    fourth = weights @ (means**4 + 6 * means**2 * stds**2 + 3 * stds**4)
    assert abs(np.mean(x**4) - fourth) < 1e-3
    for edge in np.arange(-0.9, 1.0, 0.1):  # between two levels
        level = (np.floor((edge + 1) * 127.5) + 0.5) / 127.5 - 1
        below = sum(w * statistics.NormalDist(m, s).cdf(level) for w, m, s in zip(weights, means, stds, strict=True))
        assert abs(np.mean(x < level) - below) < 2 / len(x) + 1e-9
    with pytest.raises(ValueError, match="unknown split of 'mixture': got 'test', expected one of train"):
        sources.open_source("mixture", split="test")
