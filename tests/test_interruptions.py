"""Runs that are killed, stopped, started twice, changed, damaged, and diverge."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kill_test
from mscm import lease, planning, stopping, terminal, training_loop
from mscm.checkpoint import CheckpointError, Checkpoints, reading
from mscm.config import ConfigError, differences, load_config, run_hash, run_of
from mscm.cost import chips
from mscm.dry_run import dry_run
from mscm.experiment import build
from mscm.replay import replay
from mscm.report.writer import Writer
from tests import commands, tiny_run

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    tiny_run.hurry(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and a run of it that nothing interrupted."""
    return tiny_run.train(tmp_path_factory.mktemp("whole"))


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


def assert_same_end(experiment, workdir, expected, **tolerance):
    """The same last step and, without a tolerance, the same bits: parameters, average, optimiser."""
    (step, got), (expected_step, expected) = (newest_state(experiment, path) for path in (workdir, expected))
    assert step == expected_step
    chex.assert_trees_all_close(got, expected, **({"rtol": 0.0, "atol": 0.0} | tolerance))


def student_file(whole, folder):
    """A config of a student whose teacher is the run's model."""
    text = tiny_run.CONFIG.replace("digits.teacher()", "digits.student(student_steps=2, distil=True)")
    text = text.replace("    return", f"    config.teacher.config = {whole.file!r}\n    return")
    (folder / "student.py").write_text(text)
    return str(folder / "student.py")


def alter_facts(workdir, change):
    """Changes what all checkpoints say, as another version would have written it."""
    for step in (workdir / "checkpoints").iterdir():
        (step / "files.json").unlink()  # which knows their bytes
        facts = json.loads((step / "facts" / "metadata").read_text())
        change(facts)
        (step / "facts" / "metadata").write_text(json.dumps(facts))


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
    """It writes nothing, and names the first, with an exit status that may pass; killed, that one is not in the way."""
    before, experiment = listing(workdir), changed(whole, train__num_steps=12)
    assert commands.run("main", f"--config={whole.file}", f"--workdir={workdir}") == 69
    with pytest.raises(lease.LeaseError, match=rf"process {other.pid} on .* is at work on this training, expected one"):
        training_loop.run(experiment, str(workdir))
    assert listing(workdir) == before
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    training_loop.run(experiment, str(workdir))
    assert newest_state(experiment, workdir)[0] == 12
    assert not (workdir / "owner.json").exists()


def test_the_directories_below_are_held_too(whole, workdir, tmp_path, other):
    """A student's teacher that another trains is refused, and the student's own directory is given back."""
    student = tmp_path / "student"
    student.mkdir()
    shutil.move(workdir, student / "teacher")  # with who holds it
    experiment = build(load_config(student_file(whole, tmp_path)))
    with pytest.raises(lease.LeaseError, match=rf"student/teacher/owner.json: process {other.pid} .* is at work"):
        training_loop.run(experiment, str(student))
    assert [path.name for path in student.iterdir()] == ["teacher"]


def test_a_teacher_is_held_while_its_student_trains(whole, workdir, tmp_path, monkeypatch):
    """Its own command is refused; once all has ended, nobody holds anything."""
    student = tmp_path / "student"
    student.mkdir()
    shutil.move(workdir, student / "teacher")
    held = []
    monkeypatch.setattr(training_loop, "train", lambda *_, **__: held.append(sorted(student.rglob("owner.json"))))
    monkeypatch.setattr(training_loop.evaluation, "read_ema", lambda *_: {})
    training_loop.run(build(load_config(student_file(whole, tmp_path))), str(student))
    assert held == [[student / "owner.json", student / "teacher" / "owner.json"]] * 2
    assert not list(student.rglob("owner.json"))


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
    with pytest.raises(ConfigError, match="num_steps: got 6, expected at least 8") if is_refused else nullcontext():
        training_loop.check(changed(whole, train__num_steps=num_steps), str(workdir))


@pytest.mark.parametrize("is_old", [False, True])
def test_more_steps_are_the_same_run(whole, workdir, is_old):
    """Its scores belong together, also where they go on twice, from a checkpoint that does not say its run."""
    if is_old:
        alter_facts(workdir, lambda facts: facts.pop("run"))
    for num_steps in (12, 16):
        training_loop.run(changed(whole, train__num_steps=num_steps, train__keep_checkpoints=9), str(workdir))
    with reading(workdir) as checkpoints:
        runs = {step: run_of(checkpoints.facts(step)) for step in checkpoints.steps()}
    assert runs == dict.fromkeys((4, 8, 12, 16), run_hash(changed(whole).config))


