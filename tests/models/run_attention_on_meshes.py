"""Attention on each mesh that the command line names; run by test_attention on eight devices.

Reads q, k, v and a cotangent of each shape from the directory, writes output and gradients of each implementation, and
prints, as JSON by mesh, how many collectives the kernel's program has where everything divides among the devices.
"""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding, PartitionSpec

from mscm.models import attention
from mscm.training import partition

# The interpreter made of XLA's own operations: the TPU's, which test_attention uses on one device, stops for ever where
# there are more devices than cores.
splash_attention_kernel.make_splash_mha_single_device = functools.partial(
    splash_attention_kernel.make_splash_mha_single_device, interpret=True
)


def value_and_gradients(implementation, q, k, v, g):
    out, pullback = jax.vjp(functools.partial(attention.attend, implementation=implementation), q, k, v)
    return out, *pullback(g)


def main(directory: Path, meshes: list[str]) -> None:
    collectives = {}
    for name in meshes:
        mesh = partition.make_mesh(partition.MeshSizes(*map(int, name.split("x"))))
        for shape in ("cut", "whole"):
            arrays = list(np.load(directory / f"{shape}.npz").values())
            spec = PartitionSpec(partition.BATCH_AXES, None, "tensor") if shape == "cut" else PartitionSpec()
            for implementation in ("xla", "one_by_one", "splash"):
                function = partition.on_mesh(functools.partial(value_and_gradients, implementation), mesh)
                compiled = jax.jit(function, in_shardings=NamedSharding(mesh, spec)).lower(*arrays).compile()
                results = compiled(*arrays)
                np.savez(directory / f"{implementation}_{name}_{shape}.npz", *map(np.asarray, results))
                if (shape, implementation) == ("cut", "splash"):
                    found = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
                    collectives[name] = len(found)
                    assert all(result.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4) for result in results)
    print(json.dumps(collectives))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
