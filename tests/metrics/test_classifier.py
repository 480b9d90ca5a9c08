"""The feature network: it learns, repeats, answers to image quality, and never uses a cache it should not."""

import dataclasses
import inspect
import json
import logging as python_logging

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from scipy import ndimage

from mscm.data import sources
from mscm.metrics import classifier as classifier_lib
from mscm.metrics import features
from mscm.metrics.frechet import frechet_distance
from mscm.metrics.moments import from_features


@pytest.fixture(scope="module")
def digits():
    return sources.open_source("digits", split="all")


@pytest.fixture(scope="module")
def trained(digits):
    return classifier_lib.train_classifier(digits)


@pytest.fixture(scope="module")
def small():
    """Four separable classes of 12 x 12 colour images: trains in a second."""
    rng = np.random.RandomState(0)
    labels = np.arange(64, dtype=np.int32) % 4
    images = (rng.rand(64, 12, 12, 3) * 60 + labels[:, None, None, None] * 60).astype(np.uint8)
    return sources.ArraySource("small", "all", images, labels, tuple("abcd"))


@pytest.fixture
def warnings():
    """What absl warned of, whatever handlers are installed."""
    records = []
    handler = python_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    handler.setLevel(python_logging.WARNING)
    logger = absl_logging.get_absl_logger()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def features_of(classifier, images):
    return classifier.network(images).features


def same_weights(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, dict(a.params), dict(b.params)))


def test_held_out_accuracy(digits):
    shuffled = np.random.RandomState(1).permutation(len(digits))
    held_out = shuffled[np.argsort(digits.labels[shuffled], kind="stable")][::10]  # every tenth of each class
    kept = np.setdiff1d(shuffled, held_out)
    part = dataclasses.replace(digits, split="train90", images=digits.images[kept], labels=digits.labels[kept])
    probabilities = classifier_lib.train_classifier(part).network(digits.images[held_out]).probabilities
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert (probabilities.argmax(-1) == digits.labels[held_out]).mean() >= 0.97


def test_features_are_finite_and_well_conditioned(digits, trained):
    rows = features_of(trained, digits.images)
    assert rows.shape == (1797, classifier_lib.FEATURE_DIM) and rows.dtype == np.float32
    eigenvalues = np.linalg.eigvalsh(from_features(rows).cov)
    assert eigenvalues[0] > 1e-6 * eigenvalues[-1]


def test_features_do_not_depend_on_the_batch(digits, trained):
    rows = features_of(trained, digits.images[:300])
    np.testing.assert_allclose(features_of(trained, digits.images[297:300]), rows[297:], rtol=1e-5, atol=1e-5)
    assert features_of(trained, digits.images[:0]).shape == (0, classifier_lib.FEATURE_DIM)


def test_distance_rises_with_noise_and_blur(digits, trained):
    reference = from_features(features_of(trained, digits.images))
    noise = np.random.RandomState(0).randn(*digits.images.shape) * 127.5  # standard deviation 1 of a range of 2

    def distance(images):
        pixels = np.clip(images, 0, 255).astype(np.uint8)
        return frechet_distance(reference, from_features(features_of(trained, pixels)))

    noisy = [distance(np.round(digits.images + level * noise)) for level in (0.0, 0.05, 0.1, 0.2, 0.4)]
    blurred = [distance(np.round(ndimage.gaussian_filter(digits.images * 1.0, (0, w, w, 0)))) for w in (0.01, 0.5, 1.0)]
    assert noisy[0] < 1e-3 and all(b > 1.5 * a + 0.05 for a, b in zip(noisy, noisy[1:], strict=False)), noisy
    assert all(b > 1.5 * a + 0.05 for a, b in zip(blurred, blurred[1:], strict=False)), blurred
    halves = [sources.open_source("digits", split=split).images for split in ("half_a", "half_b")]
    real = frechet_distance(*(from_features(features_of(trained, half)) for half in halves))
    assert 0 < real < noisy[3], (real, noisy)  # two real halves are closer than visibly noisy images