@pytest.mark.parametrize(("dispatch", "use"), [(6, 2), (5, 1)])
def test_dispatches_that_would_miss_the_steps_to_save_at_are_refused(whole, workdir, dispatch, use):
    """From step 8, six steps a dispatch meet no multiple of six; before anything is written, with one that does."""
    before = listing(workdir)
    changes = {f"train__{key}": 6 * dispatch for key in ("num_steps", "log_every_steps", "save_every_steps")}
    said = f"steps_per_dispatch: got {dispatch}, expected a divisor of 8, the step of the newest .*; use {use}$"
    with pytest.raises(ConfigError, match=said):
        training_loop.run(changed(whole, train__steps_per_dispatch=dispatch, **changes), str(workdir))
    assert listing(workdir) == before
    training_loop.check(changed(whole, train__steps_per_dispatch=use, **changes), str(workdir))


def test_dispatches_do_not_matter_where_all_is_done(whole, workdir):
    """Also where an earlier version has gone beyond the last step."""
    train = {f"train__{key}": 5 for key in ("num_steps", "steps_per_dispatch", "log_every_steps", "save_every_steps")}
    alter_facts(workdir, lambda facts: facts["config"]["train"].update(num_steps=5))
    before = newest_state(changed(whole), workdir)
    training_loop.run(changed(whole, **train), str(workdir))
    chex.assert_trees_all_equal(newest_state(changed(whole), workdir), before)


def test_another_number_of_steps_a_dispatch_saves_and_ends_where_it_should(whole, workdir, monkeypatch):
    """From step 8, four at a time."""
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, facts: saved.append(int(state.step)) or save(self, state, facts)
    )
    experiment = changed(whole, train__num_steps=20, train__steps_per_dispatch=4, train__log_every_steps=4)
    training_loop.run(experiment, str(workdir))
    assert saved == [12, 16, 20]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__log_every_steps": 4, "train__save_every_steps": 2, "train__keep_checkpoints": 9},
        {"train__max_bad_steps": 3},
        {"train__steps_per_dispatch": 1, "train__num_microbatches": 2},
        {"data__path": "elsewhere", "data__num_workers": 1, "data__num_threads": 3},
        {"mesh__data": 1, "model__attention": "xla", "model__remat": "full"},
        {"eval__num_images": 40, "eval__seeds": (0, 1), "eval__teacher_steps": (2,)},
    ],
    ids=["what it writes", "what it skips", "dispatches", "where the data is", "devices", "evaluation"],
)
def test_what_decides_nothing_may_change(whole, changes):
    before = changed(whole).config
    config = changed(whole, **changes).config
    assert config != before and differences(config, before) == {}


def test_a_key_that_only_one_config_has_is_a_difference():
    """Also where the other's value would be None."""
    one, other = {"a": 1, "b": {"c": None}}, {"a": 1, "b": {}}
    assert differences(one, other) == {"b.c": "b.c: got None, expected 'no such key'"}
    assert differences(other, one) == {"b.c": "b.c: got 'no such key', expected None"}
    assert differences(one, one) == {}
    # A key of an extension is no path of ours because it is called so.
    assert list(differences({"objective": {"path": 1}, "data": {"path": 1}}, {})) == ["objective.path"]


def test_a_directory_without_checkpoints_takes_any_config(whole, tmp_path):
    """Nothing is lost where nothing was saved."""
    (tmp_path / "config.json").write_text(json.dumps(changed(whole, seed=3).config))
    training_loop.check(changed(whole), str(tmp_path))


def test_the_teacher_below_a_directory_remembers_too(whole, tmp_path):
    """Its sentence names its own directory."""
    config = load_config(student_file(whole, tmp_path))
    shutil.copytree(whole.workdir, tmp_path / "run" / "teacher")
    (tmp_path / "teacher.py").write_text(Path(whole.file).read_text().replace("warmup_steps = 2", "warmup_steps = 1"))
    training_loop.check(build(config), str(tmp_path / "run"))
    config.teacher.config = str(tmp_path / "teacher.py")
    with pytest.raises(ConfigError, match=r"run/teacher: got another config .*: optimizer.warmup_steps: got 1, expec"):
        training_loop.check(build(config), str(tmp_path / "run"))


@pytest.fixture
def given(whole, tmp_path):
    """A config of a student, and the teacher's directory, which it names, as it is after four steps of eight."""
    shutil.copytree(whole.workdir, tmp_path / "given")
    shutil.rmtree(tmp_path / "given" / "checkpoints" / "8")
    config = load_config(student_file(whole, tmp_path))
    config.teacher.workdir = str(tmp_path / "given")
    config.train.num_steps = 4
    return SimpleNamespace(config=config, teacher=tmp_path / "given", workdir=tmp_path / "student")


def finish_teacher(whole, given):
    shutil.rmtree(given.teacher)
    shutil.copytree(whole.workdir, given.teacher)


def go_on(given):
    given.config.train.num_steps = 8
    training_loop.run(build(given.config), str(given.workdir))


