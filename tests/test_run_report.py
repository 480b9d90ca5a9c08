"""The report of a work directory: what stands in it, in a real browser, and of files that nobody should trust."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from mscm import atomic, run_report, stopping, training_loop
from mscm.config import ConfigError, load_config
from mscm.report import events, grid
from mscm.report.writer import Writer
from mscm.score_rows import samples_path
from tests import browser, commands, tiny_run
from tests.report.test_page import HOSTILE, Tags

ROW = {
    "identity": "i", "run": "r", "model": "digits_cd4", "step": 400, "sampler": "ddim", "nfe": 4, "seed": 0,
    "num_images": 600, "labels": "balanced", "network": "classifier 1de67a", "reference": "digits/all, 1797 images",
}
REAL = ROW | {"model": "real, half against half", "run": None, "sampler": None, "seed": None, "labels": None, "nfe": 0}


def add_events(folder: Path, hardware: str = "8 x TPU v5e", num_reports: int = 40) -> None:
    with Writer(folder, first_step=1) as writer:
        writer.write_texts(0, {events.HARDWARE: hardware})
        for step in range(50, 50 * num_reports + 1, 50):
            scalars = {"loss": 1 / step, "gradient_norm": 0.5, "learning_rate": 1e-3, "teacher_steps": step / 10}
            scalars |= {f"loss_segment/{k}": (k + 1) / step for k in (0, 1, 10, 2)}
            scalars |= {f"loss_logsnr/{name}": 2 / step for name in ("above_6", "-3_to_0", "below_-6", "-6_to_-3")}
            speeds = {"images_per_second": 1e3, "data_wait_fraction": 0.25, "model_flops_utilisation": 0.5}
            writer.write_scalars(step, scalars | speeds)


def make_workdir(workdir: Path) -> str:
    """A work directory as training and scoring leave it, but for checkpoints."""
    workdir.mkdir()
    (workdir / "config.json").write_text(load_config("configs/digits_cd4.py").to_json_best_effort())
    add_events(workdir)
    add_events(workdir / "teacher")
    rows = [ROW | {"step": step, "fd_classifier": 1000 / step, "recall": 0.5} for step in range(100, 1001, 100)]
    rows += [ROW | {"model": "digits_teacher", "sampler": "addim", "nfe": n, "fd_classifier": 30 / n} for n in (1, 8)]
    rows += [rows[9] | {"seed": 1, "fd_classifier": 3.0}, REAL | {"fd_classifier": 0.75}]
    (workdir / "eval" / "samples").mkdir(parents=True)
    (workdir / "eval" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(0)
    for row in rows[:10]:
        images = rng.integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
        np.savez(f"{samples_path(str(workdir / 'eval'), row)}.npz", images=images)
    grid.save_png(workdir / "report" / "samples.png", rng.integers(0, 256, (40, 900, 3)).astype(np.uint8))
    return str(workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("report") / "run")


def charts_of(page: str) -> list[str]:
    return re.findall('role="img" aria-label="([^"]*)"', page)


def test_what_stands_in_the_directory_is_on_the_page(workdir):
    """All curves of student and teacher, the scores against step and NFE, samples, hardware and config."""
    page = Path(run_report.write(workdir)).read_text()
    assert not Tags(page).open and "<title>digits_cd4</title>" in page
    titles = [text.partition(":")[0] for text in charts_of(page)]
    curves = [
        "Loss", "Loss of each segment", "Loss by log-SNR", "Gradient norm", "Teacher steps N", "Learning rate",
        "Images per second", "Waiting for data, % of the time", "Utilisation, % of the chips&#x27; peak",
    ]
    by = ["fd_classifier by training step", "fd_classifier by number of function evaluations"]
    assert titles == [*by, *curves, *curves]
    by_step, by_nfe = charts_of(page)[:2]
    assert "ddim 4 steps 10 at 100 to 2 at 1,000" in by_step  # the mean of two seeds
    assert "digits_cd4, ddim 2 at 4; digits_teacher, addim 30 at 1 to 3.75 at 8" in by_nfe
    assert "25 at 50 to 25 at 2,000" in charts_of(page)[9] and "50 at 50" in charts_of(page)[10]
    for text in ("2,000 of 2,400", "8 x TPU v5e", "1,000 images/s", "objective.huber_epsilon", "Teacher&#x27;s"):
        assert text in page, text


def test_the_teacher_of_a_teacher_is_on_the_page(tmp_path):
    workdir = Path(make_workdir(tmp_path / "run"))
    add_events(workdir / "teacher" / "teacher")
    page = run_report.html_of(str(workdir))
    assert re.findall("<h2>([^<]*raining)</h2>", page) == [
        "Training", "Teacher&#x27;s training", "Teacher&#x27;s teacher&#x27;s training"
    ]


def test_a_line_over_nfe_is_one_sampler_but_for_its_number_of_steps(tmp_path):
    """Weights of guidance are lines of their own; the noise levels of re-noising say how many steps there are."""
    workdir = Path(make_workdir(tmp_path / "run"))
    samplers = {"addim:guidance=0.5": 8, "addim:guidance=3.0": 8, "consistency": 1}
    samplers |= {"consistency:sigmas=2.0,clip=static": 2}
    rows = [ROW | {"sampler": sampler, "nfe": nfe, "fd_classifier": 2.0 + nfe} for sampler, nfe in samplers.items()]
    rows.append(ROW | {"sampler": "consistency:sigmas=2.0", "nfe": 2, "fd_classifier": 3.0})
    (workdir / "eval" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, by_nfe, *_ = charts_of(run_report.html_of(str(workdir)))
    names = ("addim:guidance=0.5", "addim:guidance=3.0", "consistency", "consistency:clip=static")
    assert all(f"digits_cd4, {name} " in by_nfe for name in names) and by_nfe.count("digits_cd4") == len(names)
    assert "consistency 3 at 1 to 3 at 2" in by_nfe


def test_the_command(workdir, capfd):
    """Writes it of any work directory, and says where."""
    Path(run_report.path_of(workdir)).unlink(missing_ok=True)
    assert commands.run("report", f"--workdir={workdir}") == 0
    assert capfd.readouterr().out == f"{workdir}/report/index.html\n"
    assert Tags(Path(run_report.path_of(workdir)).read_text()).names.count("h2") == 7


def test_lines_have_the_order_of_their_numbers(workdir):
    page = run_report.html_of(workdir)
    names = re.findall(r"</g></svg>([^<]*)</li>", page)
    assert names[5:9] == ["0", "1", "2", "10"] and names[9:13] == ["below -6", "-6 to -3", "-3 to 0", "above 6"]


def test_samples_are_of_checkpoints_from_first_to_last(workdir):
    """At most eight, whatever their number; the last has the newest score."""
    steps = re.findall(r"<figcaption>Step ([\d,]+), fd_classifier", run_report.html_of(workdir))
    assert len(steps) == 8 and (steps[0], steps[-1]) == ("100", "1,000")
    sources = [value for name, value in Tags(run_report.html_of(workdir)).values if name == "src"]
    assert len(sources) == 9 and all(source.startswith("data:") for source in sources)


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_it_all(workdir, is_dark):
    """In a real browser: nothing beyond the screen, all pictures, no errors, no requests, and ink on paper."""
    seen = browser.look(Path(run_report.write(workdir)), is_dark=is_dark)
    assert seen.found["width"] == seen.found["needed"] == 390 and not seen.found["beyond"]
    assert seen.found["images"] == 9 and not seen.found["broken"] and not seen.found["without_alt"]
    assert not seen.console and not seen.requests
    ink, back = (np.mean([*map(int, re.findall(r"\d+", seen.found[name]))]) for name in ("ink", "back"))
    assert (ink > back + 150) if is_dark else (back > ink + 150)
    assert "Step 1,000, fd_classifier 1" in seen.found["text"]


def test_the_browser_sees_what_is_wrong(tmp_path):
    """A page that is too wide, lacks a picture, asks for one and has an error."""
    page = tmp_path / "index.html"
    page.write_text(
        '<html><body><div style="width:900px">x</div><img src="http://127.0.0.1:9/x.png"><script>throw 1</script>'
        "</body></html>"
    )
    seen = browser.look(page)
    assert seen.found["needed"] > 390 and seen.found["beyond"] and seen.found["broken"] and seen.found["without_alt"]
    assert seen.requests == ["http://127.0.0.1:9/x.png"] and len(seen.console) == 1


def test_files_of_any_origin(tmp_path):
    """Texts that are programs, numbers that are none, names that lead elsewhere: a page, small and of text."""
    workdir = Path(make_workdir(tmp_path / "run"))
    config = {"name": HOSTILE, HOSTILE: [HOSTILE] * 99, "train": {"num_steps": 10**40}}
    config |= {f"k{i}": i for i in range(999)}
    (workdir / "config.json").write_text(json.dumps(config))
    hostile = HOSTILE.replace("\ud800", "")  # which no event can hold
    add_events(workdir, hardware=hostile, num_reports=3)
    with Writer(workdir) as writer:
        writer.write_scalars(2**62, {"loss": float("nan"), f"loss_segment/{'9' * 999}": float("inf"), hostile: 1.0})
        for i in range(999):
            writer.write_scalars(1, {f"loss_segment/{i}": 1e38})
    rows = [
        ROW | {"model": HOSTILE, "fd_classifier": 1.0, "sampler": HOSTILE},
        ROW | {"model": HOSTILE, "step": "1", "fd_classifier": 1.0},
        ROW | {"model": HOSTILE, "step": 10**30, "fd_classifier": 1.0},
        ROW | {"model": HOSTILE, "nfe": -1, "fd_classifier": 1.0},
        ROW | {"model": HOSTILE, "labels": "../../../../outside", "fd_classifier": 2.0},
        ROW | {"model": HOSTILE, "fd_classifier": float("nan"), HOSTILE: float("inf")},
        REAL | {"model": [HOSTILE], "fd_classifier": 1.0},
        ROW | {"model": HOSTILE, "step": 300, "fd_classifier": HOSTILE},
        ROW | {"model": HOSTILE, "fd_classifier": 3.0},
        REAL | {"fd_classifier": [1.0]},
    ]
    (workdir / "eval" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "report" / "samples.png").write_bytes(b"<svg onload=alert(1)>" + bytes(99))
    (workdir / "phases" / ("9" * 200)).mkdir(parents=True)
    (workdir / "phases" / "x").mkdir()
    page = run_report.html_of(str(workdir))
    tags = Tags(page)
    assert not tags.open and not {"script", "iframe", "object"} & {*tags.names} and "img" not in tags.names
    assert not [name for name, _ in tags.values if name.startswith("on")]
    assert len(page) < 500_000


def test_a_name_that_leads_out_of_the_directory_is_not_followed(tmp_path):
    """Samples are read from the directory's own folder, whatever a line of scores is called."""
    workdir, row = tmp_path / "run", ROW | {"model": str(tmp_path / "other"), "fd_classifier": 1.0}
    (workdir / "eval").mkdir(parents=True)
    (workdir / "eval" / "scores.jsonl").write_text(json.dumps(row) + "\n")
    outside = f"{samples_path(str(workdir / 'eval'), row)}.npz"
    assert os.path.dirname(outside) == str(tmp_path)
    np.savez(outside, images=np.zeros((4, 8, 8, 1), np.uint8))
    page = run_report.html_of(str(workdir))
    assert "fd_classifier by training step" in page and "<img" not in page


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8), np.array([None])],
    ids=["rank", "type", "none", "objects"],
)
def test_samples_that_are_none_are_left_out(workdir, tmp_path, array):
    directory = tmp_path / "run"
    os.makedirs(directory / "eval" / "samples")
    np.savez(f"{samples_path(str(directory / 'eval'), ROW)}.npz", images=array)
    (directory / "eval" / "scores.jsonl").write_text(json.dumps(ROW | {"fd_classifier": 1.0}) + "\n")
    page = run_report.html_of(str(directory))
    assert "<img" not in page and "fd_classifier by training step" in page


