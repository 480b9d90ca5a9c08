"""A training step compiled for devices that need not be there: does it fit, and how fast can it be?

The step is the real one: the experiment's network, optimiser, shardings and donated state, traced from shapes alone.
For a TPU topology it is compiled by libtpu on any CPU, in a child process, because libtpu reads its environment once,
and a compiler that runs out of memory should end only itself.
"""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.experimental import topologies
from ml_collections import ConfigDict

from mscm import atomic, processes
from mscm.config import ConfigError, load_config
from mscm.cost import chips, flops, hlo
from mscm.cost.plan import Plan
from mscm.experiment import Experiment, build
from mscm.methods import condition_of
from mscm.training import partition
from mscm.training.step import Batch
from mscm.types import Images, Params, Times

HOST = "host"

# libtpu without a TPU: it must not look for one, and several processes may use it at once.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # it would load what it finds onto devices that are not there
}
_WARM_UP_STEPS, _MEASURED_STEPS = 1, 5


def plan_for(config: ConfigDict, topology: str, num_slices: int = 1, *, file: str | None = None) -> Plan:
    """Compiles for a topology such as `v5e:8x8`, or several slices of it, in a child process.

    Args:
      file: of the config. The child imports what it imports, which may be where an objective or a network is.

    Raises:
      ConfigError: unknown topology, no libtpu or one that does not fit jaxlib, a config that is wrong or does not fit
        the devices, or a compiler that was killed; not where the program is too large: then `fits` is False.
    """
    _chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology: got {topology!r}, which needs the compiler for TPUs, and no package libtpu; expected it: "
            "pip install -e .[aot], or --topology=host for the devices of this machine"
        )
    request = {
        "config": json.loads(config.to_json_best_effort()), "topology": topology, "num_slices": num_slices,
        "parent": os.getpid(), "file": file,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        reply = os.path.join(folder, "reply.json")
        command, environment = [sys.executable, "-m", "mscm.planning", reply], os.environ | _ENVIRONMENT
        ended = subprocess.run(command, input=json.dumps(request), text=True, env=environment, check=False)
        if ended.returncode < 0:
            raise ConfigError(
                f"--topology: got signal {-ended.returncode} from the process that compiles for {topology}, expected a "
                "program; 9 means that this machine has too little memory: a large network needs 6 GiB free"
            )
        if ended.returncode:
            raise RuntimeError(f"got exit code {ended.returncode} from the process that compiles; its error is above")
        with open(reply, encoding="utf-8") as written:
            answer = json.load(written)
    if "error" in answer:
        raise ConfigError(answer["error"])
    collectives = answer["collectives"]
    if collectives is not None:
        collectives = {kind: hlo.Messages(**messages) for kind, messages in collectives.items()}
    return Plan(**answer | {"collectives": collectives})


def plan_here(config: ConfigDict) -> Plan:
    """Compiles for the devices that are there and measures a few steps on them.

    Raises:
      ConfigError: a config that is wrong or does not fit the devices.
    """
    experiment = build(config)
    chip = chips.chip_of_kind(experiment.mesh.devices.flat[0].device_kind)
    return _plan(experiment, HOST, chip, num_slices=1, measure=True)


def with_largest_batch(plan: Plan, config: ConfigDict, *, file: str | None = None) -> Plan:
    """The plan of a config with the largest global batch that fits, each attempt a compilation as by `plan_for`."""

    def fits(batch_size: int) -> bool:
        if batch_size == plan.global_batch_size:
            found = plan.fits
        else:
            changed = config.copy_and_resolve_references()
            changed.train.batch_size = batch_size
            found = plan_for(changed, plan.topology, plan.num_slices, file=file).fits
        logging.info("A batch of %d %s", batch_size, "fits" if found else "does not fit")
        return found

    unit = config.train.num_microbatches * plan.mesh["data"] * plan.mesh["fsdp"]
    low, high = find_largest_batch(fits, plan.global_batch_size, unit)
    return dataclasses.replace(plan, largest_batch_size=low, smallest_batch_size_that_does_not_fit=high)


def find_largest_batch(fits: Callable[[int], bool], start: int, unit: int) -> tuple[int, int]:
    """The largest batch known to fit and the smallest known not to, less than an eighth or one `unit` apart.

    `start` is a multiple of `unit`, the number of parts that microbatches and mesh cut a batch into; 0 always fits.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while low == 0 and high > unit:
        middle = high // (2 * unit) * unit
        low, high = (middle, high) if fits(middle) else (0, middle)
    while high - low > max(unit, low // 8):
        middle = (low + high) // (2 * unit) * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def model_flops(experiment: Experiment) -> tuple[int, int]:
    """Operations of one forward evaluation of a batch, and of one step's mathematics.

    A backward pass is two forward ones. So consistency training is 4 of them for each image (student forward and
    backward, reference), distillation 5 (and the teacher), or 6 (a guided teacher); the loss is walked, not assumed.
    A network in which two images are compared is asked for the gradient of one, with respect to the image alone.
    """
    state, frozen, batches, key = abstract_inputs(experiment)
    batch = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in batches.items()}
    z_t = jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32)
    t = jax.ShapeDtypeStruct(z_t.shape[:1], jnp.float32)

    def forward(params: Params, batch: Batch, z_t: Images, t: Times) -> Images:
        return experiment.denoiser(params, condition_of(batch))(z_t, t)

    once = flops.count(jax.make_jaxpr(forward)(state.params, batch, z_t, t))
    rest = (state.params, state.target, frozen, batch, key, state.step)
    loss = flops.count(jax.make_jaxpr(experiment.loss_fn)(*rest))
    comparison = 0
    if frozen.features:
        config = ConfigDict(experiment.config)
        config.objective.distance = ConfigDict(dict(name="l2"))
        comparison = loss - flops.count(jax.make_jaxpr(build(config).loss_fn)(*rest))
    return once, loss + 2 * once + comparison // 2


def least_seconds(experiment: Experiment) -> float | None:
    """What the mathematics of a step takes where its chips compute at their peak; None: the peak is not known."""
    devices = experiment.mesh.devices
    chip = chips.chip_of_kind(devices.flat[0].device_kind)
    if chip is None:
        return None
    _, flops = model_flops(experiment)
    return chips.least_seconds(chip, flops=flops / devices.size, hbm_bytes=0.0, sent_bytes=0.0)["compute"]


def abstract_inputs(experiment: Experiment) -> tuple[Any, Any, Any, Any]:
    """Shapes, types and places of what the jitted step takes."""
    spec, data, mesh = experiment.train, experiment.data, experiment.mesh
    state = experiment.placed_state()
    place = partition.batch_sharding(mesh, leading=1)
    rows = (spec.steps_per_dispatch, spec.batch_size)
    inside = {"image": ((data.resolution, data.resolution, data.channels), jnp.uint8), "label": ((), jnp.int32)}
    if data.text is not None:
        inside |= {"tokens": data.text.of_tokens, "mask": ((data.text.length,), jnp.bool_)}
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=place) for name, (shape, dtype) in inside.items()
    }
    key = partition.placed(jax.eval_shape(lambda: jax.random.key(0)), partition.replicated(mesh))
    return state, experiment.placed_frozen(), batch, key


def random_inputs(experiment: Experiment) -> tuple[Any, Any, Any, Any]:
    """The same as arrays: a new state, and random images."""
    _, _, batch, key = abstract_inputs(experiment)
    rng = np.random.default_rng(0)
    limits = {"image": 256, "label": experiment.data.num_classes, "tokens": 256, "mask": 2}
    inputs = {name: rng.integers(0, limits[name], array.shape).astype(array.dtype) for name, array in batch.items()}
    state = experiment.random_state(jax.random.key(0))
    frozen = experiment.random_frozen(jax.random.key(0))
    inputs = jax.device_put(inputs, batch["image"].sharding)
    return state, frozen, inputs, jax.device_put(jax.random.key(1), key.sharding)


def _plan(
    experiment: Experiment, topology: str, chip: chips.Chip | None, *, num_slices: int, measure: bool
) -> Plan:
    spec, mesh = experiment.train, experiment.mesh
    device = mesh.devices.flat[0]
    forward, model = model_flops(experiment)
    started = time.monotonic()
    inputs = abstract_inputs(experiment)
    traced = experiment.train_steps().trace(*inputs)
    executed = flops.count(traced.jaxpr) / spec.steps_per_dispatch
    plan = Plan(
        config=experiment.name,
        topology=topology,
        device_kind=device.device_kind,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        global_batch_size=spec.batch_size,
        num_steps=spec.num_steps,
        parameters=int(parameter_overview.count_parameters(inputs[0].params)),
        forward_flops_per_image=forward / spec.batch_size,
        model_flops_per_step=float(model),
        executed_flops_per_step=executed,
        fits=True,
        peak_hbm_bytes=None,
        hbm_capacity_bytes=chip.hbm_bytes // chip.devices if chip else None,
        num_slices=num_slices,
    )
    try:
        compiled = traced.lower().compile()
        seconds = time.monotonic() - started
        measured = _measure(experiment, compiled) if measure else None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(plan, fits=False, peak_hbm_bytes=used_bytes(str(error)))
    module = hlo.parse(_text(compiled, topology), num_slices)
    cost = hlo.Cost().plus(hlo.cost(module), 1 / spec.steps_per_dispatch)
    # A kernel's operations are in the jaxpr only, work that devices repeat in the compiled program only.
    device_flops = max(cost.flops, executed / mesh.size)
    plan = dataclasses.replace(
        plan,
        peak_hbm_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        device_flops_per_step=device_flops,
        bytes_per_step=cost.hbm_bytes,
        collectives=cost.collectives,
        loops_of_unknown_length=cost.loops_of_unknown_length,
        compile_seconds=seconds,
        host_memory_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        steps_per_second_measured=measured,
    )
    return plan if chip is None else _with_bounds(plan, chip, device_flops, cost)


def _text(compiled: jax.stages.Compiled, topology: str) -> str:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology: got a program for {topology} that jaxlib {jax.__version__} cannot read, because libtpu is "
            f"newer, expected the libtpu that belongs to it: pip install jax[tpu]=={jax.__version__} ({error})"
        ) from error
    if text is None:
        raise ConfigError(f"--topology: got a program for {topology} without a text, expected what it does as HLO")
    return text


def _with_bounds(plan: Plan, chip: chips.Chip, device_flops: float, cost: hlo.Cost) -> Plan:
    seconds = chips.least_seconds(
        chip, flops=device_flops, hbm_bytes=cost.hbm_bytes, sent_bytes=cost.sent_bytes, dcn_bytes=cost.dcn_bytes
    )
    bound_by = max(seconds, key=seconds.__getitem__)
    return dataclasses.replace(
        plan,
        seconds_at_least=seconds,
        steps_per_second_bound=1 / seconds[bound_by],
        images_per_second_bound=plan.global_batch_size / seconds[bound_by],
        hours_at_least=plan.num_steps * seconds[bound_by] / 3600,
        bound_by=bound_by,
    )


def _measure(experiment: Experiment, compiled: jax.stages.Compiled) -> float:
    """Steps per second of the compiled program, on random images."""
    state, *others = random_inputs(experiment)
    for _ in range(_WARM_UP_STEPS):
        state, _ = compiled(state, *others)
    jax.block_until_ready(state)
    started = time.perf_counter()
    for _ in range(_MEASURED_STEPS):
        state, _ = compiled(state, *others)
    jax.block_until_ready(state)
    return _MEASURED_STEPS * experiment.train.steps_per_dispatch / (time.perf_counter() - started)


def used_bytes(message: str) -> int | None:
    """What a program would need, from the compiler's sentence: its temporaries, or all of it."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    return round(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else None


def _chip(topology: str) -> chips.Chip:
    try:
        return chips.chip_of(topology)
    except ValueError as error:
        raise ConfigError(f"--topology: {error}") from error


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: the plan as JSON, or the sentence that says why there is none."""
    topology = request["topology"]
    try:
        chip = _chip(topology)
        if request["file"] is not None:
            load_config(request["file"])
        options: dict[str, Any] = {"num_slices": request["num_slices"]}
        if chip.config is not None:
            options["chip_config_name"] = chip.config
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        experiment = build(ConfigDict(request["config"])).on(devices)
        return dataclasses.asdict(_plan(experiment, topology, chip, num_slices=request["num_slices"], measure=False))
    except ConfigError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    processes.end_with(asked["parent"])
    atomic.write_text(sys.argv[1], json.dumps(_answer(asked)))
