"""Folders, zips and tars of images are the same files with the same labels; what cannot be meant is refused."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from mscm.data import folders, images, png

TREE = {
    "photos/train/cat/1.png": 1,
    "photos/train/cat/2.PNG": 2,
    "photos/train/dog/1.png": 3,
    "photos/test/cat/1.png": 4,
    "photos/test/dog/9.png": 5,
    "photos/README.txt": None,
    "photos/train/dog/.hidden.png": 6,
    "__MACOSX/photos/train/dog/1.png": 7,
}


def _bytes(value):
    return b"text" if value is None else png.encode(np.full((4, 4, 3), value, np.uint8))


def _folder(root, tree):
    for name, value in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_bytes(value))
    return root


def _zip(path, tree, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in tree.items():
            archive.writestr(name, _bytes(value))
    return path


def _tar(path, tree, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, value in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(_bytes(value))
            archive.addfile(info, io.BytesIO(_bytes(value)))
    return path


def _tar_of_tars(path):
    """The layout of ILSVRC's training images: one tar per class."""
    with tarfile.open(path, "w") as archive:
        for name, tree in (("dog", {"1.png": 3}), ("cat", {"1.png": 1, "2.PNG": 2})):
            inner = _tar(path.with_suffix(".inner"), tree).read_bytes()
            info = tarfile.TarInfo(f"{name}.tar")
            info.size = len(inner)
            archive.addfile(info, io.BytesIO(inner))
    return path


def _values(files):
    return [int(images.decode(files.read(i), channels=1)[0, 0, 0]) for i in range(len(files.entries))]


@pytest.mark.parametrize("kind", ["folder", "zip", "stored zip", "tar"])
def test_the_same_files_whatever_holds_them(tmp_path, kind):
    """Sorted classes and names, labels, bytes; also after a trip to another process."""
    make = {
        "folder": lambda: _folder(tmp_path / "x", TREE),
        "zip": lambda: _zip(tmp_path / "x.zip", TREE),
        "stored zip": lambda: _zip(tmp_path / "x.zip", TREE, zipfile.ZIP_STORED),
        "tar": lambda: _tar(tmp_path / "x.tar", TREE),
    }
    files = pickle.loads(pickle.dumps(folders.open_files(make[kind](), split="train")))
    assert files.class_names == ("cat", "dog") and files.split == "train"
    assert files.entries == (
        ("photos/train/cat/1.png", 0), ("photos/train/cat/2.PNG", 0), ("photos/train/dog/1.png", 1)
    )
    assert _values(files) == [1, 2, 3]
    assert _values(files.part(1, 3)) == [2, 3] and files.part(1, 3).entries == files.entries[1:]


def test_a_tar_of_class_tars(tmp_path):
    files = folders.open_files(_tar_of_tars(tmp_path / "ILSVRC.tar"))
    assert files.class_names == ("cat", "dog")
    assert [entry.label for entry in files.entries] == [0, 0, 1]
    assert _values(files) == [1, 2, 3]


def test_a_folder_without_splits(tmp_path):
    files = folders.open_files(_folder(tmp_path / "x", {"b/1.png": 1, "a/1.png": 2}))
    assert files.class_names == ("a", "b") and _values(files) == [2, 1] and files.split is None


