"""Image transforms that run on the device, inside the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8


def to_float(images: UInt8[Array | np.ndarray, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """x / 127.5 - 1: uint8 in [0, 255] to float32 in [-1, 1].

    The scaling of Progressive Distillation, arXiv:2202.00512.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"to_float: got {images.dtype} images, expected uint8; images are scaled to [-1, 1] only once.")
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array | np.ndarray, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """clip(round((x + 1) 127.5), 0, 255): floats in [-1, 1] to uint8, the inverse of `to_float`.

    Samples are quantised as an image file would before they are scored.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"to_uint8: got {images.dtype} images, expected floats in [-1, 1]; are they uint8 already?")
    levels = jnp.round((jnp.asarray(images).astype(jnp.float32) + 1.0) * 127.5)
    return jnp.clip(levels, 0.0, 255.0).astype(jnp.uint8)


def random_flip(images: Shaped[Array, "b h w c"], key: PRNGKeyArray) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2; consumes `key`.

    On the device and from the step's key, because host randomness would depend on the number of processes.
    """
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1, :], images)