def test_training_repeats_bit_for_bit_and_follows_the_seed(small):
    one, two, other = (classifier_lib.train_classifier(small, seed=seed, num_epochs=1) for seed in (0, 0, 1))
    assert one.fingerprint == two.fingerprint and same_weights(one, two)
    assert one.fingerprint != other.fingerprint


def test_a_large_source_is_drawn_from_and_seen_less_often(small, monkeypatch):
    """Memory and time are bounded: of 64 images 40 are loaded, and 100 examples are two epochs of them."""
    loaded = []

    class Counting(sources.ArraySource):
        def load(self, indices):
            loaded.append(indices)
            return super().load(indices)

    monkeypatch.setattr(classifier_lib, "MAX_IMAGES", 40)
    monkeypatch.setattr(classifier_lib, "MAX_EXAMPLES", 100)
    fields = {field.name: getattr(small, field.name) for field in dataclasses.fields(small)}
    card = classifier_lib.train_classifier(Counting(**fields)).card
    assert card["num_images"] == 40 and card["num_epochs"] == 2
    assert len(set(loaded[0])) == 40 and len(small) > 40


def test_fingerprint_sees_every_bit(small):
    one = classifier_lib.train_classifier(small, num_epochs=1)
    params = jax.tree.map(np.copy, dict(one.params))
    params["Dense_0"]["bias"][3] = np.nextafter(params["Dense_0"]["bias"][3], 1)
    assert dataclasses.replace(one, params=params).fingerprint != one.fingerprint


def test_cache_round_trip(small, tmp_path, warnings, monkeypatch):
    first = classifier_lib.load_or_train(small, tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()  # and no temporary file beside it
    assert path.name == "classifier_small_all_seed0.npz"
    monkeypatch.setattr(classifier_lib, "train_classifier", None)  # training again would fail
    again = classifier_lib.load_or_train(small, tmp_path / "new")
    assert again.fingerprint == first.fingerprint and again.card == first.card and not warnings
    np.testing.assert_array_equal(features_of(again, small.images), features_of(first, small.images))


def rewrite(path, change):
    with np.load(path) as file:
        arrays = dict(file)
    card = json.loads(str(arrays.pop("card")))
    change(card, arrays)
    np.savez(path, card=np.array(json.dumps(card)), **arrays)


def claim_compression(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 77  # the method of the first entry of the zip's directory
    path.write_bytes(bytes(content))


def alter_weight(card, arrays):
    arrays["Dense_0/bias"] = arrays["Dense_0/bias"] + 1e-3


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), ""),
        (lambda path: path.write_bytes(b"not a zip"), ""),
        (lambda path: path.write_bytes(b""), ""),
        (claim_compression, "compression"),
        (lambda path: np.savez(path, other=np.zeros(2)), "card"),
        (lambda path: rewrite(path, alter_weight), "SHA-256"),
        (lambda path: rewrite(path, lambda card, _: card.update(count=63)), "count = 63, expected 64"),
        (lambda path: rewrite(path, lambda card, _: card.update(architecture="v0")), "architecture = 'v0'"),
        (lambda path: rewrite(path, lambda card, _: card.pop("seed")), "seed = None, expected 0"),
    ],
    ids=["cut", "text", "empty", "compression", "other", "weight", "count", "architecture", "card"],
)
def test_wrong_cache_is_named_and_replaced(small, tmp_path, warnings, damage, reason):
    good = classifier_lib.load_or_train(small, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert classifier_lib.load_or_train(small, tmp_path).fingerprint == good.fingerprint
    (warning,) = warnings
    assert str(path) in warning and reason in warning
    classifier_lib.load_or_train(small, tmp_path)
    assert len(warnings) == 1  # the replacement is good


def test_wrong_images_are_a_sentence(trained):
    call = inspect.unwrap(features.FeatureNetwork.__call__)
    with pytest.raises(ValueError, match="got float32 images of shape"):
        call(trained.network, np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(n, 8, 8, 1\)"):
        call(trained.network, np.zeros((2, 8, 8, 3), np.uint8))
