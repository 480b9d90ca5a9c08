"""LPIPS (Zhang et al., arXiv:1801.03924): the distance of two images in the feature maps of VGG16.

  (1) d(a, b) = sum_l mean_{h,w} sum_c w_lc (f_lc(a) - f_lc(b))^2 = |e(a) - e(b)|^2

f_l are the maps after the last ReLU of each of VGG16's five blocks, divided at each pixel by their norm over the
channels; w_lc >= 0 were fitted to what people find similar; e(x), the embedding, is all sqrt(w_lc / (h w)) f_lc(x).

    params = weights.load("lpips", "lpips.npz").params  # of python -m mscm.metrics.convert
    distances = distance(params, a, b, resize=224)  # images in [-1, 1], one number for each pair

The weights are two files: torchvision's VGG16 (f) and LPIPS's own (w).
"""

import functools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from mscm.metrics.features import FeatureNetwork, Outputs

WIDTHS = (64, 128, 256, 512, 512)  # of VGG16's blocks
MIN_SIDE = 16  # of images: there are four halvings
POOLINGS = ("max", "average")
_DEPTHS = (2, 2, 3, 3, 3)  # convolutions of the blocks
# Mean and standard deviation of ImageNet's colours, for images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_BATCH_SIZE = 8

Params = Mapping[str, Mapping[str, Any]]  # {"conv1_1": {"kernel": "h w in out", "bias": "out"}, "linear1": ..., ...}


def convolutions(widths: Sequence[int] = WIDTHS) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Name, name in torchvision's file, and shape `(h, w, in, out)` of every convolution."""
    index, channels = 0, 3
    for block, (width, depth) in enumerate(zip(widths, _DEPTHS, strict=True), start=1):
        for i in range(1, depth + 1):
            yield f"conv{block}_{i}", f"features.{index}", (3, 3, channels, width)
            index, channels = index + 2, width  # between them are ReLUs
        index += 1  # the pool


def from_torch(tensors: Mapping[str, np.ndarray], widths: Sequence[int] = WIDTHS) -> dict[str, dict[str, np.ndarray]]:
    """Parameters from the tensors of both files together; those of VGG16's classifier are not needed.

    Raises:
      ValueError: a tensor is missing, left over, of another shape or negative: it is another network.
    """
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = left.pop(name, None)
        if tensor is None or tensor.shape != shape:
            raise ValueError(
                f"got {'no tensor' if tensor is None else f'shape {tensor.shape}'} for {name}, expected shape {shape}, "
                "as the two files of LPIPS with VGG16 have: --source=vgg16-397923af.pth,vgg.pth"
            )
        return np.asarray(tensor, np.float32)

    params = {}
    for name, theirs, (height, width, channels, features) in convolutions(widths):
        kernel = take(f"{theirs}.weight", (features, channels, height, width))
        kernel = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))
        params[name] = {"kernel": kernel, "bias": take(f"{theirs}.bias", (features,))}
    for i, width in enumerate(widths):
        weight = take(f"lin{i}.model.1.weight", (1, width, 1, 1)).reshape(width)
        if not (weight >= 0).all():
            raise ValueError(f"got {weight.min()} in lin{i}.model.1.weight, expected no negative weights of features")
        params[f"linear{i + 1}"] = {"weight": weight}
    if left:
        raise ValueError(f"got {len(left)} tensors more than expected, {min(left)} among them: it is another network")
    return params


def random_params(
    key: PRNGKeyArray, *, widths: Sequence[int] = WIDTHS, dtype: str = "float32"
) -> dict[str, dict[str, Array]]:
    """Parameters at random that keep the scale of activations through the depth: for plans and tests."""
    params = {}
    for name, _, shape in convolutions(widths):
        key, k_kernel, k_bias = jax.random.split(key, 3)
        std = math.sqrt(2.0 / math.prod(shape[:-1]))
        params[name] = {
            "kernel": std * jax.random.normal(k_kernel, shape, dtype),
            "bias": 0.1 * jax.random.normal(k_bias, shape[-1:], dtype),
        }
    for i, width in enumerate(widths, start=1):
        params[f"linear{i}"] = {"weight": jax.random.uniform(jax.random.fold_in(key, i), (width,), dtype)}
    return params


