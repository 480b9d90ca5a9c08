"""Reads the tensors of PyTorch files without PyTorch, and without running anything that a file brings along.

    weights = read_torch_file("inception.pth")  # {"Conv2d_1a_3x3.conv.weight": float32 "32 3 3 3", ...}
    network = read_pickled_module("edm-cifar10-32x32-cond-vp.pkl", "ema")  # network.tensors, as above

A PyTorch file holds the raw numbers, and a pickle that says which of them is which tensor. A pickle is a program. Here
only the instructions that build dicts, lists, tuples and scalars are known, and a name that it asks for is compared
with a list and never imported. `pickle.Unpickler` with a filter on its names is not enough: one memo index of four
bytes makes it allocate gigabytes, and the hash of a deeply nested key overflows its C stack.
"""

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAX_PICKLE_BYTES = 16 * 2**20  # a hundred thousand tensors; of a pickled module without the numbers
MAX_ENTRIES = 100_000  # of all dicts together; one that is named twice counts twice
MAX_NAME = 512  # characters of a tensor's dotted name
MAX_RANK = 64  # of numpy
MAX_ARGUMENTS = 100  # of a pickled module, and numbers in one of them
MAX_GROWTH = 16  # bytes of tensors per byte of file: tied and expanded weights are stored once and returned each

_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",  # numpy has no bfloat16
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "u1",  # a byte that is neither 0 nor 1 is no bool of numpy
}
_REBUILD_TENSOR = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
# Called with a value first and then with what only PyTorch needs (gradient flags, types of TorchScript).
_FIRST_ARGUMENT = {"torch._utils._rebuild_parameter", "torch.device", "torch.jit._pickle.restore_type_tag"} | {
    f"torch.jit._pickle.build_{kind}list" for kind in ("bool", "double", "int", "tensor")
}
_GLOBALS = {"collections.OrderedDict"} | _REBUILD_TENSOR | _FIRST_ARGUMENT | {f"torch.{name}" for name in _DTYPES}
_SCRIPT_CLASS = "__torch__."

# Of modules that NVIDIA's `torch_utils.persistence` pickles with their source code, which is text here.
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_FROM_BYTES = "torch.storage._load_from_bytes"  # called with a whole file of torch.save that holds one storage
_CONTAINERS = {"torch.nn.modules.container.ModuleDict"}
_MEMBERS = ("_parameters", "_buffers", "_modules")
_NUMPY_DTYPE = "numpy.dtype"
# Called with what no tensor needs: numbers of numpy among the attributes, and empty sets.
_IGNORED = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "builtins.set"}
_GLOBALS_OF_MODULES = _CONTAINERS | _IGNORED | {_PERSISTENT, _FROM_BYTES, _NUMPY_DTYPE}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": ()}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"} | {
    f"{size}{kind}" for size in ("SHORT_", "") for kind in ("BINSTRING", "BINUNICODE")
}
_OTHERS = set("PROTO FRAME EMPTY_DICT EMPTY_LIST MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL".split())
# What an instruction takes from the stack: so many objects, or (None) all above the last mark.
_TAKES = {
    "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "SETITEMS": None, "APPEND": 1, "APPENDS": None,
    "STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1, "STOP": 1,
}
_INSTRUCTIONS = {  # name and reader of the argument
    opcode.code.encode("latin-1"): (opcode.name, opcode.arg and opcode.arg.reader)
    for opcode in pickletools.opcodes
    if opcode.name in _CONSTANTS.keys() | _VALUES | _OTHERS | _TAKES.keys()
}

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


class _Refused(Exception):
    """One sentence about a file that is not what it should be."""


# Compared by identity: what a file nests in them is never hashed, compared or printed, each of which recurses.
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    kind: str
    key: str
    count: int
    data: memoryview | None = None  # where the pickle itself has brought it

    @property
    def num_bytes(self) -> int:
        return self.count * np.dtype(_DTYPES[self.kind]).itemsize

    def numbers(self) -> memoryview:
        """That the pickle has brought."""
        if self.data is None:
            raise _Refused("got a tensor whose numbers are not in the pickle, expected them; download it again.")
        return self.data


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * np.dtype(_DTYPES[self.storage.kind]).itemsize


