"""The evaluation job: it waits, ends, keeps the best, and does not mind being killed or losing a checkpoint."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from mscm import cli, evaluation, evaluation_loop, lease, score_rows
from mscm.checkpoint import CheckpointError, Checkpoints, reading
from mscm.config import ConfigError, run_hash
from mscm.evaluation_loop import Evaluation
from mscm.experiment import build
from mscm.metrics import reference_statistics
from mscm.report import grid

ROOT = Path(__file__).resolve().parents[1]

_CONFIG = """
from configs import digits


def get_config():
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 0
    config.train.update(dict(num_steps=30, steps_per_dispatch=10, log_every_steps=10, save_every_steps=10))
    config.eval.update(dict(num_images={num_images}, batch_size=20, teacher_steps=(2, 3), num_kept=40))
    return config
"""


def experiment_of(**eval_settings):
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    config.model.update(dict(head_dim=16, emb_dim=16))
    config.optimizer.warmup_steps = 0
    config.train.update(dict(num_steps=30, steps_per_dispatch=10, log_every_steps=10, save_every_steps=10))
    config.eval.update(dict(num_images=60, batch_size=20, teacher_steps=(2,), num_kept=40) | eval_settings)
    return build(config)


@pytest.fixture(scope="module")
def experiment():
    return experiment_of()


@pytest.fixture(scope="module")
def states(experiment):
    """Three training states, as after 10, 20 and 30 steps."""
    state = experiment.random_state(jax.random.key(0))
    moved = [jax.tree.map(lambda p, i=i: p + 0.01 * i, state.ema) for i in (1, 2, 3)]
    return [state._replace(step=np.int32(10 * i), ema=ema) for i, ema in enumerate(moved, 1)]


@pytest.fixture(scope="module")
def network_and_reference(experiment, tmp_path_factory):
    """Trained and computed once: what the jobs of the tests find in their directories."""
    directory = tmp_path_factory.mktemp("scorer")
    evaluation.Scorer(experiment, str(directory))
    return directory


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Nobody else starts at the same moment."""
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.0)


@pytest.fixture
def workdir(tmp_path, network_and_reference):
    shutil.copytree(network_and_reference, tmp_path / "run" / "eval")
    return tmp_path / "run"


def save(experiment, workdir, *states, keep=9, **said):
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for state in states:
            checkpoints.save(state, experiment.facts() | said)


def rows_of(workdir):
    return cli.read_json_lines(workdir / "eval" / "scores.jsonl")


def test_it_waits_for_checkpoints_and_ends_with_training(experiment, states, workdir, monkeypatch):
    """Checkpoints appear while it sleeps; it ends with the one of the last step, and has scored each once."""
    coming = iter(states)
    monkeypatch.setattr(evaluation_loop.time, "sleep", lambda seconds: save(experiment, workdir, next(coming)))
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=False)
    assert [row["step"] for row in rows_of(workdir)] == [10, 20, 30]
    assert not (workdir / "eval" / "partial.npz").exists()
    assert len({row["fd_classifier"] for row in rows_of(workdir)}) == 3
    names = sorted(path.name for path in (workdir / "eval" / "samples").iterdir())
    assert names == [
        f"digits_teacher_addim_2_60_balanced_{step:08d}.{kind}" for step in (10, 20, 30) for kind in ("npz", "png")
    ]


def test_once_does_not_wait(experiment, states, workdir, monkeypatch):
    save(experiment, workdir, states[0])
    monkeypatch.setattr(evaluation_loop.time, "sleep", None)
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
        assert job.newest() == (10, rows_of(workdir))
    assert [row["step"] for row in rows_of(workdir)] == [10]


def test_each_seed_gives_a_row(states, workdir):
    experiment = experiment_of(seeds=(0, 3))
    save(experiment, workdir, states[2])
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    rows = rows_of(workdir)
    assert [row["seed"] for row in rows] == [0, 3] and rows[0]["fd_classifier"] != rows[1]["fd_classifier"]
    distances = [row["fd_classifier"] for row in rows]
    report = (workdir / "report" / "index.html").read_text()
    assert "fd_classifier by training step" in report and report.count("data:image/png") == 1
    table = score_rows.table(rows).splitlines()
    assert len(table) == 3 and f"{np.mean(distances):.4g} ± {np.std(distances, ddof=1):.2g}" in table[2]


