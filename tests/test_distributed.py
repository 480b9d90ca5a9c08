"""Several processes on one machine: one run, one writer, one error."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mscm import distributed
from mscm.checkpoint import reading
from mscm.config import ConfigError, load_config
from mscm.experiment import build

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
from configs import digits


def get_config():
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 2
    config.train.update(dict(num_steps=4, batch_size=8, steps_per_dispatch=2, log_every_steps=2, save_every_steps=2))
    config.eval.update(dict(num_images=30, batch_size=15, teacher_steps=(1, 2)))
    return config
"""


@pytest.fixture
def run_both(run_together):
    """`python -m mscm.COMMAND` in two processes, each with its own flags; their exit codes, outputs and errors."""

    def run(command, *flags_of_each):
        start = [sys.executable, "-m", f"mscm.{command}", "--distributed=WHERE"]
        return run_together(*([*start, *flags] for flags in flags_of_each))

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def test_two_processes_are_one_run(run_both, config, tmp_path):
    """They train a teacher and a student and score both together; process 0 alone writes and prints.

    One process reads what two have written, and two score what one would.
    """
    student = tmp_path / "student.py"
    text = CONFIG.replace("digits.teacher()", "digits.student(student_steps=2, distil=True)")
    changed = f"    config.teacher.config = {config.partition('=')[2]!r}\n    return"
    student.write_text(text.replace("    return", changed))
    workdir = tmp_path / "run"
    flags = [f"--config={student}", f"--workdir={workdir}"]
    (code, output, errors), (other_code, other_output, other_errors) = run_both("main", flags, flags)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "fd_classifier" in output and "fd_classifier" not in other_output
    assert errors.count("step 4/4") == 2 and "step 4/4" not in other_errors
    rows = json.loads((workdir / "report" / "scores.json").read_text())
    models = ["digits_cd2", "digits_teacher", "real, half against half"]
    assert [row["model"] for row in rows] == models and all(model in output for model in models)
    assert [row["nfe"] for row in rows] == [2, 2, 0]
    assert (workdir / "report" / "samples.png").exists()
    for command in (["eval"], ["sample", f"--output={tmp_path / 'grid.png'}"]):
        alone = [sys.executable, "-m", f"mscm.{command[0]}", *flags, *command[1:]]
        result = subprocess.run(alone, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "grid.png").exists()
    scores = workdir / "eval" / "scores.jsonl"
    made = scores_of(scores)
    assert len(made) == len(scores.read_text().splitlines()) == 5  # each once: what two have scored, one has not again
    scores.unlink()
    (code, output, errors), (other_code, other_output, other_errors) = run_both("eval", flags, flags)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "fd_classifier" in output and "fd_classifier" not in other_output
    assert scores_of(scores) == pytest.approx(made, rel=1e-3)


def scores_of(file):
    """By model, step and number of evaluations."""
    rows = map(json.loads, file.read_text().splitlines())
    return {(row["model"], row["step"], row["nfe"]): row["fd_classifier"] for row in rows}


GATHER = """
import sys
import numpy as np
from mscm import distributed

distributed.start(sys.argv[1])
loaded = []

def load(indices):
    loaded.extend(indices.tolist())
    return np.stack([np.full((2, 3), i, np.uint8) for i in indices])

rows = distributed.gathered(load, np.array([9, 4, 7, 1, 5]))
assert rows.shape == (5, 2, 3) and rows.dtype == np.uint8
print(rows[:, 0, 0].tolist(), loaded)
"""


def test_each_process_loads_its_share(run_together):
    """The same rows in both, in order, though five do not divide; none loads all."""
    results = run_together(*[[sys.executable, "-c", GATHER, "WHERE"]] * 2)
    for (code, output, errors), loaded in zip(results, ([9, 4, 7], [1, 5, 9]), strict=True):
        assert code == 0, errors
        assert output.splitlines()[-1] == f"[9, 4, 7, 1, 5] {loaded}"


