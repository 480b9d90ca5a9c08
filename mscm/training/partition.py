"""Which part of which array lies on which device: one mesh, one table of rules.

The mesh has three axes. Along `data` lie whole copies of the state; along `fsdp` its parts, gathered where a layer
needs them; along `tensor` the heads and hidden units of a layer, whose sums are exchanged. Batches are cut along `data`
and `fsdp`. An array whose axes have the logical names of `models/layers.py` is cut by two rules:

  (1) an axis that `RULES` names takes that mesh axis, if no other axis of the array has it and its length divides;
  (2) if `fsdp` is then still free, the longest axis left that divides takes it.

Vectors (biases, scales of norms) are not cut along `fsdp`: they are less than a hundredth of the bytes, and each would
cost a message. `layers`, the axis of scanned blocks, is never cut: the scan takes one layer at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SCANNED = "layers"

RULES = {
    "embed": "fsdp",
    "cond": "fsdp",
    "conv_in": "fsdp",
    "freq": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
}

# The same for activations, where a layer asks; a tuple, as Flax takes it.
ACTIVATION_RULES = (("batch", BATCH_AXES), ("heads", RULES["heads"]), ("mlp", RULES["mlp"]))


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh; -1, for at most one of them, is what the others leave."""

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh: got {self}, expected numbers of at least 1, or -1 for one of them: what is left")

    def __str__(self) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, dataclasses.astuple(self), strict=True))

    def resolved(self, num_devices: int) -> tuple[int, ...]:
        """The three sizes for a number of devices.

        Raises:
          ValueError: the product does not fit.
        """
        sizes = dataclasses.astuple(self)
        product = int(np.prod([size for size in sizes if size != -1]))
        if product > num_devices or (-1 in sizes and num_devices % product):
            raise ValueError(
                f"mesh: got {self} and {num_devices} devices, expected sizes whose product is at most, or with a -1 "
                f"divides, {num_devices}; change config.mesh"
            )
        return tuple(num_devices // product if size == -1 else size for size in sizes)


def make_mesh(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (None: all), the first of them where fewer are asked for.

    Where the devices are several slices with a slow network between them, `data` goes across the slices.

    Raises:
      ValueError: the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes.resolved(len(devices))
    used = int(np.prod(shape))
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh: got {sizes} for {len(devices)} devices of {jax.process_count()} processes, expected to use all; "
            "set one of the sizes to -1"
        )
    devices = devices[:used]
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if shape[0] % num_slices:
        raise ValueError(
            f"mesh: got data={shape[0]} on {num_slices} slices, expected a multiple of {num_slices}: only `data` goes "
            "across slices"
        )
    within = (shape[0] // num_slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Mesh axis of each axis of an array: the rules (1) and (2); `names` are logical, `sizes` those of the mesh."""
    names = (*names, *(None for _ in shape[len(names) :]))
    free = [i for i, name in enumerate(names) if name != SCANNED]
    allowed = {"tensor"} if len(free) == 1 else {"fsdp", "tensor"}
    spec: list[str | None] = [None] * len(shape)
    for i in free:
        name = names[i]
        axis = None if name is None else RULES.get(name)
        if axis in allowed and axis not in spec and shape[i] % sizes[axis] == 0:
            spec[i] = axis
    left = [i for i in free if spec[i] is None and shape[i] % sizes["fsdp"] == 0]
    if "fsdp" in allowed and "fsdp" not in spec and left:
        spec[max(left, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def partition_specs(boxed: Any, sizes: dict[str, int]) -> Any:
    """`partition_spec` of every leaf of a tree of abstract arrays, boxed with their logical names by Flax."""
    return jax.tree.map(
        lambda leaf, names: partition_spec(leaf.shape, tuple(names), sizes),
        nn.meta.unbox(boxed),
        nn.get_partition_spec(boxed),
    )


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """The same as shardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(boxed, dict(mesh.shape)))


def placed(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays with the places where they are to be."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Rows cut along `data` and `fsdp`, after `leading` axes that are not cut."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """`function`, to be traced where JAX and Flax know the mesh and how a layer's activations lie on it.

    For kernels, which each device runs on its own part, and where the compiler would choose worse (`placement.place`).
    """

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(ACTIVATION_RULES):
            return function(*args)

    return traced


def check_batch_size(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError where the rows of a batch do not divide among its parts, and those among the devices."""
    if batch_size % num_microbatches or batch_size // num_microbatches % rounded_up(1, mesh):
        raise ValueError(
            f"train.batch_size: got {batch_size}, expected a multiple of train.num_microbatches = {num_microbatches} "
            f"times data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} devices; change one of them"
        )


def rounded_up(batch_size: int, mesh: Mesh) -> int:
    """The next number of rows that divides among the devices."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    return -(-batch_size // parts) * parts


def local_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, "rows"]:
    """The rows of a batch that devices of this process hold, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def global_batch(local: dict[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all devices from this process's rows `steps rows ...`; copies to the devices in the background."""
    sharding = batch_sharding(mesh, leading=1)

    def assemble(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (slice(None) if index is None else index[1]).indices(batch_size)  # None: all of it
            return array[:, np.searchsorted(rows, first) : np.searchsorted(rows, last)]

        shape = (array.shape[0], batch_size, *array.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: assemble(array) for name, array in local.items()}
