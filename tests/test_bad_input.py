"""What people get wrong, and what nobody should trust: one sentence each, before anything is computed or changed.

Each row of the tables is a command line, what stands in its directory, and the sentence. All begin in a directory with
configs of a small teacher and student, and a work directory of each, `t` and `s`, with a checkpoint of step 8.
"""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import jax
import numpy as np
import pytest

from mscm import evaluation, exporting, lease, planning, training_loop
from mscm.checkpoint import Checkpoints
from mscm.config import load_config
from mscm.data import folders, images, png, preparation, sources
from mscm.experiment import build
from mscm.metrics import dinov2, features, files, gathering, reference_statistics
from mscm.metrics.moments import Moments
from mscm.metrics.statistics import Statistics
from tests import commands, edm_files

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
from configs import digits


def get_config():
    config = digits.{family}
    config.model.middle.update(dict(width=16, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 2
    config.train.update(dict(num_steps=8, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=4))
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(1, 2), network="pixels"))
    {more}
    return config
"""
TEACHER = CONFIG.format(family="teacher()", more="")
STUDENT = CONFIG.format(family="student(student_steps=2, distil=True)", more="config.teacher.config = 'teacher.py'")


class Evil:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


EVIL = pickle.dumps(Evil(), 2)


def save(workdir: Path, config: str) -> None:
    """A checkpoint as training leaves it, all zeros."""
    experiment = build(load_config(config))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract_state())
    with Checkpoints(workdir, keep=1) as checkpoints:
        facts = training_loop.checkpoint_facts(experiment, experiment.data.open())
        checkpoints.save(state._replace(step=np.int32(8)), facts)
    (workdir / "config.json").write_text(json.dumps(experiment.config))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What every case begins with."""
    root = tmp_path_factory.mktemp("store")
    (root / "teacher.py").write_text(TEACHER)
    (root / "student.py").write_text(STUDENT)
    (root / "edm.py").write_text(edm_files.config_of("ddpmpp"))
    arguments = edm_files.TINY["ddpmpp"]
    (root / "net.pkl").write_bytes(edm_files.pickled(edm_files.random_network(**arguments).weights, **arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save(root / "t", "teacher.py")
        save(root / "s", "student.py")
        photos(root)
        settings = preparation.Settings(resolution=8, channels=1)
        preparation.prepare(
            folders.open_files("photos"), "records", settings, split="train", num_workers=1, report=lambda *_: None
        )
    flat = files.flat(dinov2.random_params(0))
    card = {"kind": "mscm weights 1", "network": "dinov2", "weights_sha256": files.fingerprint(flat)}
    files.save(root / "w.npz", flat, card)
    return root


@pytest.fixture
def here(store, tmp_path, monkeypatch):
    """A directory to spoil; commands run in it, and fail where they begin to compute."""
    shutil.copytree(store, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    for module, name in (
        (training_loop, "train"),
        (evaluation, "generate"),
        (exporting, "serialised"),
        (gathering, "over"),
        (planning, "_plan"),
        (evaluation.classifiers, "load_or_train"),
    ):
        monkeypatch.setattr(module, name, None)
    return tmp_path / "here"


def listing(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# What may stand in the directory.


def write(name: str, content: str | bytes = "") -> Callable[[], None]:
    def prepare() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def folder(name: str) -> Callable[[], None]:
    return lambda: Path(name).mkdir(parents=True)


def savez(name: str, **arrays) -> Callable[[], None]:
    return lambda: np.savez(name, **arrays)


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    return lambda: [step() for step in steps] and None


PICTURE = png.encode(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))


def photos(root: Path = Path()) -> None:
    """Two classes of four images."""
    for i in range(8):
        path = root / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)


def bomb(side: int = 100_000) -> bytes:
    """A file of a hundred bytes that claims so many pixels."""
    return png._head(side, side, 1) + png._chunk(b"IDAT", zlib.compress(bytes(1000))) + png._chunk(b"IEND", b"")


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    """An .npy file that claims a shape and holds ten bytes."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(10)


def zipped(name: str, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Callable[[], None]:
    def prepare() -> None:
        with zipfile.ZipFile(name, "w", method) as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    return prepare


def tarred(name: str, members: dict[str, bytes], links: dict[str, str] | None = None) -> Callable[[], None]:
    def prepare() -> None:
        with tarfile.open(name, "w") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
            for member, goal in (links or {}).items():
                info = tarfile.TarInfo(member)
                info.type, info.linkname = tarfile.SYMTYPE, goal
                tar.addfile(info)

    return prepare


def cut(name: str, count: int) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:count])


def flip(name: str, place: int) -> Callable[[], None]:
    """One bit."""

    def prepare() -> None:
        content = bytearray(Path(name).read_bytes())
        content[place] ^= 1
        Path(name).write_bytes(content)

    return prepare


def endless_tar() -> None:
    info = tarfile.TarInfo("a/1.png")
    info.size = 10**12
    Path("p.tar").write_bytes(info.tobuf() + bytes(2048))


def tars(depth: int) -> bytes:
    content = PICTURE
    for i in range(depth):
        tarred("inner.tar", {f"a/{i}.{'tar' if i else 'png'}": content})()
        content = Path("inner.tar").read_bytes()
    return content


STEP = "t/checkpoints/8"


def unlisted(*steps: Callable[[], None]) -> Callable[[], None]:
    """Of a checkpoint whose files nobody has written down."""
    return both(lambda: Path(STEP, "files.json").unlink(), *steps)


def facts(change: Callable[[dict], object]) -> Callable[[], None]:
    def prepare() -> None:
        path = Path(STEP, "facts", "metadata")
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return unlisted(prepare)


def overwrite(pattern: str, content: bytes) -> Callable[[], None]:
    return lambda: [path.write_bytes(content) for path in Path().glob(pattern)] and None


def card(**changes) -> Callable[[], None]:
    """Of the records."""

    def prepare() -> None:
        path = Path("records/train.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return prepare


def weights(change: Callable[[dict, dict], tuple[dict, dict]]) -> Callable[[], None]:
    """A file of weights that is whole and wrong."""
    return lambda: files.save("w.npz", *change(*files.load("w.npz")))


def reference(data: dict | None = None, **changes) -> Callable[[], None]:
    """Statistics of the digits in the features `pixels`, changed."""

    def prepare() -> None:
        parts = dict(features=Moments(1797, np.zeros(64), np.eye(64)), spatial=None, class_sums=None, kept=None)
        network = features.pixels((8, 8, 1))
        known = dict(name="digits", split="all", transform=None, resolution=8, channels=1, count=1797, fingerprint="")
        described = {"name": network.name, "fingerprint": network.fingerprint}
        made = reference_statistics.Reference(Statistics(**parts | changes), known | (data or {}), described)
        reference_statistics.save("ref.npz", made)

    return prepare


def moments(dim: int = 64, dim_of_cov: int | None = None, value: float = 0.0) -> Moments:
    return Moments(1797, np.full(dim, value), np.eye(dim_of_cov or dim))


MAIN, NEW, TRAINED = "main --config=teacher.py", "--workdir=run", "--workdir=t"
SAMPLE = f"sample --config=teacher.py {TRAINED} --output=x.png"
EXPORT = f"export --config=teacher.py {TRAINED} --output=x"
EVAL = f"eval --config=teacher.py {TRAINED}"
PREPARE = "prepare --output=out --resolution=8 --workers=1 --source="
IMPORT = "metrics.reference --config=teacher.py --output=o.npz --import=i.npz"
RECORDS = "--config.data.name=photos --config.data.split=train --config.data.num_classes=2 --config.data.path="

CONFIGS = [
    ("main --config=teachr.py --workdir=run", r"config file 'teachr.py' \(did you mean 'teacher'\?\)"),
    ("main --config=. --workdir=run", "got config file '.', expected an existing file"),
    ("main --workdir=run", "Flag --config must have a value"),
    (f"{MAIN} {NEW} --replay=4 --dry_run", "--replay: got it with --dry_run, expected one of them"),
    ("main --config=teacher.py", "Flag --workdir must have a value"),
    ("main --config=c.py --workdir=run", "c.py' without get_config", write("c.py", "x = 1")),
    ("main --config=c.py --workdir=run", "c.py' without get_config", write("c.py", "get_config = 3")),
    ("main --config=c.py --workdir=run", r"c.py: got SyntaxError .*line 1", write("c.py", "def get_config(:")),
    ("main --config=c.py --workdir=run", r"c.py: got SyntaxError \(source code", write("c.py", b"\0\xff\xfe")),
    ("main --config=c.py --workdir=run", "c.py: got ModuleNotFoundError .*absent", write("c.py", "import absent")),
    ("main --config=c.py --workdir=run", "got NameError .*'x'", write("c.py", "def get_config():\n    return x")),
    ("main --config=c.py --workdir=run", "NoneType from get_config", write("c.py", "def get_config():\n    pass")),
    ("main --config=c.py --workdir=run", "got dict from get", write("c.py", "def get_config():\n    return {}")),
    ("main --config=c.txt --workdir=run", "expected a Python file with a function get_config", write("c.txt", "hello")),
    ("main --config=teacher.py:big --workdir=run", "this config has no variants"),
    ("main --config=configs/imagenet64_cd8.py:big --workdir=run", "got 'big', expected one of '', 'large'"),
    ("main --config=configs/toy_mixture.py: --workdir=run --config.seed=-1", "config.seed: got -1"),  # as without :
    *(
        (f"main --config=c.py {NEW}", sentence, write("c.py", TEACHER.replace("    return config", f"    {lines}")))
        for lines, sentence in (
            ("del config.model; return config", "config: got no key 'model', expected it"),
            ("del config.schedule.name; return config", "config.schedule: got no key 'name', expected it"),
            ("config.train.bathc_size = 3; return config", r"bathc_size: nothing reads .*did you mean 'batch_size'"),
            ("config.train = dict(config.train, batch_size=8.5); return config", "got 8.5, expected a whole number"),
            ("config = type(config)(dict(config, name=5)); return config", "config.name: got 5, expected a text"),
            ("config = type(config)(dict(config, train='x')); return config", "config.train: got 'x', expected a sec"),
            ("config.data = dict(config.data, split=5); return config", "config.data.split: got 5, expected a text"),
            ("config.x = config; return config", "Circular reference"),
        )
    ),
    (
        "main --config=c.py --workdir=run",
        "got 'c.py', whose model is its own teacher",
        write("c.py", STUDENT.replace("teacher.py", "c.py")),
    ),
    *(
        (f"{MAIN} {NEW} --config.{override}", sentence)
        for override, sentence in (
            ("train.batchsize=8", r"not there \(did you mean 'config.train.batch_size'\?\), expected one of batch"),
            ("trian.batch_size=8", r"config.trian: .* \(did you mean 'config.train'\?\), expected one of data, ema"),
            ("train.nope=1", "config.train.nope: got an override of a key that is not there, expected one of batch_s"),
            ("train.nope 1", "config.train.nope: got an override"),
            ("nope.x=1", "config.nope: got an override of a key that is not there, expected one of data, ema"),
            ("model.width=3", r"config.model.width: .* \(did you mean 'config.model.middle.width'\?\), expected"),
            ("train.items=1", "config.train.items: got an override of a key that is not there"),
            ("eval.teacher_steps[9]=1", "--config: tuple index out of range"),
            ("seed.x=1", "config.seed: got an override of 'x' below it, expected a section: it is 0"),
            ("train.batch_size=many", "--config.train.batch_size=many: invalid literal"),
            ("train.batch_size=8.5", "--config.train.batch_size=8.5: invalid literal"),
            ("train.batch_size=", "--config.train.batch_size=: invalid literal"),
            ("train.batch_size", "Missing value for flag --config.train.batch_size"),
            ("train.batch_size=0", "train.batch_size: got 0, expected a whole number of at least 1"),
            ("train.batch_size=10000000000", "train.batch_size: got 10000000000, expected a number below 2147483648"),
            ("train.num_steps=-4", "train.num_steps: got -4, expected a whole number"),
            ("train=5", "--config.train=5: Failed to parse"),
            ("teacher.workdir=x", "config.teacher: got an override of 'workdir' below it, .*: it is None"),
            ("seed=99999999999", "config.seed: got 99999999999, expected a number below"),
            ("name=../x", "config.name: got '../x', expected letters, digits"),
            ("name=", "config.name: got '', expected a text"),
            ("optimizer.learning_rate=inf", "optimizer.learning_rate: got inf, expected a finite number"),
            ("optimizer.name=adma", "optimizer.name: got 'adma', expected one of adam, radam"),
            ("ema.decay=nan", "ema.decay: got nan, expected a finite number"),
            ("ema.warmup=7", "Non-boolean argument"),
            ("schedule.name=cosin", r"got 'cosin' \(did you mean 'cosine'\?\)"),
            ("schedule.logsnr_max=inf", "schedule.logsnr_max: got inf, expected a finite number"),
            ("schedule.logsnr_min=20", "expected logsnr_min < logsnr_max"),
            ("model.patch_size=3", "expected multiples of 3 = patch_size 3"),
            ("model.attention=flash", "did you mean 'splash'"),
            ("model.attention=cudnn", "got attention 'cudnn' for 16 tokens"),
            ("objective.name=difusion", "did you mean 'diffusion'"),
            ("objective.multiscale='(3,)'", "expected divisors of data.resolution = 8"),
            ("mesh.data=7", "mesh: got data=7 x fsdp=1 x tensor=1 and 1 devices"),
            ("mesh.fsdp=-1", "or -1 for one of them"),
            ("train.num_microbatches=3", "got 8, expected a multiple of train.num_microbatches = 3"),
            ("train.steps_per_dispatch=3", "got 8, expected a multiple of config.train.steps_per_dispatch = 3"),
            ("data.name=digit", "got data set 'digit', expected digits, captioned_digits, mixture, synthetic, or"),
            ("data.split=train", "split of 'digits': got 'train', expected one of all"),
            ("data.num_classes=11", "data.num_classes: got 11, expected 10"),
            ("data.name=synthetic --config.data.resolution=1000000", "'synthetic': got 1024000000000000 bytes"),
            ("eval.network=inceptoin", "did you mean 'inception'"),
            ("eval.seeds='(1,1)'", "expected each of them once"),
            ("eval.seeds='(99999999999,)'", "eval.seeds: got .99999999999,., expected whole numbers"),
            ("eval.teacher_samplers=heun:grid=karas", "got grid=karas, expected one of uniform, karras"),
            ("eval.reference=nowhere.npz", "got no reference nowhere.npz; make it with"),
        )
    ),
    *(
        (f"main --config=student.py {NEW} --config.{override}", sentence)
        for override, sentence in (
            ("teacher.config=teachr.py", "did you mean 'teacher'"),
            ("teacher.config=student.py", "whose model is its own teacher|expected the config of a diffusion model"),
            ("teacher.workdir=nowhere", "nowhere: got no directory checkpoints/ below it"),
            ("teacher.guidance=1.0", "trained with objective.label_dropout = 0.0"),
            ("objective.student_steps=0", "student_steps: got 0, expected a whole number"),
            ("objective.teacher_steps.start=nan", "teacher_steps.start: got nan, expected a finite"),
            (
                "objective.teacher_steps.start=1e30",
                "teacher_steps.start: got 1e.30, expected a number .* below 16777216",
            ),
        )
    ),
]

PLACES = [
    (f"{MAIN} {NEW} extra", "got extra, expected flags only"),
    (f"{MAIN} {NEW} --dryrun", "Unknown command line flag 'dryrun'. Did you mean: dry_run"),
    (f"{MAIN} {NEW} --verbose=perhaps", "--verbose=perhaps: .*boolean"),
    (f"{MAIN} {NEW} --replay=x", "--replay=x: invalid literal"),
    (f"{MAIN} {NEW} --replay=3", "--replay: got 3, expected a step .* there was none"),
    (f"{MAIN} {NEW} --distributed=somewhere", "--distributed: got 'somewhere', expected auto, or HOST:PORT"),
    (f"{MAIN} {NEW} --distributed=a:1,2,2", "an index below the number of processes"),
    (f"{MAIN} {NEW} --distributed=localhost:99999999,1,0", "--distributed: got 'localhost:99999999,1,0'"),
    (f"{MAIN} --workdir=", "--workdir: got an empty path"),
    (f"{MAIN} --workdir=gs://bucket/x", "needs the library gcsfs"),
    (f"{MAIN} --workdir=http://bucket/x", "expected a local path, or one that begins with gs://"),
    (f"{MAIN} --workdir=/proc/run", "--workdir: got '/proc/run', expected a directory to write to"),
    (f"{MAIN} --workdir={'x' * 300}", "expected a directory to write to: File name too long"),
    (f"{MAIN} {NEW}", "--workdir: got 'run', which is a file", write("run")),
    (f"{MAIN} --workdir=f/run", "--workdir: got 'f/run', expected a directory to write to", write("f")),
    (f"{MAIN} --workdir=f/run --dry_run", "--workdir: got 'f/run', expected a directory", write("f")),
    (f"{MAIN} {NEW}", "--workdir: got 'run/checkpoints', which is a file", write("run/checkpoints")),
    (f"{MAIN} {NEW}", "run/owner.json: Is a directory", folder("run/owner.json")),
    (f"{EVAL} --once", "t/eval/owner.json: Not a directory", write("t/eval")),
    (
        f"{MAIN} {TRAINED} --config.optimizer.b1=0.5",
        "got another config than its checkpoint of step 8 .*b1: got 0.5, expected 0.9",
    ),
    (f"{MAIN} {TRAINED} --config.train.num_steps=4", "train.num_steps: got 4, expected at least 8"),
    (f"main --config=student.py {TRAINED}", "t: got another config than its checkpoint"),
    (f"{MAIN} --workdir=s", "s: got another config than its checkpoint"),
    (
        f"main --config=student.py {NEW} --config.teacher.workdir=s",
        "got a checkpoint of 'digits_cd2' with student_step",
    ),
    ("sample --config=teacher.py --workdir=nowhere", "nowhere: got no directory checkpoints/ below it"),
    ("sample --config=teacher.py --workdir=e", "e: got no directory checkpoints/ below it", write("e/checkpoints")),
    ("sample --config=teacher.py --workdir=e", "got no finished checkpoint", folder("e/checkpoints")),
    ("sample --config=student.py --workdir=t --output=x.png", "'digits_teacher' with student_steps = None, expected 2"),
    (f"{SAMPLE} --config.model.middle.width=32", "another architecture than the config's: parameter .* has shape"),
    (f"{SAMPLE} --config.schedule.shift=0.0", "with schedule = .*'shift': 2.0.*, expected"),
    (f"{SAMPLE} --step=3", "got step 3, expected one of 8"),
    (SAMPLE, r"damaged checkpoints only \(step 8: files.json is no JSON", write(f"{STEP}/files.json", "[1,2")),
    (SAMPLE, "files.json is no list of files and sizes", write(f"{STEP}/files.json", "[1, 2]")),
    (SAMPLE, "step 8: ../../../no is missing", write(f"{STEP}/files.json", '{"../../../no": 1}')),
    (SAMPLE, "ema/_METADATA has 1 bytes, expected", write(f"{STEP}/ema/_METADATA", "{")),
    (SAMPLE, r"only \(step 8: facts/metadata is missing\), expected", unlisted(lambda: shutil.rmtree(f"{STEP}/facts"))),
    (
        SAMPLE,
        r"only \(step 8: _CHECKPOINT_METADATA does not name the items",
        unlisted(write(f"{STEP}/_CHECKPOINT_METADATA", "{")),
    ),
    (SAMPLE, "cannot be read .JSONDecodeError", unlisted(write(f"{STEP}/facts/metadata", "{"))),
    (SAMPLE, "8: got a checkpoint that cannot be read", facts(lambda said: [said])),
    (SAMPLE, "cannot be read .KeyError: 'parameters'", facts(lambda said: {"config": said["config"]})),
    (SAMPLE, "facts without a config and parameters", facts(lambda said: said | {"parameters": 5})),
    (
        SAMPLE,
        r"has shape \[1000000, 1000000\], expected",
        facts(lambda said: said | {"parameters": dict.fromkeys(said["parameters"], [10**6, 10**6])}),
    ),
    (SAMPLE, "step 8: ema/_METADATA is missing", unlisted(lambda: shutil.rmtree(f"{STEP}/ema"))),
    (SAMPLE, "cannot be read .JSONDecodeError", unlisted(write(f"{STEP}/ema/_METADATA", "{"))),
    (SAMPLE, "8: got a checkpoint that cannot be read", unlisted(overwrite(f"{STEP}/ema/**/d/*", bytes(99)))),
    (SAMPLE, "8: got a checkpoint that cannot be read", unlisted(overwrite(f"{STEP}/ema/**/d/*", EVIL))),
    (f"{MAIN} {TRAINED}", "cannot be read .KeyError: 'config'", facts(lambda said: {"parameters": {}})),
    (
        f"main --config=student.py {NEW} --config.teacher.workdir=t",
        "cannot be read .JSON",
        unlisted(write(f"{STEP}/facts/metadata", "{")),
    ),
]

SAMPLING = [
    *(
        (f"{SAMPLE} --{flag}", sentence)
        for flag, sentence in (
            ("num_steps=0", "num_steps: got 0, expected at least 1"),
            ("num_steps=100000000000", "num_steps: got 100000000000, expected at least 1 and at most 100000"),
            ("num_images=0", "--num_images=0: .*must be >= 1|lower bound|a positive integer"),
            ("seed=-1", "--seed=-1"),
            ("seed=99999999999", "--seed=99999999999"),
            ("sampler=", "got sampler '', expected one of ddim"),
            ("sampler=heum", "did you mean 'heun'"),
            ("sampler=heun:grd=karras", "got option 'grd' .did you mean 'grid'"),
            ("sampler=ddim:eta=2", "got eta=2, expected a number from 0 to 1"),
            ("sampler=ddim:eta", "expected each option once, as option=value"),
            ("sampler=heun:grid=karras,sigma_min=90", "got sigma_min that is not below sigma_max"),
            ("sampler=consistency:sigmas=1/2", "expected falling numbers above 0"),
            ("sampler=consistency:sigmas=1e9 --force", "got sigmas beyond the schedule"),
            ("sampler=consistency", "a diffusion model's x_hat is a mean of images"),
            ("labels=10", "--labels: got 10, expected numbers from 0 to 9"),
            ("labels=²", "--labels: got ²"),
            ("labels=1,2,3 --num_images=2", "--num_images: got 2 for 3 labels, expected an image for each at least"),
        )
    ),
    ("sample --config=student.py --workdir=s --num_steps=3", "got ddim 3 steps .*, expected ddim with 2 steps"),
    (f"{SAMPLE} --output=", "--output: got an empty path"),
    (f"{SAMPLE} --output=x.JPG", "--output: got 'x.JPG', expected FILE.png, FILE.npz or a folder"),
    (f"{SAMPLE} --output=gs://x/y.png", "--output: .*needs the library gcsfs"),
    (f"{SAMPLE} --output=f/x.png", "--output: got 'f/x.png', expected a file to write to: File exists", write("f")),
    (f"{SAMPLE} --output=d.png", "--output: got 'd.png', expected a file to write to: it is a folder", folder("d.png")),
    (f"{SAMPLE} --output=f", "--output: got 'f', expected a folder to write to: File exists", write("f")),
]

SCORING = [
    ("eval --config=teacher.py --workdir=nowhere --once", "nowhere: got no directory checkpoints/"),
    (f"{EVAL} --checkpoint=3", "got step 3, expected one of 8"),
    (f"{EVAL} --checkpoint=8 --once", "got --checkpoint and --once, expected one of them"),
    (f"{EVAL} --images=", "--images: got an empty name"),
    (f"{EVAL} --images=nowhere", "--images: got 'nowhere', expected an existing folder"),
    (f"{EVAL} --images=d", "--images: d: got 0 files and no image", folder("d")),
    (
        f"{EVAL} --images=d",
        "d: got 1.png of 9 x 9 pixels, expected 8 x 8",
        both(*(write(f"d/{i}.png", png.encode(np.zeros((9, 9, 1), np.uint8))) for i in (1, 2, 3, 4))),
    ),
    (
        f"{EVAL} --images=d",
        "d: got a broken image, 1.png .not an image",
        both(*(write(f"d/{i}.png", PICTURE[i:]) for i in (1, 2, 3, 4))),
    ),
    (f"{EVAL} --save_every_seconds=-1", "--save_every_seconds=-1"),
    *(
        (f"{EVAL} --images=x.npz", f"--images: x.npz: got {sentence}", prepare)
        for sentence, prepare in (
            ("a file that cannot be read", write("x.npz", "hello")),
            ("a file that cannot be read", write("x.npz", EVIL)),
            (r"a file that cannot be read \(pickled", savez("x.npz", images=np.array([Evil()], object))),
            (
                r"a file .*shape \(1000000000000, 8, 8, 1\), that is 64000000000000 bytes, where 10 are",
                zipped("x.npz", {"images.npy": header((10**12, 8, 8, 1), "|u1")}),
            ),
            (
                "a file .*at most 100 times as many",
                zipped("x.npz", {"images.npy": header((10**7,), "|u1")[:-10] + bytes(10**7)}, zipfile.ZIP_DEFLATED),
            ),
            (r"uint8 images of shape \(30, 9, 9, 1\)", savez("x.npz", images=np.zeros((30, 9, 9, 1), np.uint8))),
            ("float64 images", savez("x.npz", images=np.zeros((30, 8, 8, 1)))),
            ("arrays called pictures, expected images or arr_0", savez("x.npz", pictures=np.zeros(3))),
        )
    ),
    (
        f"{EVAL} --images=x.npz",
        "got 3 images, expected at least 4",
        savez("x.npz", images=np.zeros((3, 8, 8, 1), "u1")),
    ),
    (f"{EVAL} --once", "scores.jsonl: got a line that is no JSON", write("t/eval/scores.jsonl", "{")),
    (f"{EVAL} --once", "scores.jsonl: got a line that is no score", write("t/eval/scores.jsonl", '{"a": 1}\n')),
    (f"{EVAL} --once", "scores.jsonl: got a line that is no score", write("t/eval/scores.jsonl", "[1]\n")),
    *(
        (f"{EVAL} --once --config.eval.reference=ref.npz", sentence, prepare)
        for sentence, prepare in (
            ("got no reference ref.npz", lambda: None),
            ("ref.npz: got a file that cannot be read", write("ref.npz", "hello")),
            ("Is a directory", folder("ref.npz")),
            ("ref.npz: got a file that cannot be read", savez("ref.npz", a=np.zeros(3))),
            ("pickled objects, which are not read", savez("ref.npz", card=np.array([Evil()], object))),
            ("ref.npz: got a file that cannot be read", savez("ref.npz", card=np.array("[1]"))),
            (r"shape \(1000000, 1000000\)", zipped("ref.npz", {"c.npy": header((10**6, 10**6), "<f8")})),
            ("form, expected one of mscm.metrics.reference", savez("ref.npz", mu=np.zeros(64), sigma=np.eye(64))),
            ("got a file of kind 'x'", lambda: files.save("ref.npz", {"a": np.zeros(3)}, {"kind": "x"})),
            (
                "got a card without .* in 'data'",
                lambda: files.save("ref.npz", {"a": np.zeros(3)}, {"kind": "mscm reference 1"}),
            ),
            ("name 'cifar10' in the reference, 'digits' in what is scored", reference({"name": "cifar10"})),
            ("got non-finite numbers", reference(features=moments(value=np.nan))),
            ("and a covariance of .5, 5., expected", reference(features=moments(64, 5))),
            ("negative variance", reference(features=Moments(1797, np.zeros(64), -np.eye(64)))),
            ("got 5 features, expected 64", reference(features=moments(5))),
            ("got kept features of float32 and shape .20, 5.", reference(kept=np.zeros((20, 5), np.float32))),
        )
    ),
    (f"{IMPORT}", "--count: got none", savez("i.npz", mu=np.zeros(64), sigma=np.eye(64))),
    (f"{IMPORT} --count=1", "--count=1"),
    (f"{IMPORT} --count=9", "i.npz: got a file that cannot be read"),
    *(
        (f"{IMPORT} --count=9", f"i.npz: {sentence}", prepare)
        for sentence, prepare in (
            ("got no mu and sigma", savez("i.npz", mu=np.zeros(64))),
            ("mu and sigma: .*covariance of .64, 63.", savez("i.npz", mu=np.zeros(64), sigma=np.zeros((64, 63)))),
            ("got 60 features, expected 64", savez("i.npz", mu=np.zeros(60), sigma=np.eye(60))),
            ("mu and sigma: got non-finite", savez("i.npz", mu=np.full(64, np.nan), sigma=np.eye(64))),
            (
                "mu and sigma: got complex128 and float64, expected numbers",
                savez("i.npz", mu=np.zeros(64, complex), sigma=np.eye(64)),
            ),
            ("mu and sigma: got <U1 and", savez("i.npz", mu=np.full(64, "a"), sigma=np.eye(64))),
            (
                "mu and sigma: got a matrix that is not symmetric",
                savez("i.npz", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64)))),
            ),
            ("got a file .*pickled objects", savez("i.npz", mu=np.array([Evil()], object), sigma=np.eye(64))),
            ("got a file that cannot be read", write("i.npz", EVIL)),
            (
                "got uint8 images of shape .0, 8, 8, 1. in arr_0",
                savez("i.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((0, 8, 8, 1), np.uint8)),
            ),
            (
                "got a file that cannot be read",
                both(savez("i.npz", mu=np.zeros(64), sigma=np.eye(64)), lambda: cut("i.npz", -200)()),
            ),
        )
    ),
    (f"{IMPORT} --count=9 --output=d", "--output: got 'd', expected a file to write to: it is a folder", folder("d")),
    *(
        (f"{MAIN} {NEW} --config.eval.network=dinov2 --config.eval.weights=w.npz", f"w.npz: {sentence}", prepare)
        for sentence, prepare in (
            ("got no weights of the network 'dinov2'; get dinov2", lambda: os.unlink("w.npz")),
            ("got a file that cannot be read", write("w.npz", EVIL)),
            ("got a file that cannot be read", cut("w.npz", 5000)),
            ("got arrays of SHA-256|got a file that cannot be read", flip("w.npz", 5000)),
            ("got arrays of other shapes or names", weights(lambda arrays, said: ({}, said))),
            (
                "got arrays of other shapes or names",
                weights(lambda arrays, said: ({name: a for name, a in arrays.items() if "norm1" not in name}, said)),
            ),
            (
                "got arrays of other shapes or names",
                weights(lambda arrays, said: ({name: a[:2] for name, a in arrays.items()}, said)),
            ),
            ("got .* not finite", weights(lambda arrays, said: ({n: a * np.nan for n, a in arrays.items()}, said))),
            ("got .* of <U", weights(lambda arrays, said: ({n: a.astype(str) for n, a in arrays.items()}, said))),
            ("got a card with the SHA-256 of other", weights(lambda arrays, said: ({**arrays, "x": np.ones(3)}, said))),
            (
                "got a card with the SHA-256 of other",
                weights(
                    lambda arrays, said: (
                        arrays,
                        {name: value for name, value in said.items() if name != "weights_sha256"},
                    )
                ),
            ),
            (
                "got a file of mscm weights 1 inception, expected weights",
                weights(lambda arrays, said: (arrays, said | {"network": "inception"})),
            ),
        )
    ),
    ("metrics.convert --network=vgg --source=x.pth --output=o.npz", "--network: got 'vgg', expected one of inception"),
    ("metrics.convert --source=x.pth --output=o.npz", "--source: x.pth: expected a file of weights: No such file"),
    ("metrics.convert --source=x.pth --output=o.npz", "asks for 'posix.system'", write("x.pth", EVIL)),
    ("metrics.convert --source=x.pth --output=o.npz", "asks for 'posix.system'", zipped("x.pth", {"a/data.pkl": EVIL})),
    (
        "metrics.convert --source=x-12345678.pth --output=o.npz",
        "expected 12345678... as its name",
        write("x-12345678.pth"),
    ),
    ("metrics.convert --source=x.pth --output=f/o.npz", "--output: got 'f/o.npz', expected a file", write("f")),
    ("metrics.selfcheck --weights=x", "expected it with --network only"),
]

DATA = [
    ("prepare --output=out --source=photos", "--resolution: got none"),
    ("prepare --output=out --source=photos --resolution=0", "--resolution=0"),
    ("prepare --output=out --source=photos --resolution=10000000", "resolution: got 10000000, expected at most 8192"),
    ("prepare --output=f --source=photos --resolution=8", "f: File exists", write("f")),
    ("prepare --output=records --source=photos --resolution=8", "train.json exists already"),
    (
        "prepare --output=out --source=photos --resolution=8",
        "unfinished run of other settings",
        write("out/train-00000-of-00001.array_record.done.json", '{"settings": "x"}'),
    ),
    ("prepare --output=nowhere --verify", "nowhere: got no train.json"),
    ("prepare --output=out --text_length=77", "--text_length: got it without --text_encoder, expected both"),
    *(
        (PREPARE + words, sentence, prepare)
        for words, sentence, prepare in (
            ("nowhere", "got 'nowhere', expected an existing folder", lambda: None),
            ("photos --transform=aera", "transform: got 'aera', expected one of area", lambda: None),
            ("photos --encoding=jpg", "--encoding=jpg", lambda: None),
            ("photos --channels=2", "channels: got 2, expected one of 1, 3", lambda: None),
            ("photos --split=val", "got split 'val', expected a folder", lambda: None),
            ("photos --name=../x", "got split '../x', expected a name", lambda: None),
            ("photos --name=..", "got split '..', expected a name", lambda: None),
            ("photos --workers=0", "--workers=0", lambda: None),
            ("tfds:nosuch --split=train", "got data set 'nosuch', expected a name that Tensor", lambda: None),
            ("d", "d: got 0 files and no image", folder("d")),
            ("d", "d: got images that are in no folder", write("d/x.png", PICTURE)),
            ("photos", "no image in the class folder c", folder("photos/c")),
            ("photos", "1 classes with two folders of their name", write("photos/x/a/1.png", PICTURE)),
            ("photos", "photos/a/z, a link to a folder above it", lambda: os.symlink("..", "photos/a/z")),
            (
                "photos",
                "a link to a folder above it",
                both(lambda: os.symlink(".", "photos/y"), lambda: os.symlink(".", "photos/z")),
            ),
            ("p.zip", "neither zip nor tar", write("p.zip", "hello")),
            ("p.zip", "got an empty file", write("p.zip")),
            (
                "p.zip",
                "got a cut or damaged zip",
                both(zipped("p.zip", {"a/1.png": PICTURE, "b/1.png": PICTURE}), cut("p.zip", -40)),
            ),
            ("p.zip", "encrypted or compressed in a rare way", zipped("p.zip", {"a/1.png": PICTURE}, zipfile.ZIP_LZMA)),
            ("p.tar", "got a compressed tar", lambda: tarfile.open("p.tar", "w:gz").close()),
            (
                "p.tar",
                "got a damaged or cut tar",
                both(tarred("p.tar", {f"{c}/{i}.png": PICTURE for c in "ab" for i in range(3)}), cut("p.tar", 2000)),
            ),
            ("p.tar", "got a damaged or cut tar", endless_tar),
            (
                "p.tar",
                "b/1.png, a link to .*etc/passwd, expected that file in the tar",
                tarred("p.tar", {"a/0.png": PICTURE}, {"b/1.png": "../../../etc/passwd"}),
            ),
            (
                "p.tar",
                "b/1.png, a link to /etc/passwd",
                tarred("p.tar", {"a/0.png": PICTURE}, {"b/1.png": "/etc/passwd"}),
            ),
            ("p.tar", "a tar in a tar in a tar", lambda: Path("p.tar").write_bytes(tars(4))),
        )
    ),
    *(
        (f"{MAIN} {NEW} {RECORDS}{path}", sentence, prepare)
        for path, sentence, prepare in (
            ("", "config.data.path: got '', expected a text", lambda: None),
            ("nowhere", "config.data: got 'nowhere', expected an existing folder", lambda: None),
            (
                "photos --config.data.num_classes=3",
                "num_classes: got 3, expected 2, which is what photos has",
                lambda: None,
            ),
            ("photos --config.data.split=val", "got split 'val'", lambda: None),
            ("photos", "broken image, a/z.png .not an image", write("photos/a/z.png", PICTURE[1:])),
            ("photos", "broken image, a/z.png .*exceeds limit", write("photos/a/z.png", bomb())),
            (
                "photos",
                "broken image, a/z.png .not an image",
                write(
                    "photos/a/z.png",
                    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
                ),
            ),
            ("records --config.data.resolution=16", "resolution: got 16, expected 8", lambda: None),
            ("records --config.data.split=val", "got no val.json for split 'val', expected one of train", lambda: None),
            ("records", "got no train.json", lambda: os.unlink("records/train.json")),
            ("records", "train.json: got a file that is no JSON", write("records/train.json", "{")),
            ("records", "train.json: got format None", write("records/train.json", "[]")),
            ("records", "train.json: got format 'x'", card(format="x")),
            ("records", "train.json: got shards = 5", card(shards=5)),
            ("records", "train.json: got shards = ", card(shards=["../records/x"])),
            ("records", "got 8 images, expected 1000000000000", card(shard_sizes=[10**12], num_examples=10**12)),
            ("records", "train.json: got num_examples = 1000000000000", card(num_examples=10**12)),
            ("records", "train.json: got encoding = 'jpg'", card(encoding="jpg")),
            ("records", "got a broken record", card(encoding="raw")),
            ("records", "train.json: got resolution = 1000000", card(resolution=10**6)),
            ("records", "train.json: got class_names = 5", card(class_names=5)),
            ("records", "got labels from 0 to 1, expected 0 to 0", card(class_names=["a"])),
            ("records", "train.json: got checksum = 5", card(checksum=5)),
            ("records", "got no file .*array_record beside it", lambda: os.unlink(*Path("records").glob("*_record"))),
            ("records", "got 0 images, expected 8|got a broken", overwrite("records/*_record", bytes(70_000))),
            ("records", "got 0 images, expected 8|got a broken", overwrite("records/*_record", b"")),
            (
                "records",
                "got no file train-labels.npy",
                both(write("records/x-labels.npy"), lambda: os.unlink("records/train-labels.npy")),
            ),
            ("records", "got no labels .an array of shape", cut("records/train-labels.npy", -4)),
            ("records", "got no labels", write("records/train-labels.npy", EVIL)),
            (
                "records",
                "got no labels .pickled objects",
                lambda: np.save("records/train-labels.npy", np.array([Evil()], object), allow_pickle=True),
            ),
            (
                "records",
                "got no labels .*that is 40000000000 bytes",
                write("records/train-labels.npy", header((10**10,), "<i4")),
            ),
            ("records", "got other labels than", lambda: np.save("records/train-labels.npy", np.ones(8, np.int32))),
        )
    ),
]

ELSEWHERE = [
    ("import_teacher --config=edm.py --workdir=run", "Flag --from must have a value"),
    *(
        (f"import_teacher --config=edm.py --workdir=run --from={source}", f"--from: {sentence}", *prepare)
        for source, sentence, *prepare in (
            ("", "got '', expected ORIGIN:FILE"),
            ("net.pkl", "got 'net.pkl', expected ORIGIN:FILE"),
            ("edm:", "got 'edm:', expected ORIGIN:FILE"),
            ("adm:net.pkl", "got origin 'adm', expected one of edm"),
            ("edm:https://host/net.pkl", "got 'https://host/net.pkl', expected a file on this machine"),
            ("edm:nowhere.pkl", "nowhere.pkl: No such file"),
            ("edm:d.pkl", "d.pkl: Is a directory", folder("d.pkl")),
            ("edm:x.pkl", "x.pkl: got a file that begins with b'hello', expected a pickle", write("x.pkl", "hello")),
            ("edm:x.pkl", "x.pkl: got a pickle that asks for 'posix.system'", write("x.pkl", EVIL)),
            ("edm:x.pt", "x.pt: got a pickle that asks for 'posix.system'", write("x.pt", EVIL)),
            ("edm:x.pkl", "x.pkl: got a pickle without a network 'ema'", write("x.pkl", pickle.dumps({"net": 1}))),
            ("edm:net.pkl", "net.pkl: got a damaged file", cut("net.pkl", 50_000)),
            ("edm:net.pkl --config.model.num_blocks=2", "net.pkl: got another .* num_blocks: got 1, expected 2"),
            ("edm:x.npz", "x.npz: .*pickled objects", savez("x.npz", a=np.array([Evil()], object))),
            ("edm:x.npz", "x.npz: got no tensor 'dec.4x4_block0.affine.bias'", savez("x.npz", a=np.zeros(3))),
        )
    ),
    ("import_teacher --config=teacher.py --workdir=run --from=edm:net.pkl", "expected a diffusion model of ddpmpp"),
    ("import_teacher --config=edm.py --workdir=t --from=edm:net.pkl", "got 't', which has checkpoints"),
    ("import_teacher --config=edm.py --workdir=f --from=edm:net.pkl", "--workdir: got 'f', expected a fol", write("f")),
]

TABLES = [
    ("compare --workdir= --output=o", "--workdir: got none"),
    ("compare --workdir=nowhere --output=o", "nowhere, which has no config.json"),
    ("compare --workdir=t --output=o", "t without scores of 'digits_teacher'"),
    ("compare --workdir=t --output=o", "t/config.json: got a file that is no JSON", write("t/config.json", "{")),
    ("compare --workdir=t --output=o", "t/config.json: got list", write("t/config.json", "[1]")),
    ("compare --workdir=t --output=o", "config: got no key 'data'", write("t/config.json", '{"a": 1}')),
    (
        "compare --workdir=t --output=o",
        "scores.jsonl: got a line that is no score",
        write("t/eval/scores.jsonl", "{}\n"),
    ),
    ("report --workdir=", "--workdir: got an empty path"),
    ("report --workdir=nowhere", "nowhere, which has no config.json, events or scores"),
    ("report --workdir=t", "t/config.json: got a file that is no JSON", write("t/config.json", "[" * 99_999)),
    ("report --workdir=t", "scores.jsonl: got a line that is no score", write("t/eval/scores.jsonl", "[]\n")),
    ("plan --config=teacher.py --topology=v9:2x2", "--topology: .*'v9"),
    ("plan --config=teacher.py --topology=v5e:2xx", "--topology: .*v5e:2xx"),
    ("plan --config=teacher.py --topology=host --largest_batch", "--largest_batch: got --topology=host"),
    ("plan --config=teacher.py --topology=host --num_slices=2", "--num_slices: got 2 with --topology=host"),
    ("plan --config=teacher.py --topology=v5e:2x2 --num_slices=0", "--num_slices.*0"),
    ("plan --config=teacher.py --topology=host --json=f/x.json", "--json: got 'f/x.json', expected a file", write("f")),
    ("plan --config=teacher.py --topology=host --config.mesh.data=7", "mesh: got data=7"),
]

AVERAGED = TEACHER.replace("    return config", """    config.ema.further = dict(short=dict(sigma_rel=0.05))
    {more}
    return config""")
AVERAGES = [
    *(
        (f"main --config=c.py {NEW}", sentence, write("c.py", AVERAGED.replace("{more}", f"config.ema.{line}")))
        for line, sentence in (
            ("further = dict(main=dict(sigma_rel=0.1))", "got the name 'main', expected letters"),
            ("further = {'0x': dict(sigma_rel=0.1)}", "got the name '0x', expected letters"),
            ("further.short = dict()", "config.ema.further.short: got no key 'decay'"),
            ("further.short = dict(decay=1.0, warmup=True)", "short.decay: got 1.0, expected a number of at least 0"),
            ("further.short.sigma_rel = 0.3", "got sigma_rel = 0.3, expected a number above 0 and at most 0.288"),
            ("further.short.sigma_rel = 0.0", "further: got sigma_rel = 0.0, expected a number above 0"),
            ("further.short.decay = 0.9", "config.ema.further.short.decay: nothing reads this key"),
            ("snapshot_every_steps = 0", "snapshot_every_steps: got 0, expected a whole number"),
            ("snapshot_every_steps = 3", "snapshot_every_steps: got 3, expected a multiple of config.train.steps_per"),
            (
                "update(dict(further=dict(), snapshot_every_steps=2)); del config.ema.further.short",
                "got 2 without any sigma_rel in config.ema.further",
            ),
        )
    ),
    *(
        (f"{command} --ema={text}", sentence)
        for command in (SAMPLE, EXPORT, EVAL)
        for text, sentence in (
            ("mian", "--ema: got 'mian' .did you mean 'main'.., expected one of main, or a number"),
            ("0.5", "--ema: got 0.5, expected a sigma_rel from 0.01 to 0.2886"),
            ("0.1", "--ema: got 0.1 for 'digits_teacher', expected one of main: its config.ema.further keeps no"),
        )
    ),
    (f"{EVAL} --ema=", "--ema: got '', expected one or more averages"),
    (f"{EVAL} --ema=main,main", "--ema: got 'main,main', expected one or more averages, each of them once"),
    (f"{EVAL} --ema=main --images=x.npz", "--ema: got it with --images, expected none"),
    (f"{EVAL} --save_every_seconds=9 --images=x.npz", "--save_every_seconds: got it with --images, expected none"),
    *(
        (
            f"{command} --config=c.py {TRAINED} --ema={average}",
            "got a checkpoint of step 8 with config.ema.further = None, expected .*short.*; use the config that",
            write("c.py", AVERAGED.replace("{more}", "")),
        )
        for command in ("sample --output=x.png", "export --output=x")
        for average in ("short", "0.1")
    ),
]

EXPORTS = [
    (f"export --config=teacher.py {TRAINED}", "Flag --output must have a value"),
    (f"export --config=teacher.py {TRAINED} --output=", "--output: got an empty path"),
    (f"{EXPORT} --output=d", "--output: got 'd', expected a file to write to: it is a folder", folder("d")),
    (f"{EXPORT} --output=f/x", "--output: got 'f/x', expected a file to write to: File exists", write("f")),
    (f"{EXPORT} --step=3", "got step 3, expected one of 8"),
    (f"{EXPORT} --num_steps=0", "num_steps: got 0, expected at least 1"),
    (f"{EXPORT} --sampler=heum", "did you mean 'heun'"),
    (f"{EXPORT} --sampler=ddim:guidance=1", "guidance: got 1.0, expected 0.0 because 'digits_teacher' was trained"),
    ("export --config=teacher.py --workdir=nowhere --output=x", "nowhere: got no directory checkpoints/ below it"),
    ("export --config=teacher.py --workdir=s --output=x", "'digits_cd2' with student_steps = 2, expected None"),
    ("export --config=student.py --workdir=s --output=x --num_steps=3", "got ddim 3 steps .*, expected ddim with 2"),
    (f"{EXPORT} --config.model.middle.width=12000", "got .* bytes of parameters, expected at most 2130706432"),
]

ROWS = [*CONFIGS, *PLACES, *SAMPLING, *EXPORTS, *AVERAGES, *SCORING, *DATA, *ELSEWHERE, *TABLES]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, where reading fails
@pytest.mark.parametrize("row", ROWS, ids=[f"{i:03d} {row[0].partition(' ')[0]}" for i, row in enumerate(ROWS)])
def test_bad_input_is_one_sentence_and_changes_nothing(here, capfd, monkeypatch, row):
    line, sentence, prepare = (*row, lambda: None)[:3]
    prepare()
    before = listing(here)
    line = commands.refusal(capfd, *shlex.split(line))
    assert re.search(sentence, line), line
    assert listing(here) == before


def test_there_are_many():
    assert len(ROWS) >= 60 and {row[0].partition(" ")[0] for row in ROWS} == {
        "main",
        "sample",
        "export",
        "eval",
        "compare",
        "report",
        "prepare",
        "import_teacher",
        "plan",
        "metrics.reference",
        "metrics.convert",
        "metrics.selfcheck",
    }


@pytest.mark.parametrize("i", [0, len(CONFIGS) + 7, len(ROWS) - 2])
def test_a_process_says_the_same(here, i):
    """As this one; and with --verbose the traceback too, whatever is wrong."""
    line, sentence, prepare = (*ROWS[i], lambda: None)[:3]
    prepare()
    name, *words = shlex.split(line)
    command = [sys.executable, "-m", f"mscm.{name}", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    line = commands.sentence(result.returncode, result.stderr)
    assert re.search(sentence, line), line


@pytest.mark.parametrize(
    "line", [f"{MAIN} {NEW} --config.train.batch_size=0", f"{MAIN} {NEW} --dryrun", f"{SAMPLE} --step=3"]
)
def test_verbose_prints_the_traceback_too(here, capfd, line):
    """Also of an error in the flags themselves."""
    assert commands.run(*line.split(), "--verbose") == 2
    errors = capfd.readouterr().err
    assert "Traceback" in errors and errors.splitlines()[-1].startswith("error: ")
    assert commands.run(*line.split(), "--noverbose") == 2
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(here, capfd, monkeypatch):
    monkeypatch.setattr(training_loop, "check", None)
    assert commands.run(*f"{MAIN} {NEW}".split()) == 1
    errors = capfd.readouterr().err
    assert "TypeError: 'NoneType' object is not callable" in errors and "error: " not in errors.replace(
        "TypeError: ", ""
    )


# Untrusted files that are read.


def test_nothing_leaves_its_folder_and_nothing_is_executed(here):
    """Names in an archive are names only: nothing is unpacked."""
    zipped("p.zip", {"../../a/1.png": PICTURE, "/b/1.png": PICTURE})()
    tarred("p.tar", {"../a/1.png": PICTURE, "/b/1.png": PICTURE}, {"../a/2.png": "1.png"})()
    before = listing(here.parent)
    for name in ("p.zip", "p.tar"):
        found = folders.open_files(name)
        assert all(found.read(i) == PICTURE for i in range(len(found.entries)))
    assert listing(here.parent) == before
    with pytest.raises(ValueError):
        np.load("t/config.json", allow_pickle=False)
    assert not Path("executed").exists()


def test_a_packed_file_is_not_unpacked_beyond_a_limit(here, monkeypatch):
    monkeypatch.setattr(folders, "MAX_BYTES", 10**6)
    zipped("p.zip", {"a/1.png": bytes(10**6 + 1), "a/2.png": bytes(10**6)}, zipfile.ZIP_DEFLATED)()
    write("d/a/1.png", bytes(10**6 + 1))()
    for name in ("p.zip", "d"):
        with pytest.raises(images.BrokenImage, match="got a file of 1000001 bytes or more, expected at most 1000000"):
            folders.open_files(name).read(0)
    assert folders.open_files("p.zip").read(1) == bytes(10**6)
    with pytest.raises(images.BrokenImage, match="broken image, a/1.png"):
        sources.open_source("x", split="train", path="p.zip", resolution=8)
