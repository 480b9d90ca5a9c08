"""Disks that fill, permissions, memory, workers and data that go away: a sentence, an exit status, and nothing lost."""

import errno
import gc
import io
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mscm import atomic, evaluation, failures, processes, run_report, training_loop
from mscm.checkpoint import Checkpoints, reading
from mscm.data import folders, images, preparation, records, sources
from mscm.data import reading as data_reading
from mscm.report import grid
from mscm.report.writer import Writer
from mscm.sampling import SamplerSpec
from tests import tiny_run

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    tiny_run.hurry(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, a run of it that nothing interrupted, and one that has come to the middle."""
    root = tmp_path_factory.mktemp("whole")
    run = tiny_run.train(root)
    run.half = root / "half"
    shutil.copytree(run.workdir, run.half)
    shutil.rmtree(run.half / "checkpoints" / "8")
    return run


@pytest.fixture
def workdir(whole, tmp_path):
    """A run that has come to the middle."""
    shutil.copytree(whole.half, tmp_path / "run")
    return tmp_path / "run"


@contextmanager
def no_room(size):
    """No file can grow beyond a number of bytes: a full disk that needs no disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def without_privileges():
    """Permissions count for the owner of this process, also where that is root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def quiet_save():
    """What Orbax leaves of a save that has failed, futures that nobody has asked, goes within the test."""
    yield
    time.sleep(1.0)  # other writes of the save end in threads
    gc.collect()


# By a test whose save fails.
saves = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def public():
    """A folder that everybody may enter, which pytest's are not."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield Path(folder)
    shutil.rmtree(folder)


def state_of(experiment, workdir):
    with reading(workdir) as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(experiment.abstract_state()))


def assert_goes_on(whole, workdir):
    """The same command comes to the end of the run that nothing interrupted."""
    training_loop.run(whole.experiment, str(workdir))
    jax.tree.map(
        np.testing.assert_array_equal, state_of(whole.experiment, workdir), state_of(whole.experiment, whole.workdir)
    )
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]


# What is said.


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 73, r"/x/y: got no room .No space left; \d+ bytes are free "),
        (OSError(errno.EDQUOT, "Quota", "/x"), 73, "/x: got no room .Quota; "),
        (OSError(errno.ENOSPC, "No space left", "gs://b/x"), 73, r"gs://b/x: got no room .No space left.,"),
        (OSError(errno.EROFS, "Read-only", "/x"), 73, "/x: got no permission .Read-only., expected one for the user "),
        (OSError(errno.ESTALE, "Stale", "/x"), 74, "/x: could not be read or written .Stale.; bring it back"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 74, "/x: could not be read or written"),
        (MemoryError("Unable to allocate 7 TiB"), 71, r"got no more memory on this host .Unable to allocate 7 TiB.,"),
        (MemoryError(), 71, "got no more memory on this host .MemoryError."),
        (processes.Died("a worker"), 71, "a worker; the same command"),
    ],
)
def test_each_kind_has_a_sentence_and_a_status(error, status, sentence):
    """It says how to go on."""
    said, code = failures.explain(error)
    assert code == status and re.match(sentence, said) and said.endswith("goes on from what is saved")


@pytest.mark.parametrize("error", [OSError("no number"), OSError(errno.EPIPE, "Broken pipe"), ValueError(), KeyError()])
def test_what_is_not_the_machines_is_not_explained(error):
    """It is a traceback: whose it is nobody knows."""
    assert failures.explain(error) is None