def distance(
    params: Params,
    a: Float[Array, "n h w c"],
    b: Float[Array, "n h w c"],
    *,
    resize: int | None,
    pooling: str = "max",
) -> Float[Array, "n"]:
    """(1): one distance for each pair of images in [-1, 1], grey or RGB, float32; `resize`: to so many pixels a side.

    Bilinear between the centres of pixels, not antialiased, as PyTorch's `interpolate(align_corners=False)`.
    Consistency models (arXiv:2303.01469) resize to 224 below 256 pixels; their code for ImageNet pools by averages.
    Computes in the type of the kernels, differences in float32.
    """
    if resize is not None:
        a, b = (jax.image.resize(x, (len(x), resize, resize, x.shape[-1]), "linear", antialias=False) for x in (a, b))
    # One after the other: of b, from which no gradient is asked, then nothing is kept.
    of_a, of_b = (embedding(params, images, pooling=pooling) for images in (a, b))
    distances = [jnp.sum(jnp.square(x - y), axis=(1, 2, 3)) for x, y in zip(of_a, of_b, strict=True)]
    return functools.reduce(operator.add, distances)


def embedding(
    params: Params, images: Float[Array, "n h w c"], *, pooling: str = "max"
) -> list[Float[Array, "n _ _ _"]]:
    """e of equation (1): five maps, float32, of images in [-1, 1] of at least `MIN_SIDE` pixels."""
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    shift, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (_SHIFT, _SCALE))
    hidden = ((images - shift) / scale).astype(params["conv1_1"]["kernel"].dtype)
    maps: list[Array] = []
    for block, depth in enumerate(_DEPTHS, start=1):
        hidden = _pooled(hidden, pooling) if maps else hidden
        for i in range(1, depth + 1):
            hidden = _convolved(params[f"conv{block}_{i}"], hidden)
        pixels = hidden.shape[1] * hidden.shape[2]
        scale = jnp.sqrt(params[f"linear{block}"]["weight"].astype(jnp.float32) / pixels)
        maps.append(scale.reshape(1, 1, 1, -1) * _normalised(hidden.astype(jnp.float32)))
    return maps


def network(params: Params, *, fingerprint: str) -> FeatureNetwork:
    """Rows whose squared distances are LPIPS, as many numbers as there are in the maps: to compare two machines."""

    def forward(params: Params, images: Array) -> Outputs:
        maps = embedding(params, images.astype(jnp.float32) / 127.5 - 1.0)
        return Outputs(jnp.concatenate([x.reshape(len(x), -1) for x in maps], axis=-1))

    return FeatureNetwork("lpips", fingerprint, params, forward, batch_size=_BATCH_SIZE)


def _convolved(weights: Mapping[str, Array], hidden: Array) -> Array:
    # No accelerator may round float32 factors to fewer bits: who wants that asks for bfloat16.
    precision = lax.Precision.DEFAULT if hidden.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    product = lax.conv_general_dilated(
        hidden, weights["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )
    return jax.nn.relu(product + weights["bias"].reshape(1, 1, 1, -1))


def _pooled(hidden: Array, pooling: str) -> Array:
    """Of 2 x 2 pixels; an odd last row or column is left out."""
    window = (1, 2, 2, 1)
    if pooling == "average":
        return lax.reduce_window(hidden, 0.0, lax.add, window, window, "VALID") / 4
    return lax.reduce_window(hidden, -jnp.inf, lax.max, window, window, "VALID")


def _normalised(maps: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Divided by the norm over the channels; where all are 0 they stay 0, and so is the gradient, not nan."""
    square = jnp.sum(jnp.square(maps), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square == 0, 1.0, square))
    return maps / (norm + _EPSILON)
