"""Feature networks: images in, the rows that metrics are computed from out, on all devices.

    network = weights.load("inception", "inception.npz")  # of python -m mscm.metrics.convert
    outputs = network(images)  # uint8 "n h w c" -> Outputs of float32 rows
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from mscm import compilation

_ACCELERATOR_FACTOR = 8  # as many images at a time on each device


class Outputs(NamedTuple):
    """What one forward pass gives; arrays of `n` rows."""

    features: Float[Array, "n d"] | Float[np.ndarray, "n d"]
    spatial: Float[Array, "n s"] | Float[np.ndarray, "n s"] | None = None  # of an earlier layer, for sFID
    probabilities: Float[Array, "n k"] | Float[np.ndarray, "n k"] | None = None  # of classes, for the Inception score
    alignment: Float[np.ndarray, "n"] | None = None  # with the captions, of which a network knows nothing


def rows_of(output: Array | np.ndarray | None, what: str) -> np.ndarray:
    """One of the `Outputs`, on the host.

    Raises:
      ValueError: the network has none; `what` is what the output is called.
    """
    if output is None:
        raise ValueError(f"got a feature network without {what}, expected one that has them")
    return np.asarray(output)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A function of images with its weights; calling it returns NumPy arrays.

    Every device of every process computes its part of a batch, and each process gets all rows.
    """

    name: str  # inception, classifier, ...: metrics are named after it
    fingerprint: str  # of weights and precision: scores of another one are not comparable
    params: Any
    forward: Callable[[Any, UInt8[Array, "n h w c"]], Outputs]
    batch_size: int  # images at a time on a CPU, whose caches are small
    shape: tuple[int, int, int] | None = None  # of the images that it takes; None: of any
    largest_call: int | None = None  # images that it is given at once; None: not known

    def for_calls_of(self, num_images: int) -> "FeatureNetwork":
        """The same for calls of at most so many images: fewer devices' worth of padding, and still one program."""
        return dataclasses.replace(self, largest_call=num_images)

    @property
    def _at_a_time(self) -> int:
        """Images of one run of the program, on all devices together: a number that never changes, so that neither what
        came before nor the last, smaller call decides the last bits of a row."""
        devices = jax.device_count()
        most = self.batch_size * devices * (1 if jax.default_backend() == "cpu" else _ACCELERATOR_FACTOR)
        if self.largest_call is None:
            return most
        runs = -(-self.largest_call // most)  # of equal size
        return -(-self.largest_call // (runs * devices)) * devices

    @functools.cached_property
    def _placed(self) -> tuple[Callable[[Any, np.ndarray], Outputs], Any]:
        mesh = Mesh(jax.devices(), ("rows",), axis_types=(AxisType.Auto,))
        whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))

        def forward(params: Any, images: Array) -> Outputs:
            return self.forward(params, jax.lax.with_sharding_constraint(images, rows))

        options = compilation.options(jax.devices()[0].platform)
        compiled = jax.jit(forward, in_shardings=whole, out_shardings=whole, compiler_options=options)
        return compiled, jax.device_put(self.params, whole)

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> Outputs:
        """One row for each image; a row does not depend on the other images.

        Raises:
          ValueError: the images are not uint8, or not of the network's shape.
        """
        images = np.asarray(images)
        if self.shape is None:
            right, expected = images.ndim == 4 and images.shape[-1] in (1, 3), "h, w, 1 or 3"
        else:
            right, expected = images.shape[1:] == self.shape, ", ".join(map(str, self.shape))
        if images.dtype != np.uint8 or not right:
            raise ValueError(
                f"{self.name}: got {images.dtype} images of shape {images.shape}, expected uint8 of shape "
                f"(n, {expected}); convert floats with transforms.to_uint8."
            )
        compiled, params = self._placed
        batch_size = self._at_a_time
        parts: list[list[np.ndarray | None]] = []
        for start in range(0, max(len(images), 1), batch_size):
            batch = images[start : start + batch_size]
            # The last batch is padded, not shortened: a second shape would compile a second time.
            padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))
            outputs = compiled(params, padded)
            parts.append([None if rows is None else np.asarray(rows)[: len(batch)] for rows in outputs])
        features, *others = ([rows for rows in column if rows is not None] for column in zip(*parts, strict=True))
        return Outputs(np.concatenate(features), *(np.concatenate(column) if column else None for column in others))


def pixels(shape: tuple[int, int, int]) -> FeatureNetwork:
    """The identity: the pixels themselves, in [-1, 1], for images too small for a network to see anything in them."""

    def forward(params: None, images: Array) -> Outputs:
        return Outputs(jnp.reshape(images, (len(images), -1)) / 127.5 - 1.0)

    return FeatureNetwork("pixels", "identity", None, forward, batch_size=1024, shape=shape)