def test_a_row_says_sampler_and_evaluations(states, workdir):
    """The text of the sampler, its NFE, and the steps where they are others; nothing is made twice."""
    experiment = experiment_of(teacher_samplers=("addim", "heun:grid=karras,clip=static"))
    save(experiment, workdir, states[0])
    for _ in range(2):
        with Evaluation(experiment, str(workdir)) as job:
            job.watch(once=True)
    rows = rows_of(workdir)
    assert [(row["sampler"], row["nfe"], row.get("num_steps")) for row in rows] == [
        ("addim", 2, None), ("heun:grid=karras,clip=static", 3, 2)
    ]
    names = {path.stem for path in (workdir / "eval" / "samples").iterdir()}
    samplers = ("addim", "heun-grid-karras-clip-static")
    assert names == {f"digits_teacher_{sampler}_2_60_balanced_00000010" for sampler in samplers}
    assert job.best(rows[0]["run"]) == (10, rows[1]["fd_classifier"])  # by the last sampler, as mscm.sample has it
    assert job.grid(rows).ndim == 3
    table = score_rows.table(rows)
    assert "heun:grid=karras,clip=static" in table and len(table.splitlines()) == 4


def test_labels_are_balanced_or_drawn(experiment):
    balanced, uniform = experiment, experiment_of(labels="uniform", num_images=10_000)
    assert np.bincount(evaluation.conditions_of_images(balanced, 0)(np.arange(60))).tolist() == [6] * 10
    drawn = [evaluation.conditions_of_images(uniform, seed)(np.arange(10_000)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    counts = np.bincount(drawn[0], minlength=10)
    assert counts.sum() == 10_000 and 4 < np.square(counts - 1000).sum() / 1000 < 30  # chi-squared, 9 degrees


class _Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize("place", ["grid", "row", "network", "best", "after"])
def test_killed_anywhere_it_continues_to_the_same_file(experiment, states, workdir, tmp_path, monkeypatch, place):
    """Within a batch, before the pictures, before the row, before the copy of the best, and at the end of a row."""
    whole = tmp_path / "whole"
    shutil.copytree(workdir, whole)
    for directory in (whole, workdir):
        save(experiment, directory, *states)
    with Evaluation(experiment, str(whole)) as job:
        job.watch(once=True)

    def kill_at(call, count):
        def wrapped(*args, **kwargs):
            nonlocal count
            count -= 1
            if count == 0:
                raise _Killed
            return call(*args, **kwargs)

        return wrapped

    where, name, count = {
        "grid": (grid, "save_png", 2),
        "row": (cli, "append_json_line", 2),
        "network": (type(job.scorer.network), "__call__", 5),
        "best": (Checkpoints, "save_ema", 1),
        "after": (cli, "append_json_line", 3),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, kill_at(getattr(where, name), count))
        with pytest.raises(_Killed), Evaluation(experiment, str(workdir), save_every_seconds=0.0) as job:
            job.watch(once=True)
    with Evaluation(experiment, str(workdir), save_every_seconds=0.0) as job:
        job.watch(once=True)
        best_step, _ = job.best(rows_of(workdir)[0]["run"])
    assert (workdir / "eval" / "scores.jsonl").read_bytes() == (whole / "eval" / "scores.jsonl").read_bytes()
    assert [path.name for path in (workdir / "eval" / "best").iterdir()] == [str(best_step)]
    pictures = sorted(path.name for path in (whole / "eval" / "samples").iterdir())
    for picture in pictures:
        ours, theirs = (directory / "eval" / "samples" / picture for directory in (workdir, whole))
        assert ours.suffix == ".npz" or ours.read_bytes() == theirs.read_bytes()


def test_it_continues_inside_an_evaluation(experiment, states, workdir, monkeypatch):
    """The images that were scored before the interruption are not generated again."""
    save(experiment, workdir, states[0])
    started = []
    generate = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *a, start, **k: started.append(start) or generate(
        *a, start=start, **k
    ))
    call = evaluation.FeatureNetwork.__call__
    calls = iter(range(3))

    def stop(network, images):
        if next(calls) == 2:
            raise _Killed
        return call(network, images)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.FeatureNetwork, "__call__", stop)
        with pytest.raises(_Killed), Evaluation(experiment, str(workdir), save_every_seconds=0.0) as job:
            job.watch(once=True)
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    assert started == [0, 40]
    with np.load(workdir / "eval" / "samples" / "digits_teacher_addim_2_60_balanced_00000010.npz") as file:
        assert file["images"].shape == (50, 8, 8, 1)


