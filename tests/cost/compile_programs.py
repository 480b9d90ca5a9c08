"""Compiles small programs for eight devices and prints their HLO text as JSON by name; run by test_hlo."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS, WIDTH, ROWS = 5, 64, 16


def scanned(weights, x):
    """Layers in a scan: their weights, cut along the rows, are gathered one layer at a time."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def unrolled(weights, x):
    """The same without a loop."""
    for i in range(LAYERS):
        x = jnp.tanh(x @ weights[i])
    return x


def nested(weights, x):
    """The scan three times, in a scan."""
    return jax.lax.scan(lambda x, _: (scanned(weights, x), None), x, None, length=3)[0]


def main() -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("fsdp", None))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    one = jax.ShapeDtypeStruct((1000, 128), jnp.float32)
    square = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = {
        name: jax.jit(function, out_shardings=rows).lower(weights, x).compile()
        for name, function in (("scanned", scanned), ("unrolled", unrolled), ("nested", nested))
    }
    compiled["elementwise"] = jax.jit(lambda x: 2 * x + 1).lower(one).compile()
    compiled["product"] = jax.jit(lambda a, b: a @ b).lower(square, square).compile()
    compiled["rows"] = jax.jit(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 10)).lower(one, 3).compile()
    update = jax.jit(lambda x, y, i: jax.lax.dynamic_update_slice_in_dim(x, y, i, 0), donate_argnums=0)
    compiled["update"] = update.lower(one, jax.ShapeDtypeStruct((10, 128), jnp.float32), 3).compile()
    print(json.dumps({name: program.as_text() for name, program in compiled.items()}))


if __name__ == "__main__":
    main()
