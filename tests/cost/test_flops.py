"""Operations counted from jaxprs: closed forms of single operations."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mscm.cost import flops


def count(function, *shapes):
    return flops.count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


PRODUCT = 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        ("product", jnp.matmul, [(3, 5), (5, 7)], PRODUCT),
        ("batched product", jnp.matmul, [(11, 3, 5), (11, 5, 7)], 11 * PRODUCT),
        ("sums are free", lambda x, y: jnp.tanh(x + y), [(3, 5), (3, 5)], 0),
        ("convolution", conv, [(2, 8, 8, 4), (3, 3, 4, 6)], 2 * 2 * 64 * 9 * 4 * 6),
        (
            "grouped convolution",
            functools.partial(conv, feature_group_count=2),
            [(2, 8, 8, 4), (3, 3, 2, 6)],
            2 * 2 * 64 * 9 * 2 * 6,
        ),
        ("jit", jax.jit(jnp.matmul), [(3, 5), (5, 7)], PRODUCT),
        ("remat", jax.checkpoint(jnp.matmul), [(3, 5), (5, 7)], PRODUCT),
        ("loop", lambda a, b: jax.lax.map(lambda row: row @ b, a), [(11, 3, 5), (5, 7)], 11 * PRODUCT),
        (
            "the larger branch",
            lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.tanh(a @ b) @ b.T @ b),
            [(3, 5), (5, 7)],
            3 * PRODUCT,
        ),
        # With respect to both factors, and the value itself.
        ("gradient", jax.grad(lambda a, b: jnp.tanh(a @ b).sum(), (0, 1)), [(3, 5), (5, 7)], 3 * PRODUCT),
        ("gradient of a convolution", jax.grad(lambda x, k: jnp.tanh(conv(x, k)).sum(), (0, 1)),
         [(2, 8, 8, 4), (3, 3, 4, 6)], 3 * 2 * 2 * 64 * 9 * 4 * 6),
    ],
)  # fmt: skip
def test_closed_forms(name, function, shapes, expected):
    assert count(function, *shapes) == expected


def test_a_part_for_each_device_counts_for_all():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})
    assert count(product, (12, 5), (5, 7)) == 4 * PRODUCT


def test_a_kernel_counts_once_for_each_block():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    product = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((12, 7), jnp.float32),
        grid=(4,),
        in_specs=[pl.BlockSpec((3, 5), lambda i: (i, 0)), pl.BlockSpec((5, 7), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((3, 7), lambda i: (i, 0)),
        interpret=True,
    )
    assert count(product, (12, 5), (5, 7)) == 4 * PRODUCT


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while loop"):
        count(lambda a: jax.lax.while_loop(lambda a: a[0, 0] > 0, lambda a: a @ a, a), (3, 3))