def test_a_second_job_on_the_directory_is_refused(experiment, states, workdir):
    """Before it makes anything; when the first has ended, and when its start has failed, the next may."""
    save(experiment, workdir, states[0])
    with Evaluation(experiment, str(workdir)), pytest.raises(lease.LeaseError, match="is at work on this evaluation"):
        Evaluation(experiment, str(workdir))
    with pytest.raises(ConfigError):
        Evaluation(experiment_of(reference="absent.npz"), str(workdir))
    with Evaluation(experiment, str(workdir)):
        assert (workdir / "eval" / "owner.json").exists()
    assert not (workdir / "eval" / "owner.json").exists()


@pytest.mark.parametrize("place", ["partial", "row", "best", "real"])
def test_a_job_that_another_has_replaced_writes_nothing(experiment, states, workdir, monkeypatch, place):
    save(experiment, workdir, states[0])

    def check(self):
        if replaced:
            raise lease.LeaseError("another has taken over")

    monkeypatch.setattr(lease.Lease, "check", check)
    replaced = place == "partial"
    seconds = 0.0 if place == "partial" else 60.0
    with pytest.raises(lease.LeaseError), Evaluation(experiment, str(workdir), save_every_seconds=seconds) as job:
        if place in ("best", "real"):
            monkeypatch.setattr(job, "_write", lambda *args: cli.append_json_line(job.scores_file, args[0]))
        replaced = True
        job.real_rows() if place == "real" else job.watch(once=True)
    assert len(rows_of(workdir) if (workdir / "eval" / "scores.jsonl").exists() else []) == (place == "best")
    assert not (workdir / "eval" / "partial.npz").exists() and not (workdir / "eval" / "best").exists()


def test_a_damaged_copy_of_an_evaluation_costs_only_time(experiment, states, workdir):
    save(experiment, workdir, states[0])
    (workdir / "eval" / "partial.npz").write_bytes(b"PK\x03\x04 cut")
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    assert [row["step"] for row in rows_of(workdir)] == [10]


def test_a_checkpoint_that_training_deletes_is_left_out(experiment, states, workdir, monkeypatch):
    """Deleted between the listing and the reading: the others have their scores."""
    save(experiment, workdir, *states)
    read = evaluation.read_ema

    def read_ema(model, directory, step):
        if step == 20:
            shutil.rmtree(workdir / "checkpoints" / "20")
        return read(model, directory, step)

    monkeypatch.setattr(evaluation, "read_ema", read_ema)
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    assert [row["step"] for row in rows_of(workdir)] == [10, 30]


def test_a_checkpoint_that_cannot_be_read_is_an_error(experiment, states, workdir, monkeypatch):
    """At once where it has other bytes than when it was made; where nobody has written these down, it may just go."""
    save(experiment, workdir, states[0])
    step = workdir / "checkpoints" / "10"
    metadata = step / "ema" / "_METADATA"
    metadata.write_bytes(b"?" * metadata.stat().st_size)
    waits = []
    monkeypatch.setattr(evaluation_loop.time, "sleep", waits.append)
    for sentence, seconds in (("ema/_METADATA has other bytes", 0), ("cannot be read .*JSON|Expecting value", 30)):
        with pytest.raises(CheckpointError, match=sentence), Evaluation(experiment, str(workdir)) as job:
            job.watch(once=True)
        assert sum(waits) == seconds
        (step / "files.json").unlink(missing_ok=True)


