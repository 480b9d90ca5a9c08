"""CLIP: one vector of an image and one of a text, whose cosine says how well they fit.

Radford et al., arXiv:2103.00020, with the weights of a local directory in the form of the transformers library
(`config.json`, `model.safetensors`, `tokenizer.json`), such as openai/clip-vit-base-patch32. `pip install mscm[clip]`.

    alignment = load("clip-vit-base-patch32/")
    alignment.score(images, captions)  # uint8 "n h h c" -> cosines, float32 "n"

Images are resized to 224 x 224 as Pillow's BICUBIC does, texts cut to the 77 tokens that CLIP knows.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from mscm import compilation
from mscm.metrics import dinov2, files
from mscm.metrics.alignment import Alignment
from mscm.metrics.dinov2 import dense, layer_norm
from mscm.metrics.features import FeatureNetwork, Outputs

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGES, _TEXTS = 32, 64  # at a time
_LEGACY_EOS = 2  # in configs of a time when the end of a text was not looked up but was the largest number
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}

Params = Mapping[str, Any]  # {"layers": {"fc1": {"kernel": "l in out", "bias": "l out"}, ...}, ...}


@dataclasses.dataclass(frozen=True)
class Tower:
    """What the parameters of one of the two transformers do not say."""

    num_heads: int
    activation: str  # one of _ACTIVATIONS
    epsilon: float  # of the norms


@dataclasses.dataclass(frozen=True)
class Config:
    """Both, and what is about one of them."""

    vision: Tower
    text: Tower
    patch: int
    length: int  # tokens of a text
    end: int | None  # the number of the last token of a text; None: the largest there is


def load(directory: str | os.PathLike) -> Alignment:
    """The CLIP score of a directory of weights: the cosine, not a hundred times it.

    Raises:
      ValueError: a file is missing, is no CLIP, or of another size; or the libraries are not there.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"got {os.fspath(directory)!r}, expected a directory with the files of a CLIP")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: got no {name}, expected it, as in openai/clip-vit-base-patch32")
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(f"got no {error.name}, which reads CLIP; pip install mscm[clip]") from error
    try:
        tokenizer = Tokenizer.from_file(os.fspath(folder / "tokenizer.json"))
        tensors = load_file(folder / "model.safetensors")
        config = read_config(json.loads((folder / "config.json").read_text()))
    except Exception as error:  # the two libraries raise their own
        raise ValueError(f"{folder}: got a CLIP that cannot be read ({' '.join(str(error).split()):.200})") from error
    params = from_torch(tensors)
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    digest.update(files.fingerprint(files.flat(params)).encode())
    return make(params, config, functools.partial(_tokens_of, tokenizer, config.length), digest.hexdigest())


