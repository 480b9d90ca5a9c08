"""Files of PyTorch, whole and hostile, written by hand here and by PyTorch where it is installed."""

import base64
import io
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
import zlib

import numpy as np
import pytest

from mscm import torch_files
from mscm.torch_files import read_pickled_module, read_torch_file

# Sequential(Linear(2, 1)) with weight [[1, 2]] and bias [3], as PyTorch 2.13.0 writes it: a whole legacy file, and
# data.pkl of torch.save and of torch.jit.save.
FROM_TORCH = {
    "legacy": (
        "c-n1IO>fgc5cO`Hq+Mt!P(I3s#L--$Kq`n&<bZlv@f9w6L6&2$vRfH%#yc(o$x<#<ZGQtlfWO91K;ppIQ8}RQVWfF8^WK}CHNOzWpC3oRpB(>u"
        "e=u6}H@|um8wet`7X-noa_BNwBqzG^)|J4hLG4hbu!x0DbeY?<1b(Ijf%tW$6K}t154{G$Nc9Qy##IP?$yJXsTOtf(sKS=Rl}i}Pu&zlnBbh>H"
        "NGe{ut8!iG{I$(cK=5=9EK*xEF&=%<c4-iJhOWxYD5=pFUL=)X)V9bI)TMV-a`Ie2FN)N#)u+yMsUh5qh@--#_;CXY=&N1oi6?O!PoGT=U&Pb#"
        "6b7BuY*mvx{uW{DgA62-{1mn&m+Tb8xoKTpL%2SN9X05zEo|yx*O0CW&40Wv$CL3P+%QAQh;Ogs`wlnTaBIVL8)1JAcj^Z2s%;ugK5I<#6jQj@"
        ")$d1&&;Sk^c+l;2d6I{cdBs`>@Th^urp;@=pfCN@p7DzH*j3)R9`WGvtzS`?v48n&_7`o;kDd"
    ),
    "zip": (
        "c-k#c%TB{E5RB8(wC4SO-_uJ3d;{X*10q~}iyX(QBZY>EH{}$G3zhh5oP^7+c6MfVwBMoDbyXQnWxaO%wJA(visw=jN3cx6VmS|j;34@k<;oI5"
        "O?9JflC@M;j%SU@+p;P$GHX{i+2)C362~&~8t0j6WiTBj{H3ZDy^kQrj%2+rW^&@Y{%jG6kT8D}fnXxsVj)7ow&1_E&#_C`OR+C!Lzui&4hPm>"
        "vQs-cJ>t+tf)S1ehaVjG<z!T!63$Ybw;e9z!jrQPL#j}ua5?O+V(HNU*Bx$#>>JZK{}9{?=Kh1;b-1_v+`2sZ11-c=CI"
    ),
    "script": (
        "c-noB%TB{E5Ji);^kLpC_=a>70pEbw1hs0r$<A^dQ(HAQV~^<y33mBxhGfrTG|zLd=DU!bqYqMZUJbc&u6p-fvMN^6I~2yL!1fA~a%hBQkga~c"
        "%4U&e83x)KcYwTa?y2V{^0#CyZ-qRbMCiEo{s_go$!YrllmE;t8HvDN#{|>CWk%ddnS(|+lOw_t8XFl8s!hgr9F>bc@Xsd(v$AaFL`1q22L<yH"
        "VK3GT+>b*B3q5HjbR|C$Eb9Wd!0N25b1KWasB`S4^wuhg#=FQip;JM1&qgAH^VJS_aM4VOZ;gm>smWB&^<sGO5w7%-6t-|ZNaA1gdZcc2-s@tW"
        "TDYaSt9}6nCw1%"
    ),
}


class Raw(bytes):
    """Instructions of a pickle that leave one object."""


