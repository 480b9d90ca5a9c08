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


SINGLE = ["one:1x1x1:5", "data:8x1x1:5", "fsdp:1x8x1:5", "cube:2x2x2:5", "one_then_two:1x8x1:3"]
TWO = ["one_then_two:2x4x1:5", "two_then_one:1x8x1:3"]


def _train(run_together, directory, jobs, *, family="digits", num_processes=1):
    """The jobs on eight devices, in processes of their own: the suite has one device."""
    command = [sys.executable, str(ROOT / "tests" / "training" / "run_on_meshes.py"), family, str(directory), *jobs]
    if num_processes > 1:
        command.append("WHERE")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // num_processes}"
    (_, output, _), *others = ended = run_together(*[command] * num_processes, XLA_FLAGS=flags)
    for code, _, errors in ended:
        assert code == 0, errors
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert not any(line.startswith("{") for _, output, _ in others for line in output.splitlines())
    return {line["name"]: line for line in lines}


def _check_equal(directory, result, expected):
    """Losses to 1e-5 relative, parameters to 1e-5 of the largest of a leaf."""
    losses, name = result["losses"], result["name"]
    np.testing.assert_allclose(losses, expected["losses"][-len(losses) :], rtol=1e-5, err_msg=name)
    got, wanted = (np.load(directory / f"{line['name']}.npz") for line in (result, expected))
    assert set(got.files) == set(wanted.files)
    for key in wanted.files:
        scale = np.abs(wanted[key]).max()
        np.testing.assert_allclose(got[key], wanted[key], rtol=0, atol=1e-5 * scale, err_msg=f"{name} {key}")


# One test, because two workers would each run the whole of it for their part.
@pytest.mark.slow  # compiles the step for five meshes, in four processes
def test_neither_mesh_nor_processes_change_a_number(run_together, tmp_path):
    """Five steps on each mesh, by one process and by two, which go on where the other stopped, also on another mesh.

    Losses, and parameters after five steps, are those of one device to 1e-5 relative; fsdp cuts the parameters.
    """
    results = _train(run_together, tmp_path, SINGLE)
    two = _train(run_together, tmp_path, TWO, num_processes=2)
    np.testing.assert_allclose(two["two_then_one"]["losses"], results["one"]["losses"][:3], rtol=1e-5)
    results |= two | _train(run_together, tmp_path, ["two_then_one:1x8x1:5"])
    assert results.keys() == {job.split(":")[0] for job in SINGLE + TWO}
    for result in results.values():
        _check_equal(tmp_path, result, results["one"])
    lengths = {name: len(result["losses"]) for name, result in results.items()}
    assert lengths == {"one": 5, "data": 5, "fsdp": 5, "cube": 5, "one_then_two": 2, "two_then_one": 2}
    # An eighth on each device, but for the vectors.
    assert results["data"]["local"] == results["data"]["bytes"]
    vectors = results["fsdp"]["local"] - results["fsdp"]["bytes"] / 8
    assert 0 <= vectors < 0.03 * results["fsdp"]["bytes"]


@pytest.mark.slow  # compiles the step for two meshes
def test_no_mesh_changes_a_number_of_a_text_to_image_model(run_together, tmp_path):
    """The distillation of a guided teacher of captions, cut along all three axes."""
    jobs = ["captioned:1x1x1:4", "captioned_cube:2x2x2:4"]
    results = _train(run_together, tmp_path, jobs, family="captioned_digits")
    _check_equal(tmp_path, results["captioned_cube"], results["captioned"])
    cube = results["captioned_cube"]
    assert 0.25 < cube["local"] / cube["bytes"] < 0.3  # tensor and fsdp, but for vectors


@pytest.mark.parametrize("data, fsdp, tensor", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_each_device_does_its_share(tmp_path, data, fsdp, tensor):
    """Of the operations of the compiled step: left to itself, the compiler repeats those of scanned blocks."""
    plan = tmp_path / "plan.json"
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    command = [sys.executable, "-m", "mscm.plan", "--config=configs/digits_teacher.py", "--topology=host"]
    command += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command += ["--config.model.scan_blocks=True", "--config.train.steps_per_dispatch=1", f"--json={plan}"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(plan.read_text())
    assert found["mesh"] == mesh
    assert found["device_flops_per_step"] == pytest.approx(found["executed_flops_per_step"] / 8, rel=0.03)
