"""Checkpoints: what is saved comes back, and what does not fit is named."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.errors import JaxRuntimeError

from mscm.checkpoint import (
    SNAPSHOTS,
    CheckpointError,
    Checkpoints,
    parameter_shapes,
    reading,
    snapshots,
)
from mscm.training.step import init_state

ROOT = Path(__file__).resolve().parents[1]

FACTS_MORE = {
    "name": "tiny", "student_steps": 2, "schedule": {"name": "cosine", "shift": 0.5}, "data": "9 cats", "nothing": None
}


def _state(step: int, width: int = 3):
    params = {"dense": {"kernel": jnp.arange(2.0 * width).reshape(2, width) + step, "bias": jnp.ones(width)}}
    state = init_state(params, optax.adam(1e-3))
    return state._replace(step=jnp.int32(step), ema=jax.tree.map(lambda p: p / 3, params))


def _facts(state):
    return FACTS_MORE | {"config": {}, "parameters": parameter_shapes(state.params)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Checkpoints of the steps 2, 4 and 6, of which the two newest are kept."""
    path = tmp_path_factory.mktemp("run")
    with Checkpoints(path, keep=2) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(_state(step), _facts(_state(step)))
        checkpoints.save(_state(6), {})  # the newest again: nothing happens
    return path


def test_a_state_comes_back_bit_for_bit(workdir):
    """restore(save(state)) = state with its types, newest or named; those beyond `keep` are gone."""
    abstract = jax.eval_shape(lambda: _state(0))
    with reading(workdir) as checkpoints:
        assert checkpoints.steps() == [4, 6] and checkpoints.latest() == 6
        for step in (4, None):
            expected, got = _state(step or 6), checkpoints.restore(abstract, step)
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            jax.tree.map(np.testing.assert_array_equal, got, expected)
            assert all(a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True))


def test_the_average_and_the_facts_are_read_alone(workdir):
    """A sampler needs `ema` and `facts` only; facts are the same JSON, None included."""
    abstract = jax.eval_shape(lambda: _state(0).ema)
    with reading(workdir) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_ema(abstract), _state(6).ema)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_ema(abstract, 4), _state(4).ema)
        assert checkpoints.facts() == _facts(_state(6))
        assert checkpoints.check(_facts(_state(6))) == 6


@pytest.mark.parametrize(
    "fact",
    [{"student_steps": 4}, {"schedule": {"name": "cosine", "shift": 2.0}}, {"prediction": "x"}, {"data": "9 dogs"}],
)
def test_parameters_that_mean_something_else_are_refused(workdir, fact):
    """The same shapes under another number of steps, schedule or prediction; both values are named."""
    (key, value), facts = *fact.items(), _facts(_state(6)) | fact
    with reading(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=f"6: got a checkpoint of 'tiny' with {key} = .*, expected ") as error:
            checkpoints.check(facts)
    assert str(value) in str(error.value)


def test_a_preconditioned_diffusion_model_is_the_same_on_any_schedule(tmp_path):
    """Not a student, whose segments are times of the schedule, and not one of another prediction."""
    for prediction, student_steps, is_free in (("edm", None, True), ("edm", 2, False), ("v", None, False)):
        facts = _facts(_state(2)) | {"prediction": prediction, "student_steps": student_steps}
        workdir = tmp_path / f"{prediction}{student_steps}"
        with Checkpoints(workdir, keep=1) as checkpoints:
            checkpoints.save(_state(2), facts)
        other = facts | {"schedule": {"name": "karras"}}
        with reading(workdir) as checkpoints:
            if is_free:
                assert checkpoints.check(other) == 2
                continue
            with pytest.raises(CheckpointError, match="with schedule = .*, expected"):
                checkpoints.check(other)


def test_only_who_names_the_data_cares(workdir):
    facts = _facts(_state(6))
    del facts["data"]
    with reading(workdir) as checkpoints:
        assert checkpoints.check(facts) == 6


def test_another_architecture_is_refused_by_the_name_of_the_parameter(workdir):
    """The first parameter whose shape differs, both shapes, and a parameter that is absent."""
    wider = jax.eval_shape(lambda: _state(0, width=5))
    sentence = r"parameter dense/bias has shape \[3\], expected \[5\]"
    with reading(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=sentence):
            checkpoints.restore(wider)
        with pytest.raises(CheckpointError, match=sentence):
            checkpoints.restore_ema(wider.ema)
        with pytest.raises(CheckpointError, match=r"parameter dense/kernel has shape \[2, 3\], expected absent"):
            checkpoints.check(FACTS_MORE | {"parameters": {"dense/bias": [3]}})


def test_further_averages_are_items_of_their_own(tmp_path):
    """Read alone; a state without any has the four items that it had before there were some."""
    few, params = _state(2), _state(2).params
    more = few._replace(step=jnp.int32(4), further={"a": jax.tree.map(jnp.cos, params), "b": params})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for state in (few, more):
            checkpoints.save(state, _facts(state))
    items = [{p.name for p in (tmp_path / "checkpoints" / step).iterdir() if p.is_dir()} for step in "24"]
    assert items[0] == {"params", "ema", "opt", "facts"} and items[1] - items[0] == {"ema_a", "ema_b"}
    with reading(tmp_path) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(jax.eval_shape(lambda: more)), more)
        got = checkpoints.restore_ema(jax.eval_shape(lambda: params), name="a")
        jax.tree.map(np.testing.assert_array_equal, got, more.further["a"])


