"""DINOv2: the published network (by PyTorch where there is one, else by closed forms), Pillow's resize, other files."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import special
from sklearn.datasets import load_sample_image

from mscm.metrics import dinov2

apply = jax.jit(dinov2.apply)


def random_images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def random_tensors(width=64, depth=1, scale=0.5):
    rng = np.random.default_rng(1)
    shapes = dinov2.published_shapes(width, depth)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def error(got, expected):
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max()


def torch_network(width, depth, device="cpu"):
    """The network from its description, with the published names."""
    torch = pytest.importorskip("torch")
    nn, F = torch.nn, torch.nn.functional

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.transpose(-2, -1) / 8, dim=-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(n, t, width))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * self.gamma

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.attn, self.mlp = Attention(), Mlp()
            self.ls1, self.ls2 = LayerScale(), LayerScale()

        def forward(self, x):
            x = x + self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm2(x)))

    class PatchEmbed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, width, kernel_size=14, stride=14)

    class DinoV2(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, width))
            self.mask_token = nn.Parameter(torch.zeros(1, width))
            self.patch_embed = PatchEmbed()
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = nn.LayerNorm(width, eps=1e-6)

        def positions(self):
            grid = self.pos_embed[:, 1:].reshape(1, 37, 37, width).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
            return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

        def forward(self, pixels):
            x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions()
            for block in self.blocks:
                x = block(x)
            return self.norm(x)[:, 0]

    with torch.device(device), torch.random.fork_rng(devices=[]):
        return DinoV2().eval()


def torch_features(network, images):
    """Features of uint8 images, resized by Pillow, in float64."""
    torch = pytest.importorskip("torch")
    pixels = np.stack([pillow_resize(image) for image in np.asarray(images)]) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    with torch.inference_mode():
        return network.double()(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()


def pillow_resize(image):
    """Along the rows, then along the columns: left to itself, Pillow 13 does the columns of some images first."""
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    along_width = image.resize((224, image.height), Image.Resampling.BICUBIC)
    return np.asarray(along_width.resize((224, 224), Image.Resampling.BICUBIC).convert("RGB"))


@pytest.fixture(scope="module")
def torch_twin():
    """A network in PyTorch and its parameters; activations as small as the published ones: a wrong epsilon shows."""
    torch = pytest.importorskip("torch")
    network = torch_network(width=128, depth=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "token" in name or "pos_embed" in name or "gamma" in name:
                value.copy_(0.02 * noise)
            elif "norm" in name:
                value.copy_(0.3 * noise if "bias" in name else 1 + 0.3 * noise)
            elif "patch_embed" in name:
                value.copy_(0.02 * noise if "bias" in name else 0.02 * noise / 588**0.5)
            else:
                value.copy_(0.3 * noise if "bias" in name else 2 * noise / value.shape[1] ** 0.5)
    tensors = {name: value.numpy() for name, value in network.state_dict().items()}
    return network, dinov2.from_torch(tensors)


@pytest.mark.parametrize("shape", [(224, 224, 3), (40, 56, 3), (300, 260, 1)])
def test_features_are_those_of_pytorch(torch_twin, shape):
    network, params = torch_twin
    images = random_images(3, *shape)
    assert error(apply(params, images), torch_features(network, images)) < 1e-5


def test_positions_are_those_of_pytorch(torch_twin):
    network, params = torch_twin
    with pytest.importorskip("torch").inference_mode():
        expected = network.double().positions()[0].numpy()
    assert error(params["pos_embed"], expected) < 1e-6


@pytest.mark.parametrize(("width", "depth"), [(384, 12), (768, 12), (1024, 24)])
def test_published_names_and_shapes(width, depth):
    state = torch_network(width, depth, device="meta").state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == dinov2.published_shapes(width, depth)


def test_parameter_count():
    """Of ViT-L/14, with the mask token and 37 x 37 positions."""
    shapes = dinov2.published_shapes(1024, 24)
    assert sum(math.prod(shape) for shape in shapes.values()) == 304_368_640


def test_closed_form_of_uniform_attention():
    """Without queries and keys every token attends to all alike; then one block is the class token's mathematics."""
    tensors = random_tensors()
    for part in ("weight", "bias"):
        tensors[f"blocks.0.attn.qkv.{part}"][:128] = 0.0
    for name in ("cls_token", "pos_embed", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"):
        tensors[name] *= 0.05  # a small class token: a wrong epsilon shows
    params = dinov2.from_torch(tensors)
    images = random_images(1, 224, 224, 3)
    weights = {name.removeprefix("blocks.0."): value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    pixels = (np.asarray(images[0]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    tokens = [weights["cls_token"][0, 0]]
    for top in range(0, 224, 14):
        for left in range(0, 224, 14):
            patch = pixels[top : top + 14, left : left + 14]
            embedded = np.einsum("dcyx,yxc->d", weights["patch_embed.proj.weight"], patch)
            tokens.append(embedded + weights["patch_embed.proj.bias"])
    hidden = np.stack(tokens) + params["pos_embed"]
    values = dense(norm(hidden, "norm1"), "attn.qkv")[:, 128:]
    token = hidden[0] + weights["ls1.gamma"] * dense(values.mean(0), "attn.proj")
    inner = dense(norm(token, "norm2"), "mlp.fc1")
    inner = inner * 0.5 * (1 + special.erf(inner / np.sqrt(2)))
    token = token + weights["ls2.gamma"] * dense(inner, "mlp.fc2")
    assert error(apply(params, images)[0], norm(token, "norm")) < 1e-5


def test_interpolated_positions():
    """Of the squares of the row numbers; torch 2.13's interpolate(scale_factor=16.1 / 37, mode="bicubic")."""
    expected = np.array([
        0.333397, 8.549195, 27.939682, 56.618199, 95.925531, 148.396193, 208.772906, 278.484074,
        362.882240, 456.555994, 556.852644, 670.807945, 799.390333, 931.263507, 1074.216825, 1237.009117,
    ])
    rows, columns = np.arange(37.0)[:, None], np.arange(37.0)[None]
    tensors = random_tensors()
    for channel, values in enumerate((rows**2 + 0 * columns, 0 * rows + columns**2)):
        tensors["pos_embed"][0, 1:, channel] = values.reshape(-1)
    pos_embed = dinov2.from_torch(tensors)["pos_embed"]
    assert pos_embed.shape == (1 + 256, 64)
    np.testing.assert_array_equal(pos_embed[0], tensors["pos_embed"][0, 0])
    grid = pos_embed[1:].reshape(16, 16, 64)
    np.testing.assert_allclose(grid[..., 0], np.repeat(expected[:, None], 16, axis=1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(grid[..., 1], np.repeat(expected[None], 16, axis=0), rtol=1e-6, atol=1e-5)


def test_patches_are_known_by_their_positions_only():
    params = dinov2.random_params(0)
    images = random_images(1, 224, 224, 3)
    (top, left), (low, right) = (2 * 14, 5 * 14), (11 * 14, 3 * 14)
    one, other = images[:, top : top + 14, left : left + 14], images[:, low : low + 14, right : right + 14]
    swapped = images.at[:, top : top + 14, left : left + 14].set(other)
    swapped = swapped.at[:, low : low + 14, right : right + 14].set(one)
    features, changed = apply(params, images), apply(params, swapped)
    assert error(changed, features) > 1e-3
    order = np.arange(257)
    order[[1 + 2 * 16 + 5, 1 + 11 * 16 + 3]] = order[[1 + 11 * 16 + 3, 1 + 2 * 16 + 5]]
    assert error(apply(params | {"pos_embed": params["pos_embed"][order]}, swapped), features) < 1e-5


def test_a_row_does_not_depend_on_the_batch():
    params = dinov2.random_params(0)
    images = random_images(3, 32, 32, 3)
    features = np.asarray(apply(params, images))
    assert features.shape == (3, 64) and features.dtype == np.float32
    assert error(features[0], features[1]) > 1e-2
    for i in range(3):
        assert error(apply(params, images[i : i + 1])[0], features[i]) < 1e-5


def test_grey_images_are_repeated():
    params = dinov2.random_params(0)
    grey = random_images(1, 30, 20, 1)
    np.testing.assert_array_equal(apply(params, grey), apply(params, jnp.repeat(grey, 3, axis=-1)))


def products(params, images):
    """What the compiler is given: a line for each product of two arrays, without the two of the resize."""
    lines = jax.jit(dinov2.apply).lower(params, images).as_text().splitlines()
    return [line for line in lines if "stablehlo.dot_general" in line][2:]


def test_products_are_in_float32():
    """No accelerator may round the factors, those of the attention included."""
    lines = products(dinov2.random_params(0), random_images(1, 32, 32, 3))
    assert len(lines) == 7  # of patches and kernels five, of the attention two
    assert all("precision = [HIGHEST, HIGHEST]" in line and line.count("xf32>") == 3 for line in lines), lines


def test_products_are_in_bfloat16():
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), dinov2.random_params(0, width=128))
    images = random_images(2, 32, 32, 3)
    lines = products(params, images)
    assert len(lines) == 7
    assert all("HIGHEST" not in line and line.split(" : ")[1].count("xbf16>") >= 2 for line in lines), lines
    features = apply(params, images)
    assert features.dtype == jnp.float32
    same_weights = apply(jax.tree.map(lambda array: array.astype(jnp.float32), params), images)
    assert 1e-4 < error(features, np.asarray(same_weights)) < 5e-2


def sample_images():
    """Photographs, noise and the extremes: black and white pixels meet the clipping and the ties of the rounding."""
    photo = load_sample_image("china.jpg")
    yield "photo", photo
    yield "crop", photo[100:356, 200:456]
    for side in (8, 32, 64, 128, 299):
        yield f"photo of {side}", np.asarray(Image.fromarray(photo).resize((side, side), Image.Resampling.BOX))
    rng = np.random.default_rng(0)
    for shape in [(32, 32, 3), (33, 700, 3), (112, 112, 3), (224, 224, 3), (256, 256, 3), (500, 300, 3), (40, 30, 1)]:
        yield f"noise {shape}", rng.integers(0, 256, shape, dtype=np.uint8)
        yield f"black and white {shape}", rng.choice(np.array([0, 255], np.uint8), shape)


@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in sample_images()])
def test_resize_is_that_of_pillow(image):
    resized = dinov2.resize(jnp.asarray(image[None]))
    assert resized.dtype == jnp.float32
    np.testing.assert_array_equal(resized[0], pillow_resize(image))
    if image.shape[0] == image.shape[1] and image.shape[2] == 3:
        at_once = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resized[0], at_once)


def test_random_params_repeat_and_hide_nothing():
    params = dinov2.random_params(3, width=128, depth=2)
    assert params["blocks"]["qkv"]["kernel"].shape == (2, 128, 384)
    for array, again, other in zip(
        *(jax.tree.leaves(dinov2.random_params(seed, width=128, depth=2)) for seed in (3, 3, 4)), strict=True
    ):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, again)
        assert np.mean(array == other) < 1e-3
        assert np.abs(array).mean() > 0.01 and np.abs(array - 1).mean() > 0.1 and array.std() > 0.01


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def with_zeros(**shapes):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("mask_token"), r"got no tensor for mask_token, expected shape \(1, 64\)"),
        (without("cls_token"), r"got no tensor for cls_token, expected shape \(1, 1, d\)"),
        (without("blocks.1.ls2.gamma"), r"got no tensor for blocks.1.ls2.gamma, expected shape \(64,\)"),
        (with_zeros(cls_token=(1, 1, 80)), r"got shape \(1, 1, 80\) for cls_token, expected .* a multiple of 64"),
        (with_zeros(pos_embed=(1, 257, 64)), r"got shape \(1, 257, 64\) for pos_embed, expected shape \(1, 1370, 64\)"),
        (with_zeros(**{"patch_embed.proj.weight": (64, 3, 16, 16)}), r"got shape .* expected shape \(64, 3, 14, 14\)"),
        (with_zeros(**{"blocks.0.attn.qkv.weight": (64, 192)}), r"got shape \(64, 192\) .* expected shape \(192, 64\)"),
        (with_zeros(**{"blocks.3.norm1.weight": (64,)}), r"got no tensor for blocks.2.norm1.weight"),
        (with_zeros(**{"head.weight": (1000, 64)}), r"got 1 tensors more than expected, head.weight among them"),
        (with_zeros(register_tokens=(1, 4, 64)), r"got register_tokens, expected a network without registers"),
        (with_zeros(**{"blocks.0.mlp.w12.weight": (512, 64)}), r"got mlp.w12, .* expected the two-layer MLP"),
    ],
)
def test_another_network_is_refused(change, sentence):
    tensors = random_tensors(depth=2)
    dinov2.from_torch(tensors)
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        dinov2.from_torch(tensors)


def test_not_a_network():
    with pytest.raises(ValueError, match="got no tensor for cls_token"):
        dinov2.from_torch({})
    tensors = {name: value for name, value in random_tensors().items() if not name.startswith("blocks.")}
    with pytest.raises(ValueError, match="got no tensor for blocks.0.norm1.weight"):
        dinov2.from_torch(tensors)
