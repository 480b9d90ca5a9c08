"""The commands on a network of 20,000 parameters: train, continue, score, sample, and refuse with one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from mscm import evaluation, evaluation_loop, lease, training_loop
from mscm.checkpoint import CheckpointError, reading
from mscm.config import load_config
from mscm.experiment import DataSpec, build
from tests import commands
from tests.commands import refusal

ROOT = Path(__file__).resolve().parents[1]

# Teacher and student, made small in the same way.
_TINY = """
from configs import digits


def get_config():
    config = digits.{family}
    config.model.middle.width = 32
    config.model.middle.num_blocks = 1
    config.model.head_dim = 16
    config.model.emb_dim = 16
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 4
    config.train.batch_size = 8
    config.train.steps_per_dispatch = 2
    config.train.log_every_steps = 2
    config.train.save_every_steps = 2
    {more}
    return config
"""

# The student's only: a run scores its teacher under its own settings.
_TINY_EVAL = "dict(num_images=60, batch_size=20, teacher_steps=(1, 2, 3))"


def command(name: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`python -m mscm.NAME` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"mscm.{name}", *flags],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Config files, and the work directory of a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "teacher.py").write_text(_TINY.format(family="teacher()", more=""))
    more = f"config.teacher.config = '{root / 'teacher.py'}'; config.eval.update({_TINY_EVAL})"
    (root / "student.py").write_text(_TINY.format(family="student(student_steps=2, distil=True)", more=more))
    experiment = build(load_config(str(root / "student.py")))
    workdir = root / "run"
    training_loop.run(experiment, str(workdir))
    return SimpleNamespace(root=root, workdir=workdir, experiment=experiment)


@pytest.fixture
def flags(tiny):
    return f"--config={tiny.root / 'student.py'}", f"--workdir={tiny.workdir}"


def states_of(experiment, workdir):
    """The newest training state as numpy."""
    with reading(workdir) as checkpoints:
        return checkpoints.latest(), jax.tree.map(np.asarray, checkpoints.restore(experiment.abstract_state()))


def test_a_run_leaves_what_the_readme_says(tiny):
    """One command leaves checkpoints, events, the config, samples and scores, also of the teacher that it trained."""
    for workdir, experiment in (
        (tiny.workdir, tiny.experiment),
        (tiny.workdir / "teacher", tiny.experiment.teacher.experiment),
    ):
        assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [2, 4]
        assert json.loads((workdir / "config.json").read_text()) == experiment.config
        (events,) = workdir.glob("events.*")
        assert b"loss_logsnr" in events.read_bytes()
    (events,) = (tiny.workdir / "eval").glob("events.*")
    assert b"fd_classifier/digits_cd2_ddim_2" in events.read_bytes()
    with Image.open(tiny.workdir / "report" / "samples.png") as image:
        assert min(image.size) > 200
    with reading(tiny.workdir) as checkpoints:
        facts = checkpoints.facts()
    assert facts["data"].startswith("1797 images, fingerprint") and facts["transform"] is None
    rows = json.loads((tiny.workdir / "report" / "scores.json").read_text())
    assert [(row["sampler"], row["nfe"]) for row in rows] == [("ddim", 2), ("addim", 2), ("addim", 3), (None, 0)]
    assert [row["num_images"] for row in rows] == [60, 60, 60, 60]
    assert all(np.isfinite(row["fd_classifier"]) and row["fd_classifier"] > 0 for row in rows)


def test_training_moves_the_student_away_from_its_teacher(tiny):
    """The checkpoint's parameters are not the teacher's."""
    _, student = states_of(tiny.experiment, tiny.workdir)
    teacher = evaluation.read_ema(tiny.experiment.teacher.experiment, str(tiny.workdir / "teacher"))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), student.params, teacher)
    assert not all(jax.tree.leaves(same))
    assert student.step == 4


class _Interrupted(Exception):
    pass


def test_an_interrupted_run_continues_bit_for_bit(tiny, tmp_path, monkeypatch):
    """Stopped after step 2 of 4 and started again, a run ends with the same bits: parameters, average, optimiser."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny.workdir / "teacher", workdir / "teacher")
    report = training_loop.Progress.report

    def stop(self, step):
        report(self, step)
        if step == 4:
            raise _Interrupted

    monkeypatch.setattr(training_loop.Progress, "report", stop)
    teacher = evaluation.read_ema(tiny.experiment.teacher.experiment, str(workdir / "teacher"))
    source = training_loop.check(tiny.experiment, str(workdir))
    with pytest.raises(_Interrupted):
        training_loop.train(tiny.experiment, str(workdir), source, teacher, check_ours=lambda: None)
    assert states_of(tiny.experiment, workdir)[0] == 2
    monkeypatch.undo()
    training_loop.train(tiny.experiment, str(workdir), source, teacher, check_ours=lambda: None)
    (step, got), (expected_step, expected) = (states_of(tiny.experiment, w) for w in (workdir, tiny.workdir))
    assert step == expected_step == 4
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_finished_run_trains_no_further(tiny, tmp_path):
    """Started again with all steps done, training changes no checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny.workdir, workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    source = training_loop.check(tiny.experiment, str(workdir))
    training_loop.train(tiny.experiment, str(workdir), source, {}, check_ours=lambda: None)
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}


def test_eval_reproduces_the_scores_of_the_run(tiny, flags):
    """Scores from another process are the run's to the last digit: made again where the run's are removed, and what is
    there is not made twice."""
    lines = tiny.workdir / "eval" / "scores.jsonl"
    of_the_run = json.loads((tiny.workdir / "report" / "scores.json").read_text())
    lines.unlink()
    result = command("eval", *flags)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    made = [(row["model"], row["step"], row["nfe"]) for row in rows]
    teachers = [("digits_teacher", 4, nfe) for nfe in (1, 2, 3)]
    assert made == [("digits_cd2", 2, 2), ("digits_cd2", 4, 2), *teachers, ("real, half against half", None, 0)]
    assert all(row in rows for row in of_the_run)
    for row in rows[1:]:
        assert f"{row['fd_classifier']:.4g}" in result.stdout
    again = command("eval", *flags)
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout
    assert [json.loads(line) for line in lines.read_text().splitlines()] == rows


def test_one_checkpoint_is_scored_and_nothing_else(tiny, flags, tmp_path):
    """Neither its teacher nor the real images, which cost as much."""
    for name in ("checkpoints", "teacher"):
        shutil.copytree(tiny.workdir / name, tmp_path / name)
    result = command("eval", flags[0], f"--workdir={tmp_path}", "--checkpoint=2")
    assert result.returncode == 0, result.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "eval" / "scores.jsonl").read_text().splitlines()]
    assert (row["model"], row["step"]) == ("digits_cd2", 2) and "digits_cd2" in result.stdout


def test_a_run_without_any_score_says_so(tiny, monkeypatch):
    """Where all checkpoints were deleted before they had one."""
    monkeypatch.setattr(evaluation_loop.Evaluation, "score", lambda *args, **kwargs: [])
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="got no score, because step 4 was deleted before it had one"):
        training_loop.finish(tiny.experiment, str(tiny.workdir))


def test_a_run_waits_for_an_evaluation_under_way(tiny, monkeypatch):
    """What ends training does not collide with mscm.eval, which ends by itself after the last checkpoint."""
    held = []

    def holding(path, what, *, wait):
        held.append((path, wait))
        raise _Interrupted

    monkeypatch.setattr(lease, "holding", holding)
    with pytest.raises(_Interrupted):
        training_loop.finish(tiny.experiment, str(tiny.workdir))
    assert held == [(str(tiny.workdir / "eval" / "owner.json"), True)]


def test_sample_writes_arrays_a_grid_and_a_folder(tiny, flags, tmp_path):
    """The output's name decides what is written; image i is the same in all of them."""
    npz, png, folder = tmp_path / "a" / "images.npz", tmp_path / "b" / "grid.png", tmp_path / "folder"
    for output, more in ((npz, ()), (png, ()), (folder, ("--labels=3,7",))):
        result = command("sample", *flags, "--num_images=10", f"--output={output}", *more)
        assert result.returncode == 0, result.stderr
        assert f"10 images of digits_cd2, ddim 2 steps, NFE 2: {output}" in result.stdout
    with np.load(npz) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == list(range(10))
    with Image.open(png) as image:
        assert image.size[0] >= 10 * 48
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(10)]
    with Image.open(files[3]) as image:
        # Label 7 there and 3 in the npz: the same noise under another label.
        assert image.size == (8, 8) and image.mode == "L"
    with Image.open(files[7]) as image:
        np.testing.assert_array_equal(np.asarray(image), images[7, ..., 0])


