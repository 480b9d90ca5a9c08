"""Images of any origin: the same batches whatever holds them; what cannot be scored is one sentence."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from mscm.data import folders, loose, png
from mscm.data.images import BrokenImage

# By name: first b/2, then b/c/10, then b/c/9, then z.
TREE = {"z.png": 4, "b/c/9.png": 3, "b/c/10.png": 2, "b/2.PNG": 1}
OTHERS = {"README.txt": b"text", "b/.hidden.png": b"", "__MACOSX/z.png": b""}


def pixels(value, size=4, channels=3):
    return np.full((size, size, channels), value, np.uint8)


def contents(tree):
    return {name: png.encode(pixels(value)) for name, value in tree.items()} | OTHERS


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def stored(path, files):
    return zipped(path, files, zipfile.ZIP_STORED)


def tarred(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def opened(path, resolution=4, channels=3):
    return loose.open_images(path, resolution=resolution, channels=channels)


def values(images, batch_size=3):
    batches = list(images.batches(batch_size))
    assert all(batch.dtype == np.uint8 for batch in batches)
    return [int(image.flat[0]) for batch in batches for image in batch]


@pytest.mark.parametrize("make", [folder, zipped, stored, tarred])
def test_files_at_any_depth_in_the_order_of_their_names(tmp_path, make):
    images = opened(make(tmp_path / "images", contents(TREE)))
    assert len(images) == 4 and values(images) == [1, 2, 3, 4]


@pytest.mark.parametrize("make", [folder, zipped, tarred])
def test_unlabelled_files(tmp_path, make):
    """Of one class that is called any; they can be sent to other processes."""
    path = make(tmp_path / "images", contents(TREE))
    files = pickle.loads(pickle.dumps(folders.open_unlabelled(path)))
    names = ("b/2.PNG", "b/c/10.png", "b/c/9.png", "z.png")
    assert files.entries == tuple(folders.Entry(name, 0) for name in names)
    assert files.class_names == ("any",) and files.split is None and files.path == str(path)
    assert [files.read(i) for i in range(4)] == [contents(TREE)[name] for name in names]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("images",), ("arr_0",), ("arr_0", "images"), ("labels", "arr_0")])
def test_arrays_in_their_order(tmp_path, save, names):
    """What mscm.sample writes, and an array without a name, also with others beside it; the former comes first."""
    path = tmp_path / "samples.npz"
    array = np.random.RandomState(0).randint(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    save(path, **{name: array if name == names[-1] else np.zeros(2) for name in names})
    images = opened(path)
    assert len(images) == 5
    np.testing.assert_array_equal(np.concatenate(list(images.batches(2))), array)


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])])
@pytest.mark.parametrize("kind", ["array", "files"])
def test_batches_cover_all(tmp_path, kind, batch_size, sizes):
    """Once each, in order; the last one is smaller."""
    path = tmp_path / "images.npz"
    if kind == "array":
        np.savez(path, images=np.stack([pixels(value) for value in range(5)]))
    else:
        path = folder(tmp_path / "images", contents({f"{value}.png": value for value in range(5)}))
    images = opened(path)
    for _ in range(2):  # and again
        assert [len(batch) for batch in images.batches(batch_size)] == sizes
    assert values(images, batch_size) == [0, 1, 2, 3, 4]


def test_colours_are_those_of_the_reference(tmp_path):
    """Grey files become colour and the reverse; an array is taken as it is."""
    colour = np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    path = folder(tmp_path / "images", {"1.png": png.encode(colour), "2.png": png.encode(pixels(7, channels=1))})
    (batch,) = opened(path).batches(2)
    np.testing.assert_array_equal(batch, np.stack([colour, pixels(7)]))
    (batch,) = opened(path, channels=1).batches(2)
    np.testing.assert_array_equal(batch[1], pixels(7, channels=1))
    assert np.abs(batch[0, ..., 0] - colour @ [0.299, 0.587, 0.114]).max() < 1.01
    np.savez(tmp_path / "grey.npz", images=np.stack([pixels(7, channels=1)]))
    (batch,) = opened(tmp_path / "grey.npz", channels=1).batches(2)
    np.testing.assert_array_equal(batch, pixels(7, channels=1)[None])


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "uint8 images of shape (2, 8, 8, 3)"),
        (np.zeros((2, 4, 8, 3), np.uint8), "uint8 images of shape (2, 4, 8, 3)"),
        (np.zeros((2, 4, 4, 1), np.uint8), "uint8 images of shape (2, 4, 4, 1)"),
        (np.zeros((2, 4, 4), np.uint8), "uint8 images of shape (2, 4, 4)"),
        (np.zeros((2, 3, 4, 4), np.uint8), "uint8 images of shape (2, 3, 4, 4)"),
        (np.zeros((4, 4, 3), np.uint8), "uint8 images of shape (4, 4, 3)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "uint8 images of shape (0, 4, 4, 3)"),
        (np.zeros((), np.uint8), "uint8 images of shape ()"),
        (np.zeros((2, 4, 4, 3), np.float32), "float32 images of shape (2, 4, 4, 3)"),
        (np.zeros((2, 4, 4, 3), np.int64), "int64 images of shape (2, 4, 4, 3)"),
    ],
)
def test_arrays_of_another_size_or_type(tmp_path, array, got):
    path = tmp_path / "samples.npz"
    np.savez(path, images=array)
    with pytest.raises(ValueError) as error:
        opened(path)
    assert str(error.value) == f"{path}: got {got}, expected uint8 of shape (n, 4, 4, 3) as the reference has"


def marked_as_encrypted(path):
    np.savez(path, images=np.zeros((1, 4, 4, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def npy_file(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros((1, 4, 4, 3), np.uint8))


def broken_header(path):
    header = b"{[1]: 2}"
    zipped(path, {"images.npy": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.write_bytes(b"no zip"), ""),
        (lambda path: (np.savez(path, images=pixels(0)[None]), path.write_bytes(path.read_bytes()[:-9])), ""),
        (lambda path: np.savez(path, other=np.zeros(2)), "got arrays called other, expected images or arr_0"),
        (lambda path: np.savez(path, images=np.array([{}, {}], dtype=object)), "pickled objects"),
        (lambda path: path.write_bytes(pickle.dumps([1])), ""),
        (lambda path: zipped(path, {"images": b"not of numpy"}), ""),
        (npy_file, ""),
        (marked_as_encrypted, "encrypted"),
        (broken_header, ""),
    ],
    ids=["absent", "folder", "empty", "text", "cut", "other", "objects", "pickle", "foreign", "npy", "encrypted",
         "header"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
def test_arrays_that_cannot_be_read(tmp_path, make, reason):
    path = tmp_path / "samples.npz"
    make(path)
    with pytest.raises(ValueError) as error:
        opened(path)
    text = str(error.value)
    assert text.startswith(f"{path}: got ") and ", expected " in text and reason in text


@pytest.mark.parametrize("make", [folder, zipped, tarred])
def test_no_images(tmp_path, make):
    path = make(tmp_path / "images", {"a/1.txt": b"text", "a/.1.png": b""})
    with pytest.raises(ValueError, match=f"^{path}: got 1 files and no image, expected files such as NAME.png$"):
        opened(path)


def damaged_directory(path):
    zipped(path, contents(TREE))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02")] = 0
    path.write_bytes(content)


def newer_zip(path):
    zipped(path, contents(TREE))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200  # the version that is needed to read it
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.write_bytes(b"text"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(zipped(path, contents(TREE)).read_bytes()[:-30]),
        lambda path: path.write_bytes(tarred(path, contents(TREE)).read_bytes()[:1500]),
        damaged_directory,
        newer_zip,
    ],
    ids=["absent", "text", "empty", "cut zip", "cut tar", "damaged zip", "newer zip"],
)
def test_sources_that_cannot_be_listed(tmp_path, make):
    path = tmp_path / "images"
    make(path)
    with pytest.raises(ValueError) as error:
        opened(path)
    assert str(path) in str(error.value) and ", expected " in str(error.value)


WHOLE = png.encode(np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"got a broken image, b/2\.png \(not an image\); repair or remove it"),
        (b"text", r"got a broken image, b/2\.png \(not an image\); repair or remove it"),
        (WHOLE[:-30], r"got a broken image, b/2\.png \(.+\); repair or remove it"),
        (png.encode(pixels(1, size=8)), r"got b/2\.png of 8 x 8 pixels, expected 4 x 4 as the reference has; resize "),
        (png.encode(np.zeros((4, 6, 3), np.uint8)), r"got b/2\.png of 6 x 4 pixels, expected 4 x 4 as the reference "),
        (png.encode(np.zeros((6, 4, 3), np.uint8)), r"got b/2\.png of 4 x 6 pixels, expected 4 x 4 as the reference "),
    ],
    ids=["empty", "text", "cut", "larger", "wider", "higher"],
)
@pytest.mark.parametrize("make", [folder, zipped, tarred])
def test_a_broken_image_is_named(tmp_path, make, content, sentence):
    """When its batch is loaded; those before it are good."""
    path = make(tmp_path / "images", {"a.png": WHOLE, "b/2.png": content, "c.png": WHOLE})
    batches = opened(path).batches(1)
    np.testing.assert_array_equal(next(batches)[0], np.asarray(Image.open(io.BytesIO(WHOLE))))
    with pytest.raises(BrokenImage, match=f"^{path}: {sentence}"):
        next(batches)


def test_what_vanishes_or_is_damaged_meanwhile_is_named(tmp_path):
    images = opened(folder(tmp_path / "folder", {"a.png": WHOLE}))
    (tmp_path / "folder" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="No such file .*/folder/a.png"):
        values(images)
    path = zipped(tmp_path / "images.zip", {"a.png": WHOLE * 10})
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20  # within what is deflated
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match=f"^{path}: got a broken image, a.png .*; repair or remove it$"):
        values(opened(path))
