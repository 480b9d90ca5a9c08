"""Sharding: what lies where, and that it changes no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mscm.config import load_config
from mscm.experiment import build
from mscm.training import partition

ROOT = Path(__file__).resolve().parents[2]
FSDP_8 = {"data": 1, "fsdp": 8, "tensor": 1}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "shape, names, sizes, expected",
    [
        ((64, 256), ("embed", "mlp"), CUBE, P("fsdp", "tensor")),
        ((256, 64), ("mlp", "embed"), CUBE, P("tensor", "fsdp")),
        ((4, 64, 192), ("layers", "embed", "heads"), CUBE, P(None, "fsdp", "tensor")),
        ((3, 3, 64, 64), (None, None, "conv_in", "conv_out"), CUBE, P(None, None, "fsdp", None)),
        # Three colours do not divide: the longest axis that does takes its place.
        ((3, 3, 3, 64), (None, None, "conv_in", "conv_out"), FSDP_8, P(None, None, None, "fsdp")),
        # Vectors are cut along `tensor` alone, scanned ones too.
        ((256,), ("mlp",), CUBE, P("tensor")),
        ((64,), ("embed",), CUBE, P(None)),
        ((4, 64), ("layers", "embed"), CUBE, P(None, None)),
        # Never the axis of the layers, whatever divides.
        ((8, 3, 5), ("layers", "embed", "mlp"), FSDP_8, P(None, None, "tensor")),
        ((), (), CUBE, P()),
        ((7, 7), (), FSDP_8, P(None, None)),
    ],
)
def test_rules(shape, names, sizes, expected):
    assert partition.partition_spec(shape, names, sizes) == expected


@pytest.mark.parametrize("name", ["imagenet64_cd8.py", "imagenet64_cd8.py:large", "imagenet128_cd8.py:large"])
def test_what_is_whole_on_every_device_is_small_and_known(name):
    """Under fsdp = 8: biases, scales of norms and counters; less than one per cent of the bytes of the state."""
    state = build(load_config(f"configs/{name}")).boxed_state()
    specs = partition.partition_specs(state, FSDP_8)
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda s: s, partition.nn.meta.unbox(state)))
    whole, total = {}, 0
    for (path, leaf), spec in zip(shapes, jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True):
        total += leaf.size
        if "fsdp" not in spec:
            whole[jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]] = leaf.size
    assert set(whole) == {"bias", "scale", "count", "step"}
    assert sum(whole.values()) < 0.01 * total


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 1, 1), 8, (1, 1, 1)), ((-1, 8, 1), 64, (8, 8, 1))],
)
def test_sizes_are_resolved(sizes, devices, expected):
    assert partition.MeshSizes(*sizes).resolved(devices) == expected


@pytest.mark.parametrize("sizes, devices", [((-1, 3, 1), 8), ((4, 4, 1), 8), ((-1, 16, 1), 8)])
def test_sizes_that_do_not_fit_are_a_sentence(sizes, devices):
    with pytest.raises(ValueError, match=f"got data={sizes[0]} x fsdp={sizes[1]} .* and 8 devices, expected"):
        partition.MeshSizes(*sizes).resolved(devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, -2, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="expected numbers of at least 1, or -1 for one of them"):
        partition.MeshSizes(*sizes)


MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five steps on each mesh of eight devices, in a process of their own: the suite has one device."""
    directory = tmp_path_factory.mktemp("meshes")
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "training" / "run_on_meshes.py"), str(directory), *MESHES]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return directory, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_a_mesh_changes_no_number(runs, mesh):
    """Losses, and parameters after five steps, of eight devices and of one: 1e-5 relative."""
    directory, results = runs
    np.testing.assert_allclose(results[mesh]["losses"], results["1x1x1"]["losses"], rtol=1e-5)
    got, expected = np.load(directory / f"{mesh}.npz"), np.load(directory / "1x1x1.npz")
    assert set(got.files) == set(expected.files)
    for name in expected.files:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_fsdp_cuts_the_parameters(runs):
    """An eighth on each device, but for the vectors."""
    _, results = runs
    assert results["8x1x1"]["local"] == results["8x1x1"]["bytes"]
    vectors = results["1x8x1"]["local"] - results["1x8x1"]["bytes"] / 8
    assert 0 <= vectors < 0.03 * results["1x8x1"]["bytes"]
