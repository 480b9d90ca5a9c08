"""Tables and figures of hand-made scores, what is refused, and the toy from training to its trajectories."""

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mscm import comparison, training_loop
from mscm.config import ConfigError, load_config
from mscm.experiment import build
from tests import browser

ROOT = Path(__file__).resolve().parents[1]

_ROW = {
    "step": 1500, "run": "r", "model": "toy_mixture_teacher", "sampler": "ddim", "nfe": 1, "seed": 0, "num_images": 64,
    "labels": "balanced", "network": "pixels identity", "reference": "mixture/train, 16384 images", "num_kept": 64,
    "identity": "abc",
}


def make_run(workdir: Path, variant: str, rows: list[dict], **changes) -> str:
    """A work directory of the toy with a config.json and rows of scores, each over `_ROW`, of a model of its own."""
    config = load_config(f"configs/toy_mixture.py:{variant}")
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (config[section] if section else config)[key] = value
    (workdir / "eval").mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    own = {"model": config.name, "run": str(workdir)}
    lines = [json.dumps(_ROW | own | row) + "\n" for row in rows]
    (workdir / "eval" / "scores.jsonl").write_text("".join(lines))
    return str(workdir)


@pytest.fixture
def four_runs(tmp_path):
    """A teacher, two seeds of a 2-step student, each scored with two seeds of the noise, and a 4-step student."""
    teacher = [{"nfe": nfe, "fd_pixels": score, "run": "t"} for nfe, score in ((1, 40.0), (16, 2.0), (2, 10.0))]
    teacher.append({"sampler": "heun", "nfe": 15, "num_steps": 8, "fd_pixels": 1.0, "run": "t"})
    real = {"model": "real, half against half", "run": None, "sampler": None, "nfe": 0, "seed": None, "labels": None}
    students = {
        ("a", 0): [{"seed": 0, "fd_pixels": 1.0}, {"seed": 1, "fd_pixels": 2.0}],
        ("b", 1): [{"seed": 0, "fd_pixels": 3.0}, {"seed": 1, "fd_pixels": 5.0}],
    }
    scored = "model", "run", "step"
    of_teacher = dict(zip(scored, ("toy_mixture_teacher", "t", 1500), strict=True))
    workdirs = [make_run(tmp_path / "teacher", "teacher", [*teacher, real | {"fd_pixels": 0.5}])]
    for (name, seed), rows in students.items():
        # The teacher's score is also in the directory of its student.
        rows = [*(row | {"nfe": 2} for row in rows), teacher[0] | of_teacher]
        workdirs.append(make_run(tmp_path / name, "cd2", rows, seed=seed))
    older = [{"step": 500, "nfe": 4, "fd_pixels": 9.0}, {"step": 1500, "nfe": 4, "fd_pixels": 0.75}]
    workdirs.append(make_run(tmp_path / "c", "cd4", [*older[::-1]]))
    return workdirs


def test_points_are_means_and_deviations_over_runs_or_seeds(four_runs):
    """Over runs where there are several, each the mean over its seeds; a teacher's row in two directories is one."""
    found = comparison.compare(four_runs)
    got = [
        (p.method, p.sampler, p.nfe, p.num_runs, p.num_seeds, p.scores["fd_pixels"], str(p.spec)) for p in found.points
    ]
    over_runs = float(np.std([1.5, 4.0], ddof=1))
    assert got == [
        ("teacher", "ddim", 1, 1, 1, (40.0, None), "ddim 1 step"),
        ("teacher", "ddim", 2, 1, 1, (10.0, None), "ddim 2 steps"),
        ("teacher", "ddim", 16, 1, 1, (2.0, None), "ddim 16 steps"),
        ("teacher", "heun", 15, 1, 1, (1.0, None), "heun 8 steps"),
        ("cd", "ddim", 2, 2, 2, (2.75, over_runs), "ddim 2 steps"),
        ("cd", "ddim", 4, 1, 1, (0.75, None), "ddim 4 steps"),  # the newest checkpoint, not the last row
    ]
    assert found.real["fd_pixels"] == 0.5 and found.metrics == ["fd_pixels"]
    only = comparison.compare(four_runs[1:2]).points
    assert [(p.method, p.scores["fd_pixels"]) for p in only] == [
        ("teacher", (40.0, None)), ("cd", (1.5, float(np.std([1.0, 2.0], ddof=1)))),
    ]