def test_a_name_is_given_to_those_that_have_none():
    """The system's errors, and those that libraries make of them; others are left alone."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, RuntimeError("write() failed: No space left on device; writing /x"), ValueError(str(full))):
        with pytest.raises(OSError) as raised, failures.naming("/x/y"):
            raise error
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/x/y")
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere"), ValueError("of ours"), OSError("stale handle"),
        images.BrokenImage("No space left on device"),
    ):
        text = str(error)
        with pytest.raises(type(error)) as raised, failures.naming("/x/y"):
            raise error
        assert raised.value is error and str(error) == text


# A disk that is full.


@saves
@pytest.mark.usefixtures("quiet_save")
def test_a_run_ends_where_its_checkpoint_has_no_room(whole, workdir):
    """The save is made in the background; what is cut has no name, the one before is whole, and the run goes on."""
    with pytest.raises(OSError) as raised, no_room(10_000):
        training_loop.run(whole.experiment, str(workdir))
    sentence, status = failures.explain(raised.value)
    assert status == 73 and sentence.startswith(f"{workdir}/checkpoints: got no room (File too large; "), sentence
    with reading(workdir) as checkpoints:
        assert checkpoints.steps() == [4] and not checkpoints.damaged
    assert not (workdir / "owner.json").exists()
    assert_goes_on(whole, workdir)


@saves
@pytest.mark.usefixtures("quiet_save")
def test_a_save_that_failed_is_noticed_before_the_next(whole, tmp_path):
    """Which may be hours away."""
    state = state_of(whole.experiment, whole.workdir)
    with pytest.raises(OSError) as raised, Checkpoints(tmp_path, keep=2) as checkpoints, no_room(10_000):
        checkpoints.save(state, {})
        while True:
            checkpoints.check_save()
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "checkpoints"))
    with reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == []


def test_the_files_of_a_save_are_written_down_before_the_next(whole, tmp_path):
    files = tmp_path / "checkpoints" / "8" / "files.json"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state_of(whole.experiment, whole.workdir), {})
        while not files.exists():
            checkpoints.check_save()


def test_training_asks_at_each_report(whole, workdir, monkeypatch):
    asked = []
    monkeypatch.setattr(Checkpoints, "check_save", lambda self: asked.append(self))
    training_loop.run(whole.experiment, str(workdir))
    assert len(asked) == 2  # steps 6 and 8


def test_scores_and_pictures_that_have_no_room_leave_the_old_ones(tmp_path):
    """Nothing is left beside them, and the sentence names the file and not the one that was to replace it."""
    path = tmp_path / "scores.jsonl"
    path.write_text("old")
    with no_room(1000):
        for write in (
            lambda: atomic.write_text(path, "x" * 2000),
            lambda: grid.save_png(path, np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)),
        ):
            with pytest.raises(OSError) as raised:
                write()
            assert failures.explain(raised.value)[0].startswith(f"{path}: got no room (File too large; ")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_events_that_have_no_room_end_the_run(tmp_path):
    """At a write or at the end, and never by waiting for ever."""
    writer = Writer(tmp_path)
    with no_room(20_000), pytest.raises(OSError) as raised:
        for step in range(1000):
            writer.write_scalars(step, {"loss": 0.5, "gradient_norm": 1.0})
        writer.close()
    assert failures.explain(raised.value)[0].startswith(f"{tmp_path}: got no room (File too large; ")
    writer.close()


def test_a_preparation_without_room_goes_on(tmp_path, pictures):
    """The shards that were finished stay."""
    settings = preparation.Settings(resolution=16, encoding="raw", images_per_shard=20)
    files = folders.open_files(pictures)
    arguments = {"split": "train", "num_workers": 1, "report": lambda *_: None}
    with no_room(10_000), pytest.raises(OSError) as raised:
        preparation.prepare(files, tmp_path / "out", settings, **arguments)
    sentence, status = failures.explain(raised.value)
    assert status == 73 and re.match(rf"{tmp_path}/out/train-\d{{5}}-of-00002.array_record: got no room", sentence)
    assert not list(tmp_path.rglob("*.tmp"))
    assert preparation.prepare(files, tmp_path / "out", settings, **arguments).num_examples == 40


FULL = """
mount -t tmpfs -o size=700k none "$1" || exit 99
shift
"$@"
echo "exit status $?"
mount -o remount,size=20m "$0" && "$@"
echo "exit status $?"
"""


def test_a_disk_that_is_full(whole, tmp_path):
    """The command itself, on a real one: one line, and when there is room it goes on."""
    place = tmp_path / "disk"
    place.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", place]).returncode:
        pytest.skip("this user may not mount a small disk")
    command = [sys.executable, "-m", "mscm.main", f"--config={whole.file}", f"--workdir={place}/run"]
    result = subprocess.run(
        [*unshare, "bash", "-c", FULL, place, place, *command],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )
    assert re.findall("exit status .*", result.stdout) == ["exit status 73", "exit status 0"], result.stderr
    errors = re.findall("^error: .*$", result.stderr, re.MULTILINE)
    assert len(errors) == 1 and re.fullmatch(
        rf"error: {place}/run\S*: got no room \(No space left on device; \d+ bytes are free in {place}/run\S* now\), "
        "expected some; make room: the same command then goes on from what is saved",
        errors[0],
    )


# Permission.


@saves
@pytest.mark.usefixtures("quiet_save")
def test_no_permission(public, whole):
    """For a file, for a checkpoint, and for events."""
    state = state_of(whole.experiment, whole.workdir)

    def save():
        with Checkpoints(public / "run", keep=1) as checkpoints:
            checkpoints.save(state, {})

    (public / "run" / "checkpoints").mkdir(parents=True)
    for folder in (public / "run" / "checkpoints", public / "run"):
        folder.chmod(0o555)
    with without_privileges():
        for write in (
            lambda: atomic.write_text(public / "run" / "config.json", "{}"),
            save,
            lambda: Writer(public / "run"),
        ):
            with pytest.raises(OSError) as raised:
                write()
            sentence, status = failures.explain(raised.value)
            assert status == 73 and sentence.startswith(f"{public}/run") and "got no permission (Permission" in sentence
    (public / "run").chmod(0o755)
    (public / "run" / "checkpoints").chmod(0o755)


def test_what_may_not_be_read_is_neither_absent_nor_damaged(public, whole):
    """A teacher, a config, an item of a checkpoint, a zip; each alone is closed."""
    shutil.copytree(whole.workdir, public / "run")
    step = public / "run" / "checkpoints" / "8"
    with zipfile.ZipFile(public / "x.zip", "w") as archive:
        archive.writestr("a/1.png", b"")

    def restore():
        with reading(public / "run") as checkpoints:
            return checkpoints.restore_ema(whole.experiment.abstract_params())

    def listed():
        return folders.open_files(public / "x.zip")

    (public / "closed").mkdir()
    shutil.copy(public / "x.zip", public / "closed")
    for closed, read in (
        (public / "run", restore),
        (public / "run", lambda: run_report.write(str(public / "run"))),
        (public / "run" / "config.json", lambda: run_report.write(str(public / "run"))),
        (public / "run" / "checkpoints", restore),
        (step, restore),
        (step / "ema", restore),
        (step / "ema" / "_METADATA", restore),
        (public / "x.zip", listed),
        (public / "closed", lambda: folders.open_files(public / "closed" / "x.zip")),
    ):
        mode = closed.stat().st_mode
        closed.chmod(0)
        with without_privileges(), pytest.raises(PermissionError) as raised:
            read()
        closed.chmod(mode)
        sentence, status = failures.explain(raised.value)
        assert status == 73 and sentence.startswith(f"{closed}") and "got no permission (Permission" in sentence


def test_a_checkpoint_of_a_user_without_a_name(public, whole):
    """A container may run as any number."""
    state = state_of(whole.experiment, whole.workdir)
    if os.geteuid() != 0:
        pytest.skip("only root may be another user")
    os.chmod(public, 0o777)
    os.seteuid(54321)
    try:
        with Checkpoints(public / "run", keep=1) as checkpoints:
            checkpoints.save(state, {})
        with reading(public / "run") as checkpoints:
            assert checkpoints.steps() == [8]
        assert (public / "run" / "checkpoints" / "8" / "files.json").exists()
    finally:
        os.seteuid(0)


# Memory.

TOO_LARGE = 1 << 44


def more_than_there_is():
    """Waits, for what is allocated behind other work raises only where it is used."""
    return jnp.zeros((TOO_LARGE,)).block_until_ready()


def test_training_beyond_the_memory_of_the_devices(whole, workdir, monkeypatch):
    """Says what needs it and what makes it less; the last checkpoint is whole."""
    with monkeypatch.context() as patch, pytest.raises(failures.OutOfDeviceMemory) as raised:
        patch.setattr(training_loop.Progress, "add", lambda *_: more_than_there_is())
        training_loop.run(whole.experiment, str(workdir))
    sentence, status = failures.explain(raised.value)
    assert status == 71
    assert re.match(
        r"digits_teacher: training steps on 8 images on 1 devices: got more than the memory of a device \(Out of "
        r"memory allocating \d+ bytes\), expected less: set config.model.remat=full or cut .* with "
        r"config.mesh.fsdp \(now 1\), .* config.train.num_microbatches \(now 1\), .* mscm.plan says what fits; ",
        sentence,
    )
    assert_goes_on(whole, workdir)


def test_sampling_beyond_the_memory_of_the_devices(whole, monkeypatch):
    def large(params, key, indices, condition):
        return more_than_there_is()

    monkeypatch.setattr(evaluation, "make_sample_fn", lambda *_: large)
    batches = evaluation.generate(
        whole.experiment,
        {},
        SamplerSpec("ddim", 2),
        num_images=8,
        batch_size=4,
        seed=0,
        conditions=evaluation.conditions_in_turn(whole.experiment),
    )
    with pytest.raises(failures.OutOfDeviceMemory, match="ddim 2 steps: 4 images at once .* lower config.eval.bat"):
        next(batches)


def test_memory_that_nobody_has_a_name_for():
    """Of a feature network, say; another error of the compiler's is no matter of memory."""
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as raised:  # the latter of a program that ran before
        more_than_there_is()
    sentence, status = failures.explain(raised.value)
    assert status == 71 and sentence.startswith("got more than the memory of a device (Out of memory allocating")
    other = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: something")
    assert failures.explain(other) is None
    assert failures.explain(ValueError("RESOURCE_EXHAUSTED: HTTP response code 429: too many writes to gs://x")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), failures.device_memory("a", "b"):
        raise other


