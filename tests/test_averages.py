"""Averages by name: those that a training keeps, and those that are made of its snapshots."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.export
import numpy as np
import pytest

from configs import base, digits
from mscm import averages, cli, comparison, dry_run, planning, score_rows, training_loop
from mscm.checkpoint import SNAPSHOTS, CheckpointError, Checkpoints, reading
from mscm.config import ConfigError, load_config, run_hash
from mscm.experiment import build
from mscm.training.ema import gamma_of
from tests import commands, tiny_run

CONFIG = """
from configs import digits


def get_config():
    config = digits.averaged()
    config.model.middle.update(dict(width=16, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 2
    config.ema.further.same = dict(decay=0.999, warmup=True)
    config.ema.snapshot_every_steps = 2
    config.train.update(
        dict(num_steps=12, batch_size=8, steps_per_dispatch=1, log_every_steps=4, save_every_steps=1)
    )
    config.train.keep_checkpoints = 20
    config.eval.update(dict(num_images=20, batch_size=20, teacher_steps=(2,), network="pixels", at_end=False))
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps, of each of which there is a checkpoint."""
    root = tmp_path_factory.mktemp("averaged")
    (root / "config.py").write_text(CONFIG)
    experiment = build(load_config(str(root / "config.py")))
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.hurry(patch)
        training_loop.run(experiment, str(root / "run"))
    with reading(root / "run") as checkpoints:
        trajectory = [
            jax.tree.map(np.asarray, checkpoints.restore(experiment.abstract_state(), step)) for step in range(1, 13)
        ]
    flags = (f"--config={root / 'config.py'}", f"--workdir={root / 'run'}")
    return SimpleNamespace(experiment=experiment, workdir=root / "run", trajectory=trajectory, flags=flags)


def direct(run, sigma_rel: float, step: int = 12):
    """The average of the parameters after each step, with the weights of `training.ema`, equation (1)."""
    weights = np.diff((np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1))
    params = [state.params for state in run.trajectory[:step]]
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *params)


def distance(a, b) -> float:
    """Root mean square over all parameters."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.sqrt(np.mean((flat[0] - flat[1]) ** 2)))


def test_the_step_keeps_what_the_config_names(run):
    """Power functions of all steps; and one of the first average's decay is that average, bit for bit."""
    for step in (1, 5, 12):
        state = run.trajectory[step - 1]
        jax.tree.map(np.testing.assert_array_equal, state.further["same"], state.ema)
        for name, sigma_rel in (("short", 0.05), ("long", 0.1)):
            assert distance(state.further[name], direct(run, sigma_rel, step)) < 1e-7
    jax.tree.map(np.testing.assert_array_equal, run.trajectory[0].further["long"], run.trajectory[0].params)
    assert distance(state.further["short"], state.further["long"]) > 1e-4


def test_one_that_was_kept_is_read_by_its_name(run):
    state = run.trajectory[-1]
    for name, expected in ((None, state.ema), ("same", state.ema), ("long", state.further["long"])):
        got = averages.read(run.experiment, str(run.workdir), name)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    got = averages.read(run.experiment, str(run.workdir), "short", 5)
    jax.tree.map(np.testing.assert_array_equal, got, run.trajectory[4].further["short"])


def test_snapshots_are_power_averages_alone(run):
    """At their steps, as the checkpoints have them; none is deleted."""
    with reading(run.workdir, SNAPSHOTS) as snapshots:
        assert snapshots.steps() == [2, 4, 6, 8, 10, 12]
        for step in (2, 12):
            got = snapshots.restore_ema(run.experiment.placed_state().ema, step, name="long")
            jax.tree.map(np.testing.assert_array_equal, got, run.trajectory[step - 1].further["long"])
    items = {path.name for path in (run.workdir / SNAPSHOTS / "12").iterdir() if path.is_dir()}
    assert items == {"ema_short", "ema_long", "facts"}


def test_a_sigma_rel_that_was_kept_is_made_of_itself(run):
    """From the snapshots alone, of an even step, and from the checkpoint's own, of an odd one."""
    for step in (11, 12):
        (term,) = averages.reconstruction(run.experiment, str(run.workdir), "0.1", step).terms
        assert term[:3] == ("checkpoints", step, "long") and term.coefficient == pytest.approx(1)
        got = averages.read(run.experiment, str(run.workdir), "0.1", step)
        assert distance(got, run.trajectory[step - 1].further["long"]) < 1e-7


@pytest.mark.parametrize("sigma_rel", ["0.07", "0.08", "0.12"])
def test_any_other_is_near_the_average_of_all_steps(run, sigma_rel):
    """Several times as near as what was kept, with six snapshots: of twelve steps, each is a coarse part."""
    found = averages.reconstruction(run.experiment, str(run.workdir), sigma_rel)
    assert 0.001 < found.error < 0.06
    got, expected = averages.read(run.experiment, str(run.workdir), sigma_rel), direct(run, float(sigma_rel))
    for name in ("short", "long"):
        assert distance(got, expected) < 0.3 * distance(run.trajectory[-1].further[name], expected)


class _Interrupted(Exception):
    pass


def test_an_interrupted_run_has_the_same_snapshots(run, tmp_path, monkeypatch):
    """Stopped at step 10 of 12, with a checkpoint of step 6 and the last snapshot cut: all ends with the same bits."""
    spec = dataclasses.replace(run.experiment.train, save_every_steps=6)
    experiment, report = dataclasses.replace(run.experiment, train=spec), training_loop.Progress.report

    def stop(self, step):
        report(self, step)
        if step == 10:
            raise _Interrupted

    source = experiment.data.open()
    tiny_run.hurry(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(_Interrupted):
        patch.setattr(training_loop.Progress, "report", stop)
        training_loop.train(experiment, str(tmp_path), source, {}, check_ours=lambda: None)
    with reading(tmp_path) as checkpoints:
        assert checkpoints.steps() == [6]
    before = {path.name for path in (tmp_path / SNAPSHOTS).iterdir()}
    assert before == {"2", "4", "6", "8"}
    (tmp_path / SNAPSHOTS / "8").rename(tmp_path / SNAPSHOTS / "8.orbax-checkpoint-tmp")
    training_loop.run(experiment, str(tmp_path))
    for folder in ("checkpoints", SNAPSHOTS):
        with reading(tmp_path, folder) as got, reading(run.workdir, folder) as expected:
            assert got.steps() == ([6, 12] if folder == "checkpoints" else expected.steps())
    with reading(tmp_path) as checkpoints:
        state = checkpoints.restore(experiment.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, state, run.trajectory[-1])
    ours, theirs = (averages.read(experiment, str(where), "0.08") for where in (tmp_path, run.workdir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_checkpoint_waits_for_the_snapshots_before_it(run, tmp_path, monkeypatch):
    """Else a kill could leave a checkpoint whose run never takes a snapshot again that was under way."""
    seen, save = [], Checkpoints.save
    spec = dataclasses.replace(run.experiment.train, num_steps=4, save_every_steps=4)
    experiment = dataclasses.replace(run.experiment, train=spec)
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda *args: (seen.append({p.name for p in (tmp_path / SNAPSHOTS).iterdir()}), save(*args)),
    )
    training_loop.train(experiment, str(tmp_path), experiment.data.open(), {}, check_ours=lambda: None)
    assert seen == [{"2", "4"}]


def test_snapshots_of_another_training_are_refused(run, tmp_path):
    """They would be mixed with its own; of the same training they are welcome, without any checkpoint too."""
    shutil.copytree(run.workdir / SNAPSHOTS, tmp_path / SNAPSHOTS)
    training_loop.check(run.experiment, str(tmp_path))
    config = load_config(run.flags[0].partition("=")[2])
    config.seed = 1
    with pytest.raises(ConfigError, match="another config than its checkpoint of step 12 .*seed: got 1, expected 0"):
        training_loop.check(build(config), str(tmp_path))


def test_how_often_snapshots_are_taken_may_change_and_which_averages_may_not(run):
    config = load_config(run.flags[0].partition("=")[2])
    config.ema.snapshot_every_steps = 4
    training_loop.check(build(config), str(run.workdir))
    config.ema.further.long.sigma_rel = 0.2
    with pytest.raises(ConfigError, match="ema.further.long.sigma_rel: got 0.2, expected 0.1"):
        training_loop.check(build(config), str(run.workdir))
    with pytest.raises(CheckpointError, match="config.ema.further = .*0.1.*, expected .*0.2.*; use the config"):
        averages.read(build(config), str(run.workdir), "long")


def test_a_config_without_further_averages_is_as_before(run):
    """State, and what it is in a plan and on a disk; a config with them has two copies of the parameters more."""
    plain, averaged = digits.teacher(), base.with_power_averages(digits.teacher(), snapshot_every_steps=100)
    assert run_hash(json.loads(plain.to_json_best_effort())) == "b9c71f9c"  # by the code before there were others
    plain, averaged = build(plain), build(averaged)
    assert plain.abstract_state().further == {} and plain.snapshot_every_steps is None
    states = [planning.abstract_inputs(experiment)[0] for experiment in (plain, averaged)]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state)) for state in states]
    assert sizes[1] - sizes[0] == 2 * sum(leaf.size for leaf in jax.tree.leaves(states[0].params))
    shardings = averaged.state_shardings()
    assert shardings.further == {"short": shardings.params, "long": shardings.params}


def test_a_dry_run_counts_the_snapshots(run, tmp_path):
    size = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(run.trajectory[0].params))
    said = dry_run.dry_run(run.experiment, str(tmp_path / "new"))
    assert f", 6 snapshots of averages of {size / 1e9:.3g} GB, all kept" in said


