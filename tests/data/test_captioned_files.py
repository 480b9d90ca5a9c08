"""Images with captions from wherever they stand: the same captions, prepared as they are; and what is refused."""

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from mscm.data import captioned_files, folders, images, png, preparation, records, sources
from mscm.data.captions import TextSpec, WithTokens
from mscm.data.preparation import Settings

CAPTIONS = {"a.png": ["a cat"], "b/c.png": ["a dog", "the dog sits"], "d.jpg.png": ["größer"]}
EXPECTED = tuple(tuple(said) for said in CAPTIONS.values())


def picture(name):
    return png.encode(np.full((4, 4, 3), len(name), np.uint8))


def beside(suffix=".txt"):
    """Each image, and a file with its captions."""
    files = {}
    for name, said in CAPTIONS.items():
        text = "\n".join([*said, " "]) if suffix == ".txt" else json.dumps({"url": "x", "caption": said})
        files |= {name: picture(name), name.removesuffix(".png") + suffix: text.encode()}
    return files


def table(kind, folder=""):
    """The images, and one table of all of them."""
    files = {folder + name: picture(name) for name in CAPTIONS}
    if kind == "jsonl":
        named = [{"file_name": name, "captions": said} for name, said in CAPTIONS.items()]
        rows = [json.dumps(row, ensure_ascii=False) for row in named]
    else:
        rows = ["file_name,caption", *(f'{name},"{text}"' for name, said in CAPTIONS.items() for text in said)]
    return files | {f"{folder}metadata.{kind}": ("\n".join(rows) + "\n").encode()}


def folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tars(root, files):
    """As webdataset: examples one after the other in several tars."""
    root.mkdir()
    examples = sorted(files)
    tar(root / "0000.tar", {name: files[name] for name in examples[:2]})
    tar(root / "0001.tar", {name: files[name] for name in examples[2:]})
    return root


@pytest.mark.parametrize(
    "make",
    [
        lambda tmp: folder(tmp / "x", beside()),
        lambda tmp: folder(tmp / "x", beside(".json")),
        lambda tmp: folder(tmp / "x", table("jsonl")),
        lambda tmp: folder(tmp / "x", table("csv", "inner/")),
        lambda tmp: tar(tmp / "x.tar", beside()),
        lambda tmp: zipped(tmp / "x.zip", table("jsonl", "inner/")),
        lambda tmp: tars(tmp / "x", beside()),
    ],
    ids=["txt", "json", "jsonl", "csv", "tar", "zip", "webdataset"],
)
def test_the_same_captions_wherever_they_stand(tmp_path, make):
    """Beside the images in their order, also after a trip to another process, and of a part of them."""
    files = pickle.loads(pickle.dumps(captioned_files.open_captioned(make(tmp_path))))
    assert files.captions == EXPECTED and files.class_names == ("captioned",)
    assert {entry.label for entry in files.entries} == {0}
    values = [int(images.decode(files.read(i), channels=1)[0, 0, 0]) for i in range(3)]
    assert values == [len(name) for name in CAPTIONS]
    assert files.part(1, 3).captions == EXPECTED[1:]


def test_a_split_is_a_folder(tmp_path):
    files = beside()
    root = folder(tmp_path / "x", {f"{part}/{name}": files[name] for part in ("train", "val") for name in files})
    (root / "val" / "a.txt").write_text("another")
    assert captioned_files.open_captioned(root, split="train").captions == EXPECTED
    assert captioned_files.open_captioned(root, split="val").captions[0] == ("another",)
    with pytest.raises(folders.NoSuchSplit, match="got split 'test', expected a folder of that name with images"):
        captioned_files.open_captioned(root, split="test")
    assert sources.open_source("x", split="val", path=root, resolution=4, captioned=True).captions[0] == ("another",)
    flat = folder(tmp_path / "flat", beside())
    assert sources.open_source("x", split="train", path=flat, resolution=4, captioned=True).captions == EXPECTED