def test_memory_that_a_program_lacks_when_it_is_called_again():
    """JAX raises another error there than in the first call, which gets through as long as its input is not there."""
    large = jax.jit(lambda x: jnp.zeros((TOO_LARGE,)) + x)
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), x)[0, 0])(jnp.ones((500, 500)))
    kept = []  # what is thrown away raises nothing
    for value in (busy, jnp.zeros(())):
        with pytest.raises(failures.OutOfDeviceMemory), failures.device_memory("a", "b"):
            kept.append(large(value))
            kept[-1].block_until_ready()



# Workers.

WORKERS = """
import multiprocessing, os, signal, sys
from absl import flags
import numpy as np
from mscm import cli
from mscm.data import pipeline, sources

WHAT = flags.DEFINE_string("what", None, "")

class Hungry(sources.ArraySource):
    def load(self, indices):
        is_late = np.random.RandomState([0, 0]).permutation(64)[60] in indices
        return {"image": np.empty((len(indices), 10**15))} if is_late else super().load(indices)

def main():
    what = WHAT.value
    # Items larger than a pipe holds: a worker that is killed is within one.
    images = np.zeros((64, 64, 64, 3), np.uint8)
    source = (Hungry if what == "hungry" else sources.ArraySource)("x", "s", images, np.zeros(64, np.int32), ("a",))
    items = pipeline.batches(source, batch_size=16, seed=0, num_workers=2)
    try:
        next(items), next(items)
        workers = multiprocessing.active_children()
        print(*(worker.pid for worker in workers), flush=True)
        if what == "worker":
            os.kill(workers[0].pid, signal.SIGKILL)
        if what == "parent":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100):
            next(items)
    finally:
        items.close()

if __name__ == "__main__":
    cli.run(main, doc="", required=())
"""


