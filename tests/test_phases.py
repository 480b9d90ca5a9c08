"""Phased training: one work directory and one command, killed in any phase and continued, and scored as a whole."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mscm import evaluation, training_loop
from mscm.checkpoint import CheckpointError, reading
from mscm.config import load_config
from mscm.experiment import build

# Teacher and student, made small in the same way.
_TINY = """
from configs import digits


def get_config():
    config = digits.{family}
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(emb_dim=16, head_dim=16))
    config.optimizer.warmup_steps = 2
    config.train.update(
        dict(num_steps=4, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=2)
    )
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(1, 3)))
    return config
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """TRACT from 8 steps to 4 and to 2, which nothing interrupted."""
    root = tmp_path_factory.mktemp("phases")
    for name, family in (("teacher", "teacher()"), ("student", "tract(student_steps=2)")):
        (root / f"{name}.py").write_text(_TINY.format(family=family))
    config = load_config(str(root / "student.py"))
    config.objective.phase_steps = (8, 4, 2)
    config.teacher.config = str(root / "teacher.py")
    experiment = build(config)
    training_loop.run(experiment, str(root / "run"))
    return SimpleNamespace(experiment=experiment, workdir=root / "run")


def _states(experiment, workdir):
    """The last state of each model of the lineage, as numpy."""
    states = []
    for member in experiment.lineage(str(workdir)):
        with reading(member.workdir) as checkpoints:
            states.append(jax.tree.map(np.asarray, checkpoints.restore(member.experiment.placed_state())))
    return states


def test_each_phase_is_a_model_with_its_steps(whole):
    """Directories, what the checkpoints say, and that each phase moved away from the one before it."""
    facts = []
    for folder in ("teacher", "phases/4", "."):
        with reading(whole.workdir / folder) as checkpoints:
            assert checkpoints.latest() == 4
            facts.append(checkpoints.facts())
    assert [fact["student_steps"] for fact in facts] == [None, 4, 2]
    assert [fact["name"] for fact in facts] == ["digits_teacher", "digits_tract2_4", "digits_tract2"]
    assert facts[1]["config"]["objective"]["phase_steps"] == [8, 4]
    teacher, first, last = _states(whole.experiment, whole.workdir)
    for before, after in ((teacher.ema, first.params), (first.ema, last.params), (last.target, last.params)):
        assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    assert teacher.target == {}


def test_without_scores_the_grid_has_the_last_phase_beside_the_diffusion_model(whole, monkeypatch):
    """With a sampler that it was trained for, and its parameters."""
    at_end = dataclasses.replace(whole.experiment.eval, at_end=False)
    drawn = []
    monkeypatch.setattr(evaluation, "sample_grid", lambda models, batch_size: drawn.extend(models))
    monkeypatch.setattr(training_loop, "_write_grid", lambda *args: None)
    training_loop.finish(dataclasses.replace(whole.experiment, eval=at_end), str(whole.workdir))
    names = [(model.name, str(spec)) for model, _, spec in drawn]
    assert names == [("digits_tract2", "ddim:clip=static 2 steps"), ("digits_teacher", "addim 3 steps")]
    for (_, params, _), state in zip(drawn, _states(whole.experiment, whole.workdir)[::-2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, params, state.ema)


def test_scores_are_of_all_phases(whole):
    """The last phase, the teacher with its steps and with the largest number, the phase between, and real images."""
    rows = json.loads((whole.workdir / "report" / "scores.json").read_text())
    assert [(row["model"], row["sampler"], row["nfe"]) for row in rows] == [
        ("digits_tract2", "ddim:clip=static", 2),
        ("digits_teacher", "addim", 2),
        ("digits_teacher", "addim", 3),
        ("digits_tract2_4", "ddim:clip=static", 4),
        ("real, half against half", None, 0),
    ]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("phase", ["digits_tract2_4", "digits_tract2"])
def test_a_phase_that_was_cut_goes_on_bit_for_bit(whole, phase, tmp_path, monkeypatch):
    """Cut after step 2 of a phase and started again: the same parameters, averages, target network, optimiser."""
    workdir, report = tmp_path / "run", training_loop.Progress.report
    shutil.copytree(whole.workdir / "teacher", workdir / "teacher")
    if phase == "digits_tract2":
        shutil.copytree(whole.workdir / "phases", workdir / "phases")

    def stop(self, step):
        report(self, step)
        if step == 4 and self._experiment.name == phase:
            raise _Killed

    monkeypatch.setattr(training_loop, "finish", lambda *_: None)
    monkeypatch.setattr(training_loop.Progress, "report", stop)
    with pytest.raises(_Killed):
        training_loop.run(whole.experiment, str(workdir))
    with pytest.raises(CheckpointError), reading(workdir if phase != "digits_tract2" else workdir / "none"):
        pass  # a later phase has not begun
    monkeypatch.setattr(training_loop.Progress, "report", report)
    training_loop.run(whole.experiment, str(workdir))
    for ours, theirs in zip(_states(whole.experiment, workdir), _states(whole.experiment, whole.workdir), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