def test_names_are_parsed_once(run):
    assert averages.chosen(run.experiment, ["main", "long", "0.080", "1e-1"]) == (None, "long", "0.08", "0.1")
    for texts, sentence in (
        ([], "got '', expected one or more"),
        (["0.08", "0.080"], "each of them once"),
        (["lnog"], r"got 'lnog' \(did you mean 'long'\?\), expected one of main, .*, or a number"),
        (["0.3"], "got 0.3, expected a sigma_rel from 0.01 to 0.2886"),
        (["nan"], "got nan, expected a sigma_rel"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            averages.chosen(run.experiment, texts)
    with pytest.raises(ConfigError, match="got 0.08 for 'digits_teacher', expected one of main: its"):
        averages.chosen(build(digits.teacher()), ["0.08"])


def test_a_sweep_scores_each_average_once(run, tmp_path, capfd, monkeypatch):
    """Rows of the main average are as before; a number says how far its profile is off."""
    shutil.copytree(run.workdir, tmp_path / "run")
    tiny_run.hurry(monkeypatch)
    flags = (run.flags[0], f"--workdir={tmp_path / 'run'}", "--checkpoint=11")
    assert commands.run("eval", *flags, "--ema=main,short,0.08") == 0
    rows = cli.read_json_lines(tmp_path / "run" / "eval" / "scores.jsonl")
    assert [row.get("ema") for row in rows] == [None, "short", "0.08"] and len({row["fd_pixels"] for row in rows}) == 3
    assert "ema_error" not in rows[1] and re.fullmatch(r"0\.\d+%|\d(\.\d)?%", rows[2]["ema_error"])
    assert "ema" not in score_rows.metrics_of(rows[2]) and "ema_error" not in score_rows.metrics_of(rows[2])
    table = capfd.readouterr().out
    assert "| EMA" in table and "| main" in table and f"0.08 ({rows[2]['ema_error']} off)" in table
    best = [path.name for path in (tmp_path / "run" / "eval" / "best").iterdir()]
    assert best == ["11"]
    samples = {path.name for path in (tmp_path / "run" / "eval" / "samples").glob("*.png")}
    assert len(samples) == 3 and any("_ema_0.08_" in name for name in samples)

    assert commands.run("eval", *flags, "--ema=0.08,0.12") == 0
    again = cli.read_json_lines(tmp_path / "run" / "eval" / "scores.jsonl")
    assert again[:3] == rows and [row.get("ema") for row in again[3:]] == ["0.12"]
    compared = comparison.read_run(str(tmp_path / "run"))
    assert [row.get("ema") for row in compared.rows] == [None]
    # A copy of the best checkpoint has the main average alone.
    with pytest.raises(CheckpointError, match="with the main average alone, .*; use --ema=main"):
        averages.read(run.experiment, str(tmp_path / "run" / "eval" / "best" / "11"), "0.08")


def test_sampling_and_exporting_take_an_average(run, tmp_path, capfd):
    """One that is made, by its number in the one way in which that is printed."""
    assert commands.run("export", *run.flags, f"--output={tmp_path / 'file'}", "--ema=0.100") == 0
    assert json.loads((tmp_path / "file.json").read_text())["ema"] == "0.1"
    exported = jax.export.deserialize(bytearray((tmp_path / "file").read_bytes()))
    indices, images = np.arange(10, dtype=np.int32), {}
    for average in ("main", "0.1", "long"):
        output = tmp_path / f"{average}.npz"
        words = ("--num_images=10", f"--output={output}", f"--ema={average}")
        assert commands.run("sample", *run.flags, *words) == 0
        said = capfd.readouterr().out
        assert (f"2 steps, ema {average}, NFE 2" in said) == (average != "main")
        with np.load(output) as file:
            images[average] = file["images"].astype(int)
    from_main, from_made = (np.abs(images["long"] - images[average]).sum() for average in ("main", "0.1"))
    assert from_main > 50 > 5 >= from_made
    of_file = np.clip(np.round((exported.call(np.uint32(0), indices, indices) + 1) * 127.5), 0, 255)
    assert np.abs(images["long"] - of_file).sum() <= 5
