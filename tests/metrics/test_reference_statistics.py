"""Reference statistics: from data or an imported file, with the facts that decide what may be measured against them."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from mscm.data.sources import ArraySource
from mscm.metrics import files, moments, reference_statistics
from mscm.metrics.features import FeatureNetwork, Outputs

FACTS = {"name": "noise", "split": "train", "transform": None, "resolution": 4, "channels": 3, "count": 50}


def linear(seed: int = 0, *, name: str = "linear", fingerprint: str = "f" * 64) -> FeatureNetwork:
    """Four features, two spatial ones, no classes."""

    def forward(params, images):
        rows = images.astype(jnp.float32).reshape(len(images), -1) / 255.0
        return Outputs(jnp.matmul(rows, params, precision="highest"), rows[:, :2])

    return FeatureNetwork(name, fingerprint, np.random.RandomState(seed).randn(48, 4).astype(np.float32), forward, 16)


@pytest.fixture(scope="module")
def network():
    return linear()


@pytest.fixture(scope="module")
def source():
    pixels = np.random.RandomState(0).randint(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    return ArraySource("noise", "train", pixels, np.zeros(50, np.int32), ("any",))


@pytest.fixture(scope="module")
def reference(source, network):
    return reference_statistics.compute(source, network, batch_size=20, num_kept=30)


def assert_same(one: reference_statistics.Reference, two: reference_statistics.Reference):
    assert (one.data, one.network, one.imported_from, one.remark) == (
        two.data, two.network, two.imported_from, two.remark
    )
    arrays, others = one.statistics.to_arrays(), two.statistics.to_arrays()
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], strict=True)


def test_the_facts_are_those_of_the_data(source, reference, network):
    assert reference_statistics.describe(source) == FACTS | {"fingerprint": source.fingerprint} == reference.data
    assert reference.network == {"name": "linear", "fingerprint": network.fingerprint}
    assert reference.imported_from is None and str(reference) == "noise/train, 50 images"


def test_the_statistics_are_numpys(source, reference, network):
    """All images once, whatever the batches; the last one is not full."""
    outputs, statistics = network(source.images), reference.statistics
    for got, rows in ((statistics.features, outputs.features), (statistics.spatial, outputs.spatial)):
        assert got.count == 50
        np.testing.assert_allclose(got.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(got.cov, np.cov(rows.astype(np.float64).T), rtol=1e-6)
    assert len(statistics.kept) == 30 and statistics.class_sums is None
    assert {row.tobytes() for row in statistics.kept} <= {row.tobytes() for row in outputs.features}


def test_a_part_of_the_data(source, network):
    """Those at the indices, in their order, and no others; the count is theirs, the rest is the data set's."""
    loaded, watched = [], []

    class Watched(ArraySource):
        def load(self, indices):
            loaded.append(indices)
            return super().load(indices)

    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    indices = np.array([40, 3, 7, 8, 21])
    part = reference_statistics.compute(
        Watched(**fields), network, indices=indices, batch_size=2, num_kept=5, watch=watched.append
    )
    np.testing.assert_array_equal(np.concatenate(loaded), indices)
    assert watched == [2, 2, 1]
    assert part.data == FACTS | {"count": 5, "fingerprint": source.fingerprint}
    np.testing.assert_array_equal(part.statistics.kept, network(source.images[indices]).features)


def test_round_trip(tmp_path, reference):
    path = tmp_path / "below" / "reference.npz"
    reference_statistics.save(path, reference)
    assert_same(reference_statistics.load(path), reference)


def test_what_is_no_reference_is_refused(tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(FileNotFoundError):
        reference_statistics.load(path)
    files.save(path, {"w": np.zeros(2)}, {"kind": "mscm weights 1"})
    with pytest.raises(ValueError, match=f"{path}: got a file of kind 'mscm weights 1', expected 'mscm reference 1'"):
        reference_statistics.load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path}: got a file that cannot be read"):
        reference_statistics.load(path)


def test_a_file_of_adms_is_told_how_it_is_imported(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match=f"reference --import={tmp_path}/adm.npz --count=NUMBER_OF_ITS_IMAGES"):
        reference_statistics.load(tmp_path / "adm.npz")


