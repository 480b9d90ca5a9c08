"""What is known of a training step before it runs, for a person and for scripts."""

import dataclasses
from collections.abc import Mapping

from mscm.cost.hlo import Messages


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a training step on some devices; per step, and of one device where it says so.

    What needs the compiled program is None where the compiler found that it does not fit, what needs the chip's
    rates is None where they are not known.
    """

    config: str
    topology: str
    device_kind: str
    num_devices: int  # of all slices
    mesh: Mapping[str, int]
    global_batch_size: int
    num_steps: int
    parameters: int
    forward_flops_per_image: float
    model_flops_per_step: float  # the mathematics': without what is computed again to save memory
    executed_flops_per_step: float  # with it; of all devices, each doing its share
    fits: bool
    peak_hbm_bytes: int | None  # of one device
    hbm_capacity_bytes: int | None  # of one device
    num_slices: int = 1  # of the topology
    device_flops_per_step: float | None = None  # of one device: more than its share where devices do the same work
    bytes_per_step: float | None = None  # between one device and its HBM
    collectives: Mapping[str, Messages] | None = None  # of one device
    loops_of_unknown_length: int | None = None  # counted once in the three above
    seconds_at_least: Mapping[str, float] | None = None  # for each part of the chip
    steps_per_second_bound: float | None = None
    images_per_second_bound: float | None = None
    hours_at_least: float | None = None
    bound_by: str | None = None
    compile_seconds: float | None = None
    host_memory_bytes: int | None = None  # most that the process needed, tracing and compiling
    steps_per_second_measured: float | None = None
    largest_batch_size: int | None = None
    smallest_batch_size_that_does_not_fit: int | None = None


def where(topology: str, num_slices: int) -> str:
    """What a program is compiled for, in words."""
    return topology if num_slices == 1 else f"{num_slices} slices of {topology}"


def does_not_fit(plan: Plan) -> str:
    """One sentence: what the program needs, what there is, what to change."""
    needs = "more" if plan.peak_hbm_bytes is None else f"{_gib(plan.peak_hbm_bytes)} of"
    has = "" if plan.hbm_capacity_bytes is None else f" and {_gib(plan.hbm_capacity_bytes)} there"
    largest = "" if plan.largest_batch_size is None else f"; {plan.largest_batch_size} fits"
    place = where(plan.topology, plan.num_slices)
    return (
        f"{plan.config} on {place}: got a program that needs {needs} HBM on each device{has}, expected one "
        "that fits; set config.model.remat=full, cut the state with a larger config.mesh.fsdp, or lower "
        f"config.train.batch_size from {plan.global_batch_size}{largest}"
    )


def describe(plan: Plan) -> str:
    """The plan as lines for a person.

    Raises:
      ValueError: it does not fit; `does_not_fit` says so.
    """
    peak, memory = plan.peak_hbm_bytes, plan.host_memory_bytes
    traffic, collectives, device_flops = plan.bytes_per_step, plan.collectives, plan.device_flops_per_step
    if peak is None or memory is None or traffic is None or collectives is None or device_flops is None:
        raise ValueError(does_not_fit(plan))
    lines = [
        f"{plan.config} on {where(plan.topology, plan.num_slices)}",
        f"  devices        {plan.num_devices} x {plan.device_kind}, {_mesh(plan)}, batch {plan.global_batch_size}",
        f"  parameters     {_si(plan.parameters)}",
        f"  memory         {_memory(plan, peak)}",
        f"  model FLOPs    {_model_flops(plan)}",
        f"  executed       {_executed(plan, device_flops)}",
        f"  HBM traffic    {_si(traffic)}B per step and device",
    ]
    for kind, messages in sorted(collectives.items()):
        lines.append(
            f"  {kind:<14} {messages.count:.4g} per step, of {_si(messages.bytes)}B; "
            f"each device sends {_si(messages.sent_bytes)}B"
        )
    if plan.loops_of_unknown_length:
        lines.append(f"  warning        {plan.loops_of_unknown_length} loops of unknown length are counted once")
    if plan.bound_by is None or plan.seconds_at_least is None:
        lines.append(f"  bound          none: the peak rates of {plan.device_kind!r} are not known here")
    else:
        times = ", ".join(f"{part} {1e3 * seconds:.4g} ms" for part, seconds in plan.seconds_at_least.items())
        lines += [
            f"  at least       {times} per step; {plan.bound_by} binds",
            f"  at most        {plan.steps_per_second_bound:.4g} steps/s, {plan.images_per_second_bound:.4g} images/s; "
            f"{plan.num_steps} steps take {plan.hours_at_least:.4g} hours or more",
        ]
        if plan.num_slices > 1 and "dcn" not in plan.seconds_at_least:
            lines.append("  warning        the bound leaves out the network between slices, whose rate is not known")
    if plan.steps_per_second_measured is not None:
        measured = plan.steps_per_second_measured
        bound = plan.steps_per_second_bound
        share = "" if bound is None else f", {100 * measured / bound:.0f} % of the bound"
        images = measured * plan.global_batch_size
        lines.append(f"  measured       {measured:.4g} steps/s, {images:.4g} images/s{share}")
    lines.append(
        f"  compiled       in {plan.compile_seconds:.0f} seconds with {_gib(memory)} of this "
        "machine's memory"
    )
    return "\n".join(lines)


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())


def _memory(plan: Plan, peak: int) -> str:
    capacity = "" if plan.hbm_capacity_bytes is None else f" of {_gib(plan.hbm_capacity_bytes)}"
    text = f"fits: {_gib(peak)}{capacity} of each device at the peak"
    if plan.largest_batch_size is None:
        return text
    return f"{text}; a batch of {plan.largest_batch_size} fits, of {plan.smallest_batch_size_that_does_not_fit} not"


def _model_flops(plan: Plan) -> str:
    evaluations = plan.model_flops_per_step / (plan.forward_flops_per_image * plan.global_batch_size)
    forward = f"{evaluations:.3g} forward evaluations of {_si(plan.forward_flops_per_image)} for each image"
    return f"{_si(plan.model_flops_per_step)} per step: {forward}"


def _executed(plan: Plan, device_flops: float) -> str:
    share = plan.executed_flops_per_step / plan.num_devices
    again = f"{_si(plan.executed_flops_per_step)} per step with what is computed again to save memory"
    times = device_flops / share
    return f"{again}; {_si(device_flops)} by each device, {times:.3g} times its share"


def _si(number: int | float) -> str:
    """Four digits and a prefix: 2.234 P."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return f"{number:.4g} "


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB"