def test_a_checkpoint_that_is_just_being_deleted_is_left_out(experiment, states, workdir, monkeypatch):
    """Its arrays have gone, its folder has not."""
    save(experiment, workdir, *states)
    folder = workdir / "checkpoints" / "20"
    shutil.rmtree(folder / "ema")
    monkeypatch.setattr(evaluation_loop.time, "sleep", lambda seconds: shutil.rmtree(folder))
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    assert [row["step"] for row in rows_of(workdir)] == [10, 30]


def test_what_is_not_to_be_made_is_only_looked_up(experiment, states, workdir):
    save(experiment, workdir, states[0])
    specs = evaluation.default_samplers(experiment)
    with Evaluation(experiment, str(workdir)) as job:
        assert job.score(experiment, str(workdir), 10, specs, make=False) == job.real_rows(make=False) == []
        made = job.score(experiment, str(workdir), 10, specs), job.real_rows()
        assert made == (job.score(experiment, str(workdir), 10, specs, make=False), job.real_rows(make=False))


def test_real_images_are_of_the_split_of_the_reference(workdir):
    with Evaluation(experiment_of(reference_split="half_a", num_images=1000), str(workdir)) as job:
        (row,) = job.real_rows()
    assert row["num_images"] == 449  # of 899, not of 1797


@pytest.mark.parametrize("place", ["reference", "half_b"])
def test_statistics_of_real_images_go_on_after_a_kill(experiment, tmp_path, network_and_reference, monkeypatch, place):
    """Of the reference, and of the second half: the first is not computed again. The same numbers come out."""
    spec = experiment.eval
    for kept in network_and_reference.iterdir():
        if place != "reference" or kept.name.startswith("classifier"):
            shutil.copy(kept, tmp_path)
    seconds = 0.0 if place == "reference" else 1e9  # a half is kept when it is whole
    partial = functools.partial(evaluation.gathering.Partial, save_every_seconds=seconds)
    monkeypatch.setattr(evaluation.gathering, "Partial", partial)
    call, seen = evaluation.FeatureNetwork.__call__, []

    def counted(network, images):
        if killed_after is not None and len(seen) == killed_after:
            raise _Killed
        seen.append(len(images))
        return call(network, images)

    def run():
        seen.clear()
        scorer = evaluation.Scorer(experiment, str(tmp_path))
        return scorer.reference.statistics.features.mean if place == "reference" else scorer.half_against_half()

    monkeypatch.setattr(evaluation.FeatureNetwork, "__call__", counted)
    killed_after = 3 if place == "reference" else 4  # batches, of which three are a half of 60 images
    with pytest.raises(_Killed):
        run()
    assert list(tmp_path.glob("*.partial.npz" if place == "reference" else "half_?.npz"))
    killed_after = None
    again = run()
    total = 1797 if place == "reference" else 2 * spec.num_images
    assert sum(seen) == total - 3 * spec.batch_size
    assert not list(tmp_path.glob("*.partial.npz")) and not list(tmp_path.glob("half_?.npz"))
    (tmp_path / "reference_classifier_all.npz").unlink()
    np.testing.assert_equal(again, run())


def test_seeds_are_given_once():
    with pytest.raises(ConfigError, match=r"config.eval.seeds: got \(0, 3, 0\), expected each of them once"):
        experiment_of(seeds=(0, 3, 0))


