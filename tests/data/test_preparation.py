"""Prepared records: the transformed images in order, one checksum whatever the layout, and continued after kill -9."""

import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mscm.data import folders, images, png, preparation, records, sources
from mscm.data.preparation import Settings
from tests import commands

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((12, 9), (8, 8), (6, 20))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """14 images of 2 classes, of different sizes, one of them smaller than 8 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.RandomState(0)
    for i in range(14):
        path = root / ("cat" if i < 5 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png.encode(rng.randint(0, 256, (*SIZES[i % 3], 3), np.uint8)))
    return root


def _prepare(photos, output, *, split="train", num_workers=1, **settings):
    reports = []
    card = preparation.prepare(
        folders.open_files(photos),
        output,
        Settings(**({"resolution": 8} | settings)),
        split=split,
        num_workers=num_workers,
        report=lambda *numbers: reports.append(numbers),
    )
    return card, reports


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("records")
    return output, *_prepare(photos, output, images_per_shard=4, num_workers=2)


def test_records_are_the_transformed_images(photos, prepared):
    """In the order of the sorted names, at any indices, with the labels of the sorted classes."""
    output, card, reports = prepared
    source = sources.open_source("photos", split="train", path=output)
    assert isinstance(source, sources.Source) and isinstance(source, records.RecordSource)
    files = folders.open_files(photos)
    expected = [images.area(images.decode(files.read(i), channels=3), 8) for i in range(14)]
    for indices in (np.arange(14), np.array([13, 0, 7, 7])):
        batch = source.load(indices)
        np.testing.assert_array_equal(batch["image"], np.stack(expected)[indices])
        np.testing.assert_array_equal(batch["label"], (indices >= 5).astype(np.int32))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    assert (len(source), source.num_classes, source.resolution, source.channels) == (14, 2, 8, 3)
    assert source.fingerprint == card.checksum and source.class_names == ("cat", "dog")
    assert reports[-1] == (14, 0)


def test_the_card_says_what_there_is(photos, prepared):
    """Counts, sizes, shards; nothing temporary is left."""
    output, card, _ = prepared
    assert records.read_card(output, "train") == card
    assert (card.num_examples, card.class_counts, card.shard_sizes) == (14, (5, 9), (4, 4, 4, 2))
    assert (card.source, card.transform, card.resolution, card.broken) == (photos.name, "area", 8, ())
    assert card.num_enlarged == sum(min(SIZES[i % 3]) < 8 for i in range(14)) == 4
    assert sorted(os.listdir(output)) == sorted((*card.shards, "train.json", "train-labels.npy"))


@pytest.mark.parametrize("transform", images.TRANSFORMS)
def test_images_that_have_the_size_are_not_resized(tmp_path, transform):
    """Every transform leaves them as they are, and the card says that there was none."""
    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "photos" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "cat" / f"{i}.png").write_bytes(png.encode(image))
    card, _ = _prepare(tmp_path / "photos", tmp_path / "same", transform=transform)
    source = sources.open_source("x", split="train", path=tmp_path / "same")
    np.testing.assert_array_equal(source.load(np.arange(3))["image"], pixels)
    assert card.transform is source.transform is None
    (tmp_path / "photos" / "cat" / "3.png").write_bytes(png.encode(pixels[0, :7]))
    assert _prepare(tmp_path / "photos", tmp_path / "one", transform=transform)[0].transform == transform


def test_the_checksum_is_of_the_pixels(photos, prepared, tmp_path):
    """The same for other shards and raw pixels; another for another transform."""
    raw, _ = _prepare(photos, tmp_path / "raw", encoding="raw", images_per_shard=100)
    assert raw.checksum == prepared[1].checksum and len(raw.shards) == 1
    source, other = (sources.open_source("x", split="train", path=path) for path in (tmp_path / "raw", prepared[0]))
    np.testing.assert_array_equal(source.load(np.arange(14))["image"], other.load(np.arange(14))["image"])
    assert _prepare(photos, tmp_path / "lanczos", transform="lanczos")[0].checksum != raw.checksum


def test_grey_records(photos, tmp_path):
    card, _ = _prepare(photos, tmp_path, channels=1)
    assert sources.open_source("x", split="train", path=tmp_path).load(np.array([3]))["image"].shape == (1, 8, 8, 1)
    assert card.channels == 1


def test_a_source_can_go_to_another_process(prepared):
    source = sources.open_source("x", split="train", path=prepared[0])
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.load(np.array([2]))["image"], source.load(np.array([2]))["image"])


def test_files_as_they_are_give_the_same_images(photos, prepared):
    """A folder needs no preparation to be tried."""
    source = sources.open_source("x", split="train", path=photos, resolution=8)
    assert isinstance(source, sources.Source)
    whole = sources.open_source("x", split="train", path=prepared[0]).load(np.arange(14))
    batch = source.load(np.arange(14))
    np.testing.assert_array_equal(batch["image"], whole["image"])
    np.testing.assert_array_equal(batch["label"], whole["label"])


def test_a_broken_image_is_named_or_skipped(photos, tmp_path):
    """It ends the run, with its name; with skip_broken it is left out, counted and listed."""
    source = tmp_path / "photos"
    for path in photos.rglob("*.png"):
        (source / path.parent.name).mkdir(parents=True, exist_ok=True)
        (source / path.parent.name / path.name).write_bytes(path.read_bytes())
    (source / "dog" / "07.png").write_bytes((photos / "dog" / "07.png").read_bytes()[:60])
    out, layout = tmp_path / "out", {"images_per_shard": 4}
    with pytest.raises(ValueError, match="got a broken image, dog/07.png .*; remove it or give --skip_broken"):
        _prepare(source, out, **layout)
    assert not (out / "train.json").exists() and not list(out.glob("*.tmp"))
    with pytest.raises(ValueError, match="got no train.json .*, expected a finished one: run the same"):
        sources.open_source("x", split="train", path=out)
    # Either advice continues: the whole shards before the broken image are kept.
    shutil.copytree(out, tmp_path / "out2")
    first = (out / "train-00000-of-00004.array_record").stat().st_mtime_ns
    card, _ = _prepare(source, out, skip_broken=True, **layout)
    assert (card.broken, card.num_examples, card.class_counts) == (("dog/07.png",), 13, (5, 8))
    assert len(sources.open_source("x", split="train", path=out)) == 13
    assert (out / "train-00000-of-00004.array_record").stat().st_mtime_ns == first
    (source / "dog" / "07.png").unlink()
    other, _ = _prepare(source, tmp_path / "out2", **layout)
    assert (other.broken, other.checksum) == ((), card.checksum)
    for path in (source / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="got no whole image in class 'cat'"):
        _prepare(source, tmp_path / "out3", skip_broken=True)
    # Its shards are finished and lack images: a run that may skip none makes them again.
    with pytest.raises(ValueError, match="got a broken image, cat/00.png"):
        _prepare(source, tmp_path / "out3")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"transform": "box"}, "transform: got 'box', expected one of area, adm, lanczos"),
        ({"encoding": "jpeg"}, "encoding: got 'jpeg', expected one of png, raw"),
        ({"channels": 4}, "channels: got 4, expected one of 1, 3"),
        ({"resolution": 0}, "resolution: got 0, expected at least 1"),
        ({"images_per_shard": 0}, "images_per_shard: got 0, expected at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**({"resolution": 8} | settings))


def test_nothing_is_written_over(photos, prepared):
    with pytest.raises(ValueError, match="train.json exists already; remove it, or choose another --output"):
        _prepare(photos, prepared[0])


def test_records_that_lost_something_are_refused(photos, tmp_path):
    """A split that is not there, a shard that is gone, labels of another length, a card of another format."""
    _prepare(photos, tmp_path, images_per_shard=10)
    with pytest.raises(ValueError, match="got no val.json for split 'val', expected one of train"):
        sources.open_source("x", split="val", path=tmp_path)
    labels = np.load(tmp_path / "train-labels.npy")
    np.save(tmp_path / "train-labels.npy", labels[:-1])
    with pytest.raises(ValueError, match="train-labels.npy: got other labels than those of train.json"):
        sources.open_source("x", split="train", path=tmp_path)
    np.save(tmp_path / "train-labels.npy", labels[::-1])
    with pytest.raises(ValueError, match="train-labels.npy: got other labels than those of train.json"):
        sources.open_source("x", split="train", path=tmp_path)
    np.save(tmp_path / "train-labels.npy", labels)
    shards = [tmp_path / f"train-0000{i}-of-00002.array_record" for i in range(2)]
    kept = shards[1].read_bytes()
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ValueError, match="00001-of-00002.array_record: got 10 images, expected 4 as train.json says"):
        sources.open_source("x", split="train", path=tmp_path)
    shards[1].write_bytes(kept)
    sources.open_source("x", split="train", path=tmp_path).verify()
    (tmp_path / "train-00001-of-00002.array_record").unlink()
    with pytest.raises(ValueError, match="got no file train-00001-of-00002.array_record"):
        sources.open_source("x", split="train", path=tmp_path)
    card = json.loads((tmp_path / "train.json").read_text()) | {"format": "other"}
    for text, sentence in (
        (json.dumps(card), "got format 'other', expected 'mscm records 2'"),
        ("[1]", "got format None, expected 'mscm records 2'"),
        ("{", "got a file that is no JSON"),
    ):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            sources.open_source("x", split="train", path=tmp_path)


def test_verify_reads_the_pixels(photos, tmp_path):
    """Other images under the same labels and counts are found by the checksum alone."""
    for name in ("a", "b"):
        _prepare(photos, tmp_path / name, transform={"a": "area", "b": "lanczos"}[name])
    shutil.copy(*(tmp_path / name / "train-00000-of-00001.array_record" for name in ("b", "a")))
    source = sources.open_source("x", split="train", path=tmp_path / "a")
    with pytest.raises(ValueError, match="got checksum .*, expected .* as its card says"):
        source.verify()


def test_a_json_file_beside_images_is_no_card(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "x")
    (tmp_path / "x" / "dataset.json").write_text("{}")
    assert len(sources.open_source("x", split="train", path=tmp_path / "x", resolution=8)) == 14


def test_other_images_of_the_same_names_are_not_mixed_in(photos, tmp_path):
    """What an unfinished run has made of other files is made again."""
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        copy = tmp_path / "x" / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes() if i < 13 else b"")
    with pytest.raises(ValueError, match="got a broken image"):
        _prepare(tmp_path / "x", tmp_path / "out", images_per_shard=4)
    assert len(list((tmp_path / "out").glob("*.done.json"))) == 3
    changed = np.full((12, 9, 3), 7, np.uint8)
    (tmp_path / "x" / "cat" / "00.png").write_bytes(png.encode(changed))
    shutil.copy(photos / "dog" / "13.png", tmp_path / "x" / "dog" / "13.png")
    _prepare(tmp_path / "x", tmp_path / "out", images_per_shard=4)
    source = sources.open_source("x", split="train", path=tmp_path / "out")
    assert (source.load(np.array([0]))["image"] == 7).all()
    source.verify()


def test_two_at_once_are_refused(photos, tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another mscm.prepare writes to it; wait for its end"):
        _prepare(photos, tmp_path)
    os.close(holder)
    _prepare(photos, tmp_path)


def test_splits_whose_names_begin_alike(photos, tmp_path):
    """An unfinished `train-small` does not block `train`."""
    (tmp_path / "train-small-00000-of-00001.array_record.done.json").write_text("{}")
    _prepare(photos, tmp_path)
    with pytest.raises(ValueError, match="got split 'a/b', expected a name of letters"):
        _prepare(photos, tmp_path, split="a/b")


def _command(*flags):
    return [sys.executable, "-m", "mscm.prepare", *flags]


def test_killed_it_continues(tmp_path):
    """kill -9 in the middle; run again, it keeps the finished shards and ends with the card of an unbroken run."""
    rng = np.random.RandomState(1)
    for i in range(160):
        path = tmp_path / "photos" / f"class_{i % 4}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png.encode(rng.randint(0, 256, (256, 256, 3), np.uint8)))
    output = tmp_path / "out"
    flags = (f'--source={tmp_path / "photos"}', "--resolution=16", "--images_per_shard=10", "--workers=1")
    process = subprocess.Popen(
        _command(*flags, f"--output={output}"), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("*.done.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.array_record")}
    assert 1 <= len(finished) < 16 and not (output / "train.json").exists()

    other = subprocess.run(
        _command(*flags, f"--output={output}", "--transform=adm"), cwd=ROOT, capture_output=True, text=True
    )
    assert other.returncode == 2 and "got an unfinished run of other settings" in other.stderr
    again = subprocess.run(_command(*flags, f"--output={output}"), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "160 images of 4 classes (40 to 40 in each), 16 pixels, 0 enlarged" in again.stdout
    assert "160/160 images" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(output.glob("*.tmp")) and not list(output.glob("*.done.json"))
    card, _ = _prepare(tmp_path / "photos", tmp_path / "whole", resolution=16)
    assert records.read_card(output, "train").checksum == card.checksum


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "--output must have a value"),
        (("--output=", "--source=absent", "--resolution=8"), "--output: got an empty path"),
        (("--output=gs://x", "--source=absent", "--resolution=8"), "--output: got 'gs://x', expected a folder of"),
        (("--output=x", "--source=gs://x", "--resolution=8"), "got 'gs://x', expected a folder, zip or tar of a disk"),
        (("--output=x",), "--source: got none, expected a value"),
        (("--output=x", "--verify"), "got no train.json for split 'train', expected a directory made by"),
        (("--source=absent", "--output=x", "--resolution=8"), "got 'absent', expected an existing folder"),
        (("--source=absent", "--output=x", "--resolution=8", "--transform=box"), "transform: got 'box'"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, commands.refusal(capfd, "prepare", *flags))
    assert not any(tmp_path.iterdir())