def test_an_unfinished_teacher_is_named_and_no_later_one_takes_its_place(whole, given, caplog):
    """The student would learn from another one after its own interruption; nothing is written."""
    training_loop.run(build(given.config), str(given.workdir))
    assert "the teacher is taken as it is, at step 4 of 8: not finished" in caplog.text
    run = run_hash(changed(whole).config)
    with reading(given.workdir) as checkpoints:
        assert checkpoints.facts()["teacher"] == {"run": run, "step": 4}
    finish_teacher(whole, given)
    before = listing(given.workdir)
    said = rf"{given.teacher}: got a teacher of step 8 of run {run}, expected step 4 of run {run}, with which the train"
    with pytest.raises(ConfigError, match=said):
        go_on(given)
    assert listing(given.workdir) == before
    shutil.rmtree(given.teacher / "checkpoints" / "8")
    given.config.teacher.workdir = None  # the run remembers
    go_on(given)
    assert newest_state(build(given.config), given.workdir)[0] == 8
    assert build(given.config).diffusion_teacher(str(given.workdir)).workdir == str(given.teacher)
    assert not (given.workdir / "teacher").exists()


def test_a_teacher_of_another_training_is_refused(whole, given):
    training_loop.run(build(given.config), str(given.workdir))
    alter_facts(given.teacher, lambda facts: facts.update(run="another"))
    with pytest.raises(ConfigError, match="got a teacher of step 4 of run another, expected step 4 of run"):
        go_on(given)


@pytest.mark.parametrize("why", ["it does not say which", "it asks none"])
def test_another_teacher_is_no_matter(whole, given, why):
    """Of a student as earlier versions wrote it, and of one that only began with the teacher's weights."""
    given.config.objective.distil = why != "it asks none"
    training_loop.run(build(given.config), str(given.workdir))
    finish_teacher(whole, given)
    if given.config.objective.distil:
        alter_facts(given.workdir, lambda facts: facts.pop("teacher"))
    training_loop.check(build(given.config), str(given.workdir))


def test_a_teacher_that_is_not_given_stays_too(whole, given, tmp_path):
    """Made longer in its config, it would train on before the student does."""
    given.config.teacher.update(dict(workdir=None, config=str(tmp_path / "teacher.py")))
    (tmp_path / "teacher.py").write_text(text := Path(whole.file).read_text())
    shutil.copytree(whole.workdir, given.workdir / "teacher")
    training_loop.run(build(given.config), str(given.workdir))
    (tmp_path / "teacher.py").write_text(text.replace("num_steps=8", "num_steps=12"))
    with pytest.raises(ConfigError, match="step 12 of run .*, expected step 8 .*; leave its train.num_steps as it was"):
        go_on(given)


# Checkpoints that were cut.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "an array file is cut": ("ema/ocdbt.process_0/d/*", truncate, r"ema/ocdbt.process_0/d/\w+ has \d+ bytes, expected"),
    "an array file is empty": ("params/d/*", lambda path: path.write_bytes(b""), r"params/d/\w+ has 0 bytes, expected"),
    "metadata are gone": ("opt/_METADATA", Path.unlink, "opt/_METADATA is missing"),
    "an item is gone": ("params", shutil.rmtree, r"params/\S+ is missing"),
    "facts are cut": ("facts/metadata", truncate, r"facts/metadata has \d+ bytes, expected"),
    "the list is cut": ("files.json", truncate, r"files.json is no JSON"),
}


def damage(workdir, pattern, how):
    how(next((workdir / "checkpoints" / "8").glob(pattern)))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_reader_takes_the_newest_whole_checkpoint(whole, workdir, caplog, name):
    """It says which one is not, and why, and leaves all as it is."""
    pattern, how, reason = DAMAGES[name]
    damage(workdir, pattern, how)
    before, experiment = listing(workdir), changed(whole)
    with reading(workdir) as checkpoints:
        assert checkpoints.steps() == [4] and checkpoints.latest() == 4
        assert checkpoints.restore(experiment.abstract_state()).step == 4
        assert checkpoints.check(experiment.facts()) == 4
    assert re.search(f"step 8 is damaged and not used: {reason}", caplog.text)
    assert listing(workdir) == before


@pytest.mark.parametrize("name", ["an array file is cut", "an item is gone"])
def test_training_goes_on_from_the_newest_whole_checkpoint(whole, workdir, name):
    """To the same end; what was damaged is moved aside, each time to a place of its own."""
    pattern, how, _ = DAMAGES[name]
    for aside in ("8", "8.1"):
        damage(workdir, pattern, how)
        left = {path.name: path.read_bytes() for path in (workdir / "checkpoints" / "8").rglob("*") if path.is_file()}
        training_loop.run(changed(whole), str(workdir))
        assert_same_end(changed(whole), workdir, whole.workdir)
        files = (workdir / "damaged" / aside).rglob("*")
        assert {path.name: path.read_bytes() for path in files if path.is_file()} == left


def test_without_a_whole_checkpoint_training_is_refused(whole, workdir):
    """It would begin again, silently; nothing is touched."""
    for step in ("4", "8"):
        shutil.rmtree(workdir / "checkpoints" / step / "ema")
    before = listing(workdir)
    with pytest.raises(CheckpointError, match="got damaged checkpoints only .step 4: ema/.* is missing; step 8: ema/"):
        training_loop.run(changed(whole), str(workdir))
    assert listing(workdir) == before


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def unlisted(*patterns):
    """Takes files or folders away from a step, and what knows of them: a deletion or a copy that was cut."""

    def how(step):
        for pattern in ("files.json", *patterns):
            path = next(step.glob(pattern))
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return how


