"""The networks in the package, and the picture of what they make."""

import contextlib
import io
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import demo_networks
from mscm import demonstration as demo
from mscm import evaluation
from mscm.metrics import files
from tests import commands, tiny_run


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Rows of digits of the picture, uint8 "rows columns 8 8", and what the command printed."""
    path = tmp_path_factory.mktemp("demo") / "new" / "demo.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert commands.run("demo", f"--output={path}", "--num_images=40") == 0
    picture = np.asarray(Image.open(path))[..., 0]
    cell, padding, rows = 48, 2, 2 * len(demo.STUDENTS) + 1
    assert picture.shape[0] == padding + rows * (cell + padding)
    cells = picture[padding:, -40 * (cell + padding) :]  # the titles are left of them
    cells = cells.reshape(rows, cell + padding, 40, cell + padding)[:, :cell, :, :cell]
    images = cells.reshape(rows, 8, 6, 40, 8, 6)[:, :, 3, :, :, 3].transpose(0, 2, 1, 3)
    return images.astype(float), printed.getvalue(), path


def share_of_right_digits(images):
    """How many of the images have a real one of their class as the nearest of all."""
    real = load_digits()
    distances = np.linalg.norm(images.reshape(-1, 1, 64) / 255 - real.data / 16, axis=2)
    return (real.target[distances.argmin(axis=1)] == np.arange(len(images)) % 10).mean()


def variety(images):
    """How much images of one class differ: the standard deviation of a pixel."""
    return images.reshape(4, 10, 64).std(axis=0).mean()


def test_students_draw_digits_where_the_teacher_draws_means(shown):
    """All show the class of their column; in one step the teacher's are alike. A column starts from one noise."""
    images, _, _ = shown
    teacher, student, largest = images[0:-1:2], images[1:-1:2], images[-1]
    assert min(map(share_of_right_digits, images)) >= 0.9
    assert variety(teacher[0]) < 0.5 * variety(largest)
    assert all(0.8 * variety(largest) < variety(row) < 1.2 * variety(largest) for row in student)
    of_same_noise = np.abs(student[-1] - largest).mean(axis=(1, 2))
    of_others = np.abs(student[-1] - np.roll(largest, 10, axis=0)).mean(axis=(1, 2))
    assert np.median(of_same_noise) < 0.6 * np.median(of_others)


def test_it_says_what_was_measured_and_where_the_picture_is(shown):
    _, said, path = shown
    _, card = files.load(demo.NETWORKS)
    for name, of_name in card["fd_classifier"].items():
        values = of_name.values() if isinstance(of_name, dict) else [of_name]
        assert all(re.search(rf"\b{re.escape(f'{value:.4g}')}\b", said) for value in values), name
    assert said.endswith(f"9 rows of images: {path}\n")


@pytest.mark.parametrize("output", ["demo.jpg", ""])
def test_a_name_that_is_no_picture_is_a_sentence(output, capfd):
    assert "--output: got" in commands.refusal(capfd, "demo", f"--output={output}")


def test_networks_are_put_there_by_a_command(tmp_path, monkeypatch, capsys):
    """Of work directories: the averaged parameters of the newest checkpoint, rounded, with the scores they have."""
    run = tiny_run.train(tmp_path)
    run.workdir.rename(tmp_path / "teacher")
    monkeypatch.setattr(demo, "NETWORKS", str(tmp_path / "demo.npz"))
    monkeypatch.setattr(demo, "STUDENTS", {})
    monkeypatch.setattr(demo, "LARGEST", 2)
    monkeypatch.setattr(demo, "experiment_of", lambda _: run.experiment)
    monkeypatch.setattr(demo_networks, "RUNS", type("Flag", (), {"value": str(tmp_path)}))
    demo_networks.main([])
    arrays, card = files.load(demo.NETWORKS)
    expected = files.flat(evaluation.read_ema(run.experiment, str(tmp_path / "teacher")))
    assert arrays.keys() == {f"{demo.TEACHER}/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[f"{demo.TEACHER}/{name}"], value.astype(np.float16))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {demo.TEACHER}")]
    *_, whole, half = line.strip("|").split("|")
    assert card["fd_classifier"][demo.TEACHER] == {"2": pytest.approx(float(half), rel=1e-3)}
    assert float(half) == pytest.approx(float(whole), rel=1e-2)