def emit(value) -> bytes:
    """The instructions that make `value`."""
    match value:
        case Raw():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            number = pickle.encode_long(value)
            return b"\x8a" + bytes([len(number)]) + number
        case float():
            return b"G" + struct.pack(">d", value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case list():
            return b"](" + b"".join(map(emit, value)) + b"e"
        case dict():
            return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def dump(value) -> bytes:
    return b"\x80\x02" + emit(value) + b"."


def named(name: str) -> Raw:
    module, _, attribute = name.rpartition(".")
    return Raw(f"c{module}\n{attribute}\n".encode())


def call(name: str, *arguments) -> Raw:
    return Raw(named(name) + emit(arguments) + b"R")


def stored(kind="Float", key="0", count=6, *view) -> Raw:
    return Raw(emit(("storage", named(f"torch.{kind}Storage"), key, "cpu", count, *view)) + b"Q")


def tensor(storage=None, offset=0, size=(2, 3), stride=(3, 1)) -> Raw:
    """A view, by default of a storage '0' of six numbers."""
    storage = stored() if storage is None else storage
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def script(name: str, state) -> Raw:
    return Raw(named(f"__torch__.{name}") + b")\x81" + emit(state) + b"b")


SIX = np.arange(6, dtype="<f4").reshape(2, 3)
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def zipped(root, storages=None, *, byteorder=b"little", compression=zipfile.ZIP_STORED, folder="archive") -> bytes:
    """A file of torch.save or torch.jit.save; `root` is a value or the bytes of a pickle."""
    storages = {"0": SIX} if storages is None else storages
    members = {"data.pkl": root if type(root) is bytes else dump(root), "byteorder": byteorder, "version": b"3\n"}
    members |= {f"data/{key}": np.asarray(array).tobytes() for key, array in storages.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}/{name}", content)
    return file.getvalue()


def legacy(root, storages=None, *, magic=0x1950A86A20F9469CFC6C, version=1001, system=SYSTEM, keys=None) -> bytes:
    """A file of torch.save before PyTorch 1.6."""
    storages = {"0": SIX} if storages is None else storages
    heads = [magic, version, system, root, list(storages) if keys is None else keys]
    pickles = [head if type(head) is bytes else dump(head) for head in heads]
    return b"".join(pickles) + b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())


def scripted(root, storages=None) -> bytes:
    """A file of torch.jit.save with `root` as an attribute of a submodule."""
    if type(root) is bytes:
        return zipped(root, storages)
    return zipped(script("Net", {"training": False, "layers": script("Layers", {"root": root})}), storages)


FORMATS = pytest.mark.parametrize("write", [zipped, legacy, scripted])


@pytest.fixture
def read(tmp_path):
    def read(content: bytes) -> dict[str, np.ndarray]:
        path = tmp_path / "weights.pt"
        path.write_bytes(content)
        return read_torch_file(path)

    return read


@pytest.fixture
def refused(read):
    """The sentence of the refusal, which names the file first and ends with what to do."""

    def refused(content: bytes) -> str:
        with pytest.raises(ValueError) as error:
            read(content)
        message = str(error.value)
        where, _, sentence = message.partition(": ")
        assert where.endswith("weights.pt") and sentence.startswith("got ") and sentence.endswith("."), message
        return sentence

    return refused


@pytest.mark.parametrize("name", FROM_TORCH)
def test_files_of_pytorch(read, name):
    content = zlib.decompress(base64.b85decode(FROM_TORCH[name]))
    if name != "legacy":
        content = zipped(content, {"0": np.array([1, 2], "<f4"), "1": np.array([3], "<f4")})
    tensors = read(content)
    assert list(tensors) == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(tensors["0.weight"], np.array([[1, 2]], np.float32), strict=True)
    np.testing.assert_array_equal(tensors["0.bias"], np.array([3], np.float32), strict=True)