CUT_DELETIONS = {
    "all": (emptied, "_CHECKPOINT_METADATA is missing"),
    "facts": (unlisted("facts"), "facts/metadata is missing"),
    "the optimiser": (unlisted("opt"), "opt/_METADATA is missing"),
    "what an item begins with": (unlisted("params/_METADATA"), "params/_METADATA is missing"),
    "the note of the items": (unlisted("_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA is missing"),
    "a part of the note": (
        lambda step: [unlisted()(step), truncate(step / "_CHECKPOINT_METADATA")],
        "_CHECKPOINT_METADATA does not name the items .JSONDecodeError",
    ),
}


@pytest.mark.parametrize("name", CUT_DELETIONS)
def test_a_step_without_all_items_is_damaged_also_without_a_list(whole, workdir, caplog, name):
    """A deletion that was cut; a reader takes the one before."""
    how, reason = CUT_DELETIONS[name]
    how(workdir / "checkpoints" / "8")
    assert newest_state(changed(whole), workdir)[0] == 4
    assert re.search(f"step 8 is damaged and not used: {reason}", caplog.text)


def test_training_moves_a_step_without_files_aside(whole, workdir):
    """One that was emptied, and one that nobody has made; it comes to the same end."""
    emptied(workdir / "checkpoints" / "8")
    (workdir / "checkpoints" / "99").mkdir()
    training_loop.run(changed(whole), str(workdir))
    assert_same_end(changed(whole), workdir, whole.workdir)
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"8", "99"}


def test_a_step_that_only_lacks_the_list_is_whole(whole, workdir):
    """Its training was killed before it wrote the list."""
    (workdir / "checkpoints" / "8" / "files.json").unlink()
    assert_same_end(changed(whole), workdir, whole.workdir)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(workdir, pattern):
    """The file that holds most of the arrays."""
    return max((workdir / "checkpoints" / "8").glob(pattern), key=lambda path: path.stat().st_size)


def test_training_goes_on_from_the_newest_checkpoint_without_a_changed_byte(whole, workdir, caplog):
    """One bit, in a file of the same size: to the same end; the file that it was in is named."""
    path = largest(workdir, "opt/ocdbt.process_0/d/*")
    flip(path)
    training_loop.run(changed(whole), str(workdir))
    assert_same_end(changed(whole), workdir, whole.workdir)
    name = path.relative_to(workdir / "checkpoints" / "8")
    said = rf"Moved to \S+/damaged/8 \({name} has other bytes than it was written with\); step 4 is the newest"
    assert re.search(said, caplog.text)


@pytest.mark.parametrize(
    "pattern", ["opt/d/*", "params/ocdbt.process_0/d/*", "ema/ocdbt.process_0/d/*", "ema/_METADATA"]
)
def test_a_changed_byte_is_refused_by_who_reads_it(whole, workdir, pattern):
    """Not by who reads other items; with the steps that are left."""
    flip(largest(workdir, pattern))
    before, experiment = listing(workdir), changed(whole)
    said = r"checkpoints/8: got a damaged checkpoint .* has other bytes .* name another step \(4\)"
    with reading(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=said):
            checkpoints.restore(experiment.abstract_state())
        with pytest.raises(CheckpointError, match=said) if pattern.startswith("ema") else nullcontext():
            checkpoints.restore_ema(experiment.abstract_params())
        assert checkpoints.facts()["name"] == "digits_teacher"
        assert checkpoints.restore(experiment.abstract_state(), 4).step == 4
    flip(largest(workdir, "facts/metadata"))
    with reading(workdir) as checkpoints, pytest.raises(CheckpointError, match="facts/metadata has other bytes"):
        checkpoints.facts()
    assert listing(workdir).keys() == before.keys()


def test_a_list_without_checksums_is_one_of_sizes(whole, workdir):
    """As earlier versions wrote it."""
    path = workdir / "checkpoints" / "8" / "files.json"
    path.write_text(json.dumps({name: size for name, (size, _) in json.loads(path.read_text()).items()}))
    assert newest_state(changed(whole), workdir)[0] == 8
    damage(workdir, "opt/_METADATA", truncate)
    assert newest_state(changed(whole), workdir)[0] == 4


# Dies while a save is under way.
KILLED = """
import os, signal
from mscm import checkpoint, cli, main

save = checkpoint.Checkpoints.save

def save_and_die(self, state, facts):
    save(self, state, facts)
    if int(state.step) == 8:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.Checkpoints.save = save_and_die
cli.run(main.main, doc="", required=())
"""


def test_a_save_that_was_cut_is_made_again(whole, tmp_path):
    """kill -9 while the save goes on in the background."""
    flags = [f"--config={whole.file}", f"--workdir={tmp_path}"]
    result = subprocess.run([sys.executable, "-c", KILLED, *flags], cwd=ROOT, capture_output=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    training_loop.run(changed(whole), str(tmp_path))
    assert_same_end(changed(whole), tmp_path, whole.workdir)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]


