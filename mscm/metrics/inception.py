"""The Inception network of 2015 whose activations FID, sFID and the Inception score are defined on.

TensorFlow's frozen graph `inception-2015-12-05` (Szegedy et al., arXiv:1512.00567, as Salimans et al. and Heusel et al.
used it), not torchvision's Inception v3: its average pools do not count the padding, the pool branch of its last block
takes a maximum, and it has 1008 logits. Images are resized to 299 as TensorFlow 1 did, without antialiasing and with
pixel centres at the corners, and scaled by (v - 128) / 128.

    params = random_params(0)  # or those of a converted file: python -m mscm.metrics.convert
    pool3, spatial, logits = apply(params, images)  # uint8 "n h w 3"

Batch norms are constants after training: `from_torch` puts them into the kernels, once.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64, UInt8

from mscm.metrics.features import FeatureNetwork, Outputs

SIZE = 299  # side of the images that the network sees
FEATURE_DIM = 2048
SPATIAL_CHANNELS = 7  # of mixed_6/conv, 17 x 17: what sFID is computed from
NUM_LOGITS = 1008  # ImageNet's 1000 classes and unused ones
_BATCH_NORM_EPSILON = 1e-3
_BATCH_SIZE = 32

Params = Mapping[str, Mapping[str, Any]]  # {"Mixed_5b.branch1x1": {"kernel": "h w in out", "bias": "out"}, ...}


class Conv(NamedTuple):
    """A convolution without bias, its batch norm and a ReLU."""

    name: str  # in pytorch-fid's file, which has torchvision's names
    scope: str  # in the frozen graph, and with dots in its TorchScript translation
    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"


class Branch(NamedTuple):
    """Layers in a row, after a pool; a tuple of convolutions has them side by side."""

    layers: tuple[Conv | tuple[Conv, ...], ...]
    pool: str | None = None  # average, maximum, reduce (maximum with stride 2)

    @property
    def rows(self) -> list[tuple[Conv, ...]]:
        """The convolutions of each layer."""
        return [(layer,) if isinstance(layer, Conv) else layer for layer in self.layers]


class Block(NamedTuple):
    """Branches side by side, concatenated by channel."""

    name: str
    scope: str
    branches: tuple[Branch, ...]


def _row(name: str, scope: str, *sizes: tuple[int, int, int], last_stride: int = 1) -> tuple[Conv, ...]:
    """Convolutions NAME_1, NAME_2, ... of (features, kernel height, width), the last one with a stride."""
    scopes = (f"{scope}.conv", *(f"{scope}.conv_{i}" for i in range(1, len(sizes))))
    names = (f"{name}_{i}" for i in range(1, len(sizes) + 1))
    convs = [Conv(n, s, size[0], size[1:]) for n, s, size in zip(names, scopes, sizes, strict=True)]
    if last_stride > 1:
        convs[-1] = convs[-1]._replace(stride=last_stride, padding="VALID")
    return tuple(convs)


def _block_35(name: str, scope: str, pool_features: int) -> Block:
    return Block(name, scope, (
        Branch((Conv("branch1x1", "conv", 64, (1, 1)),)),
        Branch(_row("branch5x5", "tower", (48, 1, 1), (64, 5, 5))),
        Branch(_row("branch3x3dbl", "tower_1", (64, 1, 1), (96, 3, 3), (96, 3, 3))),
        Branch((Conv("branch_pool", "tower_2.conv", pool_features, (1, 1)),), pool="average"),
    ))


def _block_17(name: str, scope: str, width: int) -> Block:
    double = ((width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7))
    return Block(name, scope, (
        Branch((Conv("branch1x1", "conv", 192, (1, 1)),)),
        Branch(_row("branch7x7", "tower", (width, 1, 1), (width, 1, 7), (192, 7, 1))),
        Branch(_row("branch7x7dbl", "tower_1", *double)),
        Branch((Conv("branch_pool", "tower_2.conv", 192, (1, 1)),), pool="average"),
    ))


def _block_8(name: str, scope: str, pool: str) -> Block:
    def cross(prefix: str, scope: str) -> tuple[Conv, Conv]:
        return (
            Conv(f"{prefix}a", f"{scope}_mixed_conv", 384, (1, 3)),
            Conv(f"{prefix}b", f"{scope}_mixed_conv_1", 384, (3, 1)),
        )

    double = _row("branch3x3dbl", "tower_1", (448, 1, 1), (384, 3, 3))
    return Block(name, scope, (
        Branch((Conv("branch1x1", "conv", 320, (1, 1)),)),
        Branch((*_row("branch3x3", "tower", (384, 1, 1)), cross("branch3x3_2", "tower"))),
        Branch((*double, cross("branch3x3dbl_3", "tower_1"))),
        Branch((Conv("branch_pool", "tower_2.conv", 192, (1, 1)),), pool=pool),
    ))


_STEM: tuple[Conv | str, ...] = (
    Conv("Conv2d_1a_3x3", "conv", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", "conv_1", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", "conv_2", 64, (3, 3)),
    "reduce",
    Conv("Conv2d_3b_1x1", "conv_3", 80, (1, 1)),
    Conv("Conv2d_4a_3x3", "conv_4", 192, (3, 3), 1, "VALID"),
    "reduce",
)
_SPATIAL_BLOCK = "Mixed_6d"
_BLOCKS = (
    _block_35("Mixed_5b", "mixed", 32),
    _block_35("Mixed_5c", "mixed_1", 64),
    _block_35("Mixed_5d", "mixed_2", 64),
    Block("Mixed_6a", "mixed_3", (
        Branch((Conv("branch3x3", "conv", 384, (3, 3), 2, "VALID"),)),
        Branch(_row("branch3x3dbl", "tower", (64, 1, 1), (96, 3, 3), (96, 3, 3), last_stride=2)),
        Branch((), pool="reduce"),
    )),
    _block_17("Mixed_6b", "mixed_4", 128),
    _block_17("Mixed_6c", "mixed_5", 160),
    _block_17(_SPATIAL_BLOCK, "mixed_6", 160),
    _block_17("Mixed_6e", "mixed_7", 192),
    Block("Mixed_7a", "mixed_8", (
        Branch(_row("branch3x3", "tower", (192, 1, 1), (320, 3, 3), last_stride=2)),
        Branch(_row("branch7x7x3", "tower_1", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), last_stride=2)),
        Branch((), pool="reduce"),
    )),
    _block_8("Mixed_7b", "mixed_9", "average"),
    _block_8("Mixed_7c", "mixed_10", "maximum"),
)


def convolutions() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Name in pytorch-fid's file, scope in the frozen graph, and shape `(h, w, in, out)` of every convolution."""
    channels = 3
    for layer in _STEM:
        if isinstance(layer, Conv):
            yield layer.name, layer.scope, (*layer.kernel, channels, layer.features)
            channels = layer.features
    for block in _BLOCKS:
        total = 0
        for branch in block.branches:
            width = channels
            for side_by_side in branch.rows:
                for conv in side_by_side:
                    shape = (*conv.kernel, width, conv.features)
                    yield f"{block.name}.{conv.name}", f"{block.scope}.{conv.scope}", shape
                width = sum(conv.features for conv in side_by_side)
            total += width
        channels = total