@FORMATS
def test_views_and_nesting(read, write):
    tensors = read(
        write({
            "step": 3, "name": "x", "nothing": None, "flag": True, "list": [1, (2, "y")], "big": 2**70,
            "plain": tensor(),
            "net": {
                "transposed": tensor(size=(3, 2), stride=(1, 3)),
                0: {"column": tensor(offset=1, size=(2,), stride=(3,))},
                "expanded": tensor(offset=5, size=(2, 2), stride=(0, 0)),
                "number": tensor(offset=4, size=(), stride=()),
                "empty": tensor(size=(0, 3), stride=(3, 1)),
                "parameter": call("torch._utils._rebuild_parameter", tensor(), True, call("collections.OrderedDict")),
                "old": call("torch._utils._rebuild_tensor", stored(), 3, (3,), (1,)),
            },
        })
    )
    expected = {
        "plain": SIX,
        "net.transposed": SIX.T,
        "net.0.column": SIX[:, 1],
        "net.expanded": np.full((2, 2), 5, np.float32),
        "net.number": np.array(4, np.float32),
        "net.empty": np.zeros((0, 3), np.float32),
        "net.parameter": SIX,
        "net.old": SIX[1],
    }
    prefix = "layers.root." if write is scripted else ""
    assert list(tensors) == [prefix + name for name in expected]
    for array, value in zip(tensors.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(array, value, strict=True)
        assert type(array) is np.ndarray and array.flags.c_contiguous and array.flags.writeable
    tensors[prefix + "plain"][:] = -1  # of the same storage as the others
    np.testing.assert_array_equal(tensors[prefix + "net.parameter"], SIX)


BITS = np.array([0, 1, 255], np.uint8)


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("kind, dtype", {
    "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1"
}.items())
def test_types(read, write, kind, dtype):
    array = BITS.astype(dtype)
    (result,) = read(write({"x": tensor(stored(kind, "0", 3), 0, (3,), (1,))}, {"0": array})).values()
    np.testing.assert_array_equal(result, array, strict=True)


@pytest.mark.parametrize("size", [(3,), ()])
def test_types_that_are_converted(read, size):
    """A bool is any byte but 0, and a bfloat16 the upper half of a float32."""
    floats = np.array([1.5, -2.0, np.inf], np.float32)
    tensors = read(
        zipped(
            {"bool": tensor(stored("Bool", "0", 3), 0, size, size and (1,)),
             "bfloat16": tensor(stored("BFloat16", "1", 3), 0, size, size and (1,))},
            {"0": BITS[::-1], "1": (floats.view(np.uint32) >> 16).astype("<u2")},
        )
    )
    index = slice(None) if size else 0
    np.testing.assert_array_equal(tensors["bool"], np.array([True, True, False])[index], strict=True)
    np.testing.assert_array_equal(tensors["bfloat16"], floats[index], strict=True)


def test_plain_attributes_of_a_script(read):
    attributes = {
        "ints": call("torch.jit._pickle.build_intlist", [1, 2]),
        "table": call("torch.jit._pickle.restore_type_tag", {"a": 1}, "Dict[str, int]"),
        "device": call("torch.device", "cpu"),
        "weight": tensor(),
    }
    assert list(read(zipped(script("Net", attributes)))) == ["weight"]


def test_state_dict_with_versions_of_its_modules(read):
    ordered = Raw(call("collections.OrderedDict") + b"(" + emit("w") + tensor() + b"u" + emit({"_metadata": {}}) + b"b")
    assert list(read(zipped(ordered))) == ["w"]


class Calls:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def stripped(pickled: bytes) -> Raw:
    """The instructions of a pickle without its version, its frame and its end."""
    return Raw(pickled[2 + 9 * (pickled[2:3] == b"\x95") : -1])


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function, name", [(os.system, f"{os.name}.system"), (eval, "eval"), (getattr, "getattr")])
@pytest.mark.parametrize("place", ["root", "leaf", "argument", "key", "state"])
def test_code_is_named_and_not_run(refused, tmp_path, write, protocol, function, name, place):
    marker = tmp_path / "marker"
    code = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    evil = stripped(pickle.dumps({"x": Calls(function, code)}, protocol))
    value = {
        "root": evil,
        "leaf": {"w": tensor(), "x": evil},
        "argument": {"w": tensor(offset=evil)},
        "key": {evil: tensor()},
        "state": script("Net", {"w": script("Sub", evil)}),
    }[place]
    if function is not os.system:
        name = f"{'__builtin__' if protocol == 2 else 'builtins'}.{name}"  # protocol 2 speaks Python 2
    assert f"asks for {name!r}" in refused(write(value))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "torch.storage._load_from_bytes", "torch.serialization._get_layout", "torch.load", "torch._C.Foo",
     "torch._utils._rebuild_tensor_v3", "numpy.core.multiarray._reconstruct", "mscm.torch_files._Tensor",
     "torch_files.__torch__.X", "collections.defaultdict", "model.Net", "back.\\slash", "m\u00f6del.Net"],
)
def test_other_names_are_refused_even_uncalled(refused, name):
    assert repr(name) in refused(zipped({"w": tensor(), "x": named(name)}))


def test_objects_of_a_script_run_nothing(refused, tmp_path):
    state = (f"touch {tmp_path / 'marker'}",)
    assert "'__torch__.os.system' whose state only its own code" in refused(zipped(script("os.system", state)))
    assert "calls '__torch__.os.system'" in refused(zipped({"w": tensor(), "x": call("__torch__.os.system", *state)}))
    new = Raw(named("__torch__.os.system") + emit(state) + b"\x81")
    assert "makes a '__torch__.os.system'" in refused(zipped({"w": tensor(), "x": new}))
    new = Raw(named("collections.OrderedDict") + b")\x81")
    assert "makes a 'collections.OrderedDict'" in refused(zipped({"w": tensor(), "x": new}))
    assert not list(tmp_path.glob("marker"))