# Signals.


@pytest.fixture
def signals(monkeypatch):
    """The module as in a new process, and the handlers put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(stopping, "_asked", None)
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_in_training_saves_and_the_run_goes_on_bit_for_bit(
    whole, tmp_path, monkeypatch, signals, number, status
):
    """It ends after the dispatch that it met, with a checkpoint of it; again, and it ends as if nothing had been."""
    add = training_loop.Progress.add

    def add_and_signal(self, averages):
        add(self, averages)
        if self._step == 4:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # a second one changes nothing

    experiment = changed(whole)
    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped) as stopped:
        patch.setattr(training_loop.Progress, "add", add_and_signal)
        training_loop.run(experiment, str(tmp_path))
    assert stopped.value.status == status
    sentence = "digits_teacher: stopped after step 6 of 8, which is saved; run the same command again to continue"
    assert str(stopped.value) == sentence
    assert newest_state(experiment, tmp_path)[0] == 6
    assert not (tmp_path / "owner.json").exists()
    monkeypatch.setattr(stopping, "_asked", None)
    training_loop.run(experiment, str(tmp_path))
    assert_same_end(experiment, tmp_path, whole.workdir)


def test_a_signal_outside_of_training_ends_at_once(signals):
    with pytest.raises(stopping.Stopped, match="stopped by a signal; run the same command again"):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_comes_too_late_for_the_loop_is_not_lost(signals):
    with pytest.raises(stopping.Stopped), stopping.deferred():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyError), stopping.deferred():  # an error goes first
        raise KeyError


def test_a_second_interrupt_does_not_wait(signals):
    with pytest.raises(KeyboardInterrupt), stopping.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stopping.reached()
        signal.raise_signal(signal.SIGINT)


# Trains; sends itself a signal after step 4.
SIGNALLED = """
import signal, sys
from mscm import cli, main, training_loop

add = training_loop.Progress.add

def add_and_signal(self, averages):
    add(self, averages)
    if self._step == 4 and SENDS:
        signal.raise_signal(signal.SIGTERM)

training_loop.Progress.add = add_and_signal
cli.run(main.main, doc="", required=())
"""


def test_the_command_ends_with_status_75(whole, tmp_path):
    """And one sentence without a traceback."""
    flags = [f"--config={whole.file}", f"--workdir={tmp_path}"]
    result = subprocess.run(
        [sys.executable, "-c", SIGNALLED.replace("SENDS", "True"), *flags],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 75, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "digits_teacher: stopped after step 6 of 8, which is saved; run the same command again to continue"
    assert "Traceback" not in result.stderr


# Trains in a terminal of its own.
IN_TERMINAL = """
import os, sys
from mscm import cli, main

terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for stream in range(3):
    os.dup2(terminal, stream)
cli.run(main.main, doc="", required=())
"""


def test_the_end_of_the_terminal_saves(whole, tmp_path):
    """With nowhere left to print to, nothing but the status says it."""
    master, slave = os.openpty()
    flags = [f"--config={whole.file}", f"--workdir={tmp_path}", "--config.train.num_steps=100000"]
    flags += ["--config.train.save_every_steps=100000", "--config.train.log_every_steps=2"]
    job = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, os.ttyname(slave), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}, cwd=ROOT, start_new_session=True,
    )
    try:
        said = b""
        while b" images/s" not in said:
            said += os.read(master, 1000)
        os.close(master)
        assert job.wait(timeout=300) == 75
    finally:
        job.kill()
        os.close(slave)
    with reading(tmp_path) as checkpoints:
        assert 2 <= checkpoints.latest() < 100_000


def test_who_is_deaf_to_the_end_of_the_terminal_stays_so(signals):
    """As nohup starts a command."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.listen()
    signal.raise_signal(signal.SIGHUP)


# Trains; sends itself a signal when the save after step 20 has begun, which JAX has then noticed before the next one.
SAVES = """
import signal, time
from mscm import cli, main, training_loop

save = training_loop.Checkpoints.save

def save_and_signal(self, state, facts):
    save(self, state, facts)
    if state.step == 20 and SENDS:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(4)

training_loop.Checkpoints.save = save_and_signal
cli.run(main.main, doc="", required=())
"""


def test_two_processes_stop_at_the_same_step(run_together, whole, tmp_path):
    """One of them gets the signal after a save; both save and end alike, soon, and go on from there."""
    flags = [
        "--distributed=WHERE", f"--config={whole.file}", f"--workdir={tmp_path}", "--config.train.num_steps=40",
        "--config.train.save_every_steps=2", "--config.train.log_every_steps=2",
    ]
    words = [[sys.executable, "-c", SAVES.replace("SENDS", sends), *flags] for sends in ("False", "True")]
    (code, _, errors), (other_code, _, other_errors) = run_together(*words)
    assert (code, other_code) == (75, 75), errors + other_errors
    sentences = {text.splitlines()[-1] for text in (errors, other_errors)}
    (sentence,) = sentences
    with reading(tmp_path) as checkpoints:
        step = checkpoints.latest()
    assert 20 < step <= 26 and f"stopped after step {step} of 40, which is saved" in sentence