def test_a_snapshot_is_taken_once_and_never_deleted(tmp_path):
    """Again, it is left as it is; one that was removed is taken again although later ones are there."""
    state = _state(2)
    with snapshots(tmp_path) as taken:
        for step in (2, 4, 6):
            taken.save_snapshot(step, {"a": state.params}, _facts(state))
        taken.wait()
        shutil.rmtree(tmp_path / SNAPSHOTS / "4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / SNAPSHOTS).rglob("*") if path.is_file()}
    with snapshots(tmp_path) as taken:
        for step in (2, 4, 6):
            taken.save_snapshot(step, {"a": state.params}, _facts(state))
    with reading(tmp_path, SNAPSHOTS) as taken:
        assert taken.steps() == [2, 4, 6] and not taken.damaged
        got = taken.restore_ema(jax.eval_shape(lambda: state.params), 4, name="a")
        jax.tree.map(np.testing.assert_array_equal, got, state.params)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_is_not_there_is_said_in_a_sentence(workdir, tmp_path):
    """A step, a checkpoint, and a directory that do not exist."""
    with reading(workdir) as checkpoints, pytest.raises(CheckpointError, match="got step 3, expected one of 4, 6"):
        checkpoints.facts(3)
    with pytest.raises(CheckpointError, match="got no directory checkpoints/ below it"), reading(tmp_path):
        pass
    (tmp_path / "checkpoints").mkdir()
    with reading(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="got no finished checkpoint"):
        checkpoints.facts()


def test_an_older_step_is_not_saved(workdir):
    """Orbax would skip it silently."""
    state = _state(5)
    with Checkpoints(workdir, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="got step 5 to save after step 6, expected a newer step"):
            checkpoints.save(state, _facts(state))
        assert checkpoints.steps() == [4, 6]


def test_a_copy_of_the_average_alone_has_checksums(tmp_path):
    """As a whole checkpoint has: a changed byte is refused."""
    state = _state(6)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save_ema(6, state.ema, _facts(state))
    path = max((tmp_path / "checkpoints" / "6" / "ema").rglob("d/*"), key=lambda file: file.stat().st_size)
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    with reading(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="has other bytes than it was written"):
        checkpoints.restore_ema(jax.eval_shape(lambda: state.ema))


# In a process of its own: Orbax leaves its other reads to the garbage collector, in the middle of some later test.
READER = """
import sys

import jax

from mscm.checkpoint import UnreadableCheckpoint, reading
from tests.test_checkpoint import _state

abstract = jax.eval_shape(lambda: _state(2, width=1000))
for workdir in sys.argv[1:]:
    with reading(workdir) as checkpoints:
        for read, what in ((checkpoints.restore_ema, abstract.ema), (checkpoints.restore, abstract)):
            try:
                read(what)
            except UnreadableCheckpoint as error:
                print(error)
"""


def test_damaged_arrays_without_a_list_of_files_are_a_sentence(tmp_path):
    """Large ones, that are files of their own, absent or empty: Orbax raises a bare Exception."""
    state = _state(2, width=1000)
    for name, damage in (("absent", Path.unlink), ("empty", lambda path: path.write_bytes(b""))):
        with Checkpoints(tmp_path / name, keep=1) as checkpoints:
            checkpoints.save(state, _facts(state))
        step = tmp_path / name / "checkpoints" / "2"
        (step / "files.json").unlink()
        for item in ("ema", "opt"):
            damage(max((step / item / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size))
    command = [sys.executable, "-c", READER, str(tmp_path / "absent"), str(tmp_path / "empty")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"(\w+)/checkpoints/2: got a checkpoint that cannot be read .ValueError: ", result.stdout)
    assert found == ["absent"] * 2 + ["empty"] * 2, result.stdout


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, JaxRuntimeError])
def test_what_ends_the_reading_of_an_array_is_no_damage(workdir, monkeypatch, kind):
    """No memory and a signal stay what they are, though Orbax makes a bare Exception of them."""

    def restore(*_, **__):
        raise Exception("Encountered error while reading array index") from kind()

    with reading(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(kind):
            checkpoints.facts()


def test_a_changed_snapshot_may_be_removed(tmp_path):
    """Training does not move it aside, and no flag names another."""
    state = _state(6)
    with snapshots(tmp_path) as taken:
        taken.save_snapshot(6, {"short": state.ema}, _facts(state))
    path = max((tmp_path / SNAPSHOTS / "6" / "ema_short").rglob("d/*"), key=lambda file: file.stat().st_size)
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    with reading(tmp_path, SNAPSHOTS) as taken, pytest.raises(CheckpointError, match="; bring back .* or remove it: "):
        taken.restore_ema(jax.eval_shape(lambda: state.ema), name="short")