def test_the_best_checkpoint_is_kept(experiment, states, workdir, monkeypatch):
    """A copy of the averaged parameters, whatever training deletes; a better one takes its place."""
    distances = {10: 5.0, 20: 2.0, 30: 3.0}
    with Evaluation(experiment, str(workdir)) as job:
        for state in states:
            step = int(state.step)
            monkeypatch.setattr(
                evaluation.Scorer, "compare", lambda self, gathered, step=step: {"fd_classifier": distances[step]}
            )
            save(experiment, workdir, state, keep=1)
            job.watch(once=True)
        assert job.best(rows_of(workdir)[0]["run"]) == (20, 2.0)
    assert [path.name for path in (workdir / "eval" / "best").iterdir()] == ["20"]
    with reading(workdir) as checkpoints:
        assert checkpoints.steps() == [30]
    kept = evaluation.read_ema(experiment, str(workdir / "eval" / "best" / "20"))
    jax.tree.map(np.testing.assert_array_equal, kept, states[1].ema)


def with_num_steps(experiment, num_steps):
    train = experiment.config["train"] | {"num_steps": num_steps}
    return dataclasses.replace(experiment, config=experiment.config | {"train": train})


def copies(workdir):
    return sorted(path.name for path in (workdir / "eval" / "best").iterdir())


def test_more_steps_do_not_take_the_best_away(experiment, states, workdir, monkeypatch):
    """The training goes on beyond its first end: one run, whose best stays the best; a better one takes its place."""
    run = run_hash(with_num_steps(experiment, 10).config)
    for state, distance, best in zip(states, (2.0, 3.0, 1.0), ("10", "10", "30"), strict=True):
        monkeypatch.setattr(evaluation.Scorer, "compare", lambda *_, distance=distance: {"fd_classifier": distance})
        step = int(state.step)
        save(with_num_steps(experiment, step), workdir, state, keep=1, **({"run": run} if step > 10 else {}))
        with Evaluation(with_num_steps(experiment, step), str(workdir)) as job:
            job.watch(once=True)
            assert job.best(run)[0] == int(best)
        assert copies(workdir) == [best]
    assert [(row["step"], row["run"]) for row in rows_of(workdir)] == [(10, run), (20, run), (30, run)]


def test_the_best_of_another_run_is_not_deleted(experiment, states, workdir):
    """Neither where it is in the way nor where it is not; what was cut is."""
    others = [with_num_steps(experiment, steps) for steps in (10, 20)]
    best = workdir / "eval" / "best"
    for step, other in zip((10, 30), others, strict=True):
        with Checkpoints(best / str(step), keep=1) as checkpoints:
            checkpoints.save_ema(step, states[0].ema, other.facts())
    (best / "20" / "checkpoints").mkdir(parents=True)
    save(experiment, workdir, states[0])
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    aside = f"10-{run_hash(others[0].config)}"
    assert copies(workdir) == ["10", aside, "30"]
    for copy, of in (("10", experiment), (aside, others[0]), ("30", others[1])):
        with reading(best / copy) as checkpoints:
            assert checkpoints.facts()["config"] == of.config


def test_scores_under_other_settings_are_made_anew(experiment, states, workdir):
    """More images, other labels: rows beside the old ones, which stay."""
    save(experiment, workdir, states[0])
    for settings in ({}, {"num_images": 80}, {"labels": "uniform"}, {}):
        with Evaluation(experiment_of(**settings), str(workdir)) as job:
            job.watch(once=True)
    assert [(row["num_images"], row["labels"]) for row in rows_of(workdir)] == [
        (60, "balanced"), (80, "balanced"), (60, "uniform")
    ]
    names = ["60_balanced", "60_uniform", "80_balanced"]
    pictures = sorted((workdir / "eval" / "samples").glob("*.png"))
    assert [path.name for path in pictures] == [f"digits_teacher_addim_2_{name}_00000010.png" for name in names]
    events = b"".join(path.read_bytes() for path in (workdir / "eval").glob("events.*"))
    assert all(f"fd_classifier/digits_teacher_addim_2_{name}".encode() in events for name in names)