# One sends itself signals while it waits for the other, which is busy.
INTERRUPTED = """
import contextlib, os, signal, sys, threading, time
from mscm import cli

where, sender, block, *numbers = sys.argv[1:]
del sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests to ignore it

def send():
    for number in numbers:
        time.sleep(0.5)
        os.kill(os.getpid(), int(number))

def main():
    from mscm import distributed, stopping

    distributed.start(where)
    if block != "none":
        stopping.listen()
    with stopping.deferred() if block == "deferred" else contextlib.nullcontext():
        distributed.barrier()
        if where[-1] == sender:
            threading.Thread(target=send, daemon=True).start()
            distributed.barrier()
        for _ in range(1000):
            time.sleep(0.1)

cli.run(main, doc="", required=())
"""


@pytest.mark.parametrize(
    ("sender", "block", "numbers"),
    [
        (1, "none", [signal.SIGINT]),
        (0, "listening", [signal.SIGINT, signal.SIGINT, signal.SIGTERM]),
        (1, "deferred", [signal.SIGINT, signal.SIGINT]),
    ],
)
def test_an_interrupt_of_one_of_two_processes_ends_both(run_together, sender, block, numbers):
    """At once, also where they wait for each other, in a command that does not listen, and at a second one."""
    words = [sys.executable, "-c", INTERRUPTED, "WHERE", str(sender), block, *(str(int(number)) for number in numbers)]
    said = "stopped by a signal" if block == "listening" else "interrupted"
    for code, _, errors in run_together(words, words):
        assert code == 130, errors
        assert f"error: process {sender} of 2: {said}; run the same command again to continue" in errors
        assert "Traceback" not in errors


# Scores; sends itself a signal with the third batch of images.
SCORES = """
import itertools, signal
from mscm import cli, evaluation, main

to_uint8, batches = evaluation.transforms.to_uint8, itertools.count()

def to_uint8_and_signal(images):
    if next(batches) == 2 and SENDS:
        signal.raise_signal(signal.SIGTERM)
    return to_uint8(images)

evaluation.transforms.to_uint8 = to_uint8_and_signal
cli.run(main.main, doc="", required=())
"""


def test_two_processes_that_score_end_together(run_together, whole, workdir):
    """One of them gets the signal; both end alike, with what makes it be started again, and no score."""
    flags = [
        "--distributed=WHERE", f"--config={whole.file}", f"--workdir={workdir}", "--config.eval.at_end=True",
        "--config.eval.num_images=100000", "--config.eval.network=pixels",
    ]
    words = [[sys.executable, "-c", SCORES.replace("SENDS", sends), *flags] for sends in ("False", "True")]
    for code, _, errors in run_together(*words):
        assert code == 75, errors
        assert errors.splitlines()[-1] == "stopped by a signal; run the same command again to continue"
        assert "Traceback" not in errors
    assert not (workdir / "eval" / "scores.jsonl").exists() and not (workdir / "eval" / "owner.json").exists()


# Divergence.


def poisoned(experiment, *steps, of_gradient=False):
    """The same with a loss, or its gradient alone, that is not a number at some steps (counted from 0)."""
    loss_fn = experiment.method.loss_fn

    def poison(params):  # 0 times infinity in its derivative
        return jnp.sqrt(0.0 * jnp.sum(jax.tree.leaves(params)[0])) + (0.0 if of_gradient else jnp.nan)

    def bad_loss(params, target, frozen, batch, key, step):
        loss, metrics = loss_fn(params, target, frozen, batch, key, step)
        is_bad = jnp.any(step == jnp.asarray(steps))
        return loss + jax.lax.cond(is_bad, poison, lambda params: 0.0, params), metrics

    return dataclasses.replace(experiment, method=dataclasses.replace(experiment.method, loss_fn=bad_loss))


@pytest.mark.parametrize(
    ("of_gradient", "what", "numbers"),
    [(False, "loss", r"loss nan, gradient norm nan"), (True, "gradient norm", r"loss \d\S*, gradient norm nan")],
)
def test_a_divergence_is_noticed_and_found(whole, tmp_path, of_gradient, what, numbers):
    """At the next report, with the window, the quantity and what was saved; replay names the step and its batch."""
    experiment = poisoned(changed(whole), 5, of_gradient=of_gradient)
    sentence = rf"got a {what} of nan in steps 5 to 6, expected a finite number; what was saved is step 4\. .*=6"
    with pytest.raises(FloatingPointError, match=f"digits_teacher: {sentence} finds the step from .*diverged/6.json"):
        training_loop.run(experiment, str(tmp_path))
    record = json.loads((tmp_path / "diverged" / "6.json").read_text())
    assert (record["steps"], record["checkpoint"], record["examples"]) == ([5, 6], 4, [32, 47])
    assert newest_state(experiment, tmp_path)[0] == 4
    before = listing(tmp_path)
    assert re.fullmatch(
        f"digits_teacher: step 6 is the first that is not finite: {numbers}; its batch is the examples 40 to 47 of the "
        "run: epoch 0, from 40 of 1797 on",
        replay(experiment, str(tmp_path), 6),
    )
    said = replay(changed(whole), str(tmp_path), 6)
    assert "of the steps 5 to 6 are finite when they are repeated one by one" in said
    assert listing(tmp_path) == before
    with pytest.raises(ConfigError, match="--replay: got 7, expected a step at which a divergence was noticed: 6"):
        replay(experiment, str(tmp_path), 7)