def test_sample_does_not_mix_its_images_with_others(flags, tmp_path, capfd):
    """Which would be scored together; its own it writes over."""
    for i in range(6):
        Image.new("L", (8, 8)).save(tmp_path / f"{i:06d}.png")
    more = (f"--output={tmp_path}", "--num_images=4")
    assert f"got '{tmp_path}' with 2 other images, such as 000004.png" in refusal(capfd, "sample", *flags, *more)
    for i in (4, 5):
        (tmp_path / f"{i:06d}.png").unlink()
    result = command("sample", *flags, *more)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "000003.png") as image:
        assert np.asarray(image).any()


def test_sample_loses_no_image_that_was_drawn(flags, tmp_path, capfd, monkeypatch):
    """Where a batch fails, those before it are there, and no image of an older command after them."""
    for i in range(6):
        Image.new("L", (8, 8)).save(tmp_path / f"{i:06d}.png")
    generate, drawn = evaluation.generate, []

    def failing(*args, **kwargs):
        for batch in generate(*args, **kwargs | {"batch_size": 2}):
            if len(drawn) == 2:
                raise OSError(errno.EIO, "Input/output error", "x")
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(evaluation, "generate", failing)
    assert commands.run("sample", *flags, "--num_images=6", f"--output={tmp_path}") == 74
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(4)]
    for path, image in zip(files, np.concatenate(drawn), strict=True):
        with Image.open(path) as file:
            np.testing.assert_array_equal(np.asarray(file), image[..., 0])


