"""Arrays with a card: they come back as they were, or a sentence names the file."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from mscm.metrics import files

ARRAYS = {
    "weights/kernel": np.arange(1500, dtype=np.float32).reshape(30, 50),  # longer than what zipfile reads at a time
    "bias": np.array([1.5, -0.0, np.nan, np.inf]),
    "count": np.array(3),
    "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "empty": np.zeros((0, 3), np.float32),
    "turned": np.arange(6).reshape(2, 3).T,
}
CARD = {"kind": "test", "count": 3, "nothing": None, "text": 'a "quoted" ü'}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arrays.npz"


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, strict=True)


def sentence(path) -> str:
    """That of the refusal, which names the file and says what to do."""
    with pytest.raises(ValueError) as error:
        files.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: got ") and ", expected " in text and text.endswith("; make it again"), text
    return text


def npz(path, members, compression=zipfile.ZIP_STORED):
    """A zip with these bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def card(**contents) -> dict[str, bytes]:
    return {"card.npy": npy(np.array(json.dumps(contents)))}


def test_round_trip(path):
    """In folders that are made, twice; the caller's arrays and card stay as they are."""
    path = path.parent / "a" / "b" / path.name
    given = dict(CARD)
    for _ in range(2):
        files.save(path, ARRAYS, given)
    arrays, card = files.load(path)
    assert_same(arrays, ARRAYS)
    assert card == CARD == given and os.listdir(path.parent) == [path.name]


def test_files_of_anybody_with_numpy(path):
    """No other program is needed to look into one."""
    files.save(path, ARRAYS, CARD)
    with np.load(path) as file:
        assert json.loads(str(file["card"])) == CARD | {"sha256": files.fingerprint(ARRAYS)}
        np.testing.assert_array_equal(file["bias"], ARRAYS["bias"])


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(other=a.pop("x")),
        lambda a: a.update(x=a["x"].astype(np.float64)),
        lambda a: a.update(x=a["x"].view(np.int32)),
        lambda a: a.update(x=a["x"].view(">f4")),
        lambda a: a.update(x=a["x"].reshape(3, 2)),
        lambda a: a.update(x=a["x"].ravel()),
        lambda a: a.update(x=a["x"].T.copy().T[:, ::-1]),
        lambda a: a.update(x=np.nextafter(a["x"], np.float32(9))),
        lambda a: a.update(y=-a["y"]),
        lambda a: a.update(x=a["y"], y=a["x"]),
        lambda a: a.update(z=np.zeros(0)),
        lambda a: a.pop("y"),
    ],
    ids=["name", "type", "view", "order", "shape", "rank", "turned", "bit", "sign", "swap", "empty", "fewer"],
)
def test_the_fingerprint_sees(change):
    """Names, types, shapes and every bit."""
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.full((2, 3), -0.0, np.float32)}
    changed = dict(arrays)
    change(changed)
    assert files.fingerprint(changed) != files.fingerprint(arrays)


def test_the_fingerprint_does_not_see():
    """The order of the names and that in memory: they are the same arrays."""
    fortran = {name: np.array(value, order="F") for name, value in reversed(ARRAYS.items())}
    assert files.fingerprint(fortran) == files.fingerprint(ARRAYS)


def test_what_is_absent_is_not_damaged(path):
    with pytest.raises(FileNotFoundError):
        files.load(path)


class Calls:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["weights.npy", "card.npy", "weights"])
def test_nothing_is_unpickled(path, name):
    """An array of objects, and a member that is a pickle and nothing else."""
    marker = path.parent / "marker"
    content = npy(np.array([Calls(marker)], dtype=object)) if name.endswith(".npy") else pickle.dumps(Calls(marker))
    npz(path, card(sha256="0" * 64) | {name: content})
    sentence(path)
    path.write_bytes(content)  # no zip
    sentence(path)
    assert not marker.exists()


def rewritten(path, **changes):
    """As somebody writes it who edits a file with NumPy."""
    with np.load(path) as file:
        np.savez(path, **{**file, **changes})


def marked_as_encrypted(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def badly_compressed(path):
    npz(path, {"x.npy": npy(np.zeros(9))}, zipfile.ZIP_LZMA)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x5d\x00\x00", b"\xff\xff\xff", 1))


def header(text):
    return lambda path: npz(path, {"x.npy": b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip"),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(path.read_bytes()[30:]),
        lambda path: path.write_bytes(npy(np.zeros(3))),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: np.savez(path, other=np.zeros(2)),
        lambda path: npz(path, {}),
        lambda path: npz(path, card()),
        lambda path: npz(path, {"card.npy": npy(np.array("no json"))}),
        lambda path: npz(path, {"card.npy": npy(np.array("[1]"))}),
        lambda path: npz(path, card(sha256=5)),
        lambda path: npz(path, card(sha256=None)),
        lambda path: npz(path, card(sha256="0" * 64) | {"notes.txt": b"not of numpy"}),
        lambda path: rewritten(path, bias=ARRAYS["bias"][::-1]),
        lambda path: rewritten(path, more=np.zeros(1)),
        marked_as_encrypted,
        badly_compressed,
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,), }"),
        header("{[1]: 2}"),
        header("(((("),
        header("a\n  b\n c"),
    ],
    ids=["empty", "text", "end", "start", "npy", "folder", "other", "nothing", "no hash", "no json", "list", "number",
         "null", "foreign", "weight", "more", "encrypted", "lzma", "memory", "overflow", "unhashable", "bracket",
         "indent"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
def test_every_damage_is_a_sentence(path, damage):
    files.save(path, ARRAYS, CARD)
    damage(path)
    sentence(path)


@pytest.mark.filterwarnings("ignore")  # numpy's parser has some of its own about a broken header
def test_flipped_bytes(path):
    """At every position but within the numbers, where a few do: the same arrays, or the sentence."""
    files.save(path, ARRAYS, CARD)
    whole = path.read_bytes()
    data = whole.index(ARRAYS["weights/kernel"].tobytes())
    positions = [i for i in range(len(whole)) if not data + 20 < i < data + ARRAYS["weights/kernel"].nbytes - 20]
    rng = np.random.RandomState(0)
    refused = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, rng.randint(1, 256)])
        path.write_bytes(damaged)
        try:
            arrays, card = files.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: got ")
            refused += 1
        else:
            assert_same(arrays, ARRAYS)
            assert card == CARD
    assert 0 < refused < len(positions)  # dates and the like are nobody's