# What an imported file does not say.
IMPORTED = FACTS | {"transform": None, "fingerprint": None}


def arrays_of(reference: reference_statistics.Reference, *, spatial: bool) -> dict[str, np.ndarray]:
    features, others = reference.statistics.features, reference.statistics.spatial
    arrays = {"mu": features.mean, "sigma": features.cov}
    return arrays | ({"mu_s": others.mean, "sigma_s": others.cov} if spatial else {})


def test_a_file_of_pytorch_fids_form(tmp_path, reference, network):
    """Mean and covariance; what it does not hold is None, and stays so on disk."""
    path = tmp_path / "cifar10.npz"
    np.savez(path, **arrays_of(reference, spatial=False))
    imported = reference_statistics.import_npz(path, IMPORTED, network)
    assert imported.imported_from == "cifar10.npz" and imported.data == IMPORTED
    assert str(imported) == "noise/train, 50 images, from cifar10.npz"
    assert imported.network == {"name": "linear", "fingerprint": network.fingerprint}
    features = imported.statistics.features
    assert features.count == 50
    np.testing.assert_array_equal(features.mean, reference.statistics.features.mean, strict=True)
    np.testing.assert_array_equal(features.cov, reference.statistics.features.cov, strict=True)
    rest = imported.statistics.spatial, imported.statistics.kept, imported.statistics.class_sums
    assert rest == (None, None, None)
    reference_statistics.save(tmp_path / "reference.npz", imported)
    assert_same(reference_statistics.load(tmp_path / "reference.npz"), imported)


def test_a_file_of_adms_form(tmp_path, source, reference, network):
    """Spatial moments too, and images, of which the first are kept as features; numbers become float64."""
    path = tmp_path / "VIRTUAL_imagenet64.npz"
    arrays = {name: array.astype(np.float32) for name, array in arrays_of(reference, spatial=True).items()}
    np.savez(path, arr_0=source.images[:20], **arrays)
    imported = reference_statistics.import_npz(path, IMPORTED, network, num_kept=12)
    np.testing.assert_array_equal(imported.statistics.kept, network(source.images[:12]).features)
    for name in ("features", "spatial"):
        got, expected = getattr(imported.statistics, name), getattr(reference.statistics, name)
        assert type(got) is moments.Moments and got.count == 50 and got.mean.dtype == got.cov.dtype == np.float64
        np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(got.cov, expected.cov, rtol=1e-5, atol=1e-7)
    reference_statistics.save(tmp_path / "reference.npz", imported)
    assert_same(reference_statistics.load(tmp_path / "reference.npz"), imported)


@pytest.mark.parametrize("form, is_marked", [("pytorch-fid", True), ("ADM", False)])
def test_features_of_another_resize_are_marked(tmp_path, reference, form, is_marked):
    """pytorch-fid resizes and scales in its own way before Inception; every score against its statistics says so."""
    np.savez(tmp_path / "x.npz", **arrays_of(reference, spatial=form == "ADM"))
    imported = reference_statistics.import_npz(tmp_path / "x.npz", IMPORTED, linear(name="inception"))
    assert ("whose resize and scaling are others" in str(imported)) == is_marked
    reference_statistics.save(tmp_path / "reference.npz", imported)
    assert_same(reference_statistics.load(tmp_path / "reference.npz"), imported)