@dataclasses.dataclass(slots=True, eq=False)
class _Object:
    name: str
    state: dict = dataclasses.field(default_factory=dict)

    def members(self) -> dict:
        """Of a module of PyTorch what `state_dict()` looks through; of an object of TorchScript its attributes."""
        if "_modules" not in self.state:
            return self.state
        return {name: value for kind in _MEMBERS for name, value in self.state[kind].items()}


@dataclasses.dataclass(slots=True, eq=False)
class _Context:
    """What the pickles of a file have in common."""

    storages: dict[str, _Storage] = dataclasses.field(default_factory=dict)  # all that they mention
    takes_modules: bool = False
    num_bytes: int = 0  # that were read, without the numbers that stand within a pickle


class PickledModule(NamedTuple):
    """A module of PyTorch as a pickle describes it."""

    class_name: str
    arguments: dict[str, Any]  # with which it was made: texts, numbers, lists of them
    tensors: dict[str, np.ndarray]  # parameters and buffers as `state_dict()` names them


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file by their dotted names, C-contiguous and independent of each other.

    Reads what `torch.save` writes of a (nested) dict of tensors, now (zip) and before PyTorch 1.6, and what
    `torch.jit.save` writes of a module that is not frozen: the names of its `state_dict()`, and tensors that are plain
    attributes. Values that are neither tensors nor dicts are ignored, bfloat16 becomes float32. Takes about three times
    the file's size in memory.

    Raises:
      ValueError: for anything else: what the file holds, what was expected and what to do.
      OSError: for a file that cannot be read.
    """
    return _of_file(path, _read_tensors)


def read_pickled_module(path: str | os.PathLike, name: str) -> PickledModule:
    """The module `name` of a dict that `pickle.dump` has written of modules of `torch_utils.persistence`.

    As the networks of StyleGAN2-ADA, EDM and their successors are published. Their source code stands in the file and
    is neither run nor looked at. Takes memory as `read_torch_file`.

    Raises:
      ValueError: for anything else: what the file holds, what was expected and what to do.
      OSError: for a file that cannot be read.
    """

    def read(content: bytes) -> PickledModule:
        if not content.startswith(b"\x80"):
            raise _Refused(
                f"got a file that begins with {content[:8]!r}, expected a pickle; check the path, or download it again."
            )
        root = _unpickle(io.BytesIO(content), _Context(takes_modules=True))
        module = root.get(name) if isinstance(root, dict) else None
        if not isinstance(module, _Object) or not isinstance(module.state.get("_init_kwargs"), dict):
            raise _Refused(
                f"got a pickle without a network {name!r}, expected a dict with one, as EDM publishes its networks; "
                "check the path."
            )
        tensors = _named_tensors(module)
        _check_growth(tensors, content)
        arrays = {name: _array(tensor, tensor.storage.numbers()) for name, tensor in tensors.items()}
        return PickledModule(module.name, _arguments(module.state["_init_kwargs"]), arrays)

    return _of_file(path, read)


def _of_file(path: str | os.PathLike, read: Callable[[bytes], Any]) -> Any:
    """What `read` makes of the bytes of a file; its refusals and what damage raises name the file."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        return read(content)
    except _Refused as refusal:
        raise ValueError(f"{os.fspath(path)}: {refusal}") from None
    # What Python and zipfile raise for bytes that are no pickle and no archive (RuntimeError: an encrypted member).
    except (
        AttributeError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError, struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{os.fspath(path)}: got a damaged file ({type(error).__name__}: {error}), expected a whole one of "
            "PyTorch's; download or save it again."
        ) from error


def _read_tensors(content: bytes) -> dict[str, np.ndarray]:
    storages: Mapping[str, bytes | memoryview]
    if content.startswith(b"PK\x03\x04"):
        root, storages = _read_zip(content)
    elif content.startswith(b"\x80"):
        root, storages = _read_legacy(content, _Context())
    else:
        raise _Refused(
            f"got a file that begins with {content[:8]!r}, expected one of torch.save or torch.jit.save; check the "
            "path, or download it again."
        )
    tensors = _named_tensors(root)
    _check_growth(tensors, content)
    return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _check_growth(tensors: dict[str, _Tensor], content: bytes) -> None:
    growth = sum(tensor.num_bytes for tensor in tensors.values())
    if growth > MAX_GROWTH * len(content):
        raise _Refused(
            f"got tensors of {growth} bytes from a file of {len(content)}, expected at most {MAX_GROWTH} times as "
            "many; save them without expanding them."
        )


