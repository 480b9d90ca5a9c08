"""Every implementation against float64, values and gradients; who gets which, and what is refused."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mscm.models import attention
from mscm.training import partition

ROOT = Path(__file__).resolve().parents[2]
DEVICE = jax.devices()[0]
ON_CUDNN = pytest.mark.skipif(not attention._has_cudnn(DEVICE.device_kind), reason="needs a GPU with cuDNN's attention")


def tensors(shape, dtype):
    """q, k, v and a cotangent, as the types hold them exactly: the reference starts from the rounded numbers."""
    drawn = np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32)
    return tuple(jnp.asarray(array, dtype) for array in drawn)


def reference(q, k, v, g):
    """The output and the gradients of sum(g * output), in float64, from the formulas."""
    q, k, v, g = (np.asarray(array, np.float64) for array in (q, k, v, g))
    scale = 1.0 / np.sqrt(q.shape[-1])
    logits = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    by_weight = np.einsum("bqhd,bkhd->bhqk", g, v)
    by_logit = weights * (by_weight - np.sum(weights * by_weight, axis=-1, keepdims=True))
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, v),
        scale * np.einsum("bhqk,bkhd->bqhd", by_logit, k),
        scale * np.einsum("bhqk,bqhd->bkhd", by_logit, q),
        np.einsum("bhqk,bqhd->bkhd", weights, g),
    )


def value_and_gradients(q, k, v, g, *, implementation):
    out, pullback = jax.vjp(functools.partial(attention.attend, implementation=implementation), q, k, v)
    return out, *pullback(g)


def assert_close(got, expected, *, tokens, head_dim, dtype):
    """Relative to the largest entry of each result.

    float32: unit roundoff 2^-24 times the terms of the two sums, the worst case of accumulation. bfloat16: at most
    eight numbers are rounded to 2^-9 on the way to a gradient (the scaled query, which counts twice; the weight; the
    output that the backward pass reads; the gradients of weight and logit; the result; its scale). All of one sign are
    2^-6.
    """
    tolerance = 2.0**-24 * (tokens + head_dim) if dtype == jnp.float32 else 2.0**-6
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.asarray(a).dtype == dtype
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error < tolerance, f"{name}: {error:.1e} of the largest entry, expected less than {tolerance:.1e}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("implementation", "shape"),
    [
        ("auto", (2, 16, 3, 32)),
        ("xla", (2, 16, 3, 32)),
        ("xla", (1, 384, 2, 128)),
        ("one_by_one", (2, 16, 3, 32)),
        ("splash", (1, 128, 2, 128)),  # one block: a fused backward pass
        ("splash", (1, 384, 1, 128)),  # three blocks
        pytest.param("cudnn", (2, 256, 2, 128), marks=ON_CUDNN),
        pytest.param("cudnn", (2, 64, 2, 64), marks=ON_CUDNN),
    ],
)
def test_values_and_gradients_are_those_of_float64(implementation, shape, dtype):
    if implementation == "cudnn" and dtype == jnp.float32:
        pytest.skip("cuDNN's attention takes 16-bit numbers only")
    arguments = tensors(shape, dtype)
    interpreted = implementation == "splash" and DEVICE.platform != "tpu"
    with pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext():
        got = jax.jit(functools.partial(value_and_gradients, implementation=implementation))(*arguments)
    assert_close(got, reference(*arguments), tokens=shape[1], head_dim=shape[3], dtype=dtype)


def test_heads_one_after_the_other_are_heads_together(monkeypatch):
    arguments = tensors((2, 16, 3, 32), jnp.float32)
    monkeypatch.setattr(attention, "_TOKENS_OF_HEADS_TOGETHER", 15)
    got = jax.jit(functools.partial(value_and_gradients, implementation="one_by_one"))(*arguments)
    assert_close(got, reference(*arguments), tokens=16, head_dim=32, dtype=jnp.float32)


@pytest.mark.parametrize("implementation", ["xla", "one_by_one"])
def test_large_logits_do_not_overflow(implementation):
    """Of several hundred: float32 has no exponential from 89 on."""
    q, k, v, g = tensors((2, 16, 3, 32), jnp.float32)
    arguments = (100 * q, k, v, g)
    got = jax.jit(functools.partial(value_and_gradients, implementation=implementation))(*arguments)
    for a, b in zip(got, reference(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())


MESHES = ("4x2x1", "2x2x2")
SHAPES = {"cut": (8, 128, 4, 128), "whole": (3, 128, 3, 128)}  # by whether it divides among the devices


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory):
    """Every implementation that a CPU can run, on eight devices, in a process of its own: the suite has one."""
    directory = tmp_path_factory.mktemp("attention")
    for name, shape in SHAPES.items():
        np.savez(directory / f"{name}.npz", *(np.asarray(array) for array in tensors(shape, jnp.float32)))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "models" / "run_attention_on_meshes.py"), str(directory), *MESHES]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return directory, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("implementation", ["xla", "one_by_one", "splash"])
def test_a_mesh_changes_no_value_and_no_gradient(on_meshes, implementation, mesh, shape):
    directory, _ = on_meshes
    got = np.load(directory / f"{implementation}_{mesh}_{shape}.npz").values()
    tokens, head_dim = SHAPES[shape][1], SHAPES[shape][3]
    expected = reference(*tensors(SHAPES[shape], jnp.float32))
    assert_close(got, expected, tokens=tokens, head_dim=head_dim, dtype=jnp.float32)


def test_each_device_computes_its_own_examples_and_heads(on_meshes):
    """No device gets another's: the program has no collective, and the output lies as the input did."""
    _, collectives = on_meshes
    assert collectives == {mesh: 0 for mesh in MESHES}