@pytest.mark.parametrize(
    ("tree", "split", "sentence"),
    [
        (TREE, None, "2 classes with two folders of their name.* choose one of test, train"),
        (TREE, "trian", "got split 'trian', expected a folder above the class folders, one of photos, test, train"),
        ({"a/1.png": 1}, "train", "there is none: all of it is the split 'train' of a config, and mscm.prep"),
        ({"1.png": 1, "a/1.png": 1}, None, "images that are in no folder, expected one folder per class"),
        ({"x/cover.png": 1, "x/a/1.png": 1}, None, "in folders of different depth, x and x/a, expected one folder per"),
        ({"a/1.png": 1, "b/c/1.png": 1}, None, "in folders of different depth, a and b/c"),
        ({"a/1.txt": None}, None, "got 1 files and no image"),
        ({"a/1.png": 1, "b/1.txt": None}, None, "got no image in the class folder b"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, tree, split, sentence):
    with pytest.raises(ValueError, match=sentence):
        folders.open_files(_folder(tmp_path / "x", tree), split=split)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected an existing folder, zip or tar"):
        folders.open_files(tmp_path / "absent")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="neither zip nor tar"):
        folders.open_files(tmp_path / "text")
    with pytest.raises(ValueError, match="got a compressed tar, expected a plain one"):
        folders.open_files(_tar(tmp_path / "x.tar.gz", TREE, "w:gz"))
    with pytest.raises(ValueError, match="compressed in a rare way"):
        folders.open_files(_zip(tmp_path / "x.zip", TREE, zipfile.ZIP_LZMA), split="train")


@pytest.mark.parametrize("kind", [_folder, _zip, _tar])
def test_a_class_without_a_readable_image_is_refused(tmp_path, kind):
    """Its label would be another's; an archive need not name its folders."""
    with pytest.raises(ValueError, match="got no image in the class folder bird"):
        folders.open_files(kind(tmp_path / "x", {"cat/1.png": 1, "bird/1.heic": None, "dog/1.png": 2}))


def test_a_cut_tar_is_refused(tmp_path):
    """Cut within data, at the start of a header and in it, or damaged in a header."""
    whole = _tar(tmp_path / "x.tar", {f"{name}/{i}.png": i for name in "abc" for i in range(10)}).read_bytes()
    starts = [i for i in range(512, len(whole), 512) if whole[i : i + 2] in (b"b/", b"c/")]
    damaged = bytearray(whole)
    damaged[starts[3] + 150] ^= 1
    for data in (whole[: starts[2]], whole[: starts[2] + 10], whole[: starts[2] - 300], bytes(damaged)):
        (tmp_path / "cut.tar").write_bytes(data)
        with pytest.raises(ValueError, match="got a damaged or cut tar"):
            folders.open_files(tmp_path / "cut.tar")


def test_a_cut_zip_and_an_empty_file_are_called_so(tmp_path):
    """A zip's list of files is at its end: without it the file is no zip to the library."""
    whole = _zip(tmp_path / "x.zip", TREE).read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.zip").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="x.zip: got a cut or damaged zip .*, expected a whole one; copy it again"):
            folders.open_files(tmp_path / "x.zip", split="train")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="x.zip: got an empty file, expected a folder, zip or tar of images; copy "):
        folders.open_files(tmp_path / "x.zip")


def test_a_cut_class_tar_is_refused(tmp_path):
    _tar_of_tars(tmp_path / "x.tar")
    inner = (tmp_path / "x.inner").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("cat.tar")
        info.size = 1024
        archive.addfile(info, io.BytesIO(inner[:1024]))
    with pytest.raises(ValueError, match="got a damaged or cut tar"):
        folders.open_files(tmp_path / "x.tar")


def test_links_in_a_tar_are_their_files(tmp_path):
    """Hard links, as GNU tar stores a second name, and symbolic ones."""
    with tarfile.open(_tar(tmp_path / "x.tar", {"a/1.png": 5, "b/1.png": 6}), "a") as archive:
        for name, kind, goal in (("a/2.png", tarfile.LNKTYPE, "a/1.png"), ("b/2.png", tarfile.SYMTYPE, "../a/1.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, goal
            archive.addfile(info)
    files = folders.open_files(tmp_path / "x.tar")
    assert [entry.label for entry in files.entries] == [0, 0, 1, 1] and _values(files) == [5, 5, 6, 5]
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        info = tarfile.TarInfo("b/3.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/elsewhere.png"
        archive.addfile(info)
    with pytest.raises(ValueError, match="got b/3.png, a link to /elsewhere.png, expected that file in the tar"):
        folders.open_files(tmp_path / "x.tar")


def test_names_with_a_leading_dot_slash(tmp_path):
    for path in (_zip(tmp_path / "x.zip", {"./a/1.png": 3}), _tar(tmp_path / "x.tar", {"./a/1.png": 3})):
        assert folders.open_files(path).entries == (("a/1.png", 0),)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    """os.walk would leave it out, and with it a class."""
    _folder(tmp_path / "x", {"a/1.png": 1, "b/1.png": 2})
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("a"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match="x/a, expected to be allowed to read it"):
        folders.open_files(tmp_path / "x")


def test_links_are_followed(tmp_path):
    """A data set is often a folder of links into another."""
    _folder(tmp_path / "real", {"a/1.png": 9})
    (tmp_path / "x").mkdir()
    os.symlink(tmp_path / "real" / "a", tmp_path / "x" / "linked")
    files = folders.open_files(tmp_path / "x")
    assert files.class_names == ("linked",) and _values(files) == [9]
