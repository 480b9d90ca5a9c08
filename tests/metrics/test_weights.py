"""Weights are converted once from a file of PyTorch's, written by hand here; what is something else is refused."""

import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.metrics import files, inception, weights
from mscm.metrics.features import FeatureNetwork, Outputs
from tests.metrics.test_inception import random_tensors
from tests.test_torch_files import SIX, call, legacy, stored, tensor, zipped


def from_torch(tensors):
    if tensors.keys() != {"w"} or tensors["w"].shape != (2, 3):
        raise ValueError(f"got the tensors {', '.join(tensors)}, expected w of shape (2, 3)")
    return {"layer": {"kernel": tensors["w"].T}}


def make(params, *, fingerprint):
    def forward(params, images):
        colours = images.astype(jnp.float32).mean((1, 2))
        kernel = params["layer"]["kernel"]
        return Outputs((colours.astype(kernel.dtype) @ kernel).astype(jnp.float32), spatial=colours)

    return FeatureNetwork("fake", fingerprint, params, forward, 4)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """A network of six weights."""
    monkeypatch.setitem(weights.NETWORKS, "fake", weights.Network(from_torch, make, "fake.pth of the attic"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "fake.pth"
    path.write_bytes(zipped({"w": tensor()}))
    return path


@pytest.fixture
def converted(source, tmp_path):
    weights.convert("fake", source, tmp_path / "fake.npz")
    return tmp_path / "fake.npz"


KERNEL = {"layer/kernel": SIX.T}


@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_converted_network_is_the_network(source, tmp_path, write):
    """In a folder that is made; what is recorded is what the file and the weights are."""
    source.write_bytes(write({"w": tensor()}))
    output = tmp_path / "below" / "fake.npz"
    card = weights.convert("fake", source, output)
    assert card["source"] == "fake.pth" and card["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    network = weights.load("fake", output)
    assert network.fingerprint == card["weights_sha256"] == files.fingerprint(KERNEL)
    pixels = weights.probe_images()
    np.testing.assert_allclose(network(pixels).features, pixels.mean((1, 2)) @ SIX.T, rtol=1e-5)
    assert network.params["layer"]["kernel"].dtype == jnp.float32


def test_the_probe_is_kept_and_is_no_weight(converted):
    """Outputs at the time of conversion, of images that are the same for everybody: those of the loaded network."""
    network = weights.load("fake", converted)
    assert jax.tree.map(np.shape, network.params) == {"layer": {"kernel": (3, 2)}}
    probe, now = weights.probe("fake", converted), network(weights.probe_images())
    assert probe.keys() == {"features", "spatial"}  # the network has no probabilities
    for name, rows in probe.items():
        np.testing.assert_array_equal(rows, getattr(now, name), strict=True)
    # RandomState's stream is frozen: these are NumPy's numbers for seed 0.
    assert weights.probe_images().shape == (2, 32, 32, 3) and weights.probe_images()[0, 0, 0].tolist() == [172, 47, 117]


def test_bfloat16_is_another_network(converted):
    """Its scores are not comparable with those of float32."""
    exact, rounded = (weights.load("fake", converted, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.fingerprint == f"{exact.fingerprint}-bfloat16"
    assert rounded.params["layer"]["kernel"].dtype == jnp.bfloat16
    pixels = weights.probe_images()
    np.testing.assert_allclose(rounded(pixels).features, exact(pixels).features, rtol=0.02, atol=2.0)


@pytest.mark.parametrize("suffix", ["pth", "pt"])
@pytest.mark.parametrize("length", [8, 12, 64])
def test_a_hash_in_the_name_is_checked(tmp_path, suffix, length):
    """As PyTorch and pytorch-fid name their files."""
    content = zipped({"w": tensor()})
    sha256 = hashlib.sha256(content).hexdigest()
    right, wrong = (tmp_path / f"fake-2015-12-05-{digits}.{suffix}" for digits in (sha256[:length], "0" * length))
    right.write_bytes(content)
    assert weights.convert("fake", right, tmp_path / "fake.npz")["source"] == right.name
    wrong.write_bytes(content)
    with pytest.raises(ValueError) as error:
        weights.convert("fake", wrong, tmp_path / "other.npz")
    assert str(error.value) == (
        f"{wrong}: got SHA-256 {sha256[:12]}..., expected {'0' * length}... as its name says: the file is damaged; get "
        "it again"
    )
    assert not (tmp_path / "other.npz").exists()


@pytest.mark.parametrize(
    "name", ["fake-2015-12-05.pt", "fake-0000000.pt", "fake-00000000.pkl", "00000000.pth", "fake-0000000x.pth"]
)
def test_other_names_promise_nothing(source, tmp_path, name):
    assert weights.convert("fake", source.rename(tmp_path / name), tmp_path / "fake.npz")["source"] == name


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "expected a file of weights: No such file or directory"),
        (b"", "got a file that begins with b''"),
        (zipped({"w": tensor()})[:-30], "got a damaged file"),
        (zipped({"w": tensor(), "v": tensor()}), "got the tensors w, v, expected w of shape"),
        (zipped({"w": tensor(size=(6,), stride=(1,))}), "got the tensors w, expected w of shape"),
        (zipped({"w": tensor(), "x": call("os.mkdir", "marker")}), "got a pickle that asks for 'os.mkdir'"),
    ],
    ids=["absent", "empty", "cut", "more", "shape", "call"],
)
def test_other_sources_are_refused(tmp_path, monkeypatch, content, reason):
    """With one sentence that names the file once; nothing is written, nothing is run."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source.pth"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ValueError) as error:
        weights.convert("fake", source, tmp_path / "fake.npz")
    assert str(error.value).startswith(f"{source}: {reason}") and str(error.value).count(str(source)) == 1
    assert [path.name for path in tmp_path.iterdir()] == (["source.pth"] if content is not None else [])


READERS = pytest.mark.parametrize("read", [weights.load, weights.probe])


@READERS
def test_a_missing_file_is_a_sentence(tmp_path, read):
    """It says where to get it, and the command."""
    with pytest.raises(ValueError) as error:
        read("fake", tmp_path / "absent.npz")
    assert str(error.value) == (
        f"{tmp_path}/absent.npz: got no weights of the network 'fake'; get fake.pth of the attic, and convert it once: "
        "python -m mscm.metrics.convert --network=fake --source=FILE"
    )


def test_the_real_networks_say_where_their_files_are(tmp_path):
    for name, network in weights.NETWORKS.items():
        with pytest.raises(ValueError) as error:
            weights.load(name, tmp_path / "absent.npz")
        assert network.where in str(error.value) and len(network.where) > 20 or name == "fake"
    with pytest.raises(ValueError, match="pt_inception-2015-12-05-6726825d.pth"):
        weights.load("inception", tmp_path / "absent.npz")


@READERS
@pytest.mark.parametrize(
    ("card", "got"),
    [
        ({"kind": "mscm weights 1", "network": "inception"}, "mscm weights 1 inception"),
        ({"kind": "mscm reference 1", "network": {"name": "fake"}}, "mscm reference 1"),
        ({"kind": "mscm weights 0", "network": "fake"}, "mscm weights 0 fake"),
        ({}, "None None"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, read, card, got):
    path = tmp_path / "other.npz"
    files.save(path, KERNEL, card)
    with pytest.raises(ValueError) as error:
        read("fake", path)
    text = str(error.value)
    assert text.startswith(f"{path}: got a file of {got}") and "expected weights of 'fake' (mscm weights 1)" in text


@READERS
def test_a_damaged_file_is_refused(converted, read):
    """A changed weight, and a changed probe."""
    with np.load(converted) as file:
        arrays = dict(file)
    for name in ("layer/kernel", "probe/features"):
        np.savez(converted, **arrays | {name: arrays[name] + 1})
        with pytest.raises(ValueError, match=f"{converted}: got arrays of SHA-256"):
            read("fake", converted)


class Calls:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@READERS
def test_nothing_is_unpickled(tmp_path, read):
    path = tmp_path / "fake.npz"
    card = json.dumps({"kind": "mscm weights 1", "network": "fake", "weights_sha256": "0" * 64, "sha256": "0" * 64})
    np.savez(path, card=np.array(card), **{"layer/kernel": np.array([Calls(tmp_path / "marker")], dtype=object)})
    with pytest.raises(ValueError, match=f"{path}: got a file that cannot be read"):
        read("fake", path)
    assert not (tmp_path / "marker").exists()


def test_default_path(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert weights.default_path("fake") == "/caches/mscm/fake.npz"
    for empty in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        empty()
        assert weights.default_path("fake") == os.path.expanduser("~/.cache/mscm/fake.npz")


def test_inception(tmp_path, monkeypatch):
    """From a file of pytorch-fid's form to the network: what it computes then is what it computed when converted."""
    monkeypatch.setattr(inception, "_BATCH_SIZE", 2)
    rng = np.random.default_rng(0)
    tensors = random_tensors()
    for name, array in tensors.items():
        if name.endswith("conv.weight"):
            tensors[name] = rng.standard_normal(array.shape, np.float32) / np.sqrt(array[0].size, dtype=np.float32)
    root, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        kind = {"f": "Float", "i": "Long"}[array.dtype.kind]
        strides = tuple(stride // array.itemsize for stride in array.strides)
        root[name] = tensor(stored(kind, str(key), array.size), 0, array.shape, strides)
        storages[str(key)] = array
    source, path = tmp_path / "inception.pth", tmp_path / "inception.npz"
    source.write_bytes(zipped(root, storages))
    card = weights.convert("inception", source, path)
    source.unlink()  # each of the two has a hundred megabytes
    network = weights.load("inception", path)
    expected = inception.from_torch(tensors)
    jax.tree.map(np.testing.assert_array_equal, network.params, expected)
    assert network.name == "inception" and network.fingerprint == card["weights_sha256"]
    probe, now = weights.probe("inception", path), network(weights.probe_images())._asdict()
    shapes = {name: rows.shape for name, rows in probe.items()}
    assert shapes == {"features": (2, 2048), "spatial": (2, 2023), "probabilities": (2, 1008)}
    for name, rows in probe.items():
        np.testing.assert_allclose(rows, now[name], rtol=1e-4, atol=1e-6)
        assert np.isfinite(rows).all() and (rows[0] != rows[1]).any()
    path.unlink()
