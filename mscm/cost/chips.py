"""Chips and the roofline: the least time that a step can take on one.

Each part of a chip has a rate that nothing exceeds. With everything overlapped perfectly a step takes

  (1) max( operations / peak,  HBM bytes / HBM bandwidth,  bytes sent / interconnect bandwidth )

and of several slices at least the time in which a chip sends its bytes to the others through the network of the data
center (DCN). The inverse bounds the steps per second from above. Real steps overlap less, and reach half of a peak on a
good day.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker publishes of one chip. JAX shows it as `devices` devices, each with its share."""

    name: str  # as topologies name it
    kinds: tuple[str, ...]  # what JAX calls the device, ahead of time or at run time
    flops: float  # bfloat16 operations per second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes per second
    sent_bandwidth: float  # bytes per second that it can send to its neighbours, all links together
    dcn_bandwidth: float | None  # bytes per second that it can send to other slices; None: nobody published it
    topologies: tuple[str, ...]  # those that its documentation lists and fit one program, smallest first
    devices: int = 1
    config: str | None = None  # libtpu's name of how JAX uses the chip, where it is not the default


# The maker gives the interconnect in both directions; what a chip sends is half of that: v5e's 400 GB/s are the
# 1600 Gbit/s of older pages, times two directions.
_TWO_DIRECTIONS = 2
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

CHIPS = (
    # https://cloud.google.com/tpu/docs/v4; links: 6 of 50 GB/s in each direction, arXiv:2304.01433 Table 4.
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 6 * 50e9, None, _CUBES, config="megacore"),
    # https://cloud.google.com/tpu/docs/v5e; DCN: 6.4 Tbit/s for a pod of 256.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 400e9 / _TWO_DIRECTIONS, 25e9 / 8, _SQUARES),
    # https://cloud.google.com/tpu/docs/v5p
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 1200e9 / _TWO_DIRECTIONS, 50e9 / 8, _CUBES),
    # https://cloud.google.com/tpu/docs/v6e; HBM bandwidth, and v5p's and v6e's network: the table of
    # https://cloud.google.com/tpu/docs/tpu7x.
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 800e9 / _TWO_DIRECTIONS, 100e9 / 8, _SQUARES),
    # https://cloud.google.com/tpu/docs/tpu7x; a chip of two chiplets, each a device with half of everything.
    Chip("tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7380e9, 1200e9 / _TWO_DIRECTIONS, 100e9 / 8, _CUBES, devices=2),
)


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:8x8`.

    Raises:
      ValueError: no such chip, or a shape that its documentation does not list; the sentence lists them.
    """
    name, _, shape = topology.partition(":")
    chip = {chip.name: chip for chip in CHIPS}.get(name)
    if chip is None:
        names = ", ".join(chip.name for chip in CHIPS)
        raise ValueError(f"got {topology!r}, expected host, or CHIP:SHAPE such as v5e:8x8 with a chip of {names}")
    if shape not in chip.topologies:
        known = ", ".join(f"{name}:{shape}" for shape in chip.topologies)
        raise ValueError(f"got {topology!r}, expected host, or for this chip one of {known}")
    return chip


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for a device whose rates are not known here."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def least_seconds(
    chip: Chip, *, flops: float, hbm_bytes: float, sent_bytes: float, dcn_bytes: float = 0.0
) -> Mapping[str, float]:
    """The times of (1), of one device: what it computes, moves to and from its HBM, and sends.

    Where it sends to other slices, `dcn` is among them, if the rate is known.
    """
    seconds = {
        "compute": chip.devices * flops / chip.flops,
        "memory": chip.devices * hbm_bytes / chip.hbm_bandwidth,
        "interconnect": chip.devices * sent_bytes / chip.sent_bandwidth,
    }
    if dcn_bytes and chip.dcn_bandwidth is not None:
        seconds["dcn"] = chip.devices * dcn_bytes / chip.dcn_bandwidth
    return seconds
