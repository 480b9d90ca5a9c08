"""Figures: what is drawn are the numbers, the files are whole, and equal figures are equal files."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mscm.report import plots

SERIES = [
    plots.Series("teacher", "ddim", [1, 4, 64], [40.0, 4.0, 0.8], [4.0, None, 0.1]),
    plots.Series("teacher", "heun", [2, 8], [30.0, 2.0], [None, None]),
    plots.Series("cd", "ddim", [1, 2, 4], [3.0, 1.5, 1.0], [0.2, 0.1, 0.05]),
]


def test_the_lines_are_the_numbers():
    """Each series at its NFE on a log2 axis, with error bars; a colour for each method, a marker for its samplers."""
    figure = plots.scores_against_nfe(SERIES, metric="fid", level=("real", 0.5))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "fid" and "NFE" in axes.get_xlabel()
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    lines = [container.lines[0] for container in axes.containers]
    for line, series in zip(lines, SERIES, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), series.nfe)
        np.testing.assert_array_equal(line.get_ydata(), series.mean)
    colours = [to_hex(line.get_color()) for line in lines]
    assert colours[0] == colours[1] != colours[2]
    assert lines[0].get_marker() != lines[1].get_marker()
    bars = [container.lines[2] for container in axes.containers]
    assert not bars[1]
    for index in (0, 2):
        ends = np.array([segment[:, 1] for segment in bars[index][0].get_segments()])
        spread = [value or 0.0 for value in SERIES[index].spread]
        np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, spread, atol=1e-12)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["teacher, ddim", "teacher, heun", "cd, ddim", "real"]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["1", "2", "4", "8", "16", "32", "64"]


def test_many_methods_are_told_apart_and_leave_the_points_free():
    """By colour and marker together; the legend stands beside the axes."""
    many = [plots.Series(f"method {i}", "ddim", [1, 2], [3.0, 1.0 + i], [None, None]) for i in range(12)]
    figure = plots.scores_against_nfe(many, metric="fid")
    (axes,), (legend,) = figure.axes, figure.legends
    looks = [(to_hex(line.get_color()), line.get_marker()) for line in (c.lines[0] for c in axes.containers)]
    assert len(set(looks)) == 12 and axes.get_legend() is None
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert len(legend.get_texts()) == 12


@pytest.mark.parametrize(("values", "scale"), [([1.0, 9.0], "linear"), ([1.0, 11.0], "log"), ([-0.1, 11.0], "linear")])
def test_scores_are_on_a_log_axis_where_they_can_and_need_to_be(values, scale):
    series = [plots.Series("cd", "ddim", [1, 2], values, [None, None])]
    assert plots.scores_against_nfe(series, metric="kid").axes[0].get_yscale() == scale


def test_one_point_is_a_figure_too(tmp_path):
    series = [plots.Series("cd", "ddim", [4], [1.5], [None])]
    plots.save(tmp_path / "one", plots.scores_against_nfe(series, metric="fid"))
    assert (tmp_path / "one.png").stat().st_size > 1000


def trajectories():
    rng = np.random.default_rng(0)
    panels = [plots.Panel(f"{steps} steps", rng.normal(size=(steps + 1, 3))) for steps in (1, 4, 64)]
    x = np.linspace(-3.0, 3.0, 31)
    exact = rng.normal(size=(65, 3))
    return plots.trajectories(panels, exact, x=x, density_data=np.exp(-(x**2)), density_noise=np.exp(-(x**2))), panels


def test_the_paths_are_the_states():
    """Each panel has its own states over the exact ones, from t = 1 to t = 0, data at the top."""
    figure, panels = trajectories()
    assert [axes.get_title() for axes in figure.axes] == ["1 steps", "4 steps", "64 steps"]
    for axes, panel in zip(figure.axes, panels, strict=True):
        exact, model = axes.lines[:3], axes.lines[3:6]
        assert all(len(line.get_xdata()) == 65 for line in exact)
        for i, line in enumerate(model):
            np.testing.assert_array_equal(line.get_xdata(), panel.states[:, i])
            np.testing.assert_allclose(line.get_ydata(), np.linspace(1, 0, len(panel.states)))
        bottom, top = axes.get_ylim()
        assert bottom > 1 and top < 0


def test_files_are_whole_and_the_same_each_time(tmp_path):
    """PNG and SVG of two equal figures agree byte for byte, without a date."""
    written = []
    for name in ("a", "b"):
        paths = plots.save(tmp_path / "below" / name, plots.scores_against_nfe(SERIES, metric="fid"))
        paths += plots.save(tmp_path / "below" / f"{name}_paths", trajectories()[0])
        written.append([Path(path).read_bytes() for path in paths])
    assert written[0] == written[1]
    for text in written[0][1::2]:
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert b"<dc:date>" not in text and b"clip-path" in text
    with Image.open(tmp_path / "below" / "a.png") as image:
        assert min(image.size) > 300
    assert sorted(path.suffix for path in (tmp_path / "below").iterdir()) == [".png"] * 4 + [".svg"] * 4


def test_no_display_is_needed_and_no_global_state_is_made(tmp_path):
    """pyplot, which looks for a window system and keeps every figure, is not imported."""
    script = (
        "import sys\nfrom mscm.report import plots\n"
        "figure = plots.scores_against_nfe([plots.Series('a', 'b', [1], [2.0], [None])], metric='fid')\n"
        f"plots.save({str(tmp_path / 'x')!r}, figure)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