@pytest.mark.parametrize(("side", "shown"), [(8, 32), (64, 64), (512, 64)])
def test_large_images_are_made_small(side, shown):
    """So that a page of any model is a small file; small ones are enlarged to squares that one can see."""
    images = np.random.default_rng(0).integers(0, 256, (10, side, side, 3)).astype(np.uint8)
    strip = run_report._strip(images)
    assert strip.shape == (shown, 10 * (shown + 2) - 2, 3)
    if side <= 64:
        np.testing.assert_array_equal(strip[:: shown // side, : shown : shown // side], images[0])


def test_averages_are_told_apart(tmp_path):
    """Rows of several averages of one checkpoint are several lines, not a mean with a spread."""
    make_workdir(tmp_path / "run")
    rows = [ROW | {"step": 1000, "fd_classifier": 4.0, "ema": name} for name in ("0.05", "0.2")]
    with open(tmp_path / "run" / "eval" / "scores.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    page = Path(run_report.write(str(tmp_path / "run"))).read_text()
    for name in ("0.05", "0.2"):
        assert f"<td>ddim, ema {name}</td>" in page and f"digits_cd4, ddim 4 steps, ema {name}" in page


def test_a_directory_that_is_none(tmp_path):
    """And one with nothing but scores has a page."""
    with pytest.raises(ConfigError, match="which has no config.json, events or scores, expected the work directory"):
        run_report.write(str(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.jsonl").write_text(json.dumps(ROW | {"fd_classifier": 1.5}) + "\n")
    assert "<title>digits_cd4</title>" in Path(run_report.write(str(tmp_path))).read_text()


def test_scores_without_a_number_are_none(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.jsonl").write_text(json.dumps(ROW | {"fd_classifier": "1.5"}) + "\n")
    assert "fd_classifier" not in Path(run_report.write(str(tmp_path))).read_text()


def reports_of(workdir: Path) -> list[str]:
    return [path.name for path in (workdir / "report").glob("index.html*")]


def test_a_page_that_cannot_be_written_is_a_warning(workdir, tmp_path, monkeypatch):
    """What was at work goes on: a full disk, a file that is no config, an error of ours."""
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_text", full)
        run_report.update(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(run_report, "html_of", lambda workdir: 1 / 0)
        run_report.update(workdir)
    run_report.update(str(tmp_path))
    assert len(said) == 3 and re.fullmatch("No report: .*/index.html: got no room .*make room: .*", said[0])
    assert "ZeroDivisionError" in said[1] and "no config.json" in said[2]


def test_a_training_ends_with_its_report(tmp_path, monkeypatch):
    """Well, or by a signal after a step, or with a loss that is not finite; a refused one changes nothing."""
    whole = tiny_run.train(tmp_path)
    assert reports_of(whole.workdir) == ["index.html"]
    page = (whole.workdir / "report" / "index.html").read_text()
    assert "8 of 8" in page and " x cpu, " in page and "Parameters" in page
    tiny_run.hurry(monkeypatch)
    add = training_loop.Progress.add

    def end(progress, averages):
        add(progress, averages)
        raise ended

    monkeypatch.setattr(training_loop.Progress, "add", end)
    for i, ended in enumerate((stopping.Stopped("stopped"), FloatingPointError("not finite"), RuntimeError("ours"))):
        workdir = tmp_path / str(i)
        with pytest.raises(type(ended)):
            training_loop.run(whole.experiment, str(workdir))
        assert reports_of(workdir) == (["index.html"] if i < 2 else [])
    config = dataclasses.replace(whole.experiment, config=whole.experiment.config | {"seed": 5})
    (whole.workdir / "report" / "index.html").unlink()
    with pytest.raises(ConfigError):
        training_loop.run(config, str(whole.workdir))
    assert not reports_of(whole.workdir)
