"""Runs that are killed, stopped, started twice, changed, damaged, and diverge."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mscm import lease, training_loop
from mscm.checkpoint import reading
from mscm.config import ConfigError, differences, load_config
from mscm.experiment import build

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
from configs import digits


def get_config():
    config = digits.teacher()
    config.model.middle.update(dict(width=16, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 2
    config.train.update(
        dict(num_steps=8, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=4)
    )
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(1,), at_end=False))
    return config
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """In this process: no pause after a lease is taken, and no pictures at the end."""
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(training_loop, "finish", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and a run of it that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    (root / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "finish", lambda *_: None)
        training_loop.run(build(load_config(str(root / "config.py"))), str(root / "run"))
    return SimpleNamespace(file=str(root / "config.py"), workdir=root / "run")


def changed(whole, **changes):
    """The experiment with some keys of its config changed, a dot in their names written as two underscores."""
    config = load_config(whole.file)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return build(config)


@pytest.fixture
def workdir(whole, tmp_path):
    """A copy of the run, which may be damaged."""
    shutil.copytree(whole.workdir, tmp_path / "run")
    return tmp_path / "run"


def newest_state(experiment, workdir):
    """Step and training state of the newest checkpoint, as numpy."""
    with reading(workdir) as checkpoints:
        return checkpoints.latest(), jax.tree.map(np.asarray, checkpoints.restore(experiment.abstract_state()))


def assert_same_end(experiment, workdir, expected):
    """The same last step and the same bits: parameters, average, optimiser."""
    (step, got), (expected_step, expected) = (newest_state(experiment, path) for path in (workdir, expected))
    assert step == expected_step
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def listing(workdir):
    """Every file below a work directory and when it was written."""
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


# One writer.

HOLDER = """
import sys, time
from mscm import lease

with lease.holding(sys.argv[1], "training"):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(workdir):
    """Another process that trains in the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir / "owner.json")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_trainer_is_refused_while_the_first_lives(whole, workdir, other):
    """It writes nothing, and names the first; killed, that one is not in the way."""
    before, experiment = listing(workdir), changed(whole, train__num_steps=12)
    with pytest.raises(lease.LeaseError, match=rf"process {other.pid} on .* is at work on this training, expected one"):
        training_loop.run(experiment, str(workdir))
    assert listing(workdir) == before
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    training_loop.run(experiment, str(workdir))
    assert newest_state(experiment, workdir)[0] == 12
    assert not (workdir / "owner.json").exists()


def test_who_was_replaced_saves_nothing(whole, tmp_path, monkeypatch):
    """Another has taken over a process that slept: it is told before its first save."""
    asked = []

    def check(self):
        asked.append(self._path)
        raise lease.LeaseError("another has taken over")

    monkeypatch.setattr(lease.Lease, "check", check)
    with pytest.raises(lease.LeaseError, match="another has taken over"):
        training_loop.run(changed(whole), str(tmp_path / "run"))
    assert [str(path) for path in asked] == [str(tmp_path / "run" / "owner.json")]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# The config that a work directory remembers.


def test_another_config_is_refused_with_all_that_differs(whole, workdir):
    """Dotted paths with both values, before anything is written; a key that only one of them has is a difference."""
    before = listing(workdir)
    experiment = changed(whole, seed=3, optimizer__b2=0.5, objective__label_dropout=0.5, train__log_every_steps=4)
    del experiment.config["model"]["patch_size"]
    with pytest.raises(ConfigError) as error:
        training_loop.run(experiment, str(workdir))
    assert str(error.value) == (
        f"{workdir}: got another config than its checkpoint of step 8 was trained with: model.patch_size: got 'no such "
        "key', expected 2; objective.label_dropout: got 0.5, expected 0.0; optimizer.b2: got 0.5, expected 0.99; seed: "
        "got 3, expected 0; use that config, or another work directory"
    )
    assert listing(workdir) == before


@pytest.mark.parametrize(("num_steps", "is_refused"), [(12, False), (8, False), (6, True)])
def test_the_number_of_steps_may_change_if_they_are_not_done(whole, workdir, num_steps, is_refused):
    with pytest.raises(ConfigError, match="train.num_steps: got 6, expected 8") if is_refused else nullcontext():
        training_loop.check(changed(whole, train__num_steps=num_steps), str(workdir))


def test_steps_beyond_the_last_are_no_difference(whole, workdir):
    """From step 8, five steps a dispatch end at 13 of 10; the same command again finds them done."""
    experiment = changed(
        whole, train__num_steps=10, train__steps_per_dispatch=5, train__log_every_steps=5, train__save_every_steps=5
    )
    for _ in range(2):
        training_loop.run(experiment, str(workdir))
        assert newest_state(experiment, workdir)[0] == 13


@pytest.mark.parametrize(
    "changes",
    [
        {"train__log_every_steps": 4, "train__save_every_steps": 2, "train__keep_checkpoints": 9},
        {"train__steps_per_dispatch": 1, "train__num_microbatches": 2},
        {"data__path": "elsewhere", "data__num_workers": 1, "data__num_threads": 3},
        {"mesh__data": 1, "model__attention": "xla", "model__remat": "full"},
        {"eval__num_images": 40, "eval__seeds": (0, 1), "eval__teacher_steps": (2,)},
    ],
    ids=["what it writes", "dispatches", "where the data is", "devices", "evaluation"],
)
def test_what_decides_nothing_may_change(whole, changes):
    before = changed(whole).config
    config = changed(whole, **changes).config
    assert config != before and differences(config, before) == {}


def test_a_directory_without_checkpoints_takes_any_config(whole, tmp_path):
    """Nothing is lost where nothing was saved."""
    (tmp_path / "config.json").write_text(json.dumps(changed(whole, seed=3).config))
    training_loop.check(changed(whole), str(tmp_path))


def test_the_teacher_below_a_directory_remembers_too(whole, tmp_path):
    """Its sentence names its own directory."""
    text = CONFIG.replace("digits.teacher()", "digits.student(student_steps=2, distil=True)")
    text = text.replace("    return", f"    config.teacher.config = {whole.file!r}\n    return")
    (tmp_path / "student.py").write_text(text)
    shutil.copytree(whole.workdir, tmp_path / "run" / "teacher")
    (tmp_path / "teacher.py").write_text(Path(whole.file).read_text().replace("warmup_steps = 2", "warmup_steps = 1"))
    config = load_config(str(tmp_path / "student.py"))
    training_loop.check(build(config), str(tmp_path / "run"))
    config.teacher.config = str(tmp_path / "teacher.py")
    with pytest.raises(ConfigError, match=r"run/teacher: got another config .*: optimizer.warmup_steps: got 1, expec"):
        training_loop.check(build(config), str(tmp_path / "run"))