def _read_zip(content: bytes) -> tuple[Any, dict[str, bytes]]:
    """What `data.pkl` describes, and the bytes of its storages by their keys."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    roots = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise _Refused(
            f"got a zip archive with {len(roots)} members named FOLDER/data.pkl, expected one; this is not a file of "
            "PyTorch."
        )
    folder = roots[0].removesuffix("data.pkl")

    def member(name: str, num_bytes: int | None = None) -> bytes:
        info = archive.getinfo(folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(
                f"got the member {info.filename!r} compressed, expected it stored as it is; save the file with PyTorch "
                "and do not zip it again."
            )
        if info.file_size > len(content) or num_bytes not in (None, info.file_size):
            raise _Refused(
                f"got {info.file_size} bytes declared for {info.filename!r} in a file of {len(content)}, expected "
                f"{'fewer' if num_bytes is None else num_bytes}; download or save it again."
            )
        return archive.read(info)

    if folder + "byteorder" in archive.namelist() and member("byteorder") != b"little":
        raise _Refused("got big-endian numbers, expected little-endian ones; save the file on a little-endian machine.")
    context = _Context()
    root = _unpickle(io.BytesIO(member("data.pkl")), context)
    total = sum(storage.num_bytes for storage in context.storages.values())
    if total > len(content):  # many members may share their bytes
        raise _Refused(
            f"got storages of {total} bytes in a file of {len(content)}, expected fewer; download or save it again."
        )
    return root, {key: member(f"data/{key}", storage.num_bytes) for key, storage in context.storages.items()}


def _read_legacy(content: bytes, context: _Context) -> tuple[Any, dict[str, memoryview]]:
    """What the fourth pickle describes, and the bytes of its storages, which follow the fifth, by their keys."""
    stream, storages = io.BytesIO(content), context.storages
    if _unpickle(stream, context) != _LEGACY_MAGIC or _unpickle(stream, context) != _LEGACY_VERSION:
        raise _Refused("got a pickle of something else, expected a file of torch.save; save it with PyTorch.")
    if not _unpickle(stream, context)["little_endian"]:
        raise _Refused("got big-endian numbers, expected little-endian ones; save the file on a little-endian machine.")
    root = _unpickle(stream, context)
    data = {}
    keys = _unpickle(stream, context)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != storages.keys():
        raise _Refused("got a list of other storages than the tensors' own, expected those; download or save it again.")
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        start, storage = stream.tell(), storages[key]
        if count != storage.count or storage.num_bytes > len(content) - start:
            raise _Refused(
                f"got storage {key!r} of {count} numbers with {len(content) - start} bytes left in the file, expected "
                f"{storage.count} in {storage.num_bytes} bytes; download or save it again."
            )
        data[key] = memoryview(content)[start : start + storage.num_bytes]
        stream.seek(start + storage.num_bytes)
    return root, data


def _unpickle(stream: io.BytesIO, context: _Context) -> Any:
    """The object of the pickle at the stream's position, made of plain values and the classes above."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    while True:
        begin = stream.tell()
        if not (code := stream.read(1)):
            raise EOFError("the pickle has no end")
        if code not in _INSTRUCTIONS:
            raise _Refused(
                f"got a pickle with the instruction {code!r}, expected only those of tensors in dicts; save "
                "model.state_dict()."
            )
        name, read_argument = _INSTRUCTIONS[code]
        if name == "GLOBAL":  # whose reader in pickletools warns of a backslash
            argument: Any = [stream.readline().decode().removesuffix("\n") for _ in range(2)]
        else:
            argument = read_argument(stream) if read_argument else None
        within = len(argument) if context.takes_modules and isinstance(argument, bytes) else 0
        context.num_bytes += stream.tell() - begin - within
        if context.num_bytes > MAX_PICKLE_BYTES:
            raise _Refused(f"got a pickle of more than {MAX_PICKLE_BYTES} bytes, expected fewer; save only tensors.")
        if name in _TAKES:
            count = _TAKES[name]
            start = marks.pop() if count is None else len(stack) - count
            if start < 0:
                raise IndexError("the pickle takes more than it has made")
            items = stack[start:]
            del stack[start:]
        match name:
            case "STOP":
                return items[0]
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "SETITEM" | "SETITEMS":
                _set_items(stack[-1], items)
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument, context=context))
            case "STACK_GLOBAL":
                stack.append(_global(*items, context=context))
            case "REDUCE":
                stack.append(_call(*items, context=context))
            case "NEWOBJ":
                stack.append(_new_object(*items))
            case "BUILD":
                _set_state(stack[-1], items[0])
            case "BINPERSID":
                stack.append(_storage(*items[0], storages=context.storages))
            case _:
                stack.append(_CONSTANTS[name] if name in _CONSTANTS else argument)


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    if not all(type(key) is int or (type(key) is str and len(key) <= MAX_NAME) for key in keys):
        raise _Refused(
            f"got a dict with a key that is neither an integer nor a text of at most {MAX_NAME} characters, expected "
            "names of tensors; save model.state_dict()."
        )
    target.update(zip(keys, items[1::2], strict=True))