# What files call the parts of a convolution, after its name with underscores for dots.
_PARTS = {
    "kernel": ("conv_weight", "weight"),
    "gamma": ("bn_weight", "gamma"),
    "beta": ("bn_bias", "beta", "bias"),
    "mean": ("bn_running_mean", "running_mean", "mean", "moving_mean"),
    "variance": ("bn_running_var", "running_var", "var", "moving_variance"),
}


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from the tensors of pytorch-fid's file, or of NVIDIA's TorchScript translation of the frozen graph.

    Raises:
      ValueError: a tensor is missing, left over or of another shape: it is another network.
    """
    left = {name.replace(".", "_"): value for name, value in tensors.items() if "num_batches_tracked" not in name}
    is_script = "output_weight" in left

    def take(name: str, part: str, aliases: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        names = (f"{name.replace('.', '_')}_{alias}" for alias in aliases)
        tensor = next((left.pop(key) for key in names if key in left), None)
        if tensor is None and part == "gamma":
            return np.ones(shape)  # the frozen graph has none
        if tensor is None or tensor.shape != shape:
            raise ValueError(
                f"got {'no tensor' if tensor is None else f'shape {tensor.shape}'} for the {part} of {name}, expected "
                f"shape {shape}, as the Inception network of 2015 has (torchvision's Inception v3 is another one)"
            )
        return tensor

    params = {}
    for name, scope, (height, width, channels, features) in convolutions():
        where = f"layers.{scope}" if is_script else name
        shapes = {"kernel": (features, channels, height, width)}
        parts = {part: take(where, part, names, shapes.get(part, (features,))) for part, names in _PARTS.items()}
        params[name] = _fold(**parts)
    top = "output" if is_script else "fc"
    kernel = take(top, "kernel", ("weight",), (NUM_LOGITS, FEATURE_DIM))
    bias = take(top, "bias", ("bias",), (NUM_LOGITS,))
    params["fc"] = {"kernel": np.asarray(kernel.T, np.float32), "bias": np.asarray(bias, np.float32)}
    if left:
        raise ValueError(f"got {len(left)} tensors more than expected, {min(left)} among them: it is another network")
    return params


def _fold(
    *,
    kernel: Float[np.ndarray, "out in h w"],
    gamma: Float[np.ndarray, "out"],
    beta: Float[np.ndarray, "out"],
    mean: Float[np.ndarray, "out"],
    variance: Float[np.ndarray, "out"],
) -> dict[str, np.ndarray]:
    """Kernel `h w in out` and bias of a convolution with its batch norm in it; in float64, rounded to float32."""
    kernel, gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in (kernel, gamma, beta, mean, variance))
    scale = gamma / np.sqrt(variance + _BATCH_NORM_EPSILON)
    folded = kernel.transpose(2, 3, 1, 0) * scale
    return {"kernel": folded.astype(np.float32), "bias": (beta - mean * scale).astype(np.float32)}


def random_params(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Parameters at random that keep the scale of activations through the depth: for tests and benchmarks."""
    rng = np.random.RandomState(seed)
    params = {}
    for name, _, (height, width, channels, features) in convolutions():
        std = np.sqrt(2.0 / (height * width * channels))
        kernel = std * rng.standard_normal((height, width, channels, features))
        bias = 0.1 * rng.standard_normal(features)
        params[name] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    kernel = rng.standard_normal((FEATURE_DIM, NUM_LOGITS)) / np.sqrt(FEATURE_DIM)
    params["fc"] = {"kernel": kernel.astype(np.float32), "bias": np.zeros(NUM_LOGITS, np.float32)}
    return params