# Diverges; the main process has to wait for its checksums, and then for its report.
DIVERGED = """
import pathlib, sys, time
from types import SimpleNamespace
from mscm import cli

where, workdir = sys.argv[1:]
del sys.argv[1:]

def main():
    from mscm import distributed, training_loop

    def report(workdir):
        if distributed.is_main():
            time.sleep(6)
            (pathlib.Path(workdir) / "report").touch()

    distributed.start(where)
    training_loop.run_report.update = report
    experiment = SimpleNamespace(name="model", train=SimpleNamespace(batch_size=8))
    checkpoints = SimpleNamespace(wait=lambda: time.sleep(6 * distributed.is_main()), latest=lambda: 4)
    with training_loop.reporting(workdir), training_loop.noting_divergence(experiment, workdir, checkpoints):
        raise training_loop.Diverged("got a loss of nan in steps 5 to 6", 5, 6)

cli.run(main, doc="", required=())
"""


def test_two_processes_that_diverge_write_it_down(run_together, tmp_path):
    """The main one has written the file that the message names, and the report, before the other ends both."""
    for code, _, errors in run_together(*[[sys.executable, "-c", DIVERGED, "WHERE", str(tmp_path)]] * 2):
        assert code == 2, errors
        assert "model: got a loss of nan in steps 5 to 6; what was saved is step 4" in errors
        assert "Traceback" not in errors
    assert json.loads((tmp_path / "diverged" / "6.json").read_text())["checkpoint"] == 4
    assert (tmp_path / "report").exists()


def test_a_divergence_before_the_first_checkpoint_is_found_from_the_beginning(whole, tmp_path):
    experiment = poisoned(changed(whole), 1)
    with pytest.raises(FloatingPointError, match="in steps 1 to 2, .* what was saved is nothing"):
        training_loop.run(experiment, str(tmp_path))
    assert "step 2 is the first that is not finite" in replay(experiment, str(tmp_path), 2)


def test_a_bounded_number_of_bad_steps_is_skipped(whole, tmp_path, monkeypatch):
    """Two in a row, over the border of a dispatch, are; they are counted, and three are too many."""
    scalars = {}
    monkeypatch.setattr(Writer, "write_scalars", lambda self, step, values: scalars.update({step: values}))
    experiment = changed(whole, train__max_bad_steps=2)
    training_loop.run(poisoned(experiment, 3, 4, 6), str(tmp_path / "a"))
    assert [scalars[step]["skipped_steps"] for step in (2, 4, 6, 8)] == [0, 1, 1, 1]
    assert all(np.isfinite(value) for values in scalars.values() for value in values.values())
    assert newest_state(experiment, tmp_path / "a")[0] == 8
    with pytest.raises(FloatingPointError, match="in 3 steps in a row within the steps 5 to 6, expected at most"):
        training_loop.run(poisoned(experiment, 3, 4, 5), str(tmp_path / "b"))
    # Without any it changes nothing; but its program is another one, and code generators round what they fuse.
    training_loop.run(experiment, str(tmp_path / "c"))
    assert_same_end(experiment, tmp_path / "c", whole.workdir, rtol=1e-5, atol=1e-7)


def test_bad_steps_in_a_row_are_counted_over_a_resume(whole, tmp_path):
    """Two before the checkpoint and one after it are three; a good one after it begins anew."""
    for last, is_too_many in ((4, True), (5, False)):
        workdir = tmp_path / str(last)
        training_loop.run(poisoned(changed(whole, train__max_bad_steps=2, train__num_steps=4), 2, 3), str(workdir))
        experiment = poisoned(changed(whole, train__max_bad_steps=2), 2, 3, last)
        said = "in 3 steps in a row within the steps 5 to 6, expected at most"
        with pytest.raises(FloatingPointError, match=said) if is_too_many else nullcontext():
            training_loop.run(experiment, str(workdir))