@pytest.mark.parametrize(
    "target",
    [named("torch._utils._rebuild_tensor_v2"), named("__torch__.X"), tensor(), Raw(b"]"), Raw(b")"), Raw(b"K\x01")],
)
def test_state_of_anything_else_is_refused(refused, target):
    for state in ({"__defaults__": 1}, (None, {"__defaults__": 1})):
        assert "sets the state" in refused(zipped({"w": tensor(), "x": Raw(target + emit(state) + b"b")}))


@pytest.mark.parametrize(
    "code",
    [b"\x82\x01", b"\x83\x01\x00", b"ios\nsystem\n", b"oN", b"I1\n", b"S'\\z'\n", b"P0\n", b"\x97", b"0"],
)
def test_instructions_that_tensors_do_not_need(refused, code):
    """Extension codes, old kinds of calls, text numbers (a STRING would warn of its escapes)."""
    assert f"instruction {code[:1]!r}" in refused(zipped({"w": tensor(), "x": Raw(code)}))


def test_a_module_is_no_storage(refused):
    module = Raw(emit(("module", named("torch.FloatStorage"), "0", "cpu", 6)) + b"Q")
    view = stored("Float", "0", 6, ("1", 0, 3))
    kind = Raw(stored().replace(b"torch\nFloatStorage", b"__torch__\nFloatStorage"))
    for storage in (module, view, kind, stored(key=0), stored(key="k" * 600), stored(count=-1), stored(count=True)):
        assert "other than a whole storage" in refused(zipped({"w": tensor(storage)}))
    assert "damaged" in refused(zipped({"w": tensor(Raw(emit(("storage", 1)) + b"Q"))}))