def apply(
    params: Params, images: UInt8[Array, "n h w c"]
) -> tuple[Float[Array, "n 2048"], Float[Array, "n 2023"], Float[Array, "n 1008"]]:
    """Pool3 features, spatial features (mixed_6/conv, the first 7 channels) and logits, of one forward pass, float32.

    Computes in the type of the kernels. Grey images (c = 1) are repeated to three channels.
    """
    dtype = params["fc"]["kernel"].dtype
    hidden = ((resize(images) - 128.0) / 128.0).astype(dtype)
    for layer in _STEM:
        hidden = _pooled(hidden, layer) if isinstance(layer, str) else _convolved(params[layer.name], layer, hidden)
    outputs: dict[str, list[Array]] = {}
    for block in _BLOCKS:
        outputs[block.name] = [_branch(params, block.name, branch, hidden) for branch in block.branches]
        hidden = jnp.concatenate(outputs[block.name], axis=-1)
    spatial = outputs[_SPATIAL_BLOCK][0][..., :SPATIAL_CHANNELS].astype(jnp.float32)
    pool3 = hidden.astype(jnp.float32).mean((1, 2))
    kernel, bias = (params["fc"][key].astype(jnp.float32) for key in ("kernel", "bias"))
    logits = jnp.matmul(pool3, kernel, precision=lax.Precision.HIGHEST) + bias[None]
    return pool3, spatial.reshape(len(spatial), -1), logits


