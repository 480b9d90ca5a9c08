"""Arbitrary and mutated input ends in the errors that the functions name, and in no other."""

import io
import json
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import digits
from mscm.arrays import read_npy, read_npz
from mscm.config import ConfigError, flat
from mscm.data import folders, images, png, preparation, records
from mscm.experiment import build
from mscm.metrics import files
from mscm.sampling import SamplerSpec

# The same examples everywhere and always; fixtures are files that each example writes anew.
fuzz = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutated(*originals: bytes) -> st.SearchStrategy[bytes]:
    """One of them with some bytes changed, cut or put in."""

    def change(parts: tuple) -> bytes:
        content, changes = bytearray(parts[0]), parts[1]
        for place, old, new in changes:
            start = place % (len(content) + 1)
            content[start : start + old] = new
        return bytes(content)

    edit = st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8))
    return st.tuples(st.sampled_from(originals), st.lists(edit, min_size=1, max_size=4)).map(change)


# Configs.


def _tiny():
    config = digits.student(student_steps=2, distil=True)
    config.model.middle.update(dict(width=32, num_blocks=1))
    return config


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.integers(-2, 70), st.floats(), st.booleans())
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["cosine", "karras", "addim", "heun", "xla", "../x", "configs/digits_teacher.py", "full", "mlp"]),
)
VALUES = {  # ml_collections refuses an override of another type
    bool: st.booleans(),
    int: st.one_of(st.integers(-(2**70), 2**70), st.integers(-2, 70)),
    float: st.floats(),
    str: TEXTS,
    tuple: st.lists(st.one_of(NUMBERS, TEXTS), max_size=3).map(tuple),
}


@st.composite
def overrides(draw) -> dict:
    """Some keys of the config, with values that have their types."""
    config = _tiny()
    paths = sorted(flat(json.loads(config.to_json_best_effort())))
    chosen = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=2, unique=True))
    found = {}
    for path in chosen:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        found[path] = draw(VALUES[section.get_type(key)])
    return found


@settings(fuzz, max_examples=150)
@given(overrides())
def test_any_override(changes):
    config = _tiny()
    config.update_from_flattened_dict(changes)
    try:
        build(config)
    except ConfigError as error:
        assert len(str(error)) > 10


@fuzz
@given(
    st.one_of(
        st.text(max_size=30), st.from_regex(r"(ddim|heun|addim|consistency):[a-z_]+=[0-9a-z./e-]*", fullmatch=True)
    )
)
def test_any_text_of_a_sampler(text):
    try:
        spec = SamplerSpec(text, 2)
    except ConfigError:
        return
    assert SamplerSpec(spec.sampler, 2) == spec


# Images.


def _images() -> list[bytes]:
    """Small files of all formats that are read."""
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    found = [png.encode(pixels)]
    for kind, mode in [(k, m) for k in ("JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "PNG") for m in ("RGB", "L")]:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        found.append(file.getvalue())
    return found


@pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata that it does not understand
@settings(fuzz, max_examples=400)
@given(st.one_of(st.binary(max_size=200), mutated(*_images())), st.sampled_from([1, 3]))
def test_any_bytes_as_an_image(content, channels):
    try:
        pixels = images.decode(content, channels=channels)
    except images.BrokenImage:
        return
    assert pixels.dtype == np.uint8 and pixels.shape[2] == channels


@fuzz
@given(mutated(png.encode(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))))
def test_any_bytes_as_a_record(content):
    try:
        assert png.decode([content], side=8, channels=1).shape == (1, 8, 8, 1)
    except ValueError:
        pass


# Archives.


def _archives() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name in ("a/1.png", "b/2.png"):
                archive.writestr(zipfile.ZipInfo(name), _images()[0], method)
        found.append(file.getvalue())
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name in ("a/1.png", "b/é" + "2" * 120 + ".png"):
                info = tarfile.TarInfo(name)
                info.size = len(_images()[0])
                tar.addfile(info, io.BytesIO(_images()[0]))
        found.append(file.getvalue())
    return found


@settings(fuzz, max_examples=300)
@given(content=st.one_of(st.binary(max_size=100), mutated(*_archives())))
def test_any_bytes_as_an_archive(tmp_path, content):
    path = tmp_path / "archive"
    path.write_bytes(content)
    try:
        found = folders.open_files(path)
    except ValueError:
        return
    for i in range(len(found.entries)):
        try:
            images.decode(found.read(i), channels=3)
        except (images.BrokenImage, zlib.error):
            pass


# Arrays.


def _npz(*, compressed: bool) -> bytes:
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, mu=np.arange(6.0), names=np.array(["a", "bc"]), image=np.zeros((2, 3, 3, 1), np.uint8))
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.int32).reshape(2, 3))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # numpy's and zipfile's, of damaged headers
@settings(fuzz, max_examples=300)
@given(content=st.one_of(st.binary(max_size=100), mutated(_npz(compressed=False), _npz(compressed=True))))
def test_any_bytes_as_an_npz(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    for read in (read_npz, files.load):
        try:
            read(path)
        except ValueError:
            pass


@pytest.mark.filterwarnings("ignore")  # numpy's, of damaged headers
@settings(fuzz, max_examples=300)
@given(content=mutated(_npy()))
@example(content=_npy().replace(b"(2, 3)", b"(2,-3)"))
def test_any_bytes_as_an_npy(tmp_path, content):
    """What is read has the bytes of the file."""
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    try:
        assert read_npy(path).nbytes < len(content)
    except ValueError:
        pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Records of two images, and the bytes of their files."""
    root = tmp_path_factory.mktemp("prepared")
    for name in ("a/1.png", "b/2.png"):
        (root / "photos" / name).parent.mkdir(parents=True)
        (root / "photos" / name).write_bytes(_images()[0])
    output, chosen = root / "records", preparation.Settings(resolution=8)
    preparation.prepare(
        folders.open_files(root / "photos"), output, chosen, split="train", num_workers=1, report=lambda *_: None
    )
    return output, {path.name: path.read_bytes() for path in output.iterdir()}


JSON = st.recursive(st.one_of(NUMBERS, st.text(max_size=5), st.none()), lambda inner: st.lists(inner, max_size=3))


@pytest.mark.filterwarnings("ignore")  # numpy's, of damaged headers
@settings(fuzz, max_examples=200)
@given(data=st.data())
def test_any_bytes_of_prepared_data(prepared, data):
    """One of the files is changed: card, labels or records."""
    output, contents = prepared
    for name, content in contents.items():
        (output / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(contents)))
    if name == "train.json" and data.draw(st.booleans()):
        card = json.loads(contents[name])
        changed = card | {data.draw(st.sampled_from(sorted(card))): data.draw(JSON)}
        (output / name).write_text(json.dumps(changed))
    else:
        (output / name).write_bytes(data.draw(mutated(contents[name])))
    try:
        source = records.RecordSource("photos", output, split="train")
        source.load(np.arange(len(source)))
    except ValueError:
        pass
