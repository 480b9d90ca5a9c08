"""LPIPS: the network by PyTorch where there is one and by NumPy always, what a distance must be, and its two files."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mscm.metrics import files, lpips, weights
from tests.test_torch_files import stored, tensor, zipped

NARROW = (4, 6, 8, 5, 7)
distance = jax.jit(lpips.distance, static_argnames=("resize", "pooling"))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def random_tensors(widths=NARROW):
    """What is in torchvision's file, but for its classifier, and in that of LPIPS; by their names."""
    rng = np.random.default_rng(1)
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's vgg16 prints them
    w1, w2, w3, w4, w5 = widths
    outputs = (w1, w1, w2, w2, w3, w3, w3, w4, w4, w4, w5, w5, w5)
    vgg, channels = {}, 3
    for number, features in zip(numbers, outputs, strict=True):
        std = np.sqrt(2 / (9 * channels))
        vgg[f"features.{number}.weight"] = std * rng.standard_normal((features, channels, 3, 3))
        vgg[f"features.{number}.bias"] = 0.3 * rng.standard_normal(features)
        channels = features
    linear = {f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, width, 1, 1)) for i, width in enumerate(widths)}
    return tuple({name: array.astype(np.float32) for name, array in part.items()} for part in (vgg, linear))


VGG, LINEAR = random_tensors()
PARAMS = jax.tree.map(jnp.asarray, lpips.from_torch(VGG | LINEAR, NARROW))