def _global(module: Any, name: Any, *, context: _Context) -> _Global:
    """A name that the pickle may use, never the thing that it names in Python."""
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
        raise _Refused(
            f"got a pickle that asks for something that is not named in {MAX_NAME} characters, expected only tensors; "
            "it is not a weights file."
        )
    full_name = f"{module}.{name}"
    known = _GLOBALS | _GLOBALS_OF_MODULES if context.takes_modules else _GLOBALS
    if full_name not in known and not full_name.startswith(_SCRIPT_CLASS):
        raise _Refused(
            f"got a pickle that asks for {full_name!r}, expected only tensors; it is not a weights file (of a model of "
            "your own, save model.state_dict())."
        )
    return _Global(full_name)


def _call(function: Any, arguments: Any, *, context: _Context) -> Any:
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name in _REBUILD_TENSOR:
        return _tensor(*arguments[:4])
    if function.name in _FIRST_ARGUMENT:
        return arguments[0]
    if function.name == _PERSISTENT:
        return _persistent(*arguments)
    if function.name == _FROM_BYTES:
        return _storage_within(*arguments, context=context)
    if function.name == _NUMPY_DTYPE:
        return _Object(_NUMPY_DTYPE)
    if function.name in _IGNORED:
        return None
    raise _Refused(f"got a pickle that calls {function.name!r}, expected only tensors; it is not a weights file.")


def _persistent(meta: Any) -> _Object:
    """The record of a module that brings its source code along."""
    name, state = meta["class_name"], meta["state"]
    if type(name) is not str or len(name) > MAX_NAME or type(state) is not dict:
        raise _Refused(
            "got a pickled module without the name of its class and its attributes, expected both; download it again."
        )
    return _Object(name, state)


def _storage_within(content: Any, *, context: _Context) -> _Storage:
    """The storage of a file of torch.save that stands as one string of bytes within a pickle."""
    if type(content) is not bytes:
        raise _Refused("got a storage that is no string of bytes, expected one; download or save it again.")
    # Within it only tensors are known: files do not nest further.
    inner = _Context(num_bytes=context.num_bytes)
    root, data = _read_legacy(content, inner)
    context.num_bytes = inner.num_bytes
    if not isinstance(root, _Storage):
        raise _Refused("got a file within a pickle that is no storage, expected numbers; download or save it again.")
    return dataclasses.replace(root, data=memoryview(data[root.key]))


def _new_object(cls: Any, arguments: Any) -> _Object:
    if not (cls.name.startswith(_SCRIPT_CLASS) or cls.name in _CONTAINERS) or arguments:
        raise _Refused(f"got a pickle that makes a {cls.name!r}, expected only tensors; it is not a weights file.")
    return _Object(cls.name)


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, _Object):
        if target.name == _NUMPY_DTYPE:  # of a number that nobody reads
            return
        if not isinstance(state, dict):
            raise _Refused(
                f"got a {target.name!r} whose state only its own code can read, expected plain attributes; save the "
                "state_dict() of the module instead."
            )
        target.state = state
    elif not isinstance(target, dict):  # an ordered dict's is the versions of its modules
        raise _Refused(
            f"got a pickle that sets the state of a {type(target).__name__}, expected only tensors in dicts; it is not "
            "a weights file."
        )