def mesh_of(kind, platform):
    """Eight devices that are not here."""
    known = {"device_kind": kind, "num_cores": 1, "platform": platform}
    fields = {field.name for field in dataclasses.fields(AbstractDevice)}  # an older jax has no `platform`
    device = AbstractDevice(**{name: value for name, value in known.items() if name in fields})
    return AbstractMesh((2, 2, 2), partition.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def program(mesh, *, shape=(8, 256, 4, 128), dtype=jnp.bfloat16, implementation="auto"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    function = functools.partial(attention.attend, implementation=implementation)
    return str(jax.make_jaxpr(partition.on_mesh(function, mesh) if mesh else function)(x, x, x))


def test_auto_asks_the_devices_of_the_mesh_and_not_this_machine():
    tpu = mesh_of("TPU v5 lite", "tpu")
    text = program(tpu)
    assert "pallas_call" in text and "bf16[2,256,2,128]" in text  # 8 examples on 4, 4 heads on 2 devices
    for mesh in (None, mesh_of("cpu", "cpu"), mesh_of("NVIDIA A100-SXM4-40GB", "gpu")):
        assert "pallas_call" not in program(mesh)


def test_on_cpus_auto_keeps_the_logits_of_many_tokens_out_of_memory():
    cpu, many, few = mesh_of("cpu", "cpu"), (64, 512, 4, 64), (64, 64, 4, 64)
    assert "[16,512,2,64]" in program(cpu, shape=many)  # of each device: 16 examples of 2 heads
    assert "f32[512,512]" in program(cpu, shape=many) and "4,512,512]" not in program(cpu, shape=many)
    assert "4,512,512]" in program(None, shape=many) and "4,64,64]" in program(cpu, shape=few)
    assert "[32,1024,1,64]" in program(cpu, shape=(64, 1024, 4, 64))  # 16 examples x 2 heads


def test_one_by_one_sums_over_the_first_axis_of_no_large_matrix():
    """A CPU takes two and a half times as long for such a product; XLA makes one of a transposed result."""
    arguments = tensors((2, 128, 2, 32), jnp.float32)
    function = jax.jit(functools.partial(value_and_gradients, implementation="one_by_one"))
    text = function.lower(*arguments).compile().as_text()
    shapes = dict(re.findall(r"%([\w.-]+) = f32\[([\d,]*)\]", text))
    products = re.findall(r"dot\(%([\w.-]+), %[\w.-]+\), lhs_contracting_dims=\{(\d)\}", text)
    large = [axis for name, axis in products if shapes[name] == "128,128"]
    assert len(products) == 14 and large and set(large) == {"1"}  # of each head two forward, five backward


@pytest.mark.parametrize("shape", [(8, 64, 4, 128), (8, 256, 4, 64), (8, 196, 4, 128)])
def test_auto_is_xla_where_the_kernel_does_not_fit(shape):
    assert "pallas_call" not in program(mesh_of("TPU v5 lite", "tpu"), shape=shape)


def test_cudnn_is_for_16_bits_on_gpus_that_are_here_and_young_enough(monkeypatch):
    """Traced only: there is no GPU. That cuDNN is there is pretended."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(attention, "_has_cudnn", lambda kind: "A100" in kind)
    young, old = mesh_of("NVIDIA A100-SXM4-40GB", "gpu"), mesh_of("Tesla T4", "gpu")
    text = program(young)
    assert "dot_product_attention_fwd" in text and "bf16[2,256,2,128]" in text  # 8 examples on 4, 4 heads on 2 devices
    assert "dot_product_attention_fwd" in program(young, shape=(8, 64, 4, 64))
    for other in (program(young, dtype=jnp.float32), program(young, shape=(8, 64, 4, 20)), program(old)):
        assert "dot_product_attention_fwd" not in other


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype", "sentence"),
    [
        ("flash", (1, 16, 1, 8), jnp.float32, "got attention 'flash', expected one of auto, xla, one_by_one, splash"),
        ("splash", (1, 64, 1, 128), jnp.float32, "'splash' for 64 tokens of float32 with head_dim=128, expected"),
        ("splash", (1, 128, 1, 32), jnp.float32, "head_dim=32, expected tokens and head_dim to be multiples of 128"),
        ("cudnn", (1, 64, 1, 64), jnp.float32, "'cudnn' for 64 tokens of float32 .* expected numbers of 16 bits"),
        ("cudnn", (1, 64, 1, 20), jnp.bfloat16, "head_dim=20, expected numbers of 16 bits and head_dim to be"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_sentence(implementation, shape, dtype, sentence):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=sentence):
        jax.eval_shape(functools.partial(attention.attend, implementation=implementation), x, x, x)


@pytest.mark.skipif(DEVICE.platform != "cpu", reason="says what a CPU cannot run")
@pytest.mark.parametrize(("implementation", "expected"), [("splash", "a TPU"), ("cudnn", "an NVIDIA GPU")])
def test_devices_that_cannot_run_it_are_refused(implementation, expected):
    with pytest.raises(ValueError, match=f"got attention '{implementation}' on 'cpu', expected {expected}"):
        attention.check_device(implementation, DEVICE)
    for runs_everywhere in ("auto", "xla", "one_by_one"):
        attention.check_device(runs_everywhere, DEVICE)
