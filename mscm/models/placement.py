"""How activations lie on the mesh: examples along `batch`, heads and hidden units along `tensor`.

The mesh and the axis rules are those around the trace (`training/partition.py` sets both); without them all of this
does nothing, so that a model also runs alone.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def spec_of(shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of the logically named axes of an array; an axis that does not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()

    def cut(size: int, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        parts = (axes,) if isinstance(axes, str) else axes or ()
        return None if size % math.prod(mesh.shape[part] for part in parts) else axes

    return PartitionSpec(*map(cut, shape, nn.logical_to_mesh_axes(names) or ()))


def device_kind() -> str | None:
    """What JAX calls the devices of the mesh around the trace; None without one, where nothing is known of them."""
    mesh = jax.sharding.get_abstract_mesh()
    # By its kind: only a jax younger than the oldest that we run on knows an abstract device's platform.
    return None if mesh.empty else mesh.abstract_device.device_kind


def place(x: Array, *names: str | None) -> Array:
    """The same array, laid out by the logical names of its axes.

    The compiler must be told: left alone, it cuts the sums of a scanned layer along `fsdp`, as its weights are cut,
    computes them for all examples of that axis, and adds up activations where it should have gathered weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(x.shape, names)))