def _storage(
    tag: Any, kind: Any, key: Any, location: Any, count: Any, view: Any = None, *, storages: dict[str, _Storage]
) -> _Storage:
    del location  # the device that it was on
    name = kind.name.removeprefix("torch.")
    text = type(key) is str and len(key) <= MAX_NAME
    if tag != "storage" or view is not None or name not in _DTYPES or not text or type(count) is not int or count < 0:
        raise _Refused(
            "got a pickle that refers to something other than a whole storage of numbers, expected only tensors; save "
            "model.state_dict() with a newer PyTorch."
        )
    storage = storages.setdefault(key, _Storage(name, key, count))
    if (storage.kind, storage.count) != (name, count):
        raise _Refused(
            f"got storage {key!r} as {storage.count} of a {storage.kind} and as {count} of a {name}, expected one type "
            "and size; download or save it again."
        )
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    """A view that lies inside its storage; offset and stride in elements."""
    if not (isinstance(storage, _Storage) and type(size) is type(stride) is tuple):
        raise _Refused("got a tensor without a storage, a size and strides, expected all; download or save it again.")
    if len(size) != len(stride) or len(size) > MAX_RANK:
        raise _Refused(
            f"got a tensor of {len(size)} sizes and {len(stride)} strides, expected one number and at most {MAX_RANK}; "
            "download or save it again."
        )
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise _Refused(
            "got a tensor with a negative or broken offset, size or stride, expected integers from 0; download or save "
            "it again."
        )
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and end > storage.count:
        raise _Refused(
            f"got a tensor that ends at element {end} of a storage of {storage.count}, expected it inside; download or "
            "save it again."
        )
    return _Tensor(storage, offset, size, stride)


def _named_tensors(root: Any) -> dict[str, _Tensor]:
    """The tensors in nested dicts and TorchScript objects, in the file's order."""
    tensors: dict[str, _Tensor] = {}
    pending, num_entries = [("", root)], 0
    while pending:
        name, node = pending.pop()
        if isinstance(node, _Object):
            node = node.members()
        if isinstance(node, _Tensor):
            if not name or name in tensors:
                raise _Refused(
                    f"got {'two tensors' if name else 'a tensor'} named {name!r}, expected a name for each; save them "
                    "as a dict without such names."
                )
            tensors[name] = node
        elif isinstance(node, dict):
            num_entries += len(node)
            # Also ends the walk through a dict that contains itself.
            if num_entries > MAX_ENTRIES or len(name) > MAX_NAME:
                raise _Refused(
                    f"got more than {MAX_ENTRIES} entries or names of more than {MAX_NAME} characters, expected the "
                    "tensors of a network; save only those."
                )
            pending.extend((f"{name}.{key}" if name else str(key), node[key]) for key in reversed(node))
    if not tensors:
        raise _Refused("got no tensors, expected a dict of them; save model.state_dict().")
    return tensors


def _arguments(given: dict) -> dict[str, Any]:
    """What a module was made with, as plain values."""

    def plain(value: Any) -> bool:
        return value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= MAX_NAME)

    if len(given) > MAX_ARGUMENTS:
        raise _Refused(
            f"got a module made with {len(given)} arguments, expected at most {MAX_ARGUMENTS}; check the path."
        )
    for name, value in given.items():
        rows = value if type(value) in (list, tuple) else [value]
        if type(name) is not str or len(rows) > MAX_ARGUMENTS or not all(plain(row) for row in rows):
            raise _Refused(
                f"got a module made with {name!r} of another kind than numbers and texts, or more than {MAX_ARGUMENTS} "
                "of them, expected those; it is not a network that is known here."
            )
    return {name: list(value) if type(value) is tuple else value for name, value in given.items()}


def _array(tensor: _Tensor, data: bytes | memoryview) -> np.ndarray:
    dtype = np.dtype(_DTYPES[tensor.storage.kind])
    if 0 in tensor.size:
        view = np.zeros(tensor.size, dtype)
    else:
        strides = [step * dtype.itemsize for step in tensor.stride]
        view = np.ndarray(tensor.size, dtype, data, tensor.offset * dtype.itemsize, strides)
    if tensor.storage.kind == "BFloat16Storage":
        bits = view.astype(np.uint32, order="C")
        bits <<= 16  # in place, which keeps a number of no dimensions an array
        return bits.view(np.float32)
    return view.astype(bool if tensor.storage.kind == "BoolStorage" else dtype, order="C")