def test_another_training_in_the_same_directory_has_scores_of_its_own(experiment, states, workdir):
    """Its checkpoints have the same steps, and the parameters are others."""
    save(experiment, workdir, *states[:2])
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
    shutil.rmtree(workdir / "checkpoints")
    again = dataclasses.replace(experiment, config=experiment.config | {"seed": 1})
    save(again, workdir, states[2]._replace(step=np.int32(10)))
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
        assert job.newest() == (10, rows_of(workdir)[2:])
    first, _, third = rows_of(workdir)
    assert first["step"] == third["step"] == 10 and first["run"] != third["run"]
    assert first["fd_classifier"] != third["fd_classifier"]


def test_a_reference_of_other_images_is_refused_or_marked(experiment, states, workdir, tmp_path):
    save(experiment, workdir, states[0])
    with Evaluation(experiment, str(workdir)) as job:
        job.watch(once=True)
        reference = job.scorer.reference
    other = tmp_path / "other.npz"
    reference_statistics.save(other, reference_statistics.Reference(
        reference.statistics, {**reference.data, "split": "half_a", "resolution": 16}, reference.network
    ))
    changed = experiment_of(reference=str(other))
    both_sides = "split 'half_a' in the reference, 'all' in what is scored; resolution 16 in the reference, 8 in what"
    with pytest.raises(ConfigError, match=both_sides):
        Evaluation(changed, str(workdir))
    with Evaluation(changed, str(workdir), allow_mismatch=True) as job:
        job.watch(once=True)
    first, second = rows_of(workdir)
    assert "mismatch" not in first and len(second["mismatch"]) == 2
    assert first["identity"] != second["identity"] and first["fd_classifier"] == second["fd_classifier"]
    with pytest.raises(ConfigError, match="got no reference .*; make it with python -m mscm.metrics.reference"):
        Evaluation(experiment_of(reference=str(tmp_path / "absent.npz")), str(workdir))


def test_a_model_of_images_that_were_resized_otherwise_is_refused_or_marked(experiment, states, workdir):
    """The checkpoint says how its images were resized; one that does not say it, or the same, has its score."""
    save(experiment, workdir, states[0])
    save(experiment, workdir, states[1], transform=None)
    save(experiment, workdir, states[2], transform="adm")
    for _ in range(2):  # a row with a mark is no reason to let the next one pass
        with Evaluation(experiment, str(workdir)) as job:
            with pytest.raises(ConfigError, match="transform None in the reference, 'adm' in what is scored"):
                job.watch(once=True)
        with Evaluation(experiment, str(workdir), allow_mismatch=True) as job:
            job.watch(once=True)
            assert job.newest()[0] == 30
        assert [(row["step"], "mismatch" in row) for row in rows_of(workdir)] == [(10, False), (20, False), (30, True)]


