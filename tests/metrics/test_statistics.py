"""What is gathered in one pass does not depend on the batches, and every metric is that of its own module."""

import dataclasses

import numpy as np
import pytest
import scipy.special

from mscm.metrics import files, statistics
from mscm.metrics.features import Outputs
from mscm.metrics.frechet import frechet_distance
from mscm.metrics.kernel import kernel_distance
from mscm.metrics.moments import from_features
from mscm.metrics.neighbours import precision_recall
from mscm.metrics.statistics import Accumulator, Statistics, compare, inception_score
from tests.metrics import torch_reference

NUM, NUM_KEPT = 47, 20
NETWORKS = ("inception", "dinov2", "classifier")


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Five of them, the last one shorter."""
    monkeypatch.setattr(statistics, "SPLIT_SIZE", 10)


def make_logits(seed=0, num=NUM):
    return 3.0 * np.random.RandomState(seed).randn(num, 4)


def make_outputs(seed=0):
    rng = np.random.RandomState(seed)
    features = ((1 + 0.3 * seed) * rng.randn(NUM, 5) + 1e3 + 0.3 * seed).astype(np.float32)
    probabilities = scipy.special.softmax(make_logits(seed), axis=1).astype(np.float32)
    return Outputs(features, rng.rand(NUM, 3).astype(np.float32), probabilities)


def rows_of(outputs, start, stop=None):
    return Outputs(*(None if rows is None else rows[start:stop] for rows in outputs))


def gather(outputs, sizes=(NUM,), num_kept=NUM_KEPT):
    """The accumulator after batches of these sizes, and after one of the rest."""
    accumulator, start = Accumulator(len(outputs.features), num_kept=num_kept), 0
    for size in sizes:
        accumulator.add(rows_of(outputs, start, start + size))
        start += size
    accumulator.add(rows_of(outputs, start))
    return accumulator


def class_sums(probabilities):
    features = np.zeros((len(probabilities), 1), np.float32)
    return gather(Outputs(features, None, np.asarray(probabilities, np.float32))).statistics().class_sums


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("num", [1, 9, 10, 11, 47, 50])
def test_inception_score_equals_the_reference(num):
    logits = make_logits(num=num)
    score, _ = inception_score(class_sums(scipy.special.softmax(logits, axis=1)))
    assert score == pytest.approx(torch_reference.inception_score(logits, split_size=10), rel=1e-6)


def test_inception_score_of_constant_predictions_is_one():
    constant = np.tile(scipy.special.softmax(make_logits(num=1), axis=1), (NUM, 1))
    assert inception_score(class_sums(constant)) == pytest.approx((1, 0), abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_inception_score_of_balanced_one_hots_is_their_number(num_classes):
    balanced = np.eye(num_classes)[np.arange(40) % num_classes]
    assert inception_score(class_sums(balanced)) == pytest.approx((num_classes, 0), rel=1e-12, abs=1e-12)


def test_inception_score_is_a_mean_over_splits():
    # Ten of one class, and five of each of two classes: 1 and 2, although all together would be less than 2.
    classes = np.repeat([0, 0, 1], [10, 5, 5])
    assert inception_score(class_sums(np.eye(2)[classes])) == pytest.approx((1.5, 0.5))
    # The shorter last split weighs as much as the others.
    assert inception_score(class_sums(np.eye(2)[np.append(classes, [0, 1])])) == pytest.approx((5 / 3, 2**0.5 / 3))


def test_inception_score_depends_on_the_order_only_by_split():
    one_hots, rng = np.eye(4)[np.repeat(np.arange(4), 10)], np.random.RandomState(0)
    within = np.concatenate([start + rng.permutation(10) for start in range(0, 40, 10)])
    assert inception_score(class_sums(one_hots))[0] == pytest.approx(1)
    assert inception_score(class_sums(one_hots[within]))[0] == pytest.approx(1)
    assert inception_score(class_sums(one_hots[rng.permutation(40)]))[0] > 2


def test_splits_are_of_5000(monkeypatch):
    monkeypatch.undo()
    sums = class_sums(np.tile(np.eye(2, dtype=np.float32), (5001, 1)))
    np.testing.assert_array_equal(sums[:, 0], [5000, 5000, 2])


@pytest.mark.parametrize(
    "sizes",
    [
        (NUM,),
        (1,) * NUM,
        (8,) * 5,
        (16, 16),
        (10,) * 4,  # splits
        (3, 0, 24, 1),  # from the first split into the third
        (0,),
    ],
)
def test_batches_do_not_matter(sizes):
    outputs = make_outputs()
    got = gather(outputs, sizes).statistics()
    for part, rows in ((got.features, outputs.features), (got.spatial, outputs.spatial)):
        expected = from_features(rows)
        assert part.count == NUM
        np.testing.assert_allclose(part.mean, expected.mean, rtol=1e-10)
        np.testing.assert_allclose(part.cov, expected.cov, rtol=1e-10, atol=1e-10 * np.abs(expected.cov).max())
    p = outputs.probabilities.astype(np.float64)
    expected = np.column_stack([np.ones(NUM), -scipy.special.entr(p).sum(axis=1), p])
    expected = [expected[start : start + 10].sum(axis=0) for start in range(0, NUM, 10)]
    np.testing.assert_allclose(got.class_sums, expected, rtol=1e-10)
    np.testing.assert_array_equal(got.kept, gather(outputs).statistics().kept)


@pytest.mark.parametrize("sizes", [(NUM,), (1,) * NUM, (16, 16)])
@pytest.mark.parametrize("num_kept", [4, NUM_KEPT, NUM, 10_000])
def test_kept_are_rows_at_random_in_their_order(num_kept, sizes):
    outputs = make_outputs()
    chosen = sorted(np.random.RandomState(0).permutation(NUM)[:num_kept])  # a score of another choice is another score
    kept = gather(outputs, sizes, num_kept).statistics().kept
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept, outputs.features[chosen])


@pytest.mark.parametrize("interrupted", [1, 10, 25, NUM])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "features only"])
def test_goes_on_to_the_same_bits(interrupted, whole, tmp_path):
    outputs = make_outputs() if whole else Outputs(make_outputs().features)
    batches = [rows_of(outputs, start, start + 6) for start in range(interrupted, NUM, 6)]
    first, path = rows_of(outputs, 0, interrupted), tmp_path / "state.npz"
    uninterrupted, stopped = (Accumulator(NUM, num_kept=NUM_KEPT) for _ in range(2))
    for batch in (first, *batches):
        uninterrupted.add(batch)
    stopped.add(first)
    files.save(path, stopped.to_arrays(), {})
    restored = Accumulator.from_arrays(files.load(path)[0])
    assert restored.count == interrupted
    for batch in batches:
        restored.add(batch)
    assert_same_bits(restored.statistics().to_arrays(), uninterrupted.statistics().to_arrays())
    assert_same_bits(restored.to_arrays(), uninterrupted.to_arrays())


def test_state_is_a_copy():
    outputs, accumulator = make_outputs(), Accumulator(NUM, num_kept=NUM_KEPT)
    accumulator.add(rows_of(outputs, 0, 15))
    state = accumulator.to_arrays()
    for other in (accumulator, Accumulator.from_arrays(state), Accumulator.from_arrays(state)):
        other.add(rows_of(outputs, 15))
        assert_same_bits(other.to_arrays(), gather(outputs, (15,)).to_arrays())


def test_too_few_and_too_many_images():
    accumulator, outputs = Accumulator(NUM), make_outputs()
    for start in (0, 40):
        with pytest.raises(ValueError, match=f"got {start} images, expected {NUM}"):
            accumulator.statistics()
        accumulator.add(rows_of(outputs, start, start + 40))
    assert accumulator.statistics().features.count == NUM
    with pytest.raises(ValueError, match=f"got {NUM + 1} images, expected {NUM}"):
        accumulator.add(rows_of(outputs, 0, 1))


@pytest.mark.parametrize("lacking", [(), ("spatial",), ("probabilities",), ("spatial", "probabilities")])
def test_round_trip_without_what_a_network_does_not_give(lacking):
    gathered = gather(make_outputs()._replace(**dict.fromkeys(lacking)), (16, 16)).statistics()
    assert (gathered.spatial is None, gathered.class_sums is None) == tuple(
        name in lacking for name in ("spatial", "probabilities")
    )
    arrays = gathered.to_arrays()
    again = Statistics.from_arrays(arrays)
    assert_same_bits(again.to_arrays(), arrays)
    assert isinstance(again.features.count, int)
    for field in dataclasses.fields(Statistics):
        assert (getattr(again, field.name) is None) == (getattr(gathered, field.name) is None)


def expected_scores(samples, reference, network):
    fd, fd_spatial, kd, class_score = {
        "inception": ("fid", "sfid", "kid", "inception_score"),
        "dinov2": ("fd_dinov2", "fd_spatial_dinov2", "kd_dinov2", "class_score"),
        "classifier": ("fd_classifier", "fd_spatial_classifier", None, "class_score"),
    }[network]
    scores = {fd: frechet_distance(samples.features, reference.features)}
    scores[fd_spatial] = frechet_distance(samples.spatial, reference.spatial)
    scores[class_score], scores[f"{class_score}_std"] = inception_score(samples.class_sums)
    if kd:
        scores[kd], scores[f"{kd}_std"] = kernel_distance(reference.kept, samples.kept)
    scores["precision"], scores["recall"] = precision_recall(reference.kept, samples.kept)
    return scores


@pytest.mark.parametrize("network", NETWORKS)
def test_compare_gives_each_metric_under_its_name(network):
    samples, reference = (gather(make_outputs(seed)).statistics() for seed in (1, 0))
    scores = compare(samples, reference, network=network)
    assert scores == expected_scores(samples, reference, network)
    assert scores["precision"] != scores["recall"] and all(type(value) is float for value in scores.values())


def test_samples_without_variety_have_precision_and_no_recall():
    """All near one real image: each is like real ones, and few real ones are like them; not the other way round."""
    real, noise = np.random.RandomState(0).randn(2, NUM, 5).astype(np.float32)
    both = (Outputs(features, None, None) for features in (real[:1] + 1e-3 * noise, real))
    samples, reference = (gather(outputs, num_kept=NUM).statistics() for outputs in both)
    scores = compare(samples, reference, network="dinov2")
    assert scores["precision"] == 1.0 and scores["recall"] < 0.1


@pytest.mark.parametrize("side", ["samples", "reference", "both"])
@pytest.mark.parametrize(
    ("lacking", "left_out"),
    [("spatial", {"sfid"}), ("kept", {"kid", "kid_std", "precision", "recall"})],
)
def test_compare_leaves_out_what_a_side_lacks(lacking, left_out, side):
    samples, reference = (gather(make_outputs(seed)).statistics() for seed in (1, 0))
    whole = compare(samples, reference, network="inception")
    if side != "reference":
        samples = dataclasses.replace(samples, **{lacking: None})
    if side != "samples":
        reference = dataclasses.replace(reference, **{lacking: None})
    expected = {name: score for name, score in whole.items() if name not in left_out}
    assert compare(samples, reference, network="inception") == expected


def test_compare_needs_classes_of_the_samples_only():
    samples, reference = (gather(make_outputs(seed)).statistics() for seed in (1, 0))
    whole, without = (dataclasses.replace(side, class_sums=None) for side in (samples, reference))
    assert compare(samples, without, network="inception") == compare(samples, reference, network="inception")
    assert not {"inception_score", "inception_score_std"} & compare(whole, reference, network="inception").keys()