def torch_distance(a, b, *, resize, pooling):
    """LPIPS of torch images `n c h w` with the tensors above, in their type."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pool = {"max": torch.nn.MaxPool2d, "average": torch.nn.AvgPool2d}[pooling](2)

    def features(x):
        if resize is not None:
            x = functional.interpolate(x, size=resize, mode="bilinear", align_corners=False)
        x = ((x.expand(-1, 3, -1, -1) + 1) / 2 - mean.to(x)) / std.to(x)  # what VGG16 was trained with
        for number in range(30):
            if f"features.{number}.weight" in VGG:
                kernel, bias = (torch.tensor(VGG[f"features.{number}.{part}"]).to(x) for part in ("weight", "bias"))
                x = functional.conv2d(x, kernel, bias, padding=1)
            elif number in (4, 9, 16, 23):
                x = pool(x)
            else:
                x = torch.relu(x)
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    total = 0
    for f, g, weight in zip(features(a), features(b), LINEAR.values(), strict=True):
        total = total + functional.conv2d((f - g) ** 2, torch.tensor(weight).to(f)).mean((2, 3))
    return total[:, 0]


CASES = pytest.mark.parametrize(
    ("shape", "resize", "pooling"),
    [
        ((32, 32, 3), 224, "max"),
        ((40, 40, 3), 24, "average"),
        ((37, 22, 3), None, "max"),  # odd rows and columns at every pool
        ((37, 22, 3), None, "average"),
        ((8, 8, 1), 56, "max"),
    ],
)


@CASES
def test_distance_and_gradient_are_those_of_pytorch(shape, resize, pooling):
    torch = pytest.importorskip("torch")
    a, b = (random_images(3, *shape, seed=seed) for seed in (0, 1))
    options = dict(resize=resize, pooling=pooling)
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(lpips.distance(PARAMS, a, b, **options))))(a, b)
    theirs = [torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2) for images in (a, b)]
    expected = torch_distance(theirs[0].requires_grad_(), theirs[1], **options)
    expected.sum().backward()
    np.testing.assert_allclose(distance(PARAMS, a, b, **options), expected.detach().numpy(), rtol=1e-4)
    of_torch = theirs[0].grad.permute(0, 2, 3, 1).numpy()
    # Where two pixels are the largest to rounding, as at the border of a resized image, either may get the gradient.
    assert np.linalg.norm(gradient - of_torch) < 5e-3 * np.linalg.norm(of_torch)


def numpy_distance(a, b, *, pooling):
    """Equation (1), in float64."""

    def features(x):
        x = (x.astype(np.float64) + [0.030, 0.088, 0.188]) / [0.458, 0.448, 0.450]
        names = iter(name for name in VGG if name.endswith("weight"))
        for block, depth in enumerate((2, 2, 3, 3, 3)):
            if block:
                n, h, w, c = x.shape
                cells = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
                x = cells.max((2, 4)) if pooling == "max" else cells.mean((2, 4))
            for _ in range(depth):
                name = next(names)
                padded, (h, w) = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1:3]
                kernel, bias = VGG[name], VGG[name.replace("weight", "bias")]
                parts = (padded[:, i : i + h, j : j + w] @ kernel[:, :, i, j].T for i in range(3) for j in range(3))
                x = np.maximum(sum(parts) + bias, 0)
            yield x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10)

    maps = zip(features(a), features(b), LINEAR.values(), strict=True)
    return sum((weight.reshape(-1) * (f - g) ** 2).sum(-1).mean((1, 2)) for f, g, weight in maps)


@pytest.mark.parametrize("pooling", lpips.POOLINGS)
def test_distance_is_equation_1(pooling):
    a, b = (random_images(2, 19, 33, 3, seed=seed) for seed in (2, 3))
    expected = numpy_distance(a, b, pooling=pooling)
    np.testing.assert_allclose(distance(PARAMS, a, b, resize=None, pooling=pooling), expected, rtol=1e-4)
    assert expected.min() > 0.01


def half_pixel_resize(images, size):
    """Output i at (i + 1/2) in / out - 1/2 between its neighbours, the border repeated; in float64."""
    for axis in (1, 2):
        side = images.shape[axis]
        positions = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
        lower = np.floor(positions).astype(int)
        part = (positions - lower).reshape(-1, *(1,) * (3 - axis))
        below, above = (np.take(images, i, axis) for i in (lower, np.minimum(lower + 1, side - 1)))
        images = below * (1 - part) + above * part
    return images


@pytest.mark.parametrize(("side", "size"), [(16, 56), (32, 40), (40, 17), (32, 16)])
def test_images_are_resized_between_half_pixels(side, size):
    """To more pixels and, without antialiasing, to fewer."""
    a, b = (random_images(2, side, side, 3, seed=seed) for seed in (4, 5))
    resized = (half_pixel_resize(images.astype(np.float64), size).astype(np.float32) for images in (a, b))
    expected = distance(PARAMS, *resized, resize=None)
    np.testing.assert_allclose(distance(PARAMS, a, b, resize=size), expected, rtol=1e-5)


def test_a_distance():
    """0 for equal images, symmetric, positive for others, larger for what is more different."""
    a, b = (random_images(3, 16, 16, 3, seed=seed) for seed in (6, 7))
    np.testing.assert_allclose(distance(PARAMS, a, a, resize=32), 0, atol=1e-12)
    there, back = distance(PARAMS, a, b, resize=32), distance(PARAMS, b, a, resize=32)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    near = distance(PARAMS, a, 0.9 * a + 0.1 * b, resize=32)
    assert there.shape == (3,) and there.dtype == jnp.float32 and np.all(0 < near) and np.all(near < there)


def test_a_pair_does_not_see_its_batch_mates():
    a, b = (random_images(3, 16, 16, 3, seed=seed) for seed in (6, 7))
    whole = distance(PARAMS, a, b, resize=32)
    for i in range(3):
        np.testing.assert_allclose(distance(PARAMS, a[i : i + 1], b[i : i + 1], resize=32), whole[i : i + 1], rtol=1e-5)


def test_rows_of_the_network_are_its_embedding():
    """Squared distances of the rows of 8-bit images are the distances of the images."""
    images = weights.probe_images()
    rows = lpips.network(PARAMS, fingerprint="")(images).features
    assert rows.shape == (2, sum(width * (32 >> i) ** 2 for i, width in enumerate(NARROW)))
    a, b = images.astype(np.float32)[:, None] / 127.5 - 1
    expected = distance(PARAMS, a, b, resize=None)
    np.testing.assert_allclose(np.sum((rows[0] - rows[1]) ** 2), expected[0], rtol=1e-5)


@functools.partial(jax.jit, static_argnames="resize")
def gradients(params, a, b, *, resize):
    return jax.grad(lambda a, b: jnp.sum(lpips.distance(params, a, b, resize=resize)), argnums=(0, 1))(a, b)


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_gradients_where_the_distance_is_0(shift):
    """Of equal images, also where no feature is on at any pixel: 0, not nan."""
    params = PARAMS | {"conv1_2": PARAMS["conv1_2"] | {"bias": PARAMS["conv1_2"]["bias"] + shift}}
    a = random_images(2, 16, 16, 3)
    for gradient in gradients(params, a, a, resize=32):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
    if shift:
        assert not np.any(lpips.embedding(params, jnp.asarray(a))[0])
        # Also before the ReLU, which would hide a nan where the features are its zeros.
        root = jax.grad(lambda maps: jnp.sum(lpips._normalised(maps)))(jnp.zeros((1, 2, 2, 3)))
        assert np.all(np.isfinite(root))


def test_grey_images_have_three_equal_channels():
    a, b = (random_images(2, 16, 16, 1, seed=seed) for seed in (8, 9))
    coloured = (np.repeat(images, 3, axis=-1) for images in (a, b))
    np.testing.assert_array_equal(distance(PARAMS, a, b, resize=32), distance(PARAMS, *coloured, resize=32))


def test_bfloat16_is_the_same_function_with_less_precision():
    a, b = (random_images(2, 16, 16, 3, seed=seed) for seed in (8, 9))
    exact = distance(PARAMS, a, b, resize=32)
    rounded = distance(jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS), a, b, resize=32)
    assert rounded.dtype == jnp.float32
    assert np.all(np.abs(rounded / exact - 1) < 0.05) and np.any(np.abs(rounded / exact - 1) > 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions_are_in_the_type_of_the_kernels(dtype):
    """No accelerator may round the factors of float32; of bfloat16 there is nothing more to ask for."""
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    images = random_images(1, 16, 16, 3)
    lines = jax.jit(lpips.embedding).lower(params, images).as_text().splitlines()
    lines = [line for line in lines if "stablehlo.convolution" in line]
    assert len(lines) == 13
    is_highest, types = dtype == "float32", "xf32>" if dtype == "float32" else "xbf16>"
    assert all(("HIGHEST" in line) == is_highest and line.count(types) == 3 for line in lines), lines


def test_the_network_has_the_published_size():
    """VGG16's 13 convolutions with the published number of parameters, and a weight for each feature."""
    convolutions = [shape for _, _, shape in lpips.convolutions()]
    assert len(convolutions) == 13
    assert sum(np.prod(shape) + shape[-1] for shape in convolutions) == 14_714_688
    params = jax.eval_shape(lpips.random_params, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 14_714_688 + 64 + 128 + 256 + 512 + 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_params_are_like_those_of_a_file(dtype):
    """The same names and shapes, in the type that was asked for."""
    params = lpips.random_params(jax.random.key(0), widths=NARROW, dtype=dtype)
    jax.tree.map(lambda p, q: (p.shape == q.shape and p.dtype == dtype) or pytest.fail(f"{p}, {q}"), params, PARAMS)
    assert params.keys() == PARAMS.keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("features.28.bias"), r"got no tensor for features.28.bias, expected shape \(7,\)"),
        (lambda t: t.pop("lin4.model.1.weight"), "got no tensor for lin4.*--source=vgg16-397923af.pth,vgg.pth"),
        (lambda t: t.update({"lin1.model.1.weight": np.ones((1, 192, 1, 1))}), r"got shape \(1, 192, 1, 1\) for lin1"),
        (lambda t: t.update({"features.30.weight": np.ones(3)}), "got 1 tensors more than expected, features.30"),
        (lambda t: t["lin2.model.1.weight"].__isub__(0.5), "got -0.4.* in lin2.*, expected no negative weights"),
    ],
)
def test_another_network_is_refused(change, sentence):
    vgg, linear = random_tensors()
    tensors = {name: array.copy() for name, array in (vgg | linear).items()}
    tensors["classifier.0.weight"] = np.ones(3)  # of torchvision's, and nobody's business here
    lpips.from_torch(tensors, NARROW)
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        lpips.from_torch(tensors, NARROW)


