"""Data sets of TensorFlow Datasets, read without TensorFlow: a small one that is made here."""

import io
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mscm.data import images, png, preparation, sources, tfds_source

PIXELS = np.random.RandomState(0).randint(0, 256, (11, 8, 8, 3), np.uint8)


class _Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def features(self):
        return {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(names=["cat", "dog"])}

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(8)), "test": self._generate_examples(range(8, 11))}

    def _generate_examples(self, indices):
        for i in indices:
            yield i, {"image": io.BytesIO(png.encode(PIXELS[i])), "label": i % 2}


class MscmPets(_Base):
    """Square images of one size."""


class MscmUneven(_Base):
    """Images of any size."""

    def features(self):
        return super().features() | {"image": tfds.features.Image(shape=(None, None, 3))}


class MscmUnlabelled(_Base):
    """Numbers in place of classes."""

    def features(self):
        return super().features() | {"label": tfds.features.Scalar(np.int64)}


class MscmCaptioned(_Base):
    """Captions as COCO has them, of images of any size: two of the even images, one of the others."""

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        })
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, indices):
        for i in indices:
            texts = [f"image {i}", f"größer {i}"][: 2 - i % 2]
            captions = [{"id": 10 * i + k, "text": text} for k, text in enumerate(texts)]
            yield i, {"image": io.BytesIO(png.encode(PIXELS[i])), "captions": captions}


class MscmUnprepared(_Base):
    """Never written."""


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """The first three as array_record, in a directory that TFDS looks into."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for builder in (MscmPets, MscmUneven, MscmUnlabelled, MscmCaptioned):
        builder(data_dir=os.fspath(data_dir), file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(os.fspath(data_dir))


def test_examples_come_back():
    """All of them, in whatever order TFDS wrote them, with labels that need no image."""
    source = sources.open_source("mscm_pets", split="train")
    assert isinstance(source, sources.Source)
    assert (len(source), source.num_classes, source.resolution, source.channels) == (8, 2, 8, 3)
    assert source.class_names == ("cat", "dog")
    batch = source.load(np.arange(8))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    pairs = {(image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)}
    assert pairs == {(PIXELS[i].tobytes(), i % 2) for i in range(8)}
    np.testing.assert_array_equal(source.labels, batch["label"])
    picked = source.load(np.array([5, 0, 5]))
    np.testing.assert_array_equal(picked["image"], batch["image"][[5, 0, 5]])
    test = sources.open_source("mscm_pets", split="test")
    assert len(test) == 3 and test.fingerprint != source.fingerprint
    assert "tensorflow" not in sys.modules


def test_a_data_set_can_be_prepared(tmp_path):
    """Images of any size, cut down to one, with the labels that they had."""
    files = tfds_source.open_tfds_files("tfds:mscm_uneven", split="train")
    settings = preparation.Settings(resolution=4, images_per_shard=3)
    preparation.prepare(files, tmp_path, settings, split="train", num_workers=1, report=lambda *numbers: None)
    batch = sources.open_source("x", split="train", path=tmp_path).load(np.arange(8))
    pairs = {(image.tobytes(), int(label)) for image, label in zip(batch["image"], batch["label"], strict=True)}
    assert pairs == {(images.area(PIXELS[i], 4).tobytes(), i % 2) for i in range(8)}
    with pytest.raises(ValueError, match="got split None of 'mscm_pets', expected one of train, test"):
        tfds_source.open_tfds_files("tfds:mscm_pets", split=None)


@pytest.mark.parametrize(
    ("name", "split", "sentence"),
    [
        ("mscm_pets", "validation", "got split 'validation' of 'mscm_pets', expected one of train, test"),
        ("mscm_uneven", "train", "expected one square size; run python -m mscm.prepare"),
        ("mscm_unlabelled", "train", "without an image and a class label"),
        ("mscm_unprepared", "train", "is not prepared in .* tfds build mscm_unprepared --file_format=array_record"),
        ("no_such_data_set", "train", "got data set 'no_such_data_set', expected digits, .*, or a name"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(name, split, sentence):
    with pytest.raises(ValueError, match=sentence):
        sources.open_source(name, split=split)


def test_captions_are_prepared_with_their_images(tmp_path):
    """Beside each image its own, whatever the order, also in a part of the data; without TensorFlow."""
    files = tfds_source.open_tfds_files("tfds:mscm_captioned", split="train", captioned=True)
    preparation.prepare(
        files, tmp_path, preparation.Settings(resolution=8), split="train", num_workers=1, report=lambda *_: None
    )
    source = sources.open_source("x", split="train", path=tmp_path)
    assert source.num_classes == 1 and len(source) == 8
    for image, said in zip(source.load(np.arange(8))["image"], source.captions, strict=True):
        number = int(said[0].split()[1])
        assert said == (f"image {number}", f"größer {number}")[: 2 - number % 2]
        np.testing.assert_array_equal(image, PIXELS[number])
    assert files.part(3, 5).captions == files.captions[3:5]
    assert "tensorflow" not in sys.modules


def test_a_data_set_without_captions():
    with pytest.raises(ValueError, match=r"'mscm_pets' with the images \['image'\] and the texts \[\], expected one"):
        tfds_source.open_tfds_files("tfds:mscm_pets", split="train", captioned=True)
    with pytest.raises(ValueError, match="'mscm_captioned' without an image and a class label"):
        tfds_source.open_tfds_files("tfds:mscm_captioned", split="train")