MU, SIGMA = np.zeros(4), np.eye(4)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"other": MU}, "got no mu and sigma"),
        ({"mu": MU}, "got no mu and sigma"),
        ({"sigma": SIGMA, "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "got no mu and sigma"),
        ({"mu": MU, "sigma": SIGMA[:3]}, r"mu and sigma: got a mean of shape \(4,\) and a covariance of \(3, 4\)"),
        ({"mu": MU, "sigma": np.eye(3)}, r"got a mean of shape \(4,\) and a covariance of \(3, 3\)"),
        ({"mu": MU[None], "sigma": SIGMA}, r"got a mean of shape \(1, 4\)"),
        ({"mu": np.array(0.0), "sigma": SIGMA}, r"got a mean of shape \(\)"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": np.eye(3)}, r"mu_s and sigma_s: got a mean of shape \(4,\)"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "got 5 features, expected 4"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA}, "got 4 features, expected 2"),
        ({"mu": np.array(list("abcd")), "sigma": SIGMA}, "got "),
        ({"mu": MU, "sigma": np.full((4, 4), np.nan)}, "non-finite"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "got float32 images"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.zeros((2, 48), np.uint8)}, "got uint8 images"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.array([{}], dtype=object)}, "got a file that cannot be read"),
    ],
    ids=["other", "mu", "sigma", "not square", "size", "rank", "number", "spatial", "network", "layer", "text", "nan",
         "floats", "rows", "pickle"],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path, monkeypatch, network, arrays, reason):
    """With a sentence that names it."""
    # Without the hook, whose errors are not those that a user sees.
    monkeypatch.setattr(FeatureNetwork, "__call__", inspect.unwrap(FeatureNetwork.__call__))
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"^{path}: .*{reason}"):
        reference_statistics.import_npz(path, IMPORTED, network)


def npy_file(path):
    with open(path, "wb") as file:
        np.save(file, MU)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"damaged"),
        lambda path: (np.savez(path, mu=MU, sigma=SIGMA), path.write_bytes(path.read_bytes()[:-20])),
        npy_file,
    ],
    ids=["absent", "folder", "text", "cut", "npy"],
)
def test_an_import_that_cannot_be_read_is_refused(tmp_path, network, damage):
    path = tmp_path / "statistics.npz"
    damage(path)
    with pytest.raises(ValueError, match=f"^{path}: got a file that cannot be read .*, expected an .npz"):
        reference_statistics.import_npz(path, IMPORTED, network)


@pytest.mark.parametrize(
    ("fact", "other"),
    [("name", "cats"), ("split", "test"), ("transform", "area"), ("resolution", 8), ("channels", 1)],
)
def test_a_difference_names_both_sides(reference, network, fact, other):
    scored = reference.data | {fact: other}
    assert reference_statistics.differences(reference, scored, network) == [
        f"{fact} {reference.data[fact]!r} in the reference, {other!r} in what is scored"
    ]
    del scored[fact]  # nothing is known of it
    assert reference_statistics.differences(reference, scored, network) == []


def test_the_same_facts_differ_in_nothing(reference, network):
    """How many images there are, and which, may differ: halves are compared, and sets of samples."""
    assert reference_statistics.differences(reference, dict(reference.data), network) == []
    others = reference.data | {"count": 7, "fingerprint": "other"}
    assert reference_statistics.differences(reference, others, network) == []


@pytest.mark.parametrize("change", [{"name": "other"}, {"fingerprint": "e" * 64}])
def test_another_network_is_a_difference(reference, network, change):
    """Of another name or other weights; scores of the two are not comparable."""
    other = linear(**change)
    (difference,) = reference_statistics.differences(reference, reference.data, other)
    assert difference == (
        f"network linear {'f' * 12} in the reference, {other.name} {other.fingerprint[:12]} in what is scored"
    )


def test_all_differences_are_named(reference):
    scored = reference.data | {"name": "cats", "resolution": 8}
    found = reference_statistics.differences(reference, scored, linear(name="other"))
    assert [difference.split()[0] for difference in found] == ["name", "resolution", "network"]


def test_what_nobody_knows_of_an_imported_file_is_no_difference(reference, network):
    """Of computed statistics None is a fact: the images were not resized."""
    scored = reference.data | {"transform": "area"}
    assert reference.data["transform"] is None
    assert len(reference_statistics.differences(reference, scored, network)) == 1
    imported = dataclasses.replace(reference, imported_from="x.npz")
    assert reference_statistics.differences(imported, scored, network) == []
    known = dataclasses.replace(imported, data=reference.data | {"transform": "adm"})
    assert reference_statistics.differences(known, scored, network) == [
        "transform 'adm' in the reference, 'area' in what is scored"
    ]
    assert reference_statistics.differences(known, reference.data, network) == [
        "transform 'adm' in the reference, None in what is scored"
    ]
