"""Plans: the mathematics' operations, the search, what is refused, and one step compiled for a TPU."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mscm import planning, processes
from mscm.config import ConfigError, load_config
from mscm.cost import flops
from mscm.cost import plan as plans
from mscm.cost.plan import Plan
from mscm.experiment import build

ROOT = Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: pip install -e .[aot]"
)


def load(name: str, **train):
    """A config whose step is traced on the one device of the tests."""
    config = load_config(f"configs/{name}")
    config.mesh.fsdp = 1
    config.train.update(train)
    return config


@pytest.fixture(scope="module")
def tiny():
    """The digits' teacher with one narrow block, two steps in a dispatch."""
    config = load("digits_teacher.py", batch_size=8, steps_per_dispatch=2)
    config.model.update(dict(emb_dim=16, head_dim=16))
    config.model.middle.update(dict(width=16, num_blocks=1))
    return config


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("imagenet64_teacher.py", 218),
        ("imagenet64_teacher.py:large", 838),
        ("imagenet128_teacher.py", 277),
        ("imagenet128_teacher.py:large", 1072),
    ],
)
def test_operations_of_the_papers_networks(name, gflops):
    """Forward evaluations of arXiv:2403.06807v3's networks, counted by hand from its table."""
    forward, step = planning.model_flops(build(load(name, batch_size=1)))
    assert forward == pytest.approx(gflops * 1e9, rel=0.005)
    assert step == 3 * forward


@pytest.mark.parametrize(
    ("name", "evaluations"), [("digits_teacher.py", 3), ("digits_ct4.py", 4), ("digits_cd4.py", 5)]
)
def test_evaluations_of_each_objective(name, evaluations):
    forward, step = planning.model_flops(build(load(name)))
    assert step / forward == pytest.approx(evaluations, rel=1e-6)


def test_the_backward_pass_is_two_forward_passes():
    """The gradient of the whole step, with nothing computed again, against the assumption of `model_flops`."""
    experiment = build(load("digits_cd4.py"))
    _, expected = planning.model_flops(experiment)
    traced = experiment.train_steps().trace(*planning.abstract_inputs(experiment))
    # The first layer needs no gradient with respect to its input.
    found = flops.count(traced.jaxpr) / experiment.train.steps_per_dispatch
    assert 0.99 * expected < found < expected


@pytest.mark.parametrize("largest", [1, 7, 8, 63, 64, 65, 100, 1000, 12345])
@pytest.mark.parametrize("start", [8, 64, 2048])
def test_the_search_ends_an_eighth_from_the_largest_batch(largest, start):
    tried = []

    def fits(batch_size):
        tried.append(batch_size)
        return batch_size <= largest

    low, high = planning.find_largest_batch(fits, start, 8)
    assert low <= largest < high
    assert high - low <= max(8, low // 8)
    assert all(batch_size % 8 == 0 and batch_size > 0 for batch_size in tried)
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [("v5e:5x5", "v5e:16x16"), ("v1:2x2", "a chip of v4, v5e"), ("banana", "v5e:8x8")],
)
def test_an_unknown_topology_is_refused_before_anything_runs(tiny, monkeypatch, topology, complaint):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ConfigError, match=complaint):
        planning.plan_for(tiny, topology)


def test_a_missing_compiler_is_named(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ConfigError, match=r"no package libtpu; expected it: pip install -e \.\[aot\]"):
        planning.plan_for(tiny, "v5e:2x2")


