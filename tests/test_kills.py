"""Five kills of a run, from its start to its scores: the short form of benchmarks/kill_test.py."""

import pytest

from benchmarks import kill_test
from mscm.report.writer import Writer

# As in test_phases.py, so that what is compiled there is not compiled again.
SHORT = {
    "train__num_steps": 4,
    "train__log_every_steps": 2,
    "train__save_every_steps": 2,
    "objective__phase_steps": (8, 4, 2),
    "eval__num_images": 20,
    "eval__batch_size": 20,
    "eval__teacher_steps": (1, 3),
    "eval__network": "pixels",
}


@pytest.mark.slow  # seven processes, each of which starts JAX and some train
def test_five_kills_change_nothing(tmp_path):
    """Teacher, two phases and scores, killed on the way: the same checkpoints, scores and metrics as of a whole run."""
    command = kill_test.Command(tmp_path, **SHORT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_test.run(command.words(whole), whole)
    expected = kill_test.ending(command.experiment(), whole)
    assert kill_test.run_and_kill(command.words(killed), killed, seed=0, kills=5)
    got = kill_test.ending(command.experiment(), killed)
    assert got == expected
    names = ["digits_teacher", "digits_tract2_4", "digits_tract2"]
    assert [got[f"checkpoint of {name}"][0] for name in names] == [4, 4, 4]
    assert {step for step, name, _ in got["metrics of digits_tract2"] if name == "loss"} == {2, 4}
    assert len(got["scores"]) == 5


def test_a_run_that_fails_is_no_kill(tmp_path):
    """The exit status is the sentence's, and the log says the rest."""
    command = kill_test.Command(tmp_path, train__batch_size=0)
    with pytest.raises(RuntimeError, match=r"exit status 2, see .*run.log"):
        kill_test.run_and_kill(command.words(tmp_path / "run"), tmp_path / "run", seed=0, kills=1)
    assert "train.batch_size: got 0" in (tmp_path / "run.log").read_text()


TEACHER = "Training digits_teacher in a\ndigits_teacher: 20 parameters\n"
STEPS = "digits_teacher: step 2/4, loss 0.9\n"
DONE = "digits_teacher: step 4/4, loss 0.8\n"
STUDENT = "Training digits_tract2 in b\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", "start-up"),
        ("Mesh\n" + TEACHER, "start-up"),
        ("Training digits_teacher in a\ndigits_teacher: all 4 steps are done\n" + STUDENT, "start-up"),
        (TEACHER + STEPS, "training"),
        (TEACHER + STEPS + DONE, "phase change"),
        (TEACHER + DONE + STUDENT, "phase change"),
        (TEACHER + DONE + STUDENT + STEPS, "training"),
        (TEACHER + DONE + "Scoring 20 images a sampler\n", "evaluation"),
    ],
)
def test_what_a_kill_met_is_read_from_the_log(said, expected):
    assert kill_test.moment(said, saves=False) == expected
    assert kill_test.moment(said, saves=True) == "saving"


def test_the_kills_of_a_run_have_equal_shares():
    """Evaluation last; each soon after the run came there; other seeds have other moments."""
    plan = kill_test.plan(3, 20)
    names = [name for name, _ in plan]
    assert sorted(names) == sorted(4 * list(kill_test.MOMENTS)) and set(names[-4:]) == {"evaluation"}
    assert all(0.0 <= wait <= kill_test.MOMENTS[name] for name, wait in plan)
    assert plan == kill_test.plan(3, 20) != kill_test.plan(4, 20)


def test_events_are_read_as_tensorboard_does(tmp_path):
    """What was written for steps that a later writer begins anew is void; a file may be cut."""
    with Writer(tmp_path / "a", first_step=1) as writer:
        for step in (2, 4, 6):
            writer.write_scalars(step, {"loss": step / 2, "steps_per_second": step})
    (first,) = (tmp_path / "a").iterdir()
    with Writer(tmp_path / "b", first_step=5) as writer:
        writer.write_scalars(6, {"loss": 9.0})
    (second,) = (tmp_path / "b").iterdir()
    (tmp_path / "events.1").write_bytes(first.read_bytes() + first.read_bytes()[:20])
    assert kill_test.scalars(tmp_path) == [(2, "loss", 1.0), (4, "loss", 2.0), (6, "loss", 3.0)]
    (tmp_path / "events.2").write_bytes(second.read_bytes())
    assert kill_test.scalars(tmp_path) == [(2, "loss", 1.0), (4, "loss", 2.0), (6, "loss", 9.0)]