def network(params: Params, *, fingerprint: str) -> FeatureNetwork:
    """The feature network of FID, sFID, KID, the Inception score, precision and recall."""

    def forward(params: Params, images: Array) -> Outputs:
        pool3, spatial, logits = apply(params, images)
        # Without the bias, as the evaluation that the Inception score's figures come from computes it.
        return Outputs(pool3, spatial, jax.nn.softmax(logits - params["fc"]["bias"].astype(jnp.float32)[None]))

    return FeatureNetwork("inception", fingerprint, params, forward, batch_size=_BATCH_SIZE)


def resize(images: UInt8[Array, "n h w c"]) -> Float[Array, "n 299 299 3"]:
    """To 299 x 299 as TensorFlow 1's `resize_bilinear` does: align_corners=False, no half pixels, no antialiasing.

    Pixel i of the result is at i (side / 299), between that pixel rounded down and the next, the last one repeated.
    """
    _, height, width, channels = images.shape
    if channels == 1:
        images = jnp.repeat(images, 3, axis=-1)
    rows, columns = (jnp.asarray(_interpolation(side), jnp.float32) for side in (height, width))
    # Two products with mostly zeros: a gather is slow on a TPU. In full precision, because they are the image.
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    along_height = product("Hh,nhwc->nHwc", rows, images.astype(jnp.float32))
    return product("Ww,nHwc->nHWc", columns, along_height)


def _interpolation(side: int) -> Float64[np.ndarray, "299 side"]:
    """The weight of each old pixel in each new one, along one axis."""
    positions = np.arange(SIZE) * (side / SIZE)
    lower = np.floor(positions).astype(int)
    upper = np.minimum(lower + 1, side - 1)
    matrix = np.zeros((SIZE, side))
    np.add.at(matrix, (np.arange(SIZE), lower), 1.0 - (positions - lower))
    np.add.at(matrix, (np.arange(SIZE), upper), positions - lower)
    return matrix


def _branch(params: Params, block: str, branch: Branch, hidden: Array) -> Array:
    if branch.pool == "average":  # before a 1 x 1 convolution: both are linear, and after it there are fewer channels
        ((conv,),) = branch.rows
        weights = params[f"{block}.{conv.name}"]
        return _activated(_average(_product(weights, conv, hidden)), weights)
    if branch.pool is not None:
        hidden = _pooled(hidden, branch.pool)
    for side_by_side in branch.rows:
        outputs = [_convolved(params[f"{block}.{conv.name}"], conv, hidden) for conv in side_by_side]
        hidden = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
    return hidden


def _convolved(weights: Mapping[str, Array], conv: Conv, hidden: Array) -> Array:
    return _activated(_product(weights, conv, hidden), weights)


def _activated(hidden: Array, weights: Mapping[str, Array]) -> Array:
    return jax.nn.relu(hidden + weights["bias"].reshape(1, 1, 1, -1))


def _product(weights: Mapping[str, Array], conv: Conv, hidden: Array) -> Array:
    return lax.conv_general_dilated(
        hidden,
        weights["kernel"],
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # The features are read to four digits and more: a TPU's default would round the factors to bfloat16.
        precision=lax.Precision.HIGHEST,
    )


def _pooled(hidden: Array, pool: str) -> Array:
    """Maxima of 3 x 3 pixels: with stride 2, or of the same size (the padding is never the largest)."""
    stride, padding = {"reduce": (2, "VALID"), "maximum": (1, "SAME")}[pool]
    return lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(hidden: Array) -> Array:
    """Means of 3 x 3 pixels; what lies outside of the image is not counted."""
    height, width = hidden.shape[1:3]
    inside = np.convolve(np.ones(height), np.ones(3), "same")[:, None] * np.convolve(np.ones(width), np.ones(3), "same")
    sums = lax.reduce_window(hidden, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return sums / jnp.asarray(inside[None, :, :, None], hidden.dtype)
