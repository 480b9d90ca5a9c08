"""What the text of a compiled program says of its memory traffic and messages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mscm.cost import hlo

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH = 5, 64
MATRIX = 4 * WIDTH * WIDTH


@pytest.fixture(scope="module")
def programs():
    """HLO text by name, from a process with eight devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    script = str(ROOT / "tests" / "cost" / "compile_programs.py")
    command = [sys.executable, script]
    return json.loads(subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def measure(text: str) -> hlo.Cost:
    return hlo.cost(hlo.parse(text))


@pytest.mark.parametrize(("name", "times"), [("scanned", 1), ("unrolled", 1), ("nested", 3)])
def test_every_layer_of_a_loop_is_gathered(programs, name, times):
    """Five matrices, whether they are in a loop, in none, or in a loop that runs three times."""
    found = measure(programs[name])
    gathers = found.collectives.pop("all-gather")
    assert gathers.count * gathers.bytes == pytest.approx(gathers.count * times * LAYERS * MATRIX)
    assert gathers.sent_bytes == pytest.approx(gathers.bytes * 7 / 8)
    assert not found.collectives
    assert found.loops_of_unknown_length == 0
    if name != "unrolled":  # there XLA may gather all of them at once
        assert gathers.count == times * LAYERS


def test_a_loop_reads_each_layer_once(programs):
    """Its slices are what is read: one row of devices' part of the weights in each iteration, and not all of them."""
    once, thrice = measure(programs["scanned"]).hbm_bytes, measure(programs["nested"]).hbm_bytes
    part, gathered = LAYERS * MATRIX / 8, LAYERS * MATRIX
    # Part read and written as operand of the gather, gather's operand and result, result read by the product.
    assert 2 * gathered + part < once < 2 * gathered + 12 * part
    assert thrice == pytest.approx(3 * once, rel=0.1)


def test_a_loop_that_says_nothing_is_counted_once_and_reported(programs):
    """Two loops, of 5 and 3 iterations, whose lengths are taken out of the text."""
    found = measure(programs["nested"].replace("known_trip_count", "hidden"))
    assert found.collectives["all-gather"].count == 1
    assert found.loops_of_unknown_length == 2


def test_traffic_of_programs_known_in_closed_form(programs):
    """Every operand read, every result written, once; of slices and updates only their rows."""
    table, rows, index = 4 * 1000 * 128, 4 * 10 * 128, 4
    assert measure(programs["elementwise"]).hbm_bytes == 2 * table
    assert measure(programs["product"]).hbm_bytes == 3 * 4 * 256 * 256
    assert measure(programs["rows"]).hbm_bytes == pytest.approx(2 * rows, abs=8 * index)
    assert measure(programs["update"]).hbm_bytes == pytest.approx(2 * rows, abs=8 * index)


def tpu(name: str) -> str:
    """Text as the compiler for TPUs writes it."""
    return (ROOT / "tests" / "cost" / name).read_text()


@pytest.mark.parametrize(("start", "iterations"), [(0, 3), (1, 2)])
def test_a_loop_as_tpus_have_it(start, iterations):
    """Tiles, memory spaces, a length that only the condition says, asynchronous copies, a fusion in a fusion.

    A layer is read, its result made on the chip and written into its place; the scalars, a tile of 128 numbers each,
    are the index that both fusions read and the sum that is the next; 5 x 3 numbers fill a tile of 8 x 128.
    """
    found = measure(tpu("tpu_loop.hlo").replace("START", str(start)))
    layer, scalar, tile = 4 * 16 * 128, 4 * 128, 2 * 8 * 128
    copied = scalar  # the constant, to where the loop counts
    assert found.hbm_bytes == iterations * (2 * layer + 3 * scalar) + tile + copied
    assert found.loops_of_unknown_length == 0
    assert found.collectives == {}


def test_a_collective_that_runs_beside_a_loop_counts_once():
    """Started before a loop of seven, handed on in it, ended after it: one gather of 8 x 16 x 128 numbers.

    In each iteration the loop reads an array of 16 x 128, multiplies it by a square that is on the chip, and writes it.
    """
    found = measure(tpu("tpu_async.hlo"))
    part, whole, array = 2 * 16 * 128, 8 * 2 * 16 * 128, 4 * 16 * 128
    assert found.collectives.pop("all-gather") == hlo.Messages(1.0, float(whole), whole * 7 / 8)
    # A sum of which a fusion keeps one part of eight.
    assert found.collectives.pop("reduce-scatter") == hlo.Messages(1.0, float(array), array * 7 / 8)
    assert not found.collectives
    assert found.flops == 7 * 2 * 16 * 128 * 128
    kept = array + array / 8  # what that fusion reads and writes
    sliced = 2 * array / 8  # to the chip and back
    assert found.hbm_bytes == part + whole + 7 * 2 * array + kept + sliced


MESSAGE = """\
HloModule jit_f, num_partitions=8

ENTRY %main (p.0: f32[4,16]) -> f32[4,16] {
  %p.0 = f32[4,16]{1,0} parameter(0)
  ROOT %message = f32[4,16]{1,0} KIND(%p.0), channel_id=1, GROUPS, use_global_device_ids=true
}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups={}", 8),
    ],
)
@pytest.mark.parametrize(
    ("kind", "whole", "sent"),
    [
        ("all-gather", lambda n: 256 * n, lambda n: 256 * (n - 1)),
        ("all-gather-start", lambda n: 256 * n, lambda n: 256 * (n - 1)),
        ("reduce-scatter", lambda n: 256, lambda n: 256 * (n - 1) / n),
        ("all-reduce", lambda n: 256, lambda n: 512 * (n - 1) / n),
        ("all-to-all", lambda n: 256, lambda n: 256 * (n - 1) / n),
        ("collective-permute", lambda n: 256, lambda n: 256),
    ],
)
def test_bytes_of_messages_by_group(groups, devices, kind, whole, sent):
    """Closed forms of a ring of n devices, for an operand of 256 bytes on each."""
    found = measure(MESSAGE.replace("KIND", kind).replace("GROUPS", groups))
    expected = hlo.Messages(1.0, float(whole(devices)), float(sent(devices)))
    assert found.collectives == {kind.removesuffix("-start"): expected}
    assert found.sent_bytes == sent(devices)


BETWEEN_SLICES = """\
HloModule jit_f, num_partitions=4

ENTRY %main (p.0: f32[4,16]) -> f32[4,16] {
  %p.0 = f32[4,16]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[4,16]{1,0}, u32[], token[]) send(%p.0, %after-all), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %recv = (f32[4,16]{1,0}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %recv-done = (f32[4,16]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true, ATTRIBUTES
  ROOT %get-tuple-element = f32[4,16]{1,0} get-tuple-element(%recv-done), index=0
}
"""


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize(
    ("kind", "whole", "sent"),
    [
        ("all-reduce", lambda n: 256, lambda n: 512 * (n - 1) / n),
        ("all-gather", lambda n: 256 * n, lambda n: 256 * (n - 1)),
        ("one-to-one", lambda n: 256, lambda n: 256),
    ],
)
def test_bytes_between_slices(slices, kind, whole, sent):
    """As the compiler for TPUs writes them: a host takes the operand and gives back the result, each moved once."""
    transfer = f'_xla_megascale_transfer_type="{kind.upper().replace("-", "_")}"'
    attributes = f'frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",{transfer}}}'
    found = hlo.cost(hlo.parse(BETWEEN_SLICES.replace("ATTRIBUTES", attributes), slices))
    expected = hlo.Messages(1.0, float(whole(slices)), float(sent(slices)))
    assert found.collectives == {f"dcn {kind}": expected}
    assert found.dcn_bytes == sent(slices) and found.sent_bytes == 0
    assert found.hbm_bytes == pytest.approx(2 * 256, abs=8)
    both = found.plus(measure(MESSAGE.replace("KIND", "all-reduce").replace("GROUPS", "replica_groups={}")))
    assert both.dcn_bytes == sent(slices) and both.sent_bytes == 2 * 256 * 7 / 8


def test_of_branches_the_cheaper_counts():
    text = re.sub(r"\n +", "\n  ", """\
HloModule jit_f

%cheap (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  ROOT %copy.0 = f32[8]{0} copy(%p.0)
}

%dear (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %copy.1 = f32[8]{0} copy(%p.1)
  ROOT %copy.2 = f32[8]{0} copy(%copy.1)
}

ENTRY %main (p.2: f32[8], p.3: s32[]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  %p.3 = s32[] parameter(1)
  ROOT %conditional = f32[8]{0} conditional(%p.3, %p.2, %p.2), branch_computations={%dear, %cheap}
}
""")
    assert measure(text).hbm_bytes == 2 * 32


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")


CONVOLUTION = """\
HloModule jit_f

ENTRY %main (p.0: f32[LEFT], p.1: f32[RIGHT]) -> f32[OUT] {
  %p.0 = f32[LEFT]{0} parameter(0)
  %p.1 = f32[RIGHT]{0} parameter(1)
  ROOT %convolution = f32[OUT]{0} convolution(%p.0, %p.1), ATTRIBUTES
}
"""


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "pairs"),
    [
        ("3,5", "5,7", "3,7", "dim_labels=bf_io->bf", 3 * 5 * 7),
        # 3 x 3 with zeros around 8 x 8: of 24 pairs in each axis two are with zeros.
        ("2,8,8,4", "3,3,4,6", "2,8,8,6", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 2 * 22**2 * 24),
        # Two groups: 4 of 8 input features each.
        ("1,8,8", "1,4,6", "1,8,6", "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2", 8 * 4 * 6),
        # A batch of 9 products as a convolution over the batch, whose kernel meets each example once.
        (
            "9,3,5",
            "9,5,7",
            "9,3,7",
            "window={size=9 stride=8 pad=0_0 lhs_dilate=9}, dim_labels=0bf_0io->0bf",
            9 * 3 * 5 * 7,
        ),
    ],
)
def test_operations_of_convolutions(left, right, out, attributes, pairs):
    """Only pairs that are inside count."""
    text = CONVOLUTION.replace("LEFT", left).replace("RIGHT", right).replace("OUT", out)
    assert measure(text.replace("ATTRIBUTES", attributes)).flops == 2 * pairs


def test_operations_of_loops(programs):
    """A product of 2 x 64 rows on each device with every layer."""
    for name, times in (("scanned", 1), ("unrolled", 1), ("nested", 3)):
        assert measure(programs[name]).flops == times * LAYERS * 2 * 2 * WIDTH * WIDTH