def test_missing_weights_are_said_before_training(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without = experiment_of(network="inception")
    for refuse in (lambda e: evaluation.check(e, e.data.open()), lambda e: evaluation.Scorer(e, str(tmp_path))):
        with pytest.raises(ConfigError, match="pytorch-fid.*python -m mscm.metrics.convert --network=inception"):
            refuse(without)
    for setting in (dict(precision="bfloat16"), dict(network="pixels", weights="pixels.npz")):
        with pytest.raises(ConfigError, match="the network '(classifier|pixels)' has no file and is float32"):
            evaluation.Scorer(experiment_of(**setting), str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "bfloat16"}, "has no file and is float32, expected no weights or precision"),
        ({"weights": "x.npz"}, "has no file and is float32, expected no weights or precision"),
        ({"reference_split": "b"}, "unknown split of 'digits': got 'b', expected one of all, half_a, half_b"),
        ({"reference": "OTHER"}, "split 'all' in the reference, 'half_b' in what is scored; transform None in the ref"),
        ({"reference": "absent.npz"}, "got no reference absent.npz; make it with"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(network_and_reference, settings, sentence):
    """And how to train without; of no flag that mscm.main has not."""
    if settings.get("reference") == "OTHER":
        path = network_and_reference / "reference_classifier_all.npz"
        settings = {"reference": str(path), "reference_split": "half_b"}
    experiment = experiment_of(**settings)
    source = experiment.data.open()
    object.__setattr__(source, "transform", "area")
    with pytest.raises(ConfigError) as error:
        evaluation.check(experiment, source)
    text = str(error.value)
    assert sentence in text and text.endswith("or --config.eval.at_end=False to train without scores at the end")
    assert "allow_mismatch" not in text


def start_eval(directory, *flags):
    """`python -m mscm.eval`."""
    words = [sys.executable, "-m", "mscm.eval", f"--config={directory / 'config.py'}", f"--workdir={directory / 'run'}"]
    words += flags if any(flag.startswith("--images") for flag in flags) else ["--save_every_seconds=0", *flags]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_eval(directory, *flags):
    """Exit code and output."""
    process = start_eval(directory, *flags)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def progress_of(directory):
    """Changes whenever the job has written how far it is."""
    times = []
    for name in ("partial.npz", "scores.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            times.append((directory / "run" / "eval" / name).stat().st_mtime_ns)
    return times


@pytest.mark.slow  # twelve processes, each of which starts JAX
def test_kill_minus_nine_at_ten_random_moments(states, network_and_reference, tmp_path):
    """The file of scores of a job that was killed ten times is that of one that was not, to the byte.

    Three kills are within the start of the process, seven soon after it has written something.
    """
    for name in ("killed", "whole"):
        directory = tmp_path / name
        shutil.copytree(network_and_reference, directory / "run" / "eval")
        (directory / "config.py").write_text(_CONFIG.format(num_images=1000))
        save(experiment_of(teacher_steps=(2, 3)), directory / "run", *states)
    code, output = run_eval(tmp_path / "whole")
    assert code == 0, output
    rng, continued = random.Random(0), 0
    for i in range(10):
        process = start_eval(tmp_path / "killed")
        before = progress_of(tmp_path / "killed")
        while i % 4 and progress_of(tmp_path / "killed") == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.1 if i % 4 else 4.0))
        os.kill(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output  # it had not ended
        continued += "continuing after" in output
    code, output = run_eval(tmp_path / "killed")
    assert code == 0, output
    scores = [(tmp_path / name / "run" / "eval" / "scores.jsonl").read_bytes() for name in ("killed", "whole")]
    assert scores[0] == scores[1]
    assert len(scores[0].splitlines()) == 7  # three checkpoints with two numbers of steps, and the real images
    assert continued >= 3
    assert not list((tmp_path / "killed" / "run" / "eval").glob("partial.npz"))


def test_images_of_any_origin_get_the_score_of_their_checkpoint(states, network_and_reference, tmp_path):
    """What mscm.sample writes, scored as a file, has the distance of the checkpoint: the same images."""
    directory = tmp_path / "run"
    shutil.copytree(network_and_reference, directory / "eval")
    (tmp_path / "config.py").write_text(_CONFIG.format(num_images=60))
    save(experiment_of(teacher_steps=(2, 3)), directory, states[2])
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={directory}"]
    for output in ("images.npz", "folder"):
        words = [sys.executable, "-m", "mscm.sample", *flags, "--num_images=60", f"--output={tmp_path / output}"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        code, printed = run_eval(tmp_path, f"--images={tmp_path / output}")
        assert code == 0, printed
    code, printed = run_eval(tmp_path, "--checkpoint=30")
    assert code == 0, printed
    (of_checkpoint,) = [row for row in rows_of(directory) if row["nfe"] == 3]
    of_images = [json.loads(line) for line in (directory / "eval" / "images.jsonl").read_text().splitlines()]
    assert len(of_images) == 2
    for row in of_images:
        assert row["fd_classifier"] == pytest.approx(of_checkpoint["fd_classifier"], rel=1e-9)
        assert row["precision"] == of_checkpoint["precision"] and row["num_images"] == 60
    for flag, sentence in (
        ("--checkpoint=7", "got step 7, expected one of 30"),
        (f"--images={tmp_path / 'absent'}", "--images: got"),
        (f"--images={ROOT / 'README.md'}", "neither zip nor tar"),
    ):
        code, printed = run_eval(tmp_path, flag)
        assert code == 2 and sentence in printed and "Traceback" not in printed, printed