def test_sample_refuses_what_the_student_was_not_trained_for(tiny, flags, tmp_path, capfd):
    """Another number of steps is refused in a sentence that names the student's, and --force takes it."""
    output = f"--output={tmp_path / 'x.npz'}"
    refused = refusal(capfd, "sample", *flags, "--num_steps=3", output)
    assert "ddim 3 steps" in refused and "expected ddim with 2 steps" in refused and "--force" in refused
    assert not (tmp_path / "x.npz").exists()
    heun = ("--num_steps=3", "--sampler=heun:grid=karras,clip=static")
    assert "expected ddim with 2 steps" in refusal(capfd, "sample", *flags, *heun, output)
    forced = command("sample", *flags, *heun, "--num_images=10", "--force", output)
    assert forced.returncode == 0, forced.stderr
    assert "digits_cd2, heun:grid=karras,clip=static 3 steps, NFE 5: " in forced.stdout
    assert "did you mean 'heun'" in refusal(capfd, "sample", *flags, "--sampler=heum")
    assert (tmp_path / "x.npz").exists()
    assert "--labels: got 10, expected numbers from 0 to 9" in refusal(capfd, "sample", *flags, "--labels=10")


def test_mistakes_on_the_command_line_are_one_sentence(tiny, flags, tmp_path, capfd):
    """What can be wrong is said before anything is compiled, in one line, with exit code 2 and what to do."""
    config, workdir = flags
    fresh = f"--workdir={tmp_path / 'fresh'}"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    said = refusal(capfd, "main", config, fresh, f"--config.teacher.workdir={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in said and "checkpoints" in said
    said = refusal(capfd, "main", config, f"--workdir={tmp_path / 'file'}")
    assert "which is a file, expected a directory" in said
    said = refusal(capfd, "main", config, fresh, "--config.optimizer.decay=linaer")
    assert "got 'linaer', expected one of constant, cosine, linear" in said
    said = refusal(capfd, "eval", config, fresh, "--once")
    assert "expected the work directory of a training" in said
    for words, sentence in (
        (["--images=x.npz", "--once"], "got --images and --once, expected one of them"),
        (["--images=x.npz", "--checkpoint=2"], "got --images and --checkpoint, expected one of them"),
        (["--checkpoint=2", "--once"], "got --checkpoint and --once, expected one of them"),
        (["--images="], "--images: got an empty name"),
    ):
        assert sentence in refusal(capfd, "eval", config, workdir, *words)
    said = refusal(capfd, "sample", config, workdir, "--step=3")
    assert "got step 3, expected one of 2, 4" in said


def test_a_checkpoint_of_another_number_of_steps_is_refused(tiny):
    """The parameters would fit; what they mean is another function."""
    config = load_config(str(tiny.root / "student.py"))
    config.objective.student_steps = 4
    with pytest.raises(ValueError, match="with student_steps = 2, expected 4"):
        evaluation.read_ema(build(config), str(tiny.workdir))
    with pytest.raises(ValueError, match="objective.student_steps: got 4, expected 2"):
        training_loop.check(build(config), str(tiny.workdir))
    config.teacher.workdir = str(tiny.workdir)
    with pytest.raises(ValueError, match="with student_steps = 2, expected None"):
        training_loop.check(build(config), str(tiny.root / "another"))


def test_training_does_not_continue_on_other_data(tiny, monkeypatch):
    """Half of the digits are other data, under another name or behind the same: other batches would follow."""
    config = load_config(str(tiny.root / "student.py"))
    config.data.split = "half_a"
    with pytest.raises(ValueError, match="data.split: got 'half_a', expected 'all'"):
        training_loop.check(build(config), str(tiny.workdir))
    half = build(config).data.open()
    expected = r"with data = 1797 images, fingerprint \w{16}, expected 89\d images, fingerprint"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=expected):
        patch.setattr(DataSpec, "open", lambda self: half)
        training_loop.check(tiny.experiment, str(tiny.workdir))
    evaluation.read_ema(build(config), str(tiny.workdir))  # scoring against them is no mistake