def test_metrics_go_on_after_a_stop_between_two_reports(whole, tmp_path, monkeypatch, signals):
    """A stop reports what came since the last report, so that none of it is lost: the two parts are the whole."""
    reports = {}
    monkeypatch.setattr(Writer, "write_scalars", lambda self, step, values: reports.update({step: values}))
    changes = {"train__log_every_steps": 4, "train__save_every_steps": 8}
    training_loop.run(changed(whole, **changes), str(tmp_path / "whole"))
    expected, add = dict(reports), training_loop.Progress.add
    reports.clear()

    def add_and_signal(self, averages):
        add(self, averages)
        if self._step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
        patch.setattr(training_loop.Progress, "add", add_and_signal)
        training_loop.run(changed(whole, **changes), str(tmp_path / "stopped"))
    monkeypatch.setattr(stopping, "_asked", None)
    training_loop.run(changed(whole, **changes), str(tmp_path / "stopped"))
    assert sorted(expected) == [4, 8] and sorted(reports) == [4, 6, 8]
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert reports[4][name] == expected[4][name]
        assert np.mean([reports[6][name], reports[8][name]]) == pytest.approx(expected[8][name], rel=1e-6)


def test_events_are_those_of_one_run(whole, workdir, monkeypatch):
    """All that was reported is in the file when a save begins; what was reported after the last save is void."""
    save, seen = training_loop.Checkpoints.save, []

    def look_and_save(self, state, facts):
        seen.append([step for step, name, _ in kill_test.scalars(workdir) if name == "loss"])
        save(self, state, facts)

    with Writer(workdir) as writer:  # of steps that were done and not saved
        writer.write_scalars(10, {"loss": 7.0})
    monkeypatch.setattr(training_loop.Checkpoints, "save", look_and_save)
    training_loop.run(changed(whole, train__num_steps=16), str(workdir))
    assert seen == [[2, 4, 6, 8, 10, 12], [2, 4, 6, 8, 10, 12, 14, 16]]
    assert 7.0 not in [value for _, name, value in kill_test.scalars(workdir) if name == "loss"]


# Before anything happens.


def test_a_dry_run_says_what_would_happen_and_writes_nothing(whole, workdir, tmp_path):
    """A new directory, one that is continued, one that is done, and a teacher that is only read."""
    new = tmp_path / "a" / "b"
    command = [sys.executable, "-m", "mscm.main", f"--config={whole.file}", f"--workdir={new}", "--dry_run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "a").exists()
    first, second, third = result.stdout.splitlines()
    assert first == "digits_teacher: 1797 images, 1 cpu of mesh {'data': 1, 'fsdp': 1, 'tensor': 1}"
    said = re.fullmatch(
        rf"digits_teacher in {new}: 0 of 8 steps are done, which take a time that python -m mscm.plan --topology=host "
        r"measures, 2 checkpoints of (\S+) GB to come, 3 kept",
        second,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(newest_state(changed(whole), workdir)[1]))
    assert said[1] == f"{size / 1e9:.3g}"
    needed, free = re.fullmatch(r"New checkpoints need (\S+) GB of (\S+) GB that are free", third).groups()
    assert needed == f"{2 * size / 1e9:.3g}" and float(free) > 0
    before = listing(workdir)
    assert ": all 8 steps are done\n" in dry_run(changed(whole), str(workdir))
    longer = changed(whole, train__num_steps=20, train__save_every_steps=2, train__keep_checkpoints=1)
    text = dry_run(longer, str(workdir))
    with reading(workdir) as checkpoints:
        rate = checkpoints.facts()["steps_per_second"]
    left = terminal.duration(12 / rate)
    assert f": 8 of 20 steps are done, {left} left at the {rate:.3g} steps/s of before, 6 checkpoints of " in text
    assert " to come, 1 kept\n" in text
    assert f"need {2 * size / 1e9:.3g} GB of" in text  # the old one goes after the new one has come
    student = load_config(student_file(whole, tmp_path))
    student.teacher.workdir = str(workdir)
    text = dry_run(build(student), str(new))
    assert f"\ndigits_teacher in {workdir}: only read, its step 8\ndigits_cd2 in {new}: 0 of 8 steps are done" in text
    assert listing(workdir) == before and not new.exists()


def test_a_dry_run_says_how_long_chips_that_are_known_need_at_least(whole, tmp_path, monkeypatch):
    """The operations of the steps by the peak of all devices together."""
    device = jax.devices()[0]
    known = dataclasses.replace(chips.CHIPS[1], kinds=(device.device_kind,), flops=1e6)
    monkeypatch.setattr(chips, "CHIPS", (known,))
    experiment = changed(whole)
    seconds = 8 * planning.model_flops(experiment)[1] / 1e6
    assert f"0 of 8 steps are done, {terminal.duration(seconds)} left or more: so long the v5e would" in dry_run(
        experiment, str(tmp_path / "x")
    )


def test_a_dry_run_refuses_what_cannot_work(whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--workdir: .*/file/x', expected a directory to write to: .*/file is none"):
        dry_run(changed(whole), str(tmp_path / "file" / "x"))
    with pytest.raises(ConfigError, match="got .*, expected a multiple of"):
        dry_run(changed(whole, train__num_microbatches=3), str(tmp_path / "x"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="--workdir: got 1e-06 GB free in .*, expected .* GB for checkpoints"):
        dry_run(changed(whole), str(tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
