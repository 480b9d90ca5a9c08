"""Compiles a training step for devices that you need not have: does it fit, and how fast can it be?

  python -m mscm.plan --config=configs/imagenet64_cd8.py --topology=v5e:8x8
  python -m mscm.plan --config=configs/digits_cd4.py --topology=host

A topology is CHIP:SHAPE; a name that is none lists those that are. It needs pip install -e .[aot] and no TPU; a large
network takes minutes. host compiles for the devices of this machine and measures a few steps on them. Any key of the
config can be overridden: --config.train.batch_size=1024.
"""

import dataclasses
import json

from absl import flags, logging
from ml_collections import config_flags

from mscm import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/imagenet64_cd8.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE such as v5e:8x8, or host.")
JSON = flags.DEFINE_string("json", None, "File to write the same to as JSON.")
LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch", False, "Also search the largest batch that fits, to an eighth; compiles about six times more."
)


def main() -> None:
    """Compiles, prints, writes."""
    from mscm import planning  # here and not above: --help must not wait for jax
    from mscm.config import ConfigError

    config, topology = CONFIG.value, TOPOLOGY.value
    if LARGEST_BATCH.value and topology == planning.HOST:
        raise ConfigError("--largest_batch: got --topology=host, expected a topology, whose compiler knows what fits")
    logging.info("Compiling %s for %s", config.name, topology)
    plan = planning.plan_here(config) if topology == planning.HOST else planning.plan_for(config, topology)
    if LARGEST_BATCH.value:
        plan = _with_largest_batch(plan, config)
    if JSON.value:
        try:
            cli.write_text(JSON.value, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: got {JSON.value!r}, expected a file to write to: {error.strerror}") from error
    if not plan.fits:
        raise ConfigError(does_not_fit(plan))
    print(describe(plan), flush=True)


def _with_largest_batch(plan, config):
    from mscm import planning

    def fits(batch_size: int) -> bool:
        if batch_size == plan.global_batch_size:
            return plan.fits
        changed = config.copy_and_resolve_references()
        changed.train.batch_size = batch_size
        found = planning.plan_for(changed, plan.topology).fits
        logging.info("A batch of %d %s", batch_size, "fits" if found else "does not fit")
        return found

    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    low, high = planning.find_largest_batch(fits, plan.global_batch_size, parts)
    return dataclasses.replace(plan, largest_batch_size=low, smallest_batch_size_that_does_not_fit=high)


def does_not_fit(plan) -> str:
    """One sentence: what the program needs, what there is, what to change."""
    needs = "more" if plan.peak_hbm_bytes is None else f"{_gib(plan.peak_hbm_bytes)} of"
    has = "" if plan.hbm_capacity_bytes is None else f" and {_gib(plan.hbm_capacity_bytes)} there"
    largest = "" if plan.largest_batch_size is None else f"; {plan.largest_batch_size} fits"
    return (
        f"{plan.config} on {plan.topology}: got a program that needs {needs} HBM on each device{has}, expected one "
        "that fits; set config.model.remat=full, cut the state with a larger config.mesh.fsdp, or lower "
        f"config.train.batch_size from {plan.global_batch_size}{largest}"
    )


def describe(plan) -> str:
    """The plan as lines for a person."""
    lines = [
        f"{plan.config} on {plan.topology}",
        f"  devices       {plan.num_devices} x {plan.device_kind}, {_mesh(plan)}, batch {plan.global_batch_size}",
        f"  parameters    {_si(plan.parameters)}",
        f"  memory        {_memory(plan)}",
        f"  model FLOPs   {_model_flops(plan)}",
        f"  executed      {_executed(plan)}",
        f"  HBM traffic   {_si(plan.bytes_per_step)}B per step and device",
    ]
    for kind, messages in sorted(plan.collectives.items()):
        lines.append(
            f"  {kind:<13} {messages.count:.4g} per step, of {_si(messages.bytes)}B; "
            f"each device sends {_si(messages.sent_bytes)}B"
        )
    if plan.loops_of_unknown_length:
        lines.append(f"  warning       {plan.loops_of_unknown_length} loops of unknown length are counted once")
    if plan.bound_by is None:
        lines.append(f"  bound         none: the peak rates of {plan.device_kind!r} are not known here")
    else:
        times = ", ".join(f"{part} {1e3 * seconds:.4g} ms" for part, seconds in plan.seconds_at_least.items())
        lines += [
            f"  at least      {times} per step; {plan.bound_by} binds",
            f"  at most       {plan.steps_per_second_bound:.4g} steps/s, {plan.images_per_second_bound:.4g} images/s; "
            f"{plan.num_steps} steps take {plan.hours_at_least:.4g} hours or more",
        ]
    if plan.steps_per_second_measured is not None:
        measured = plan.steps_per_second_measured
        share = f", {100 * measured / plan.steps_per_second_bound:.0f} % of the bound" if plan.bound_by else ""
        images = measured * plan.global_batch_size
        lines.append(f"  measured      {measured:.4g} steps/s, {images:.4g} images/s{share}")
    lines.append(
        f"  compiled      in {cli.duration(plan.compile_seconds)} with {_gib(plan.host_memory_bytes)} of this "
        "machine's memory"
    )
    return "\n".join(lines)


def _mesh(plan) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())


def _memory(plan) -> str:
    capacity = "" if plan.hbm_capacity_bytes is None else f" of {_gib(plan.hbm_capacity_bytes)}"
    text = f"fits: {_gib(plan.peak_hbm_bytes)}{capacity} of each device at the peak"
    if plan.largest_batch_size is None:
        return text
    return f"{text}; a batch of {plan.largest_batch_size} fits, of {plan.smallest_batch_size_that_does_not_fit} not"


def _model_flops(plan) -> str:
    evaluations = plan.model_flops_per_step / (plan.forward_flops_per_image * plan.global_batch_size)
    forward = f"{evaluations:.3g} forward evaluations of {_si(plan.forward_flops_per_image)} for each image"
    return f"{_si(plan.model_flops_per_step)} per step: {forward}"


def _executed(plan) -> str:
    share = plan.executed_flops_per_step / plan.num_devices
    again = f"{_si(plan.executed_flops_per_step)} per step with what is computed again to save memory"
    times = plan.device_flops_per_step / share
    return f"{again}; {_si(plan.device_flops_per_step)} by each device, {times:.3g} times its share"


def _si(number: float) -> str:
    """Four digits and a prefix: 2.234 P."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return f"{number:.4g} "


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    cli.run(main, doc=__doc__, required=("config", "topology"))