def test_a_compiler_that_dies_is_reported(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    with pytest.raises(ConfigError, match="got signal 9 .* too little memory"):
        planning.plan_for(tiny, "v5e:2x2")


def test_an_error_in_the_child_is_no_error_of_the_users(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(RuntimeError, match="exit code 1"):
        planning.plan_for(tiny, "v5e:2x2")


_COMPILER = """
import os, sys, time
from mscm import processes
processes.end_with(int(sys.argv[1]))
print(os.getpid(), processes.start_of(os.getpid()), flush=True)
time.sleep(600)
"""


def test_a_compiler_ends_with_who_asked_it(tiny, tmp_path):
    """It would compile for minutes, in gigabytes, and nobody would read its answer."""
    asks = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"
    parent = subprocess.Popen([sys.executable, "-c", asks, _COMPILER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid, start = parent.stdout.readline().split()
    assert processes.is_alive(int(pid), start)
    parent.kill()
    parent.stdout.read()  # until the child has closed it too
    parent.stdout.close()
    parent.wait()

    request = {"config": json.loads(tiny.to_json_best_effort()), "topology": "v5e:2x2", "num_slices": 1, "parent": 1}
    command = [sys.executable, "-m", "mscm.planning", str(tmp_path / "reply.json")]
    ended = subprocess.run(command, input=json.dumps(request), text=True, cwd=ROOT, timeout=120, stderr=subprocess.PIPE)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.", round(21.5 * 2**30)),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.25T) exceeds available HBM (15.75G).",
            1280 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory", None),
    ],
)
def test_what_a_program_needs_is_read_from_the_compilers_sentence(message, expected):
    assert planning.used_bytes(message) == expected


def test_here(tiny):
    """On a CPU: compiled, measured, and no bound made up for rates that nobody published."""
    plan = planning.plan_here(tiny)
    assert plan.fits and plan.num_devices == 1 and plan.device_kind == jax.devices()[0].device_kind
    assert plan.steps_per_second_measured > 0 and plan.steps_per_second_bound is None and plan.bound_by is None
    # One device does the whole step, and the compiler leaves out nothing that the jaxpr has.
    assert plan.device_flops_per_step == pytest.approx(plan.executed_flops_per_step, rel=0.02)
    text = plans.describe(plan)
    assert "measured" in text and "peak rates of 'cpu' are not known" in text
    json.dumps(dataclasses.asdict(plan))


@pytest.mark.parametrize(("start", "num_microbatches"), [(16, 1), (64, 1), (16, 2)])
def test_the_search_changes_the_batch_and_nothing_else(tiny, monkeypatch, start, num_microbatches):
    """On a mesh that cuts each microbatch into four, with 40 images that fit."""
    config = tiny.copy_and_resolve_references()
    config.train.num_microbatches = num_microbatches
    first = Plan(
        config="name",
        topology="v5e:2x2",
        device_kind="TPU v5 lite",
        num_devices=8,
        num_slices=2,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        global_batch_size=start,
        num_steps=1,
        parameters=1,
        forward_flops_per_image=1.0,
        model_flops_per_step=1.0,
        executed_flops_per_step=1.0,
        fits=start <= 40,
        peak_hbm_bytes=1,
        hbm_capacity_bytes=1,
    )

    def plan_for(config, topology, num_slices, *, file):
        assert (topology, num_slices, file) == ("v5e:2x2", 2, "file.py")
        assert config.train.batch_size % (4 * num_microbatches) == 0
        assert config.model == tiny.model
        return dataclasses.replace(first, fits=config.train.batch_size <= 40)

    monkeypatch.setattr(planning, "plan_for", plan_for)
    found = planning.with_largest_batch(first, config, file="file.py")
    expected = (40, 40 + 4 * num_microbatches)
    assert (found.largest_batch_size, found.smallest_batch_size_that_does_not_fit) == expected
    assert config.train.batch_size == 8


@needs_libtpu
def test_a_topology(tiny, tmp_path):
    """The command, a distillation, four chips: gradients summed once a step, a bound, the keys that scripts read."""
    path = tmp_path / "plan.json"
    words = ["--config=configs/digits_cd4.py", "--config.train.batch_size=8", "--topology=v5e:2x2", f"--json={path}"]
    arguments = [sys.executable, "-m", "mscm.plan", *words]
    run = subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    plan = json.loads(path.read_text())
    assert plan["fits"] and plan["num_devices"] == 4 and plan["global_batch_size"] == 8
    assert 0 < plan["peak_hbm_bytes"] < plan["hbm_capacity_bytes"] == 16 * 2**30
    assert plan["bound_by"] in ("compute", "memory", "interconnect")
    seconds = plan["seconds_at_least"]
    assert set(seconds) == {"compute", "memory", "interconnect"}
    assert plan["steps_per_second_bound"] == pytest.approx(1 / seconds[plan["bound_by"]])
    assert seconds["memory"] == pytest.approx(plan["bytes_per_step"] / 819e9)
    # Every gradient, in float32, is summed over the chips; of sums a chip sends its parts twice.
    reduced = plan["collectives"]["all-reduce"]
    assert reduced["bytes"] == pytest.approx(4 * plan["parameters"], rel=0.01)
    assert reduced["sent_bytes"] == pytest.approx(2 * 3 / 4 * reduced["bytes"])
    assert plan["loops_of_unknown_length"] == 0
    assert plan["device_flops_per_step"] * 4 == pytest.approx(plan["model_flops_per_step"], rel=0.05)
    assert f"{plan['bound_by']} binds" in run.stdout


@needs_libtpu
def test_the_compiler_knows_what_a_config_imports(tmp_path):
    """An objective that is not in the package."""
    path = tmp_path / "plan.json"
    words = ["--config=trajectory_digits.py", "--config.train.batch_size=8", "--topology=v5e:2x2", f"--json={path}"]
    subprocess.run([sys.executable, "-m", "mscm.plan", *words], cwd=ROOT / "docs" / "examples", check=True)
    assert json.loads(path.read_text())["fits"]


@needs_libtpu
def test_two_slices():
    """Gradients are summed within a slice, each chip's quarter of them between the slices, and that binds."""
    plan = planning.plan_for(load("digits_cd4.py", batch_size=8, steps_per_dispatch=1), "v5e:2x2", num_slices=2)
    assert (plan.num_devices, plan.num_slices) == (8, 2)
    assert plan.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    sent = plan.collectives["dcn all-reduce"].sent_bytes
    # A sum of two is sent once, 4 bytes each by four chips; small ones are not cut, and large ones filled up.
    assert plan.parameters <= sent < 1.5 * plan.parameters
    assert plan.seconds_at_least["dcn"] == pytest.approx(sent / 3.125e9)
    assert plan.bound_by == "dcn" and "on 2 slices of v5e:2x2" in plans.describe(plan)
    assert plan.device_flops_per_step * 8 == pytest.approx(plan.model_flops_per_step, rel=0.05)


@needs_libtpu
def test_only_data_goes_across_slices(tiny):
    config = tiny.copy_and_resolve_references()
    config.mesh.data, config.mesh.fsdp = 1, 8
    with pytest.raises(ConfigError, match="got data=1 on 2 slices, expected a multiple of 2"):
        planning.plan_for(config, "v5e:2x2", 2)


@needs_libtpu
def test_a_mesh_that_does_not_fit_is_one_sentence(tiny):
    config = tiny.copy_and_resolve_references()
    config.mesh.fsdp = 3
    with pytest.raises(ConfigError, match="divides, 4; change config.mesh"):
        planning.plan_for(config, "v5e:2x2")