def test_alexnets_weights_are_not_vggs():
    linear = {f"lin{i}.model.1.weight": np.ones((1, width, 1, 1)) for i, width in enumerate((64, 192, 384, 256, 256))}
    vgg, _ = random_tensors(lpips.WIDTHS)
    with pytest.raises(ValueError, match=r"got shape \(1, 192, 1, 1\) for lin1.model.1.weight, .* \(1, 128, 1, 1\)"):
        lpips.from_torch(vgg | linear)


def torch_file(path, tensors):
    """A file of PyTorch's with these tensors."""
    root, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        root[name] = tensor(stored("Float", str(key), array.size), 0, array.shape, strides)
        storages[str(key)] = array
    path.write_bytes(zipped(root, storages))
    return path


@pytest.fixture
def narrow(monkeypatch):
    """The conversion for the small network."""
    of_narrow = weights.NETWORKS["lpips"]._replace(from_torch=functools.partial(lpips.from_torch, widths=NARROW))
    monkeypatch.setitem(weights.NETWORKS, "lpips", of_narrow)


def test_two_files_become_one(tmp_path, narrow):
    """Whose network is that of the tensors; what it gives when it is loaded is what it gave when converted."""
    sources = [torch_file(tmp_path / "a.pth", VGG), torch_file(tmp_path / "b.pth", LINEAR)]
    path = tmp_path / "lpips.npz"
    card = weights.convert("lpips", sources, path)
    assert card["source"] == "a.pth, b.pth" and card["source_sha256"].count(", ") == 1
    assert weights.convert("lpips", sources[::-1], path)["weights_sha256"] == card["weights_sha256"]
    network = weights.load("lpips", path)
    jax.tree.map(np.testing.assert_array_equal, network.params, PARAMS)
    assert network.fingerprint == card["weights_sha256"] == files.fingerprint(files.flat(PARAMS))
    probe = weights.probe("lpips", path)["features"]
    np.testing.assert_allclose(network(weights.probe_images()).features, probe, rtol=1e-4, atol=1e-6)
    rounded = weights.load("lpips", path, dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(rounded.params))