def test_a_teacher_of_another_architecture_is_refused(tiny, tmp_path):
    """A work directory that does not fit names the first parameter that differs, before anything is compiled."""
    for name in ("teacher", "student"):
        text = (tiny.root / f"{name}.py").read_text().replace("width = 32", "width = 48")
        (tmp_path / f"{name}.py").write_text(text.replace(str(tiny.root), str(tmp_path)))
    config = load_config(str(tmp_path / "student.py"))
    with pytest.raises(ValueError, match="teacher: got another config .*: model.middle.width: got 48, expected 32"):
        training_loop.run(build(config), str(tiny.workdir))
    config.teacher.workdir = str(tiny.workdir / "teacher")
    with pytest.raises(ValueError, match="got another architecture than the config.s: parameter .* has shape"):
        training_loop.run(build(config), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["main", "eval", "sample", "export"])
def test_commands_start_without_jax(name):
    """`--help` and an error of a flag do not wait for jax."""
    script = f"import sys, mscm.{name}\n"
    script += "print([name for name in ('jax', 'flax', 'orbax', 'sklearn') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--config=configs/digits_cd3.py --workdir=x", "got config file 'configs/digits_cd3.py' (did you mean"),
        ("--config=setup.cfg --workdir=x", "got config file 'setup.cfg', expected a Python file"),
        ("--config configs/digits_cd4.py:large --workdir=x", "expected 'configs/digits_cd4.py': this config has no"),
        ("--config=configs/imagenet64_cd8.py:huge --workdir=x", "got 'huge', expected one of '', 'large'"),
        ("--config=configs/digits_cd4.py --workdir=x --config.train.num_stepz=3", "mean 'config.train.num_steps"),
        ("--config=configs/digits_cd4.py --workdir=x --config.train.num_steps=3.5", "invalid literal for int()"),
        ("--config=configs/digits_cd4.py --workdri=x", "flag 'workdri'. Did you mean: workdir"),
        ("--config=configs/digits_cd4.py", "--workdir must have a value"),
        ("--workdir=x", "--config must have a value"),
        ("--config=configs/digits_cd4.py --workdir=x y z", "got y z, expected flags only"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, sentence, tmp_path, capfd, monkeypatch):
    """From any directory: a config file that is not here is looked for in the repository."""
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(capfd, "main", *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["main", "eval", "sample", "export"])
def test_help_says_what_the_command_does(name):
    """`--help` prints the command line and the flags."""
    result = command(name, "--help")
    assert f"python -m mscm.{name} --config=" in result.stdout
    assert "--workdir" in result.stdout