def test_a_phone_shows_the_page_of_a_comparison(four_runs, tmp_path):
    found = comparison.compare(four_runs)
    comparison.write(found, comparison.draw(found, timed=False), str(tmp_path / "out"), metric="fd_pixels")
    seen = browser.look(tmp_path / "out" / "compare.html")
    assert seen.found["width"] == seen.found["needed"] == 390 and not seen.found["beyond"]
    assert not seen.console and not seen.requests and "fd_pixels of 2 methods" in seen.found["text"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[2.0]], (2.0, None)),
        ([[1.0, 3.0]], (2.0, 2.0**0.5)),
        ([[1.0], [3.0], [5.0]], (3.0, 2.0)),
        ([[1.0, 3.0], [4.0, 6.0]], (3.5, 4.5**0.5)),  # of 2 and 5
        ([[1.0], [np.nan]], (np.nan, np.nan)),  # one that has diverged
    ],
)
def test_mean_and_spread(scores, expected):
    assert comparison.over_runs_or_seeds(scores) == pytest.approx(expected, nan_ok=True)


def test_methods_of_one_name_are_told_apart_by_what_their_configs_say(tmp_path):
    """An ablation is two lines, named by the key; another seed, place or speed is no other method."""
    row = [{"nfe": 4, "fd_pixels": 1.0}]
    runs = [
        make_run(tmp_path / "a", "ct4", row),
        make_run(tmp_path / "b", "ct4", row, objective__huber_epsilon=1.0),
        make_run(tmp_path / "c", "ct4", row, seed=3, teacher__workdir="elsewhere", train__keep_checkpoints=1),
    ]
    points = comparison.compare(runs).points
    assert [(p.method, p.num_runs) for p in points] == [("ct (huber_epsilon=0.0001)", 2), ("ct (huber_epsilon=1.0)", 1)]


@pytest.mark.parametrize(("family", "variant"), [("digits", ""), ("cifar10", "small")])
def test_a_phase_that_several_students_share_is_one_point(tmp_path, family, variant):
    """It is called as they are, and counts once for each seed of the training."""
    runs = []
    for steps in (1, 2):
        for seed in (0, 1):
            config = load_config(f"configs/{family}_tract{steps}.py" + (f":{variant}" if variant else ""))
            name, score = config.name, 3.0 + seed
            rows = [
                {"model": name, "nfe": steps, "fd_pixels": 9.0},
                {"model": f"{name}_16", "nfe": 16, "fd_pixels": score, "run": f"{steps}{seed}"},
            ]
            config.seed = seed
            workdir = tmp_path / f"{steps}{seed}"
            for folder, phases in ((workdir, (256, 16, steps)), (workdir / "phases" / "16", (256, 16))):
                folder.mkdir(parents=True)
                config.objective.phase_steps = phases
                (folder / "config.json").write_text(config.to_json_best_effort())
            (workdir / "eval").mkdir()
            lines = [json.dumps(_ROW | {"run": f"{steps}{seed}"} | row) + "\n" for row in rows]
            (workdir / "eval" / "scores.jsonl").write_text("".join(lines))
            runs.append(str(workdir))
    points = {point.nfe: point for point in comparison.compare(runs).points}
    assert len({point.method for point in points.values()}) == 1
    of_phase = points[16]
    assert (of_phase.num_runs, of_phase.num_seeds) == (2, 1)
    assert of_phase.scores["fd_pixels"] == pytest.approx((3.5, 0.5**0.5))