def test_an_error_of_one_ends_all(run_both, config, tmp_path):
    """With its sentence and its number, in every process."""
    (tmp_path / "file").write_text("")
    results = run_both("main", [config, f"--workdir={tmp_path / 'run'}"], [config, f"--workdir={tmp_path / 'file'}"])
    for code, _, errors in results:
        assert code == 2, errors
        assert "error: process 1 of 2: --workdir: got" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("silent", [None, 1, 3])
def test_a_process_is_silent_when_its_last_sign_is_old(monkeypatch, silent):
    """Not one that says something new just in time, nor one that is done; one of which nothing was heard is."""
    now = [100.0]
    monkeypatch.setattr(distributed, "_now", lambda: now[0])
    watch = distributed.Watch([1, 2, 3])
    for sign in range(20):
        signs = {1: str(sign), 2: "done" if sign else "0", 3: str(sign)}
        if sign > 9 and silent == 1:
            signs[1] = "9"
        if silent == 3:
            del signs[3]
        late = now[0] - 100.0 >= (0.0 if silent == 3 else 9.5 * 59.0) + 60.0
        assert watch.silent(signs) == (silent if late else None)
        now[0] += 59.0


# Dies after step 2 without a word.
KILLED = """
import os, signal
from mscm import cli, distributed, main, training_loop

distributed.SILENT_SECONDS = 5.0
add = training_loop.Progress.add

def add_and_die(self, averages):
    add(self, averages)
    if self._step == 2 and DIES:
        os.kill(os.getpid(), signal.SIGKILL)

training_loop.Progress.add = add_and_die
cli.run(main.main, doc="", required=())
"""


def states(workdir):
    """Every array of the checkpoints of a work directory, in their order."""
    experiment = build(load_config(str(workdir.parent / "config.py")))
    with reading(workdir) as checkpoints:
        found = {step: checkpoints.restore(experiment.placed_state(), step) for step in checkpoints.steps()}
    return {step: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] for step, state in found.items()}


@pytest.mark.slow  # six processes that train
def test_the_death_of_one_ends_the_other_and_the_run_goes_on(run_both, run_together, config, tmp_path):
    """With kill -9. The main process says which one is silent; both started again, they come to the same bits."""
    flags = [config, "--config.eval.at_end=False"]
    there = ["--distributed=WHERE", *flags, f"--workdir={tmp_path / 'a'}"]
    words = [[sys.executable, "-c", KILLED.replace("DIES", dies), *there] for dies in ("False", "True")]
    (code, _, errors), (other_code, _, _) = run_together(*words)
    assert other_code == -signal.SIGKILL
    assert code == 1, errors
    assert "error: process 0 of 2: process 1 was not heard of for 5 s: it was killed, or its machine is gone" in errors
    assert not (tmp_path / "a" / "checkpoints" / "4").exists()
    for name in ("a", "whole"):
        for code, _, errors in run_both("main", *[[*flags, f"--workdir={tmp_path / name}"]] * 2):
            assert code == 0, errors
    assert states(tmp_path / "a") == states(tmp_path / "whole") and len(states(tmp_path / "a")) == 2


@pytest.mark.parametrize("where", ["", "host", "host:1", "host:1,2", "host:1,2,2", "host:1,0,0", "host,2,0", "h:1,a,b"])
def test_a_wrong_address_is_a_sentence(where):
    with pytest.raises(ConfigError, match=f"--distributed: got {where!r}, expected auto, or HOST:PORT,PROCESSES,INDEX"):
        distributed.start(where)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_a_sentence(host):
    """On any address of this machine, because the coordinator listens to all."""
    with socket.create_server((host, 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]},2,0"
        with pytest.raises(ConfigError, match=f"--distributed: got '{where}', whose port .*in use.*: name another"):
            distributed.start(where)


def test_a_platform_that_says_nothing_is_a_sentence(config, tmp_path):
    command = [sys.executable, "-m", "mscm.main", config, f"--workdir={tmp_path}", "--distributed=auto"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "error: --distributed: got 'auto', and the platform does not say who is there" in result.stderr
    assert "Traceback" not in result.stderr
