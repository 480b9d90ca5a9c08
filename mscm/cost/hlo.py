"""Operations, memory traffic and messages of a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here a computation counts as often as it runs: a loop's length
is in the text, as `known_trip_count` or in the condition that ends it.

Memory traffic is counted by instructions of the schedule: a fusion reads its operands and writes its results, and
nothing between; an operand of which it takes slices counts with the slices, a result that it updates in place with the
update. Arrays count as they are stored, in whole tiles; those that XLA put into on-chip memory (`S(1)` in a layout) do
not count. This is a floor: a kernel may read an operand twice.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

# Between slices: a host takes an array from its chip, and the hosts of all slices do what the transfer's type says.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_DCN = "dcn "  # begins the names of such collectives

_OF_PARTS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
COLLECTIVES = (*_OF_PARTS, "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other names of types end in, or begin with, their bits
_SLICES = ("dynamic-slice", "slice", "gather")
# What they cost is the cost of what they call.
_BODIES = ("while", "conditional", "call", "async-start")
# Their result holds their operand as well; the second holds of it only the part that is read.
_BOTH_IN_RESULT = ("copy-start", "all-gather-start", "collective-permute-start")
_SLICE_STARTS = ("slice-start", "dynamic-slice-start")
# A TPU's custom calls that move nothing, and those around a collective that runs beside fusions.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "ZeroCrop")
_ASYNC_START, _ASYNC_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
# They name or regroup what is there.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "optimization-barrier",
    "after-all",
    "partition-id",
    "replica-id",
)

_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_TILE = re.compile(r"T\(([\d,]+)\)")
_NAME = re.compile(r"%([\w.-]+)")
_DIMS = re.compile(r"^[a-z]+[0-9a-z]*\[([\d,]*)\]")
_SIZE = re.compile(r"^[a-z]+(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `shape` is its text, `attributes` what follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str  # the text between the parentheses: a parameter's number, a constant's value

    def hbm_bytes(self) -> float:
        """Stored bytes of its result, all of a tuple's arrays together, that lie in the main memory."""
        return math.fsum(_stored_bytes(array) for array in _ARRAY.finditer(self.shape) if not _is_on_chip(array))

    def stored_bytes(self) -> float:
        """The same wherever they lie."""
        return math.fsum(_stored_bytes(array) for array in _ARRAY.finditer(self.shape))

    def dims(self) -> list[int]:
        """Lengths of the axes of its result, which is one array."""
        return [int(size) for size in _found(_DIMS, self.shape)[1].split(",") if size]

    def target(self) -> str | None:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else None

    def channel(self) -> str | None:
        """The number that all parts of one collective share."""
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else None

    def bytes(self) -> float:
        """Bytes of its result without what fills up tiles."""
        return math.fsum(_bytes(array) for array in _ARRAY.finditer(self.shape))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions; `users` are the instructions that have a name as operand."""

    instructions: Mapping[str, Instruction]
    users: Mapping[str, list[Instruction]]
    root: Instruction

    def parameters(self) -> list[Instruction]:
        """Its parameters in their order."""
        found = [instruction for instruction in self.instructions.values() if instruction.opcode == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.literal))


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program of one device of several, `num_devices` to a slice.

    The compiler for TPUs lets a collective run beside fusions: one starts it, others, also in loops, hand its arrays
    on, one ends it, and each has the collective's instruction in it. `handed_on` are the names of all but the first.
    """

    computations: Mapping[str, Computation]
    entry: Computation
    num_devices: int
    num_slices: int
    handed_on: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Messages:
    """All collectives of one kind in one run of the program, of one device."""

    count: float
    bytes: float  # of the whole arrays: what is gathered, what is reduced
    sent_bytes: float  # what a device sends at least, its own part of an array staying where it is


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program does in one run, of one device."""

    flops: float = 0.0  # of products and convolutions; of kernels that are not HLO none
    hbm_bytes: float = 0.0
    collectives: Mapping[str, Messages] = dataclasses.field(default_factory=dict)
    loops_of_unknown_length: int = 0  # counted once

    @property
    def sent_bytes(self) -> float:
        """What a device sends to others of its slice, in all collectives."""
        return self._sent(between_slices=False)

    @property
    def dcn_bytes(self) -> float:
        """What a device sends to other slices."""
        return self._sent(between_slices=True)

    def _sent(self, *, between_slices: bool) -> float:
        kinds = self.collectives.items()
        return math.fsum(messages.sent_bytes for kind, messages in kinds if kind.startswith(_DCN) == between_slices)

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """With `times` runs of something else."""
        collectives = dict(self.collectives)
        for kind, messages in other.collectives.items():
            old = dataclasses.astuple(collectives.get(kind, Messages(0.0, 0.0, 0.0)))
            new = dataclasses.astuple(messages)
            collectives[kind] = Messages(*(a + times * b for a, b in zip(old, new, strict=True)))
        return Cost(
            self.flops + times * other.flops,
            self.hbm_bytes + times * other.hbm_bytes,
            collectives,
            self.loops_of_unknown_length + other.loops_of_unknown_length,
        )


def parse(text: str, num_slices: int = 1) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    lines: list[re.Match[str]] = []
    header, _, body = text.partition("\n")
    for line in body.splitlines():
        if head := _HEAD.match(line):
            name, is_entry, lines = head[2], bool(head[1]), []
        elif line.startswith("}"):
            computations[name] = _computation(lines)
            entry = computations[name] if is_entry else entry
        elif match := _LINE.match(line):
            lines.append(match)
    devices = re.search(r"num_partitions=(\d+)", header)
    if entry is None:
        raise ValueError("hlo: got text without an ENTRY computation, expected that of a compiled program")
    return Module(computations, entry, int(devices[1]) if devices else 1, num_slices, _handed_on(computations))


def cost(module: Module) -> Cost:
    """Operations, bytes and messages of one run of the program."""
    return _of_computation(module, module.entry, is_scheduled=True)


def _handed_on(computations: Mapping[str, Computation]) -> frozenset[str]:
    starts: dict[str | None, str] = {}
    collectives: list[Instruction] = []
    for computation in computations.values():
        inside = [i for i in computation.instructions.values() if i.opcode in COLLECTIVES]
        collectives += inside
        if computation.root.target() == _ASYNC_START:
            starts |= {instruction.channel(): instruction.name for instruction in inside}
    return frozenset(i.name for i in collectives if starts.get(i.channel(), i.name) != i.name)


def _computation(lines: list[re.Match[str]]) -> Computation:
    instructions, users = {}, collections.defaultdict(list)
    root = None
    for line in lines:
        instruction = _instruction(line[2], line[3])
        instructions[instruction.name] = instruction
        for operand in set(instruction.operands):
            users[operand].append(instruction)
        root = instruction if line[1] else root
    return Computation(instructions, dict(users), root or instruction)


def _instruction(name: str, text: str) -> Instruction:
    shape = text[: _closing(text, 0) + 1] if text.startswith("(") else text.partition(" ")[0]
    opcode, _, _ = text[len(shape) :].strip().partition("(")
    first = len(shape) + text[len(shape) :].index("(")
    last = _closing(text, first)
    literal = text[first + 1 : last]
    return Instruction(name, shape, opcode, tuple(_NAME.findall(literal)), text[last + 1 :], literal)


def _closing(text: str, first: int) -> int:
    """Index of the parenthesis that closes the one at `first`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, first):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"hlo: got an open parenthesis in {text[:80]!r}")