def run_workers(folder, what):
    """Exit status, errors, and those of the workers that live on, once they had time to end."""
    (folder / "script.py").write_text(WORKERS)
    # Not pipes: a worker that lives on would hold them open.
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.run(
            [sys.executable, folder / "script.py", f"--what={what}"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=err, timeout=120,
        )
    workers = [int(pid) for pid in (folder / "out").read_text().split()]
    assert len(workers) == 2
    lives_on = [pid for pid in workers if not _ends(pid)]
    return process.returncode, (folder / "err").read_text(), lives_on


def _ends(pid):
    for _ in range(300):
        if not processes.start_of(pid):
            return True
        subprocess.run(["sleep", "0.1"], check=True)
    return False


def test_a_worker_that_is_killed_ends_the_run(tmp_path):
    """While it sends, after which Grain waits for the rest for ever; the others end too."""
    status, errors, lives_on = run_workers(tmp_path, "worker")
    assert status == 71 and not lives_on and "Traceback" not in errors, errors
    assert re.search(r"^error: got a killed worker process .*num_workers .*goes on from what is saved$", errors, re.M)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    status, _, lives_on = run_workers(tmp_path, "parent")
    assert status == -9 and not lives_on


def test_a_worker_without_memory_ends_the_run(tmp_path):
    status, errors, lives_on = run_workers(tmp_path, "hungry")
    assert status == 71 and not lives_on and "Traceback" not in errors, errors
    assert re.search("^error: got no more memory on this host .Unable to allocate .*lower config.data", errors, re.M)


def test_a_preparation_whose_worker_is_killed_goes_on(tmp_path, pictures):
    settings = preparation.Settings(resolution=16, images_per_shard=20)
    files = folders.open_files(pictures)

    def kill(*_):
        import multiprocessing

        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(processes.Died, match="got a killed worker process, expected all to live: .*lower --workers"):
        preparation.prepare(
            files, tmp_path, settings, split="train", num_workers=1, report=kill, report_every_seconds=0.0
        )
    card = preparation.prepare(files, tmp_path, settings, split="train", num_workers=1, report=lambda *_: None)
    assert card.num_examples == 40


# Data.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty image files of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        pixels = np.random.RandomState(i).randint(0, 256, (16, 16, 3), np.uint8)
        grid.save_png(folder / ("cat" if i % 2 else "dog") / f"{i}.png", pixels)
    return folder


@pytest.fixture(params=["png", "raw"])
def prepared(request, tmp_path, pictures):
    """Records of them."""
    settings = preparation.Settings(resolution=16, encoding=request.param, images_per_shard=20)
    preparation.prepare(
        folders.open_files(pictures), tmp_path / "data", settings, split="train", num_workers=1, report=lambda *_: None
    )
    return records.RecordSource("x", tmp_path / "data", split="train")


@pytest.fixture
def pauses(monkeypatch):
    """What was waited for, without waiting."""
    waited = []
    monkeypatch.setattr(data_reading.time, "sleep", waited.append)
    return waited


def test_records_that_are_cut_or_vanish_are_named(prepared):
    """The shard and the record; also by a process that opens it anew."""
    shard, anew = Path(prepared._shards.paths[1]), pickle.dumps(prepared)
    expected = prepared.load(np.arange(40))["image"]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    source = pickle.loads(anew)
    with pytest.raises(images.BrokenImage, match=rf"^{shard}: got a broken record, number \d+ \(.*\); prepare it"):
        source.load(np.arange(40))
    np.testing.assert_array_equal(source.load(np.arange(20))["image"], expected[:20])
    shard.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        pickle.loads(anew).load(np.array([0, 25]))
    assert failures.explain(raised.value)[0].startswith(f"{shard}: could not be read or written (No such file")


def test_a_record_is_read_again(prepared, pauses, caplog):
    """By a new reader: one that has failed fails again."""

    class Failing:
        def read(self, indices):
            raise RuntimeError("read() failed: Stale file handle; reading x")

    expected = prepared.load(np.arange(40))
    prepared._shards._readers[1] = Failing()
    with caplog.at_level(logging.WARNING):
        got = prepared.load(np.arange(40))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert pauses == [1.0]
    assert f"{prepared._shards.paths[1]}: could not be read (Stale file handle); trying it again in 1 s" in caplog.text


def test_files_that_vanish_are_named(tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "x")
    source = sources.open_source("x", split="train", path=tmp_path / "x", resolution=16)
    (tmp_path / "x" / "cat" / "1.png").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        source.load(np.arange(40))
    sentence, _ = failures.explain(raised.value)
    assert sentence.startswith(f"{tmp_path}/x/cat/1.png: could not be read or written (No such")


def test_a_file_is_read_again(pictures, monkeypatch, pauses):
    """Where the disk fails in the middle of it, too."""
    source = sources.open_source("x", split="train", path=pictures, resolution=16)
    expected, left = source.load(np.arange(3)), [2]

    class Failing(io.FileIO):
        def read(self, size=-1):
            if left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(folders, "open", lambda path, mode: Failing(path), raising=False)
    jax.tree.map(np.testing.assert_array_equal, source.load(np.arange(3)), expected)
    assert pauses == [1.0, 5.0]


@pytest.mark.parametrize(("code", "times"), [(errno.EIO, 4), (errno.ESTALE, 4), (errno.ENOENT, 1), (errno.EACCES, 1)])
def test_reading_gives_up(code, times, pauses):
    """After three pauses, or at once where waiting does not help."""
    asked = []

    def read():
        asked.append(None)
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError) as raised:
        data_reading.patiently(read, "/x/y")
    assert (raised.value.errno, raised.value.filename) == (code, "/x/y")
    assert len(asked) == times and pauses == [1.0, 5.0, 25.0][: times - 1]
