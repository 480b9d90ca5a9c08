"""Plans as sentences."""

import dataclasses

import pytest

from mscm.cost.hlo import Messages
from mscm.cost.plan import Plan, describe, does_not_fit

TOO_LARGE = Plan(
    config="name",
    topology="v5e:2x2",
    device_kind="TPU v5 lite",
    num_devices=4,
    mesh={"data": 1, "fsdp": 4, "tensor": 1},
    global_batch_size=8,
    num_steps=3600,
    parameters=10_000_000,
    forward_flops_per_image=1e12,
    model_flops_per_step=40e12,
    executed_flops_per_step=48e12,
    fits=False,
    peak_hbm_bytes=20 * 2**30,
    hbm_capacity_bytes=16 * 2**30,
)
FITS = dataclasses.replace(
    TOO_LARGE,
    fits=True,
    peak_hbm_bytes=8 * 2**30,
    device_flops_per_step=24e12,
    bytes_per_step=819e9,
    collectives={"all-gather": Messages(5.0, 8e9, 7e9)},
    seconds_at_least={"compute": 0.5, "memory": 1.0, "interconnect": 0.035},
    steps_per_second_bound=1.0,
    images_per_second_bound=8.0,
    hours_at_least=1.0,
    bound_by="memory",
    compile_seconds=12.3,
    host_memory_bytes=2**30,
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, ("20.00 GiB", "16.00 GiB", "remat=full", "config.mesh.fsdp", "batch_size from 8")),
        ({"largest_batch_size": 4}, ("batch_size from 8; 4 fits",)),
        ({"peak_hbm_bytes": None}, ("needs more HBM", "16.00 GiB there")),
        ({"hbm_capacity_bytes": None}, ("20.00 GiB of HBM on each device, expected",)),
    ],
)
def test_too_large_a_program(changes, parts):
    """What it needs, what there is, what to change."""
    sentence = does_not_fit(dataclasses.replace(TOO_LARGE, **changes))
    for part in parts:
        assert part in sentence


def test_a_plan():
    """Every number that a person plans with, in its unit."""
    plan = dataclasses.replace(FITS, loops_of_unknown_length=1, steps_per_second_measured=0.5)
    text = describe(plan)
    for part in (
        "4 x TPU v5 lite, data=1 x fsdp=4 x tensor=1, batch 8",
        "8.00 GiB of 16.00 GiB",
        "40 T per step: 5 forward evaluations of 1 T",
        "48 T per step",
        "24 T by each device, 2 times its share",
        "819 GB per step",
        "5 per step, of 8 GB; each device sends 7 GB",
        "1 loops of unknown length",
        "memory 1000 ms",
        "memory binds",
        "1 steps/s, 8 images/s; 3600 steps take 1 hours or more",
        "0.5 steps/s, 4 images/s, 50 % of the bound",
        "12 seconds with 1.00 GiB",
    ):
        assert part in text, text
    assert "on v5e:2x2\n" in text and "between slices" not in text


def test_a_plan_of_two_slices():
    """Says so, and whether the bound has the network between them."""
    plan = dataclasses.replace(
        FITS,
        num_slices=2,
        collectives={"dcn all-reduce": Messages(2.0, 8e9, 8e9)},
        seconds_at_least={**FITS.seconds_at_least, "dcn": 2.0},
        bound_by="dcn",
    )
    text = describe(plan)
    for part in ("name on 2 slices of v5e:2x2", "dcn all-reduce 2 per step", "dcn 2000 ms per step; dcn binds"):
        assert part in text, text
    assert "leaves out" not in text
    text = describe(dataclasses.replace(plan, seconds_at_least=FITS.seconds_at_least, bound_by="memory"))
    assert "leaves out the network between slices, whose rate is not known" in text
