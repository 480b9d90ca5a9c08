"""The roofline, and what names of chips mean."""

import dataclasses

import pytest

from mscm.cost import chips

V5E = chips.chip_of("v5e:8x8")


def test_a_second_of_each_part_takes_a_second():
    """v5e in the figures of its maker: 197 TFLOP/s, 819 GB/s, 1600 Gbit/s sent."""
    found = chips.least_seconds(V5E, flops=197e12, hbm_bytes=2 * 819e9, sent_bytes=3 * 1600e9 / 8)
    assert found == pytest.approx({"compute": 1, "memory": 2, "interconnect": 3})


def test_what_goes_to_other_slices_has_a_rate_of_its_own():
    """6.4 Tbit/s of a pod of 256 chips; nothing where nothing is sent, or nobody published a rate."""
    work = dict(flops=1e12, hbm_bytes=2e9, sent_bytes=3e6)
    one_slice = chips.least_seconds(V5E, **work)
    assert chips.least_seconds(V5E, **work, dcn_bytes=6.4e12 / 8 / 256) == pytest.approx({**one_slice, "dcn": 1.0})
    assert "dcn" not in one_slice
    assert "dcn" not in chips.least_seconds(chips.chip_of("v4:2x2x1"), **work, dcn_bytes=1e9)


def test_a_device_that_is_half_a_chip_takes_twice_as_long():
    half = dataclasses.replace(V5E, devices=2)
    work = dict(flops=1e12, hbm_bytes=2e9, sent_bytes=3e6)
    whole = chips.least_seconds(V5E, **work)
    assert chips.least_seconds(half, **work) == pytest.approx({part: 2 * seconds for part, seconds in whole.items()})


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [
        ("v9:8x8", "with a chip of v4, v5e, v5p, v6e, tpu7x"),
        ("", "with a chip of v4"),
        ("v5e", "one of v5e:1x1, v5e:2x2"),
        ("v5e:3x3", "v5e:16x16"),
        ("v5p:8x8", "v5p:2x2x1"),
    ],
)
def test_an_unknown_topology_lists_the_known_ones(topology, complaint):
    with pytest.raises(ValueError, match=complaint):
        chips.chip_of(topology)


def test_names_are_unambiguous():
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    assert all(chips.chip_of_kind(kind).name for kind in kinds)
    assert chips.chip_of_kind("cpu") is None