def _without(files, name):
    return {key: data for key, data in files.items() if key != name}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (_without(beside(), "a.txt"), "got no caption of a.png, expected a.txt; add it, or remove the image"),
        (beside() | {"a.txt": b" \n"}, "got no caption of a.png"),
        (
            {name: picture(name) for name in CAPTIONS},
            "got no caption of a.png and 2 others, expected a.txt",
        ),
        ({"a.txt": b"a cat"}, "got 1 files and no image, expected files such as NAME.jpg and NAME.txt"),
        (beside() | {"a.txt": b"\xff\xfe\xff"}, "a.txt: got a file that is no text .*, expected UTF-8"),
        (beside() | {"a.txt": b"x" * (2**20 + 1)}, "a.txt: got a file of more than 1048576 bytes"),
        (beside(".json") | {"a.json": b"{"}, "a.json: got a file that is no JSON"),
        (beside(".json") | {"a.json": b"[" * 100_000}, "a.json: got a file that is no JSON"),
        (beside(".json") | {"a.json": b'{"caption": 3}'}, "got no caption of a.png"),
        (table("jsonl") | {"a.png": b""} | {"e.png": picture("e")}, "got no caption of e.png, expected a row of it"),
        (_without(table("jsonl"), "a.png"), "got a row of a.png in metadata.jsonl, expected that file"),
        (table("jsonl") | {"metadata.jsonl": b"{]"}, "metadata.jsonl: got a table that cannot be read"),
        (table("jsonl") | {"metadata.jsonl": b'{"a": 1}'}, "row 1 is .*, expected file_name and caption"),
        (table("csv") | {"metadata.csv": b"x,y\n1,2\n"}, "row 2 is .*, expected file_name and caption"),
        (table("csv") | {"metadata.csv": b"file_name,caption\n../../etc/passwd,x\n"}, "got a row of ../../etc/passwd"),
    ],
)
def test_what_is_not_captioned_is_a_sentence(tmp_path, files, sentence):
    with pytest.raises(ValueError, match=sentence):
        captioned_files.open_captioned(folder(tmp_path / "x", files))


@pytest.fixture
def prepared(tmp_path):
    """Records of the images, two in a shard."""
    files = captioned_files.open_captioned(folder(tmp_path / "x", beside()))
    output = tmp_path / "records"
    settings = Settings(resolution=4, images_per_shard=2)
    preparation.prepare(files, output, settings, split="train", num_workers=1, report=lambda *_: None)
    return output


def test_captions_are_prepared_with_their_images(prepared, tmp_path):
    source = sources.open_source("x", split="train", path=prepared)
    assert source.captions == EXPECTED and pickle.loads(pickle.dumps(source)).captions == EXPECTED
    np.testing.assert_array_equal(source.load(np.arange(3))["image"][:, 0, 0, 0], [len(name) for name in CAPTIONS])
    text = WithTokens(source, TextSpec("bytes", length=20)).load(np.array([1]))
    assert bytes(text["tokens"][0][text["mask"][0]]) == b"a dog"
    # Other captions of the same images are other data.
    folder(tmp_path / "x", {"a.txt": b"a tiger"})
    files = captioned_files.open_captioned(tmp_path / "x")
    settings, again = Settings(resolution=4), tmp_path / "again"
    preparation.prepare(files, again, settings, split="train", num_workers=1, report=lambda *_: None)
    other = sources.open_source("x", split="train", path=again)
    assert other.card.checksum == source.card.checksum and other.fingerprint != source.fingerprint


def test_a_broken_image_takes_its_captions_along(tmp_path):
    files = captioned_files.open_captioned(folder(tmp_path / "x", beside() | {"b/c.png": b"no image"}))
    settings, output = Settings(resolution=4, skip_broken=True), tmp_path / "records"
    card = preparation.prepare(files, output, settings, split="train", num_workers=1, report=lambda *_: None)
    source = sources.open_source("x", split="train", path=output)
    assert card.broken == ("b/c.png",) and source.captions == (EXPECTED[0], EXPECTED[2])


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_captions_that_are_not_those_of_the_card(prepared, damage):
    path = records.captions_path(prepared, "train")
    path.write_text(path.read_text().replace("cat", "rat")) if damage == "changed" else path.unlink()
    with pytest.raises(ValueError, match="got other captions than those|got no such file, expected the captions"):
        sources.open_source("x", split="train", path=prepared)


def test_a_card_from_before_there_were_captions(prepared):
    """It has no such key, and its images none."""
    path = records.card_path(prepared, "train")
    values = json.loads(path.read_text())
    del values["captions_sha256"]
    path.write_text(json.dumps(values))
    assert sources.open_source("x", split="train", path=prepared).captions is None


def test_captions_not_yet_prepared_are_read_as_they_stand(tmp_path):
    root = folder(tmp_path / "x", beside())
    one = sources.open_source("x", split="train", path=root, resolution=4, captioned=True)
    assert one.captions == EXPECTED
    (root / "a.txt").write_text("a tiger")
    other = sources.open_source("x", split="train", path=root, resolution=4, captioned=True)
    assert one.fingerprint != other.fingerprint