def test_files_of_a_comparison(four_runs, tmp_path, caplog):
    """Without a checkpoint there are no samples, which is said, and all else is written: the numbers of the points."""
    found = comparison.compare(four_runs)
    drawn = comparison.draw(found, timed=True)
    assert drawn == [None] * 6
    written = comparison.write(found, drawn, str(tmp_path / "out"), metric="fd_pixels")
    files = [f"compare.{kind}" for kind in ("csv", "html", "md", "png", "svg")]
    assert sorted(os.path.basename(path) for path in written) == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(map(os.path.basename, written))
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["nfe"]), float(row["fd_pixels"])) for row in rows] == [
        (p.method, p.nfe, p.scores["fd_pixels"][0]) for p in found.points
    ]
    assert float(rows[4]["fd_pixels_spread"]) == found.points[4].scores["fd_pixels"][1]
    assert rows[0]["fd_pixels_spread"] == rows[0]["seconds_per_image"] == rows[0]["device"] == ""
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| cd                      | ddim    |   2 |    2 |     2 |     64 | 2.75 ± 1.8 |" in text
    assert "real, half against half" in text and "Network pixels identity; reference mixture/train" in text
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "teacher, ddim 40 at 1 to 2 at 16; teacher, heun 1 at 15; cd, ddim 2.75 at 2" in page
    assert ">2.75 ± 1.8</td>" in page and "Network pixels identity; reference mixture/train" in page
    root = ElementTree.parse(tmp_path / "out" / "compare.svg").getroot()
    assert root.tag.endswith("svg")
    again = comparison.write(found, drawn, str(tmp_path / "again"), metric="fd_pixels")
    assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(written, again, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"identity": "x", "network": "pixels other"}, "network 'pixels identity' in .*a, 'pixels other' in .*b;"),
        ({"identity": "x", "reference": "other"}, "reference 'mixture/train, 16384 images' in .*a, 'other' in .*b"),
        ({"num_images": 32}, "num_images 64 in .*a, 32 in .*b"),
        ({"labels": "uniform"}, "labels 'balanced' in .*a, 'uniform' in .*b"),
        ({"identity": "x"}, "identity 'abc' in .*a, 'x' in .*b"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(tmp_path, change, sentence):
    row = {"nfe": 2, "fd_pixels": 1.0}
    runs = [make_run(tmp_path / "a", "cd2", [row]), make_run(tmp_path / "b", "cd4", [row | change])]
    with pytest.raises(ConfigError, match=f"--workdir: got scores that cannot be compared: {sentence}"):
        comparison.compare(runs)


def test_the_newest_settings_that_all_have_are_taken(tmp_path):
    """A directory that was also scored otherwise is compared in what the others have."""
    row = {"nfe": 2, "fd_pixels": 1.0}
    both = [row | {"fd_pixels": 7.0}, row | {"num_images": 32, "fd_pixels": 2.0}]
    runs = [make_run(tmp_path / "a", "cd2", both), make_run(tmp_path / "b", "cd4", [row | {"nfe": 4}])]
    assert [p.scores["fd_pixels"][0] for p in comparison.compare(runs).points] == [7.0, 1.0]
    assert [p.scores["fd_pixels"][0] for p in comparison.compare(runs[:1]).points] == [2.0]


def test_what_is_no_scored_run_is_refused(tmp_path):
    """One sentence each, with the command that makes what is missing; the same training twice is no second seed."""
    with pytest.raises(ConfigError, match="absent, which has no config.json, expected the work directory of a"):
        comparison.compare([str(tmp_path / "absent")])
    unscored = make_run(tmp_path / "a", "cd2", [{"model": "toy_mixture_teacher", "fd_pixels": 1.0}])
    with pytest.raises(ConfigError, match="without scores of 'toy_mixture_cd2', expected some; .* python -m mscm.eval"):
        comparison.compare([unscored])
    twice = [make_run(tmp_path / name, "cd2", [{"nfe": 2, "fd_pixels": 1.0, "run": "same"}]) for name in "bc"]
    with pytest.raises(ConfigError, match="are the same training of 'toy_mixture_cd2' twice, expected another"):
        comparison.compare(twice)
    found = comparison.compare(twice[:1])
    assert comparison.choose_metric(found, None) == "fd_pixels"
    with pytest.raises(ConfigError, match="--metric: got 'fid', expected one of fd_pixels"):
        comparison.choose_metric(found, "fid")


def test_samples_are_from_common_noise(four_runs, monkeypatch, caplog):
    """Every point is drawn with one key and the same indices and labels, timed in batches of config.eval.batch_size."""
    asked = []

    def make(experiment, spec):
        def sample(params, key, indices, labels):
            assert params == experiment.name
            asked.append((jax.random.key_data(key).tolist(), indices.tolist(), labels.tolist()))
            return jnp.full((len(indices), 1, 1, 1), spec.num_steps / 127.5 - 1)

        return sample

    monkeypatch.setattr(comparison.evaluation, "make_sample_fn", make)
    monkeypatch.setattr(comparison.Model, "params", lambda self, step: self.experiment.name)
    found = comparison.compare(four_runs)
    for timed, count in ((False, comparison.SAMPLE_COLUMNS), (True, 4096)):
        asked.clear()
        drawn = comparison.draw(found, timed=timed)
        assert len(asked) == len(found.points) * (6 if timed else 1)
        assert asked[0][1:] == (list(range(count)), [0] * count) and all(call == asked[0] for call in asked)
        assert [(d.images.shape, d.images.min(), d.images.max()) for d in drawn] == [
            ((comparison.SAMPLE_COLUMNS, 1, 1, 1), p.spec.num_steps, p.spec.num_steps) for p in found.points
        ]
        assert all((d.seconds_per_image is not None) == timed for d in drawn)
    monkeypatch.setattr(comparison, "median_seconds", lambda work: 2.0)
    assert {d.seconds_per_image for d in comparison.draw(found, timed=True)} == {2.0 / 4096}

    def gone(experiment):
        raise ConfigError("config.data: got no captions")

    monkeypatch.setattr(comparison.evaluation, "conditions_in_turn", gone)
    caplog.clear()
    assert comparison.draw(found, timed=True) == [None] * len(found.points)
    assert caplog.text.count("No samples of toy_mixture_teacher: config.data: got no captions") == 1


def test_a_teacher_is_what_its_work_directory_says(tmp_path):
    """Its config file may be gone since, or say something else; it is read where the directory is gone."""
    student = make_run(tmp_path / "run", "cd2", [{"nfe": 2, "fd_pixels": 1.0}], teacher__config="gone.py")
    with pytest.raises(ConfigError, match="got config file 'gone.py'"):
        comparison.compare([student])
    make_run(tmp_path / "run" / "teacher", "teacher", [], name="as_it_was")
    (model,) = comparison.read_run(student).ancestors
    assert model.experiment.name == "as_it_was"


def test_times_are_the_median_of_a_few_calls():
    """Of five; of fewer where they are slow."""
    for steps, expected, calls in (([1, 9, 2, 3, 2, 99], 2, 5), ([30, 99], 30, 1), ([5, 16, 99], 10.5, 2)):
        durations, now, count = iter(steps), [0.0], [0]

        def work(durations=durations, now=now, count=count):
            now[0] += next(durations)
            count[0] += 1

        assert comparison.median_seconds(work, clock=lambda now=now: now[0]) == expected
        assert count[0] == calls


_TINY = """
from configs import toy_mixture


def get_config():
    config = toy_mixture.get_config("{variant}")
    config.model.update(dict(width=8, emb_dim=8, num_blocks=1))
    config.optimizer.warmup_steps = 0
    config.train.update(dict(num_steps=4, batch_size=16, steps_per_dispatch=2, log_every_steps=4, save_every_steps=4))
    config.eval.update(dict(num_images=64, batch_size=32, num_kept=64, teacher_steps=(2,)))
    {more}
    return config
"""


def test_the_toy_from_training_to_its_trajectories(tmp_path):
    """Trained for four steps, scored, and compared by the command: all files, the scores of the runs, times."""
    (tmp_path / "teacher.py").write_text(_TINY.format(variant="teacher", more=""))
    more = f"config.teacher.config = {str(tmp_path / 'teacher.py')!r}"
    (tmp_path / "student.py").write_text(_TINY.format(variant="cd2", more=more))
    workdir, output = tmp_path / "run", tmp_path / "out"
    training_loop.run(build(load_config(str(tmp_path / "student.py"))), str(workdir))
    command = [sys.executable, "-m", "mscm.compare", f"--workdir={workdir}", f"--output={output}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    files = [f"compare.{kind}" for kind in ("csv", "html", "md", "png", "svg")]
    files += ["samples.png", "trajectories.png", "trajectories.svg"]
    assert sorted(path.name for path in output.iterdir()) == files
    assert (output / "compare.html").read_text().count('src="data:image/png') == 2
    with open(output / "compare.csv", newline="") as file:
        rows = {(row["method"], row["nfe"]): row for row in csv.DictReader(file)}
    scores = [json.loads(line) for line in (workdir / "eval" / "scores.jsonl").read_text().splitlines()]
    by_model = {(row["model"].rpartition("_")[2][:2], row["nfe"]): row["fd_pixels"] for row in scores}
    assert set(rows) == {("teacher", "2"), ("cd", "2")}
    assert float(rows["cd", "2"]["fd_pixels"]) == by_model["cd", 2]
    assert float(rows["teacher", "2"]["fd_pixels"]) == by_model["te", 2]
    assert all(float(row["seconds_per_image"]) > 0 and row["device"] for row in rows.values())
    assert (output / "compare.md").read_text().splitlines()[0] in result.stdout
    with Image.open(output / "samples.png") as image:
        assert image.size[1] >= 2 * 48
    missing = subprocess.run([*command[:3], "--workdir=absent", command[-1]], env=environment, capture_output=True)
    assert missing.returncode == 2 and missing.stderr.startswith(b"error: --workdir: got absent, which has no config")
