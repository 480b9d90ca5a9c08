"""The Inception network of 2015 against an independent PyTorch implementation, and what must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.metrics import inception
from tests.metrics import torch_reference

_HEIGHTS = (32, 299, 400)


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).randint(0, 256, (3, 40, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, inception.random_params(0))


@pytest.fixture(scope="module")
def apply():
    return jax.jit(inception.apply)


@pytest.fixture(scope="module")
def reference():
    """The other implementation with random weights."""
    pytest.importorskip("torch")
    return torch_reference.random_network(0)


def tensors_of(reference):
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


def as_script(tensors):
    """The same under the names of the TorchScript translation of the frozen graph, which has no gamma."""
    parts = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    renamed = {"output.weight": tensors["fc.weight"], "output.bias": tensors["fc.bias"]}
    for name, scope, _ in inception.convolutions():
        renamed |= {f"layers.{scope}.{theirs}": tensors[f"{name}.{ours}"] for ours, theirs in parts.items()}
    return renamed


@pytest.mark.parametrize("height", _HEIGHTS)
def test_resize_is_tensorflow_1s(height):
    """Against the formula in float64, from below, at and above the network's size: equal to float32 rounding."""
    images = np.random.RandomState(1).randint(0, 256, (2, height, 48, 3)).astype(np.uint8)
    np.testing.assert_allclose(
        jax.jit(inception.resize)(images), torch_reference.tf1_resize(images), rtol=0, atol=255 * 2.0**-22
    )


def test_features_are_those_of_the_other_implementation(reference, images, apply):
    """Pool3, spatial features and logits of one forward pass, from the tensors of a file of pytorch-fid's form."""
    expected = torch_reference.features(reference, images)
    pool3, spatial, logits = apply(inception.from_torch(tensors_of(reference)), images)
    for name, got in {"pool3": pool3, "spatial": spatial, "logits": logits}.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-4 * scale, err_msg=name)
        assert np.std(expected[name] - expected[name].mean(axis=0)) > 0.01 * scale  # it does tell images apart


def test_the_inception_score_leaves_the_bias_out(reference, images):
    params = inception.from_torch(tensors_of(reference))
    unbiased = torch_reference.features(reference, images)["logits_unbiased"]
    outputs = inception.network(params, fingerprint="")(images)
    np.testing.assert_allclose(outputs.probabilities, jax.nn.softmax(unbiased), rtol=1e-3, atol=1e-6)
    assert np.abs(params["fc"]["bias"]).max() > 0.01


def test_both_files_give_the_same_network(reference):
    tensors = tensors_of(reference)
    tensors |= {name: np.ones_like(value) for name, value in tensors.items() if name.endswith("bn.weight")}
    one, two = inception.from_torch(tensors), inception.from_torch(as_script(tensors))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_an_image_does_not_depend_on_its_batch(params, images, apply):
    whole = apply(params, images)
    alone = apply(params, images[1:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1:2], b, rtol=1e-4, atol=1e-5), whole, alone)


def test_grey_images_have_three_equal_channels(params, images, apply):
    grey = images[..., :1]
    jax.tree.map(np.testing.assert_array_equal, apply(params, grey), apply(params, np.repeat(grey, 3, axis=-1)))


def test_bfloat16_is_the_same_function_with_less_precision(params, images, apply):
    exact = apply(params, images)
    rounded = apply(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), images)
    for a, b in zip(exact, rounded, strict=True):
        error = np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(np.asarray(a))
        assert b.dtype == jnp.float32 and 1e-5 < error < 0.05


def random_tensors():
    """Tensors of the published shapes, without PyTorch."""
    rng = np.random.RandomState(0)
    tensors = {"fc.weight": rng.rand(1008, 2048).astype(np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for name, _, (height, width, channels, features) in inception.convolutions():
        tensors[f"{name}.conv.weight"] = np.zeros((features, channels, height, width), np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.bn.{part}"] = rng.rand(features).astype(np.float32)
        tensors[f"{name}.bn.num_batches_tracked"] = np.array(0)
    return tensors


def test_the_network_has_the_published_size():
    """94 convolutions; parameters as the published description has them: 21,785,568 without the last layer."""
    shapes = [shape for _, _, shape in inception.convolutions()]
    assert len(shapes) == 94
    assert sum(np.prod(shape) + 2 * shape[-1] for shape in shapes) == 21_785_568
    assert len({name for name, _, _ in inception.convolutions()}) == 94
    assert len({scope.replace(".", "_") for _, scope, _ in inception.convolutions()}) == 94


def test_a_batch_norm_becomes_kernel_and_bias():
    tensors = random_tensors()
    name = "Mixed_6b.branch7x7_2"
    tensors[f"{name}.conv.weight"] += 3.0
    gamma, beta, mean, variance = (
        tensors[f"{name}.bn.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    folded = inception.from_torch(tensors)[name]
    x = 2.0 * np.ones(128) @ folded["kernel"][0, 0].astype(np.float64) + folded["bias"]
    np.testing.assert_allclose(x, gamma * (2.0 * 128 * 3.0 - mean) / np.sqrt(variance + 1e-3) + beta, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("Mixed_7c.branch_pool.conv.weight"), "got no tensor for the kernel of Mixed_7c.branch_pool"),
        (lambda t: t.pop("Mixed_5b.branch1x1.bn.running_var"), "got no tensor for the variance of Mixed_5b.branch1x1"),
        (lambda t: t.update({"fc.weight": np.zeros((1000, 2048))}), r"got shape \(1000, 2048\) for the kernel of fc"),
        (lambda t: t.update({"AuxLogits.fc.weight": np.zeros(3)}), "got 1 tensors more than expected, AuxLogits_fc_"),
        (lambda t: t.clear(), "got no tensor for the kernel of Conv2d_1a_3x3"),
    ],
)
def test_another_network_is_refused(change, sentence):
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        inception.from_torch(tensors)
