"""DINOv2, the vision transformer whose class token FD-DINOv2 is computed from.

Oquab et al., arXiv:2304.07193; as a feature network of generated images: Stein et al., arXiv:2306.04675, who take
ViT-L/14 without registers, images resized to 224 x 224 as Pillow does, and the class token after the last norm.

    params = random_params(0)  # or from_torch of the tensors in dinov2_vitl14_pretrain.pth
    features = apply(params, images)  # uint8 "n h w c" -> float32 "n 1024"

The position embedding is for 37 x 37 patches, those of the last training images, and 16 x 16 are needed: `from_torch`
interpolates it, once.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int64, UInt8

from mscm.metrics.features import FeatureNetwork, Outputs

SIZE = 224  # side of the images that the network sees
PATCH = 14
GRID = SIZE // PATCH
HEAD_DIM = 64  # of all published sizes
_TRAINED_GRID = 37  # images of 518 pixels
_NORM_EPSILON = 1e-6
_BATCH_SIZE = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in [0, 1]
_PILLOW_BITS = 22  # behind the point, of the weights with which Pillow resizes 8-bit images
_LOW_BITS = 11  # of these, in the low half

Params = Mapping[str, Any]  # {"fc1": {"kernel": "in out", "bias": "out"}, "norm": {"scale": "d", "bias": "d"}, ...}


def published_shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the published files: S/14 is (384, 12), B/14 (768, 12), L/14 (1024, 24)."""
    vector = (width,)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + _TRAINED_GRID**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": vector,
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}  # outputs, inputs
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{part}": vector for part in ("weight", "bias")}
        for name, (outputs, inputs) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"blocks.{i}.{name}.bias"] = (outputs * width,)
        shapes |= {f"blocks.{i}.{scale}.gamma": vector for scale in ("ls1", "ls2")}
    return shapes | {f"norm.{part}": vector for part in ("weight", "bias")}


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters, float32, from the tensors of a published file without registers, of ViT-S/14, B/14 or L/14.

    Raises:
      ValueError: a tensor is missing, left over or of another shape: it is another network.
    """
    _check(tensors)

    def stacked(name: str) -> np.ndarray:
        return np.stack([np.asarray(tensors[f"blocks.{i}.{name}"], np.float32) for i in range(_depth(tensors))])

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": stacked(f"{name}.weight").swapaxes(1, 2), "bias": stacked(f"{name}.bias")}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    # Out, in, h, w: a patch is a row of its pixels, channels last.
    kernel = tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(PATCH * PATCH * 3, -1)
    params = {
        "patch_embed": {"kernel": kernel, "bias": tensors["patch_embed.proj.bias"]},
        "cls_token": tensors["cls_token"][0],
        "pos_embed": _interpolated(tensors["pos_embed"][0]),
        "blocks": {
            "norm1": norm("norm1"),
            "qkv": dense("attn.qkv"),
            "proj": dense("attn.proj"),
            "ls1": stacked("ls1.gamma"),
            "norm2": norm("norm2"),
            "fc1": dense("mlp.fc1"),
            "fc2": dense("mlp.fc2"),
            "ls2": stacked("ls2.gamma"),
        },
        "norm": {"scale": tensors["norm.weight"], "bias": tensors["norm.bias"]},
    }
    return jax.tree.map(lambda array: np.ascontiguousarray(array, np.float32), params)


def random_params(seed: int, *, width: int = HEAD_DIM, depth: int = 2) -> dict[str, Any]:
    """Parameters at random, none of them near the zero or one that would hide it: for tests and benchmarks."""
    rng = np.random.default_rng(seed)

    def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if name in ("cls_token", "pos_embed"):
            return noise
        if len(shape) > 1:
            return noise / math.sqrt(math.prod(shape[1:]))
        return 0.2 * noise if name.endswith("bias") else 0.7 + 0.2 * noise

    return from_torch({name: random(name, shape) for name, shape in published_shapes(width, depth).items()})


def network(params: Params, *, fingerprint: str) -> FeatureNetwork:
    """The feature network of FD-DINOv2."""
    return FeatureNetwork(
        "dinov2", fingerprint, params, lambda params, images: Outputs(apply(params, images)), batch_size=_BATCH_SIZE
    )


def apply(params: Params, images: UInt8[Array, "n h w c"]) -> Float[Array, "n d"]:
    """The class token after the last norm, float32, of images of any size; `d` is 1024 for ViT-L/14.

    Computes in the type of the kernels, but norms and softmax in float32. Grey images (c = 1) are repeated to three
    channels.
    """
    # For the products of the attention too, which takes no precision: the features are read to four digits and more.
    precision = "default" if params["patch_embed"]["kernel"].dtype == jnp.bfloat16 else "highest"
    with jax.default_matmul_precision(precision):
        hidden = _tokens(params, resize(images))
        hidden, _ = lax.scan(lambda hidden, block: (_block(block, hidden), None), hidden, params["blocks"])
    return layer_norm(params["norm"], hidden[:, :1])[:, 0]


def resize(images: UInt8[Array, "n h w c"]) -> Float[Array, "n 224 224 3"]:
    """To 224 x 224 as Pillow's BICUBIC does, bit for bit: whole numbers in [0, 255], antialiased where images shrink.

    What FD-DINOv2's evaluation code (dgm-eval) does, unless it is given `--clean_resize`, which rounds nothing.
    Exact for sides up to 4096 pixels: a sum of products with the low halves then stays below 2^24.
    """
    _, height, width, channels = images.shape
    if channels == 1:
        images = jnp.repeat(images, 3, axis=-1)
    rows, columns = (jnp.asarray(_pillow_weights(side), jnp.float32) for side in (height, width))
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    # Rounded in between, so the order counts. Along the rows first, as Pillow before version 13, with which the known
    # scores were computed; version 13 has the other order for images whose height shrinks more than their width.
    along_width = _rounded(product("pWw,nhwc->pnhWc", columns, images.astype(jnp.float32)))
    return _rounded(product("pHh,nhWc->pnHWc", rows, along_width))


def _rounded(halves: Float[Array, "2 n h w c"]) -> Float[Array, "n h w c"]:
    """Products with the two halves of the weights to whole numbers in [0, 255], halves up."""
    high, low = halves.astype(jnp.int32)
    rounded = ((high << _LOW_BITS) + low + (1 << (_PILLOW_BITS - 1))) >> _PILLOW_BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.float32)


def _pillow_weights(side: int) -> Int64[np.ndarray, "2 224 side"]:
    """The weight of each old pixel in each new one along one axis, an integer in two halves.

    Pillow's weights have 22 bits behind the point, and float32 cannot add up their products with 8-bit pixels: at 256
    pixels, where the new grid repeats every 7 pixels, 2 in 100 pixels of a black and white image came out otherwise.
    """
    scale = side / SIZE
    centres = (np.arange(SIZE)[:, None] + 0.5) * scale
    weights = _cubic((np.arange(side) + 0.5 - centres) / max(scale, 1.0), a=-0.5)
    weights *= 2**_PILLOW_BITS / weights.sum(1, keepdims=True)
    integers = np.copysign(np.floor(np.abs(weights) + 0.5), weights).astype(np.int64)
    high = (integers + (1 << (_LOW_BITS - 1))) >> _LOW_BITS
    return np.stack([high, integers - (high << _LOW_BITS)])


def _interpolated(pos_embed: np.ndarray) -> np.ndarray:
    """Position embedding `1+37*37 d` to `1+16*16 d`: the class token's and the interpolated grid's; in float64.

    As the published code calls torch: bicubic with a = -0.75, no antialiasing, the border repeated, and a scale factor
    of 16.1 / 37, not 16 / 37. Output i is therefore at (i + 0.5) 37 / 16.1 - 0.5, and the weights were used like this.
    """
    positions = (np.arange(GRID) + 0.5) * (_TRAINED_GRID / (GRID + 0.1)) - 0.5
    lower = np.floor(positions).astype(int)
    weights = np.zeros((GRID, _TRAINED_GRID))
    for neighbour in (lower - 1, lower, lower + 1, lower + 2):
        inside = np.clip(neighbour, 0, _TRAINED_GRID - 1)
        np.add.at(weights, (np.arange(GRID), inside), _cubic(positions - neighbour, a=-0.75))
    grid = np.asarray(pos_embed[1:], np.float64).reshape(_TRAINED_GRID, _TRAINED_GRID, -1)
    grid = np.einsum("Hh,Ww,hwd->HWd", weights, weights, grid, optimize=True)
    return np.concatenate([pos_embed[:1], grid.reshape(GRID * GRID, -1)])


def _cubic(distances: np.ndarray, *, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys, 1981): 1 at 0, zero at 1 and from 2 on."""
    x = np.abs(distances)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _depth(tensors: Mapping[str, np.ndarray]) -> int:
    matches = (re.match(r"blocks\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _check(tensors: Mapping[str, np.ndarray]) -> None:
    if "register_tokens" in tensors:
        raise ValueError("got register_tokens, expected a network without registers, as dinov2_vitl14_pretrain.pth")
    if any(".mlp.w12." in name for name in tensors):
        raise ValueError("got mlp.w12, the SwiGLU of ViT-g/14, expected the two-layer MLP of ViT-S/14, B/14 or L/14")
    token = tensors.get("cls_token")
    if token is None or token.shape[:-1] != (1, 1) or token.shape[-1] % HEAD_DIM:
        got = "no tensor" if token is None else f"shape {token.shape}"
        raise ValueError(f"got {got} for cls_token, expected shape (1, 1, d) with d a multiple of {HEAD_DIM}")
    shapes = published_shapes(token.shape[-1], _depth(tensors))
    for name, shape in shapes.items():
        got = f"shape {tensors[name].shape}" if name in tensors else "no tensor"
        if got != f"shape {shape}":
            raise ValueError(f"got {got} for {name}, expected shape {shape}, as DINOv2 has without registers")
    if left := tensors.keys() - shapes.keys():
        raise ValueError(f"got {len(left)} tensors more than expected, {min(left)} among them: it is another network")


def _tokens(params: Params, images: Float[Array, "n 224 224 3"]) -> Float[Array, "n t d"]:
    """The class token, then the patches row by row."""
    mean, std = (np.reshape(np.array(values, np.float32), (1, 1, 1, 3)) for values in (_MEAN, _STD))
    pixels = (images / 255.0 - mean) / std
    patches = pixels.reshape(-1, GRID, PATCH, GRID, PATCH, 3).swapaxes(2, 3).reshape(-1, GRID * GRID, PATCH * PATCH * 3)
    patches = dense(params["patch_embed"], patches.astype(params["patch_embed"]["kernel"].dtype))
    cls_token = jnp.broadcast_to(params["cls_token"], (len(images), 1, patches.shape[-1]))
    return jnp.concatenate([cls_token, patches], axis=1) + params["pos_embed"][None]


def _block(params: Params, hidden: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    """Attention and MLP, each between a norm and LayerScale."""
    queries, keys, values = jnp.split(dense(params["qkv"], _norm_like(params["norm1"], hidden)), 3, axis=-1)
    heads = (x.reshape(*x.shape[:2], -1, HEAD_DIM) for x in (queries, keys, values))
    attended = jax.nn.dot_product_attention(*heads).reshape(hidden.shape)
    hidden = hidden + params["ls1"][None, None] * dense(params["proj"], attended)
    inner = jax.nn.gelu(dense(params["fc1"], _norm_like(params["norm2"], hidden)), approximate=False)
    return hidden + params["ls2"][None, None] * dense(params["fc2"], inner)


def dense(params: Params, inputs: Float[Array, "n t i"]) -> Float[Array, "n t o"]:
    return jnp.matmul(inputs, params["kernel"]) + params["bias"][None, None]


def _norm_like(params: Params, hidden: Array) -> Array:
    return layer_norm(params, hidden).astype(hidden.dtype)


def layer_norm(
    params: Params, hidden: Float[Array, "n t d"], epsilon: float = _NORM_EPSILON
) -> Float[Array, "n t d"]:
    """LayerNorm, in float32."""
    hidden = hidden.astype(jnp.float32)
    hidden = hidden - hidden.mean(-1, keepdims=True)
    hidden = hidden * lax.rsqrt(jnp.square(hidden).mean(-1, keepdims=True) + epsilon)
    scale, bias = (params[key].astype(jnp.float32)[None, None] for key in ("scale", "bias"))
    return hidden * scale + bias