def test_wrong_files_are_named(tmp_path, narrow):
    a, b = torch_file(tmp_path / "a.pth", VGG), torch_file(tmp_path / "b.pth", LINEAR)
    for sources, sentence in [
        (a, f"{a}: got no tensor for lin0.model.1.weight"),
        ([b], f"{b}: got no tensor for features.0.weight"),
        ([a, b, b], f"{b}: got lin0.model.1.weight a second time"),
        ([a, tmp_path / "c.pth"], f"{tmp_path}/c.pth: expected a file of weights"),
    ]:
        with pytest.raises(ValueError) as error:
            weights.convert("lpips", sources, tmp_path / "lpips.npz")
        assert str(error.value).startswith(sentence)
    with pytest.raises(ValueError, match="torchvision.*--network=lpips --source=vgg16-397923af.pth,vgg.pth$"):
        weights.load("lpips", tmp_path / "lpips.npz")


def test_the_command_takes_both_files(tmp_path):
    """Of the published size."""
    vgg, linear = random_tensors(lpips.WIDTHS)
    sources = f"{torch_file(tmp_path / 'vgg16.pth', vgg)},{torch_file(tmp_path / 'vgg.pth', linear)}"
    path = tmp_path / "lpips.npz"
    words = [sys.executable, "-m", "mscm.metrics.convert", "--network=lpips", f"--source={sources}", f"--output={path}"]
    done = subprocess.run(words, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "lpips from vgg16.pth (SHA-256 " in done.stdout and ", vgg.pth (SHA-256 " in done.stdout
    params = weights.load("lpips", path).params
    jax.tree.map(np.testing.assert_array_equal, params, lpips.from_torch(vgg | linear))