def make(params: Params, config: Config, tokens_of: Any, fingerprint: str) -> Alignment:
    """The score of parameters, with a function from texts to token numbers."""

    def forward(params: Params, images: UInt8[Array, "n h w c"]) -> Outputs:
        return Outputs(encode_images(params, config, images))

    network = FeatureNetwork("clip", fingerprint, params["vision"], forward, batch_size=_IMAGES)
    encode = jax.jit(
        functools.partial(encode_texts, config=config), compiler_options=compilation.options(jax.default_backend())
    )

    def texts(captions: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        tokens = tokens_of(captions)
        parts = []
        for start in range(0, len(tokens), _TEXTS):
            part = tokens[start : start + _TEXTS]
            padded = np.pad(part, ((0, _TEXTS - len(part)), (0, 0)), mode="edge")  # one compiled shape
            parts.append(np.asarray(encode(params["text"], padded))[: len(part)])
        return np.concatenate(parts)

    def score(images: UInt8[np.ndarray, "n h w c"], captions: Sequence[str]) -> Float32[np.ndarray, "n"]:
        seen, said = network(images).features, texts(captions)
        norms = np.linalg.norm(seen, axis=1) * np.linalg.norm(said, axis=1)
        return np.asarray(np.sum(seen * said, axis=1) / norms, np.float32)

    return Alignment("clip_score", fingerprint, score)


def read_config(values: Mapping[str, Any]) -> Config:
    """Of a config.json.

    Raises:
      ValueError: an activation or a size that is not known here.
    """

    def tower(name: str) -> Tower:
        part = values[f"{name}_config"]
        default = {"vision": 12, "text": 8}[name]
        activation = part.get("hidden_act", "quick_gelu")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"hidden_act of {name} is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
        return Tower(part.get("num_attention_heads", default), activation, part.get("layer_norm_eps", 1e-5))

    vision, text = values["vision_config"], values["text_config"]
    if vision.get("image_size", 224) != dinov2.SIZE:
        raise ValueError(f"image_size is {vision['image_size']}, expected {dinov2.SIZE}")
    end = text.get("eos_token_id", 49407)
    return Config(
        tower("vision"),
        tower("text"),
        patch=vision.get("patch_size", 32),
        length=text.get("max_position_embeddings", 77),
        end=None if end == _LEGACY_EOS else end,
    )


def from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of both towers, float32, from the tensors of a file.

    Raises:
      ValueError: one is missing.
    """
    try:
        vision = _tower(tensors, "vision_model")
        vision |= {
            "class": tensors["vision_model.embeddings.class_embedding"],
            # Out, in, h, w: a patch is a row of its pixels, channels last.
            "patch": tensors["vision_model.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "position": tensors["vision_model.embeddings.position_embedding.weight"],
            "norm_in": _norm(tensors, "vision_model.pre_layrnorm"),  # as it is called there
            "norm_out": _norm(tensors, "vision_model.post_layernorm"),
            "projection": tensors["visual_projection.weight"].T,
        }
        text = _tower(tensors, "text_model")
        text |= {
            "token": tensors["text_model.embeddings.token_embedding.weight"],
            "position": tensors["text_model.embeddings.position_embedding.weight"],
            "norm_out": _norm(tensors, "text_model.final_layer_norm"),
            "projection": tensors["text_projection.weight"].T,
        }
    except KeyError as error:
        raise ValueError(f"got no tensor {error.args[0]}, expected those of a CLIP") from error
    return jax.tree.map(lambda array: np.ascontiguousarray(array, np.float32), {"vision": vision, "text": text})


def _norm(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def _tower(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    matches = (re.match(rf"{name}\.encoder\.layers\.(\d+)\.", key) for key in tensors)
    depth = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if not depth:
        raise KeyError(f"{name}.encoder.layers.0")

    def stacked(part: str, kind: str) -> np.ndarray:
        return np.stack([tensors[f"{name}.encoder.layers.{i}.{part}.{kind}"] for i in range(depth)])

    def dense(part: str) -> dict[str, np.ndarray]:
        return {"kernel": stacked(part, "weight").swapaxes(1, 2), "bias": stacked(part, "bias")}

    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
    names |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    layers = {short: dense(part) for short, part in names.items()}
    norms = {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    for short, part in norms.items():
        layers[short] = {"scale": stacked(part, "weight"), "bias": stacked(part, "bias")}
    return {"layers": layers}


def encode_images(params: Params, config: Config, images: UInt8[Array, "n h w c"]) -> Float[Array, "n d"]:
    """Vectors of square images of any size, float32."""
    mean, std = (np.reshape(np.array(values, np.float32), (1, 1, 1, 3)) for values in (_MEAN, _STD))
    side, patch = dinov2.SIZE // config.patch, config.patch
    with jax.default_matmul_precision("highest"):
        pixels = (dinov2.resize(images) / 255.0 - mean) / std
        patches = pixels.reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
        x = jnp.einsum("nhwijc,ijcd->nhwd", patches, params["patch"])
        x = x.reshape(len(x), side * side, -1)
        first = jnp.broadcast_to(params["class"][None, None], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + params["position"][None]
        x = layer_norm(params["norm_in"], x, config.vision.epsilon)
        x = _transformer(params["layers"], x, config.vision, None)
        return jnp.matmul(layer_norm(params["norm_out"], x[:, :1], config.vision.epsilon)[:, 0], params["projection"])


def encode_texts(params: Params, tokens: Int[Array, "n t"], *, config: Config) -> Float[Array, "n d"]:
    """Vectors of texts, float32: what the transformer makes of the last token, which has seen all before it."""
    with jax.default_matmul_precision("highest"):
        x = params["token"][tokens] + params["position"][None]
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        x = layer_norm(params["norm_out"], _transformer(params["layers"], x, config.text, causal), config.text.epsilon)
        # The first of them: a text is filled up with more.
        last = jnp.argmax(tokens if config.end is None else tokens == config.end, axis=1)
        return jnp.matmul(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], params["projection"])


def _transformer(
    layers: Params, x: Float[Array, "n t d"], tower: Tower, mask: Bool[Array, "t t"] | None
) -> Float[Array, "n t d"]:
    def layer(x: Array, params: Params) -> tuple[Array, None]:
        h = layer_norm(params["norm1"], x, tower.epsilon)
        q, k, v = (dense(params[name], h).reshape(*h.shape[:2], tower.num_heads, -1) for name in "qkv")
        h = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
        x = x + dense(params["out"], h.reshape(x.shape))
        h = _ACTIVATIONS[tower.activation](dense(params["fc1"], layer_norm(params["norm2"], x, tower.epsilon)))
        return x + dense(params["fc2"], h), None

    return lax.scan(layer, x, layers)[0]


def _tokens_of(tokenizer: Any, length: int, captions: Sequence[str]) -> Int[np.ndarray, "n t"]:
    """Numbers of tokens with the marks of start and end, which a cut text keeps, filled up with the latter."""
    rows = np.empty((len(captions), length), np.int32)
    for row, encoded in zip(rows, tokenizer.encode_batch(list(captions)), strict=True):
        numbers = encoded.ids
        row[:] = numbers[-1]
        row[: len(numbers)] = numbers[: length - 1] + numbers[-1:] if len(numbers) > length else numbers
    return rows