def test_small_pickles_stay_small(read):
    """An index into the memo of four bytes, and text of a claimed 4 GiB."""
    pickled = b"\x80\x02" + emit({"w": tensor()})
    tracemalloc.start()
    assert list(read(zipped(pickled + b"r\xff\xff\xff\x7f."))) == ["w"]
    for text in (b"X\xff\xff\xff\xff", b"B\xff\xff\xff\xff", b"T\xff\xff\xff\x7f"):
        with pytest.raises(ValueError, match="damaged"):
            read(zipped(pickled + text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


DEEP = Raw(b")" + b"\x85" * 250_000)  # its hash would overflow the stack of C


@pytest.mark.parametrize("key", [DEEP, (), True, None, "k" * 600])
def test_keys_are_short_texts_and_integers(refused, key):
    assert "neither an integer nor a text" in refused(zipped({key: tensor()}))


def test_deep_values_elsewhere(read, refused):
    assert list(read(zipped({"w": tensor(), "deep": DEEP}))) == ["w"]
    assert "other storages" in refused(legacy({"w": tensor()}, keys=[DEEP]))
    assert "other than a whole storage" in refused(zipped({"w": tensor(stored("Float", DEEP))}))
    assert "not named in" in refused(zipped({"w": Raw(DEEP + emit("system") + b"\x93")}))


HUGE = 2**62


@FORMATS
@pytest.mark.parametrize(
    "view, match",
    [
        ({"offset": 1}, "ends at element 7 of a storage of 6"),
        ({"size": (3, 3)}, "ends at element 9"),
        ({"stride": (4, 1)}, "ends at element 7"),
        ({"size": (), "stride": (), "offset": 6}, "ends at element 7"),
        ({"size": (HUGE, HUGE), "stride": (HUGE, HUGE)}, "ends at element"),
        ({"size": (HUGE,), "stride": (0,)}, "at most 16 times"),
        ({"size": (50_000,), "stride": (0,)}, "at most 16 times"),
        ({"size": (0, 2**200)}, "damaged"),
        ({"size": (1,), "stride": (2**200,)}, "damaged"),
        ({"offset": -1}, "negative"),
        ({"size": (-2, 3)}, "negative"),
        ({"stride": (3, -1)}, "negative"),
        ({"size": (True, 3)}, "negative or broken"),
        ({"size": ("2", 3)}, "negative or broken"),
        ({"size": [2, 3]}, "without a storage, a size"),
        ({"stride": "31"}, "without a storage, a size"),
        ({"storage": "0"}, "without a storage, a size"),
        ({"size": (6,)}, "1 sizes and 2 strides"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "at most 64"),
    ],
)
def test_views_outside_their_storage(refused, write, view, match):
    assert match in refused(write({"w": tensor(**view)}))


def test_storages_longer_than_the_file(refused):
    assert "23 bytes left in the file, expected 6 in 24 bytes" in refused(legacy({"w": tensor()})[:-1])
    for count in (7, HUGE):
        content = legacy({"w": tensor(stored(count=count))}).removesuffix(struct.pack("<q", 6) + SIX.tobytes())
        content += struct.pack("<q", count) + SIX.tobytes()
        assert f"with 24 bytes left in the file, expected {count} in {4 * count} bytes" in refused(content)


@FORMATS
@pytest.mark.parametrize("count", [5, 7, 10**6, 2**40, HUGE, 2**200])
def test_storages_of_another_size_than_declared(refused, write, count):
    sentence = refused(write({"w": tensor(stored(count=count), size=(5,), stride=(1,))}))
    assert str(count * 4) in sentence


def test_storage_of_two_types(refused):
    two = {"a": tensor(), "b": tensor(stored("Int"))}
    assert "6 of a FloatStorage and as 6 of a IntStorage" in refused(zipped(two))


def test_storage_that_is_missing(refused):
    other = {"w": tensor(stored(key="7"))}
    assert "archive/data/7" in refused(zipped(other))
    assert "other storages" in refused(legacy(other))
    assert "other storages" in refused(legacy({"w": tensor()}, keys=["0", "1"]))


def central_directory(content: bytes, name: bytes) -> int:
    """Where the archive's directory describes the member."""
    start = content.index(name, content.index(b"PK\x01\x02")) - 46
    assert content[start : start + 4] == b"PK\x01\x02"
    return start


def patched(content: bytes, position: int, new: bytes) -> bytes:
    return content[:position] + new + content[position + len(new) :]


def test_members_that_share_their_bytes(refused):
    """As in a zip bomb: each of the members fits into the file, all of them together do not."""
    names = [str(i) for i in range(10, 60)]
    tensors = {name: tensor(stored(key=name, count=500), 0, (1,), (1,)) for name in names}
    content = zipped(tensors, {name: np.zeros(500 if name == "10" else 0, "<f4") for name in names})
    first = central_directory(content, b"archive/data/10")
    for name in names[1:]:  # sizes, checksum and place of the first, whose name is only as long
        position = central_directory(content, f"archive/data/{name}".encode())
        content = patched(content, position + 16, content[first + 16 : first + 28])
        content = patched(content, position + 42, content[first + 42 : first + 46])
    assert "got storages of 100000 bytes" in refused(content)


@pytest.mark.parametrize("member", [b"archive/data.pkl", b"archive/data/0", b"archive/byteorder"])
def test_declared_size_of_a_member(refused, member):
    content = zipped({"w": tensor()})
    position = central_directory(content, member)
    assert "got 4026531840 bytes declared" in refused(patched(content, position + 20, b"\0\0\0\xf0" * 2))
    assert "encrypted" in refused(patched(content, position + 8, b"\1\0"))


def test_place_of_a_member(refused):
    """One that no integer of C holds."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        info.extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
        archive.writestr(info, dump({"w": tensor()}))
    content = file.getvalue()
    position = central_directory(content, b"archive/data.pkl")
    assert "damaged" in refused(patched(content, position + 42, b"\xff" * 4))


def test_compressed_members(refused):
    assert "compressed" in refused(zipped({"w": tensor()}, compression=zipfile.ZIP_DEFLATED))


def test_archives_of_something_else(refused):
    assert "0 members" in refused(zipped({"w": tensor()}, folder="a/b"))
    file = io.BytesIO(zipped({"w": tensor()}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("second/data.pkl", dump({}))
    assert "2 members" in refused(file.getvalue())


def test_big_endian(refused):
    assert "big-endian" in refused(zipped({"w": tensor()}, byteorder=b"big"))
    assert "big-endian" in refused(legacy({"w": tensor()}, system=SYSTEM | {"little_endian": False}))


def test_pickles_of_something_else(refused):
    assert "something else" in refused(pickle.dumps({"w": 1}))
    assert "something else" in refused(legacy({"w": tensor()}, version=1000))
    assert "something else" in refused(legacy({"w": tensor()}, magic=(1, 2)))
    assert "damaged" in refused(legacy({"w": tensor()}, system=[1]))
    assert "takes more than it has made" in refused(zipped(Raw(b"K\x01\x86")))
    assert "calls 'collections.OrderedDict'" in refused(zipped(call("collections.OrderedDict", [["w", tensor()]])))


def test_names_of_tensors(refused):
    assert "two tensors named 'a.b'" in refused(zipped({"a.b": tensor(), "a": {"b": tensor()}}))
    assert "two tensors named '1'" in refused(zipped({"1": tensor(), 1: tensor()}))
    assert "a tensor named ''" in refused(zipped(tensor()))
    assert "names of more than" in refused(zipped({"k" * 300: {"k" * 300: {"w": tensor()}}}))
    assert "not named in" in refused(zipped({"w": tensor(), "x": named("__torch__." + "X" * 600)}))
    for nothing in ({}, {"w": 1}, [tensor()], None):
        assert "got no tensors" in refused(zipped(nothing))


def test_dicts_that_hold_themselves_or_double(refused):
    itself = Raw(b"}q\x00(" + emit("x") + b"h\x00" + emit("w") + tensor() + b"u")
    assert "names of more than" in refused(zipped(itself))
    double = emit({})
    for i in range(100):  # 2 ** 100 names
        double = b"}(" + emit("a") + double + b"q" + bytes([i]) + emit("b") + b"h" + bytes([i]) + b"u"
    assert "more than 100000 entries" in refused(zipped({"w": tensor(), "x": Raw(double)}))


def test_size_of_the_pickle(refused, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 2000)
    for write in (zipped, legacy):
        assert "more than 2000 bytes" in refused(write({"w": tensor(), "x": [1] * 1000}))


@pytest.mark.parametrize(
    "content",
    [b"", b"P", b"\x80", b"weights\n", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"version https://git-lfs",
     struct.pack("<Q", 2) + b"{}", b"<!DOCTYPE html>",
     b"\x80\x02.", b"\x80\x02t.", b"\x80\x02K\x01\x86.", b"\x80\x02u.", b"\x80\x02K\x01e."],
)
def test_files_of_something_else(refused, content):
    refused(content)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(OSError, match=path.name):
            read_torch_file(path)


def test_random_bytes(refused):
    rng = np.random.RandomState(0)
    for start in (b"", b"\x80\x02", b"PK\x03\x04"):
        for size in (1, 10, 1000):
            refused(start + rng.bytes(size))


@FORMATS
def test_truncated(refused, write):
    content = write({"w": tensor(), "n": {"b": tensor(offset=3, size=(3,), stride=(1,))}})
    for twentieth in range(20):
        refused(content[: len(content) * twentieth // 20])
    refused(content[:-1])


@FORMATS
def test_flipped_bytes(read, write):
    """Whatever a damaged byte means, it ends in a sentence or in tensors."""
    content = write({"w": tensor(), "n": {"b": tensor(offset=3, size=(3,), stride=(1,))}})
    rng = np.random.RandomState(0)
    outcomes = []
    for _ in range(400):
        damaged = bytearray(content)
        for position in rng.randint(len(content), size=rng.randint(1, 4)):
            damaged[position] = rng.randint(256)
        try:
            outcomes.append(len(read(bytes(damaged))))
        except ValueError as error:
            assert "weights.pt: got " in str(error)
            outcomes.append(None)
    assert {None, 2} <= set(outcomes)


PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


def within(array=SIX, kind="Float") -> Raw:
    """A storage as a pickle holds it: a whole file of torch.save."""
    return call("torch.storage._load_from_bytes", legacy(stored(kind, "0", array.size), {"0": array}))


def persistent(state, name="Net") -> Raw:
    """A module with its source code, which would leave a file."""
    source = "open('marker', 'w')"
    return call(PERSISTENT, dict(type="class", version=6, module_src=source, class_name=name, state=state))


def module(parameters=None, *, modules=None, **arguments) -> Raw:
    """The module of a network; by default with the one tensor `w`."""
    state = {"_parameters": {"w": tensor(within())} if parameters is None else parameters, "_buffers": {"none": None}}
    state |= {"_modules": modules or {}, "_init_args": (), "_init_kwargs": arguments, "training": False}
    return persistent(state)


@pytest.fixture
def read_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(content: bytes):
        (tmp_path / "net.pkl").write_bytes(content)
        try:
            return read_pickled_module(tmp_path / "net.pkl", "ema")
        finally:
            assert not (tmp_path / "marker").exists()

    return read


def test_module_with_its_source_code(read_module):
    """Names as of `state_dict()`; numbers of numpy and sets among the attributes are passed over."""
    container = Raw(named("torch.nn.modules.container.ModuleDict") + b")\x81" + emit({
        "_parameters": {}, "_buffers": {}, "_modules": {"8x8": module()}
    }) + b"b")
    dtype = Raw(call("numpy.dtype", "f8", False, True) + emit((3, "<", None, None, None, -1, -1, 0)) + b"b")
    number = call("numpy.core.multiarray.scalar", dtype, bytes(8))
    root = {
        "loss_fn": persistent({"P_mean": -1.2}, "Loss"), "set": call("builtins.set", []), "empty": Raw(b"\x8f"),
        "ema": module(modules={"enc": container}, mult=(1, 2), rate=0.5, name="x", nothing=None, flag=True),
        "number": number,
    }
    found = read_module(dump(root))
    assert found.class_name == "Net"
    assert found.arguments == {"mult": [1, 2], "rate": 0.5, "name": "x", "nothing": None, "flag": True}
    assert list(found.tensors) == ["w", "enc.8x8.w"]
    for array in found.tensors.values():
        np.testing.assert_array_equal(array, SIX, strict=True)


def bad_blob(blob) -> Raw:
    return module({"w": tensor(call("torch.storage._load_from_bytes", blob))})


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ({"net": module()}, "without a network 'ema'"),
        ({"ema": {"w": tensor(within())}}, "without a network 'ema'"),
        ({"ema": persistent({"_modules": {}})}, "without a network 'ema'"),
        ([module()], "without a network 'ema'"),
        ({"ema": call(PERSISTENT, {"class_name": 3, "state": {}})}, "without the name of its class"),
        ({"ema": call(PERSISTENT, {"class_name": "Net", "state": None})}, "without the name of its class"),
        ({"ema": call(PERSISTENT, {"state": {}})}, "damaged"),
        ({"ema": persistent({"_init_kwargs": {}, "_modules": {}, "_parameters": 3, "_buffers": {}})}, "damaged"),
        ({"ema": module({})}, "got no tensors"),
        ({"ema": module({"w": tensor()})}, "whose numbers are not in the pickle"),
        ({"ema": module({"w": tensor(size=(2**40,), storage=stored(count=2**40), stride=(1,))})}, "at most 16 times"),
        ({"ema": module({"w": tensor(within(), size=(3, 3))})}, "ends at element 9 of a storage of 6"),
        ({"ema": bad_blob("text")}, "no string of bytes"),
        ({"ema": bad_blob(b"bytes")}, "damaged"),
        ({"ema": bad_blob(legacy({"w": tensor()}))}, "within a pickle that is no storage"),
        ({"ema": bad_blob(legacy(within(), {}))}, "asks for 'torch.storage._load_from_bytes'"),
        ({"ema": bad_blob(legacy(module(), {}))}, f"asks for '{PERSISTENT}'"),
        ({"ema": module(x={"a": 1})}, "made with 'x' of another kind"),
        ({"ema": module(x=[[1]])}, "made with 'x' of another kind"),
        ({"ema": module(x=(1,) * 101)}, "made with 'x' of another kind than numbers and texts, or more than 100"),
        ({"ema": module(**{f"x{i}": i for i in range(101)})}, "made with 101 arguments, expected at most 100"),
        ({"ema": module(), "x": named("torch.nn.Linear")}, "asks for 'torch.nn.Linear'"),
        ({"ema": module(), "x": call("os.system", "touch marker")}, "asks for 'os.system'"),
        ({"ema": module(), "x": Raw(named("numpy.dtype") + b")\x81")}, "makes a 'numpy.dtype'"),
    ],
)
def test_modules_that_are_refused(read_module, root, sentence):
    with pytest.raises(ValueError, match="net.pkl: got ") as error:
        read_module(dump(root))
    assert sentence in str(error.value)


def test_pickles_of_modules_are_bounded(read_module, monkeypatch):
    """Without the numbers; a storage that is read a thousand times counts as often."""
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 4000)
    large = np.zeros(10_000, np.float32)
    assert read_module(dump({"ema": module({"w": tensor(within(large))})})).tensors["w"].shape == (2, 3)
    blob = Raw(emit(legacy(stored("Float", "0", 6), {"0": SIX})) + b"q\x07")
    again = Raw(named("torch.storage._load_from_bytes") + b"h\x07\x85R")
    with pytest.raises(ValueError, match="more than 4000 bytes"):
        read_module(dump({"x": blob, "y": [again] * 20, "ema": module()}))
    inside = persistent({"_parameters": {}, "_buffers": {}, "_modules": Raw(b"h\x09")})
    itself = Raw(b"}q\x09(" + emit("x") + inside + b"u")
    with pytest.raises(ValueError, match="more than 100000 entries or names of more than"):
        read_module(dump({"ema": module(modules=itself)}))


def test_damaged_modules(read_module):
    content = dump({"ema": module(modules={"a": module()}, x=[1])})
    for twentieth in range(20):
        with pytest.raises(ValueError):
            read_module(content[: len(content) * twentieth // 20])
    rng, outcomes = np.random.RandomState(0), []
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randint(len(content))] = rng.randint(256)
        try:
            outcomes.append(len(read_module(bytes(damaged)).tensors))
        except ValueError as error:
            assert "net.pkl: got " in str(error)
            outcomes.append(None)
    assert {None, 2} <= set(outcomes)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def assert_same(tensors, state_dict, torch):
    assert list(tensors) == list(state_dict)
    for name, value in state_dict.items():
        value = value.float() if value.dtype == torch.bfloat16 else value
        np.testing.assert_array_equal(tensors[name], value.detach().numpy(), strict=True)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_of_torch(tmp_path, torch, zip_format, protocol):
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sequential(nn.BatchNorm2d(3), nn.Linear(3, 2)))
    state_dict = net.state_dict()
    state_dict |= {"half": base.half(), "bfloat16": base.bfloat16(), "bool": base > 0, "double": base.double()}
    state_dict |= {"transposed": base.T, "shared": base, "strided": base[1::2, ::3], "expanded": base[:1].expand(3, 6)}
    state_dict |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base)}
    path = tmp_path / "weights.pt"
    torch.save(state_dict, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    assert_same(read_torch_file(path), state_dict, torch)
    torch.save({"model": state_dict, "epoch": 3}, path, _use_new_zipfile_serialization=zip_format)
    assert_same(read_torch_file(path), {f"model.{name}": value for name, value in state_dict.items()}, torch)


@pytest.mark.parametrize("zip_format", [True, False])
def test_whole_module_of_torch_is_refused(tmp_path, torch, zip_format):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(1, 1), path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match="'torch.nn.modules.linear.Linear'"):
        read_torch_file(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_script_of_torch(tmp_path, torch, traced):
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 2, 1).half())))
    net[1].register_buffer("table", torch.arange(6).reshape(2, 3).T)
    net.eval()[1][1].float()
    path = str(tmp_path / "net.pt")
    torch.jit.save(torch.jit.trace(net, torch.ones(1, 2, 4, 4)) if traced else torch.jit.script(net), path)
    tensors, expected = read_torch_file(path), torch.jit.load(path).state_dict()
    assert_same({name: tensors[name] for name in expected}, expected, torch)
    assert tensors.keys() == net.state_dict().keys()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_module_of_torch(tmp_path, torch, protocol, monkeypatch):
    """As the decorator of `torch_utils.persistence` reduces a module: its source and its attributes, no state."""
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = rebuild = lambda meta: pytest.fail("it was called")
    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    class Net(torch.nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            self._init_args, self._init_kwargs, self.scale = (), arguments, np.sqrt(0.5)
            self.weight = torch.nn.Parameter(torch.randn(2, 3))
            self.bias = None
            self.register_buffer("filter", torch.ones(2, 2).half())
            self.register_buffer("absent", None)
            self.enc = torch.nn.ModuleDict()

        def __reduce__(self):
            meta = dict(type="class", version=6, module_src="raise", class_name="Net", state=self.__dict__)
            return rebuild, (meta,)

    net = Net(channel_mult=[1, 2], dropout=0.13)
    net.enc["8x8_block0"] = Net()
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": net.eval().requires_grad_(False), "loss_fn": None}, protocol))
    found = read_pickled_module(path, "ema")
    assert (found.class_name, found.arguments) == ("Net", {"channel_mult": [1, 2], "dropout": 0.13})
    assert_same(found.tensors, net.state_dict(), torch)