def _found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """What every instruction of a kind has."""
    if (match := pattern.search(text)) is None:
        raise ValueError(f"hlo: got {text[:80]!r}, expected {pattern.pattern}")
    return match


def _bytes(array: re.Match[str]) -> float:
    kind, dims = array[1], array[2]
    bits = _BITS[kind] if kind in _BITS else int(_found(_SIZE, kind)[1])
    return math.prod(int(size) for size in dims.split(",") if size) * bits / 8


def _stored_bytes(array: re.Match[str]) -> float:
    """Bytes in memory: on a TPU the innermost axes are filled up to whole tiles, such as T(8,128)."""
    tile = _TILE.search(array[3] or "")
    size = _bytes(array)
    if tile is None or not size:
        return size
    sizes = [int(size) for size in array[2].split(",") if size]
    innermost_first = [int(axis) for axis in array[3].partition(":")[0].split(",") if axis]
    # A tile of more axes than the array has meets axes of length 1.
    for axis, length in itertools.zip_longest(innermost_first, map(int, reversed(tile[1].split(",")))):
        inside = 1 if axis is None else sizes[axis]
        size *= -(-inside // length) * length / inside if length else 1
    return size


def _is_on_chip(array: re.Match[str]) -> bool:
    return "S(" in (array[3] or "")


def _of_computation(module: Module, computation: Computation, *, is_scheduled: bool) -> Cost:
    """Of one run of a computation; inside a fusion nothing is a step of the schedule, and moves no bytes of its own."""
    total = Cost()
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES and instruction.name not in module.handed_on:
            total = total.plus(_message(kind, instruction, computation, module.num_devices, is_scheduled=is_scheduled))
        if kind == "send" and (transfer := _BETWEEN_SLICES.search(instruction.attributes)):
            kind = transfer[1].lower().replace("_", "-")
            size = computation.instructions[instruction.operands[0]].bytes()
            total = total.plus(_messages(_DCN + kind, kind, size, module.num_slices))
        if is_scheduled:
            total = total.plus(Cost(hbm_bytes=_moved(instruction, computation, module)))
        if instruction.opcode in ("dot", "convolution"):
            total = total.plus(Cost(_flops(instruction, computation)))
        total = total.plus(*_inside(instruction, computation, module, is_scheduled=is_scheduled))
    return total


def _inside(
    instruction: Instruction, computation: Computation, module: Module, *, is_scheduled: bool
) -> tuple[Cost, float]:
    """Of the computations that an instruction calls, and how often it calls them."""
    if instruction.opcode not in (*_BODIES, "fusion"):
        return Cost(), 1.0
    branches = _BRANCHES.search(instruction.attributes)
    called = _CALLED.findall(instruction.attributes) + (_NAME.findall(branches[1]) if branches else [])
    is_scheduled = is_scheduled and instruction.opcode != "fusion"
    costs = [_of_computation(module, module.computations[name], is_scheduled=is_scheduled) for name in called]
    if instruction.opcode == "while":
        times = _trip_count(instruction, computation, module)
        return costs[0].plus(Cost(loops_of_unknown_length=int(times is None))), 1.0 if times is None else times
    # Of the branches of a conditional the cheapest: nobody knows which runs, and this is a floor.
    return min(costs, key=lambda cost: cost.hbm_bytes), 1.0


def _trip_count(loop: Instruction, computation: Computation, module: Module) -> float | None:
    """How often a loop runs; None where the text does not say."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return float(known[1])
    # The compiler for TPUs does not write it. Its loops come from `scan`: `index < length`, from a start, by ones.
    condition = module.computations[_found(_CONDITION, loop.attributes)[1]]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    index, length = (condition.instructions[name] for name in test.operands)
    position = re.search(r"index=(\d+)", index.attributes) if index.opcode == "get-tuple-element" else None
    if position is None or length.opcode != "constant":
        return None
    start = _source(_source(computation.instructions[loop.operands[0]], computation), computation, int(position[1]))
    return float(length.literal) - float(start.literal) if start.opcode == "constant" else None


def _source(instruction: Instruction, computation: Computation, element: int | None = None) -> Instruction:
    """Where a value, or one element of a tuple, comes from, through what only copies it."""
    if element is not None and instruction.opcode == "tuple":
        return _source(computation.instructions[instruction.operands[element]], computation)
    while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _flops(instruction: Instruction, computation: Computation) -> float:
    """Of a product or a convolution: twice the pairs of numbers that meet."""
    left, right = (computation.instructions[name].dims() for name in instruction.operands)
    out = instruction.dims()
    if instruction.opcode == "dot":
        contracted = _found(_CONTRACTED, instruction.attributes)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = _found(_LABELS, instruction.attributes).groups()
    images, kernel, result = (
        dict(zip(axes, sizes, strict=True)) for axes, sizes in zip(labels, (left, right, out), strict=True)
    )
    of_window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", of_window[1] if of_window else ""))
    pairs = [
        _pairs(images[axis], kernel[axis], result[axis], *(_of_axis(window, key, int(axis)) for key in _WINDOW_KEYS))
        for axis in sorted(result.keys() - {"b", "f"})
    ]
    # The kernel's own number of input features: with groups it is already the number of one group.
    return 2.0 * result["b"] * result["f"] * kernel["i"] * math.prod(pairs)


_WINDOW_KEYS = ("stride", "lhs_dilate", "rhs_dilate", "pad")


def _of_axis(window: Mapping[str, str], key: str, axis: int) -> int:
    """One axis of `stride=2x2` or of `pad=1_1x0_1`, of which the padding before the first number matters."""
    default = 0 if key == "pad" else 1
    return int(window[key].split("x")[axis].split("_")[0]) if key in window else default


def _pairs(size: int, kernel: int, out: int, stride: int, size_dilation: int, kernel_dilation: int, pad: int) -> int:
    """Pairs of a number and a place of the kernel along one axis, without those in the padding and between numbers.

    Compilers write products with batches as convolutions in which almost all pairs are of that kind.
    """
    at = stride * np.arange(out)[:, None] + kernel_dilation * np.arange(kernel)[None, :] - pad
    return int(np.sum((at >= 0) & (at <= (size - 1) * size_dilation) & (at % size_dilation == 0)))


def _message(
    kind: str, instruction: Instruction, computation: Computation, num_devices: int, *, is_scheduled: bool
) -> Cost:
    if kind == "all-reduce" and not is_scheduled and any(
        other.opcode == "dynamic-slice" for other in computation.instructions.values()
    ):
        kind = "reduce-scatter"  # in one fusion a TPU's compiler writes it so: a sum, and the slices that are kept
    operands = (computation.instructions[name] for name in instruction.operands)
    size = math.fsum(operand.bytes() for operand in operands)
    return _messages(kind, kind, size, _group_size(instruction.attributes, num_devices))


def _messages(name: str, kind: str, size: float, devices: int) -> Cost:
    """Of one collective of so many devices, each of which gives `size` bytes."""
    whole = size * devices if kind == "all-gather" else size
    if kind in _OF_PARTS:
        # By a ring, which sends least: every device passes on all parts but one; a sum is scattered, then gathered.
        sent = whole * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
    else:
        sent = whole
    return Cost(collectives={name: Messages(1.0, whole, sent)})


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices of one group of a collective, in any of the three ways in which HLO writes groups; none: all devices."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A part of an axis is written 'axis':(devices before it)devices of it.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return groups[1].count(",") + 1
    return num_devices


def _moved(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes between the main memory and the chip for one instruction of the schedule, without what it calls."""
    opcode = instruction.opcode
    if opcode in (*_FREE, *_BODIES) or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode in _BOTH_IN_RESULT:
        return instruction.hbm_bytes()
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "send":
        return math.fsum(operand.hbm_bytes() for operand in operands)
    if opcode in _SLICE_STARTS:
        part = list(_ARRAY.finditer(instruction.shape))[-2]  # operands, result, context
        return _stored_bytes(part) * (bool(operands[0].hbm_bytes()) + (not _is_on_chip(part)))
    if opcode == "custom-call" and instruction.target() in _FREE_CALLS:
        return 0.0
    if opcode in _SLICES:
        read = _in_place(operands[0], instruction)
        return read + math.fsum(operand.hbm_bytes() for operand in operands[1:]) + instruction.hbm_bytes()
    if opcode == "dynamic-update-slice":
        return _in_place(operands[0], operands[1]) + math.fsum(operand.hbm_bytes() for operand in operands[1:])
    if opcode != "fusion":
        return math.fsum(operand.hbm_bytes() for operand in operands) + instruction.hbm_bytes()
    body = module.computations[_found(_CALLED, instruction.attributes)[1]]
    if body.root.target() == _ASYNC_DONE:
        return 0.0
    read = math.fsum(
        _read(body, parameter, module)
        for operand, parameter in zip(operands, body.parameters(), strict=True)
        if operand.hbm_bytes()
    )
    return read + _written(body, instruction, module)


def _in_place(array: Instruction, part: Instruction) -> float:
    """Bytes of the part of an array that is touched, if the array lies in the main memory."""
    return part.stored_bytes() if array.hbm_bytes() else 0.0


def _read(body: Computation, value: Instruction, module: Module) -> float:
    """Bytes of a value that a fusion reads: of slices theirs, of an array updated in place none."""
    whole, read = value.stored_bytes(), 0.0
    for user in body.users.get(value.name, ()):
        is_first = user.operands[0] == value.name
        if user.opcode in _SLICES and is_first:
            read += user.stored_bytes()
        elif user.opcode == "bitcast":
            read += _read(body, user, module)
        elif user.opcode == "fusion":
            inner = module.computations[_found(_CALLED, user.attributes)[1]]
            pairs = zip(user.operands, inner.parameters(), strict=True)
            read += math.fsum(_read(inner, parameter, module) for name, parameter in pairs if name == value.name)
        elif not (user.opcode == "dynamic-update-slice" and is_first) and not _hands_on(user, body, module):
            return whole
    return min(read, whole)


def _hands_on(user: Instruction, body: Computation, module: Module) -> bool:
    """Whether an instruction only passes arrays of a running collective from its fusion to the next."""
    is_link = any(name in module.handed_on for name in body.instructions)
    return user.name in module.handed_on or (is_link and user.opcode in ("tuple", "parameter"))


def _written(body: Computation, fusion: Instruction, module: Module) -> float:
    """Bytes that a fusion writes: of a result updated in place the update's."""
    if body.root.target() == _ASYNC_START:
        return math.fsum(body.instructions[name].hbm_bytes() for name in body.root.operands)
    names = body.root.operands if body.root.opcode == "tuple" else (body.root.name,)
    total = 0.0
    for name, array in zip(names, _ARRAY.finditer(fusion.shape), strict=True):
        if _is_on_chip(array) or _hands_on(body.instructions[name], body, module):
            continue
        source = _source(body.instructions[name], body)
        if source.opcode == "dynamic-update-slice":
            total += body.instructions[source.operands[1]].stored_bytes()
        else:
            total += _stored_bytes(array)
    return total
